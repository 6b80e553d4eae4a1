"""The interface of a saved package, read from its specification, and how it differs from a contract.

Legend: T sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence

from coremill.core.contract import Contract, Dim, DType, TensorSpec
from coremill.core.documents import Record
from coremill.core.errors import PackageError
from coremill.coreml.converter import PackageFunction, ct, package_functions, working_lengths
from coremill.coreml.graph import MAIN, SEQ_DIM, describe
from coremill.coreml.package import Spec

_ARRAY = ct.proto.FeatureTypes_pb2.ArrayFeatureType
_DTYPES = {_ARRAY.INT32: DType.INT32, _ARRAY.FLOAT16: DType.FLOAT16, _ARRAY.FLOAT32: DType.FLOAT32}


class PackageInterface(Record):
    """What the saved specification says of one function; a dimension that follows T is called `T`."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...] = ()
    lengths: tuple[int, ...]
    """The last sizes that the inputs admit, ascending: of `main`, the sequence lengths."""
    default: int
    """The length that the input has where a caller does not choose."""


def package_interfaces(spec: Spec) -> tuple[PackageInterface, ...]:
    """The interfaces of every function of the ML Program that `spec` holds, `main` first.

    Raises:
        PackageError: no ML Program, an input of a flexible range, an array of an unknown dtype, inputs without
            dimensions or of differing ranks, or an output that the program does not compute.
    """
    if spec.WhichOneof("Type") != "mlProgram" or MAIN not in spec.mlProgram.functions:
        raise PackageError("the model is no ML Program with a function `main`", expected="an ML Program")
    if not spec.description.functions:
        return (_interface(spec, MAIN, spec.description),)
    described = {function.name: function for function in spec.description.functions}
    if missing := sorted(described.keys() ^ set(spec.mlProgram.functions)):
        raise PackageError(
            f"the description and the program differ in the functions {', '.join(missing)}",
            expected="a description of every function",
        )
    if spec.description.defaultFunctionName != MAIN:
        raise PackageError(
            f"the default function is `{spec.description.defaultFunctionName}`", expected="`main`, the first"
        )
    return tuple(_interface(spec, name, function) for name, function in described.items())


def _interface(spec: Spec, name: str, description: Spec) -> PackageInterface:
    shapes = {feature.name: _enumerated(feature) for feature in description.input}
    for feature, listed in shapes.items():
        if not listed or not all(listed) or len({len(shape) for shape in listed}) > 1:
            raise PackageError(
                f"input `{feature}` is of shapes {[list(shape) for shape in listed]}", expected="shapes of one rank"
            )
    lengths = {shape[-1] for listed in shapes.values() for shape in listed}
    inputs = tuple(
        TensorSpec(name=feature.name, dtype=_dtype(feature), shape=_symbolic(shapes[feature.name]))
        for feature in description.input
    )
    computed = _computed_shapes(spec, name)
    if missing := [feature.name for feature in description.output if feature.name not in computed]:
        raise PackageError(
            f"the program does not compute {', '.join(f'`{feature}`' for feature in missing)}",
            expected="every output that the description lists",
        )
    outputs = tuple(
        TensorSpec(name=feature.name, dtype=_dtype(feature), shape=computed[feature.name])
        for feature in description.output
    )
    states = tuple(
        TensorSpec(
            name=feature.name,
            dtype=_array_dtype(feature.name, feature.type.stateType.arrayType),
            shape=tuple(feature.type.stateType.arrayType.shape),
        )
        for feature in description.state
    )
    default = {tuple(feature.type.multiArrayType.shape)[-1] for feature in description.input}
    return PackageInterface(
        name=name,
        inputs=inputs,
        outputs=outputs,
        states=states,
        lengths=tuple(sorted(lengths)),
        default=min(default, default=0),
    )


def differences(contract: Contract, found: Sequence[PackageInterface]) -> tuple[str, ...]:
    """Each point in which the package is not what the contract says, in words; empty if it is."""
    expected = {function.name: function for function in package_functions(contract)}
    interfaces = {interface.name: interface for interface in found}
    said = []
    if list(expected) != list(interfaces):
        said.append(
            f"functions: the contract says {', '.join(expected)}; the package has {', '.join(interfaces) or 'none'}"
        )
    if MAIN in interfaces:
        said += _main_differences(contract, interfaces[MAIN])
    for name, function in expected.items():
        if name != MAIN and name in interfaces:
            said += _function_differences(function, interfaces[name])
    return tuple(said)


def _main_differences(contract: Contract, found: PackageInterface) -> list[str]:
    said = _tensor_differences("", (contract.inputs, contract.outputs, ()), found)
    promised_lengths = tuple(sorted(working_lengths(contract)))
    if promised_lengths != found.lengths:
        said.append(
            f"lengths: the contract says {list(promised_lengths)}; the package admits {list(found.lengths)}"
        )
    if found.default != contract.shapes.primary:
        said.append(f"default length: the contract says {contract.shapes.primary}; the package has {found.default}")
    return said


def _function_differences(expected: PackageFunction, found: PackageInterface) -> list[str]:
    """Of a function whose shapes are all fixed."""
    sizes = {} if expected.default is None else {SEQ_DIM: expected.default}
    inputs = tuple(TensorSpec(name=spec.name, dtype=spec.dtype, shape=spec.at(**sizes)) for spec in expected.inputs)
    return _tensor_differences(f"{expected.name}: ", (inputs, expected.outputs, expected.states), found)


def _tensor_differences(
    where: str, promised: tuple[tuple[TensorSpec, ...], ...], found: PackageInterface
) -> list[str]:
    kinds = zip(("inputs", "outputs", "states"), promised, (found.inputs, found.outputs, found.states), strict=True)
    return [
        f"{where}{kind}: the contract says {describe(said) or 'none'}; the package has {describe(seen) or 'none'}"
        for kind, said, seen in kinds
        if said != seen
    ]


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


def _computed_shapes(spec: Spec, name: str) -> dict[str, tuple[Dim, ...]]:
    """The shape that the program computes for each value of a function; the description may leave it out."""
    function = spec.mlProgram.functions[name]
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
    if feature.type.WhichOneof("Type") != "multiArrayType":
        raise PackageError(
            f"`{feature.name}` is not an array of a known dtype", expected=", ".join(dtype.value for dtype in DType)
        )
    return _array_dtype(feature.name, feature.type.multiArrayType)


def _array_dtype(name: str, array: Spec) -> DType:
    if array.dataType not in _DTYPES:
        raise PackageError(
            f"`{name}` is not an array of a known dtype", expected=", ".join(dtype.value for dtype in DType)
        )
    return _DTYPES[array.dataType]
