"""The interface of a saved package, read from its specification, and its differences from a contract.

Legend: T sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from coremill.core.contract import MAIN, Dim, DType, PackageFunction, TensorSpec
from coremill.core.documents import Record
from coremill.core.errors import PackageError
from coremill.coreml.converter import Spec
from coremill.coreml.graph import SEQ_DIM, describe
from coremill.mil.description import ARRAY_DTYPES


class PackageInterface(Record):
    """One function of a saved specification; a dimension that varies with the sequence length is named `T`."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...] = ()
    lengths: tuple[int, ...]
    """The last sizes that the inputs accept, ascending; for `main`, the sequence lengths."""
    default: int
    """The sequence length if the caller does not choose one."""


def package_interfaces(spec: Spec) -> tuple[PackageInterface, ...]:
    """Return the interface of each function of the ML Program in `spec`, `main` first.

    Raises:
        PackageError: it is not an ML Program, an input has a flexible range or no dimensions or shapes of different
            ranks, an array has an unknown dtype, or the program does not compute an output.
    """
    if spec.WhichOneof("Type") != "mlProgram" or MAIN not in spec.mlProgram.functions:
        raise PackageError("the model is not an ML Program with a function `main`", expected="an ML Program")
    if not spec.description.functions:
        return (_interface(spec, MAIN, spec.description),)
    described = {function.name: function for function in spec.description.functions}
    if missing := sorted(described.keys() ^ set(spec.mlProgram.functions)):
        raise PackageError(
            f"the description and the program differ in the functions {', '.join(missing)}",
            expected="a description of every function",
        )
    if spec.description.defaultFunctionName != MAIN:
        raise PackageError(f"the default function is `{spec.description.defaultFunctionName}`", expected="`main`")
    return tuple(_interface(spec, name, function) for name, function in described.items())


def _interface(spec: Spec, name: str, description: Spec) -> PackageInterface:
    shapes = {feature.name: _enumerated(feature) for feature in description.input}
    for feature, listed in shapes.items():
        if not listed or not all(listed) or len({len(shape) for shape in listed}) > 1:
            raise PackageError(
                f"input `{feature}` has the shapes {[list(shape) for shape in listed]}",
                expected="shapes of the same rank",
            )
    lengths = {shape[-1] for listed in shapes.values() for shape in listed}
    inputs = tuple(
        TensorSpec(
            name=feature.name,
            dtype=_dtype(feature.name, feature.type.multiArrayType),
            shape=_symbolic(shapes[feature.name]),
        )
        for feature in description.input
    )
    computed = _computed_shapes(spec, name)
    if missing := [feature.name for feature in description.output if feature.name not in computed]:
        raise PackageError(
            f"the program does not compute {', '.join(f'`{feature}`' for feature in missing)}",
            expected="every output that the description lists",
        )
    outputs = tuple(
        TensorSpec(
            name=feature.name, dtype=_dtype(feature.name, feature.type.multiArrayType), shape=computed[feature.name]
        )
        for feature in description.output
    )
    states = tuple(
        TensorSpec(
            name=feature.name,
            dtype=_dtype(feature.name, feature.type.stateType.arrayType),
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


def differences(promised: Sequence[PackageFunction], found: Sequence[PackageInterface]) -> tuple[str, ...]:
    """Describe each difference of a package from the functions of its contract; () if there is none."""
    expected = {function.name: function for function in promised}
    interfaces = {interface.name: interface for interface in found}
    described = []
    if list(expected) != list(interfaces):
        described.append(_difference("functions", ", ".join(expected), ", ".join(interfaces)))
    for name, function in expected.items():
        if name in interfaces:
            described += _function_differences(function, interfaces[name])
    return tuple(described)


def _function_differences(expected: PackageFunction, found: PackageInterface) -> Iterator[str]:
    inputs, where = expected.inputs, "" if expected.name == MAIN else f"{expected.name}: "
    if len(expected.lengths) < 2:  # all shapes are fixed
        sizes = {} if expected.default is None else {SEQ_DIM: expected.default}
        inputs = tuple(TensorSpec(name=spec.name, dtype=spec.dtype, shape=spec.at(**sizes)) for spec in inputs)
    for kind, promised, seen in (
        ("inputs", inputs, found.inputs),
        ("outputs", expected.outputs, found.outputs),
        ("states", expected.states, found.states),
    ):
        if promised != seen:
            yield _difference(where + kind, describe(promised), describe(seen))
    if expected.name == MAIN:
        if (lengths := tuple(sorted(expected.lengths))) != found.lengths:
            yield _difference("lengths", str(list(lengths)), str(list(found.lengths)))
        if expected.default != found.default:
            yield _difference("default length", str(expected.default), str(found.default))


def _difference(what: str, promised: str, found: str) -> str:
    return f"{what}: the contract has {promised or 'none'}; the package has {found or 'none'}"


def _enumerated(feature: Spec) -> tuple[tuple[int, ...], ...]:
    """The shapes that an input accepts."""
    array = feature.type.multiArrayType
    flexibility = array.WhichOneof("ShapeFlexibility")
    if flexibility == "shapeRange":
        raise PackageError(
            f"input `{feature.name}` accepts a range of shapes", expected="enumerated shapes, or a fixed one"
        )
    if flexibility == "enumeratedShapes":
        return tuple(sorted({tuple(shape.shape) for shape in array.enumeratedShapes.shapes}))
    return (tuple(array.shape),)


def _symbolic(shapes: Sequence[tuple[int, ...]]) -> tuple[Dim, ...]:
    """One shape for all of `shapes`: the sizes that they have in common, and `T` where they differ."""
    return tuple(sizes[0] if len(set(sizes)) == 1 else SEQ_DIM for sizes in zip(*shapes, strict=True))


def _computed_shapes(spec: Spec, name: str) -> dict[str, tuple[Dim, ...]]:
    """The shape of each value that a function computes; the description may omit it."""
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


def _dtype(name: str, array: Spec) -> DType:
    # A feature of another type, such as an image, has an empty array.
    dtypes = {dtype.value: dtype for dtype in DType}
    found = ARRAY_DTYPES.get(array.dataType)
    if found not in dtypes:
        raise PackageError(
            f"`{name}` is not an array of a known dtype", expected=", ".join(dtype.value for dtype in DType)
        )
    return dtypes[found]
