"""What a package says of a function: its inputs, outputs and states, and which shapes an input may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coremill.core.errors import PackageError, UnsupportedOperationError
from coremill.mil.coremltools_quietly import FeatureTypes_pb2
from coremill.mil.graph import Graph
from coremill.mil.loader import Package
from coremill.mil.values import TensorType

MAIN = "main"
"""The function of a package that has one."""

_ARRAY_DTYPES = {
    FeatureTypes_pb2.ArrayFeatureType.FLOAT16: "float16",
    FeatureTypes_pb2.ArrayFeatureType.FLOAT32: "float32",
    FeatureTypes_pb2.ArrayFeatureType.DOUBLE: "float64",
    FeatureTypes_pb2.ArrayFeatureType.INT8: "int8",
    FeatureTypes_pb2.ArrayFeatureType.INT32: "int32",
}

_ELEMENT_NAMES = {"float16": "fp16", "float32": "fp32", "float64": "fp64", "int8": "int8", "int32": "int32"}
"""numpy's name of a type to MIL's."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input, output or state."""

    name: str
    dtype: str
    """numpy's name of the type: int32, float16, float32, …"""
    shape: tuple[int | None, ...]
    """None for a size that varies."""
    enumerated_shapes: tuple[tuple[int, ...], ...] = ()
    """The shapes of an input with enumerated shapes, the default first."""
    size_ranges: tuple[tuple[int, int | None], ...] = ()
    """Least and greatest size of each dimension of an input with range shapes; None is no upper limit."""

    @property
    def supported_shapes(self) -> list[tuple[int, ...]] | None:
        """Every shape it may have, or None where ranges allow too many to list."""
        if self.enumerated_shapes:
            return list(self.enumerated_shapes)
        fixed = tuple(size for size in self.shape if size is not None)
        return [fixed] if len(fixed) == len(self.shape) else None

    def admits(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape may be given."""
        listed = self.supported_shapes
        if listed is not None:
            return tuple(shape) in listed
        if len(shape) != len(self.shape):
            return False
        ranges = self.size_ranges or tuple((size or 1, size) for size in self.shape)
        return all(
            low <= size and (high is None or size <= high) for size, (low, high) in zip(shape, ranges, strict=True)
        )

    def describe_shapes(self) -> str:
        """The shapes that `admits` admits, for a message."""
        listed = self.supported_shapes
        if listed is not None:
            return ("one of " if len(listed) > 1 else "") + ", ".join(str(list(shape)) for shape in listed)
        ranges = self.size_ranges or tuple((size or 1, size) for size in self.shape)
        sizes = [
            str(low) if low == high else f"{low} to {high}" if high is not None else f"at least {low}"
            for low, high in ranges
        ]
        return f"rank {len(sizes)} with sizes [{', '.join(sizes)}]"


@dataclass(frozen=True, slots=True)
class FunctionDescription:
    """The interface of one function."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...]


def choose_function(package: Package, function_name: str | None) -> str:
    """The function to run: the one asked for, else the package's default.

    Raises:
        PackageError: the package has no such function.
    """
    description = package.spec.description
    names = [each.name for each in description.functions] or sorted(package.spec.mlProgram.functions)
    chosen = function_name or description.defaultFunctionName or MAIN
    if chosen not in names:
        raise PackageError(f"{package.name}: no function {chosen!r}", expected=f"one of {names}")
    return chosen


def describe_function(package: Package, function_name: str, graph: Graph) -> FunctionDescription:
    """What the package says of a function, its graph filling in shapes that a description leaves out.

    Raises:
        PackageError: description and program disagree.
        UnsupportedOperationError: an input or output that is no tensor, such as an image.
    """
    description = package.spec.description
    source = next((each for each in description.functions if each.name == function_name), description)
    declared = {graph.names[slot]: graph.types[slot] for slot in graph.inputs if slot in graph.types}
    returned = {graph.names[slot]: graph.types[slot] for slot in graph.outputs if slot in graph.types}
    where = f"{package.name}, function {function_name!r}"
    inputs = tuple(_input_spec(each, where) for each in source.input)
    states = tuple(_array_spec(each.name, each.type.stateType.arrayType, declared, where) for each in source.state)
    outputs = tuple(_array_spec(each.name, _array_type(each, where), returned, where) for each in source.output)
    described = {each.name for each in inputs + states}
    if described != set(declared):
        raise PackageError(
            f"{where}: describes the inputs and states {sorted(described)}",
            expected=f"those of its program, {sorted(declared)}",
        )
    for spec, value_type in [(each, declared[each.name]) for each in inputs + states] + [
        (each, returned[each.name]) for each in outputs
    ]:
        if _ELEMENT_NAMES[spec.dtype] != value_type.element.name or len(spec.shape) != len(value_type.shape):
            raise PackageError(
                f"{where}: describes {spec.name!r} as {spec.dtype} of rank {len(spec.shape)}",
                expected=f"{value_type}, as its program declares it",
            )
    return FunctionDescription(function_name, inputs, outputs, states)


def _array_type(feature: Any, where: str) -> Any:
    kind = feature.type.WhichOneof("Type")
    if kind != "multiArrayType":
        raise UnsupportedOperationError(f"{where}: {feature.name!r} is of type {kind}", expected="a multi-array")
    return feature.type.multiArrayType


def _dtype(name: str, array: Any, where: str) -> str:
    if array.dataType not in _ARRAY_DTYPES:
        raise PackageError(f"{where}: {name!r} is of data type number {array.dataType}")
    return _ARRAY_DTYPES[array.dataType]


def _array_spec(name: str, array: Any, types: Mapping[str, TensorType], where: str) -> TensorSpec:
    """An output or state: its described shape where it has one, else its type's in the program."""
    dtype = _dtype(name, array, where)
    if name not in types:
        raise PackageError(f"{where}: its program has no {name!r}", expected=f"one of {sorted(types)}")
    return TensorSpec(name, dtype, tuple(int(size) for size in array.shape) or types[name].shape)


def _input_spec(feature: Any, where: str) -> TensorSpec:
    array = _array_type(feature, where)
    dtype = _dtype(feature.name, array, where)
    default = tuple(int(size) for size in array.shape)
    flexibility = array.WhichOneof("ShapeFlexibility")
    if flexibility == "enumeratedShapes":
        listed = [tuple(int(size) for size in each.shape) for each in array.enumeratedShapes.shapes]
        shapes = tuple(dict.fromkeys([default, *listed] if default else listed))
        if len({len(each) for each in shapes}) != 1:
            raise PackageError(f"{where}: the shapes of input {feature.name!r} are of different ranks")
        shape = tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))
        return TensorSpec(feature.name, dtype, shape, enumerated_shapes=shapes)
    if flexibility == "shapeRange":
        ranges = tuple(
            (int(each.lowerBound), int(each.upperBound) if each.upperBound >= 0 else None)
            for each in array.shapeRange.sizeRanges
        )
        shape = tuple(low if low == high else None for low, high in ranges)
        return TensorSpec(feature.name, dtype, shape, size_ranges=ranges)
    return TensorSpec(feature.name, dtype, default)
