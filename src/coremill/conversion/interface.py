"""The interface of a saved package, read from its specification, and how it differs from a contract.

Legend: T sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence

from coremill.conversion.converter import ct, working_lengths
from coremill.conversion.graph import SEQ_DIM, describe
from coremill.conversion.package import Spec
from coremill.core.contract import Contract, Dim, DType, TensorSpec
from coremill.core.documents import Record
from coremill.core.errors import PackageError

_ARRAY = ct.proto.FeatureTypes_pb2.ArrayFeatureType
_DTYPES = {_ARRAY.INT32: DType.INT32, _ARRAY.FLOAT16: DType.FLOAT16, _ARRAY.FLOAT32: DType.FLOAT32}
_MAIN = "main"


class PackageInterface(Record):
    """What the saved specification says; a dimension that follows T is called `T`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    lengths: tuple[int, ...]
    """The sequence lengths that the input admits, ascending."""
    default: int
    """The length that the input has where a caller does not choose."""


def package_interface(spec: Spec) -> PackageInterface:
    """The interface of the ML Program that `spec` holds.

    Raises:
        PackageError: no ML Program, an input of a flexible range, an array of an unknown dtype, inputs without
            dimensions or of differing ranks, or an output that the program does not compute.
    """
    if spec.WhichOneof("Type") != "mlProgram" or _MAIN not in spec.mlProgram.functions:
        raise PackageError("the model is no ML Program with a function `main`", expected="an ML Program")
    description = spec.description
    shapes = {feature.name: _enumerated(feature) for feature in description.input}
    for name, listed in shapes.items():
        if not listed or not all(listed) or len({len(shape) for shape in listed}) > 1:
            raise PackageError(
                f"input `{name}` is of shapes {[list(shape) for shape in listed]}", expected="shapes of one rank"
            )
    lengths = {shape[-1] for listed in shapes.values() for shape in listed}
    inputs = tuple(
        TensorSpec(name=feature.name, dtype=_dtype(feature), shape=_symbolic(shapes[feature.name]))
        for feature in description.input
    )
    computed = _computed_shapes(spec)
    if missing := [feature.name for feature in description.output if feature.name not in computed]:
        raise PackageError(
            f"the program does not compute {', '.join(f'`{name}`' for name in missing)}",
            expected="every output that the description lists",
        )
    outputs = tuple(
        TensorSpec(name=feature.name, dtype=_dtype(feature), shape=computed[feature.name])
        for feature in description.output
    )
    default = {tuple(feature.type.multiArrayType.shape)[-1] for feature in description.input}
    return PackageInterface(
        inputs=inputs, outputs=outputs, lengths=tuple(sorted(lengths)), default=min(default, default=0)
    )


def differences(contract: Contract, found: PackageInterface) -> tuple[str, ...]:
    """Each point in which the package is not what the contract says, in words; empty if it is."""
    said = []
    for kind, promised, seen in (
        ("inputs", contract.inputs, found.inputs),
        ("outputs", contract.outputs, found.outputs),
    ):
        if promised != seen:
            said.append(f"{kind}: the contract says {describe(promised)}; the package has {describe(seen)}")
    promised_lengths = tuple(sorted(working_lengths(contract)))
    if promised_lengths != found.lengths:
        said.append(
            f"lengths: the contract says {list(promised_lengths)}; the package admits {list(found.lengths)}"
        )
    if found.default != contract.shapes.primary:
        said.append(f"default length: the contract says {contract.shapes.primary}; the package has {found.default}")
    return tuple(said)


def _enumerated(feature: Spec) -> tuple[tuple[int, ...], ...]:
    """The shapes that an input admits."""
    array = feature.type.multiArrayType
    flexibility = array.WhichOneof("ShapeFlexibility")
    if flexibility == "shapeRange":
        raise PackageError(
            f"input `{feature.name}` admits a range of shapes", expected="enumerated shapes, or a fixed one"
        )
    if flexibility == "enumeratedShapes":
        return tuple(sorted({tuple(shape.shape) for shape in array.enumeratedShapes.shapes}))
    return (tuple(array.shape),)


def _symbolic(shapes: Sequence[tuple[int, ...]]) -> tuple[Dim, ...]:
    """One shape for all of `shapes`: the sizes that they share, and `T` where they differ."""
    return tuple(sizes[0] if len(set(sizes)) == 1 else SEQ_DIM for sizes in zip(*shapes, strict=True))


def _computed_shapes(spec: Spec) -> dict[str, tuple[Dim, ...]]:
    """The shape that the program computes for each value of `main`; the description leaves it out for outputs."""
    function = spec.mlProgram.functions[_MAIN]
    block = function.block_specializations[function.opset]
    return {
        value.name: tuple(
            int(dim.constant.size) if dim.WhichOneof("dimension") == "constant" else SEQ_DIM
            for dim in value.type.tensorType.dimensions
        )
        for operation in block.operations
        for value in operation.outputs
    }


def _dtype(feature: Spec) -> DType:
    found = feature.type.multiArrayType.dataType
    if feature.type.WhichOneof("Type") != "multiArrayType" or found not in _DTYPES:
        raise PackageError(
            f"`{feature.name}` is not an array of a known dtype", expected=", ".join(dtype.value for dtype in DType)
        )
    return _DTYPES[found]
