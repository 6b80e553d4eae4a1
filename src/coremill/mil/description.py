"""A package's description of a function: its inputs, outputs and states, and the shapes that an input may have."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from coremill.core.errors import PackageError, UnsupportedOperationError
from coremill.mil.coremltools_quietly import FeatureTypes_pb2, Model_pb2
from coremill.mil.graph import Graph
from coremill.mil.loader import Package
from coremill.mil.values import TensorType

MAIN = "main"
"""The name of the only function of a package."""

SCALAR_SHAPE = (1,)
"""Core ML's arrays have at least one dimension: a scalar of the program is an array of this shape."""

ARRAY_DTYPES = {
    FeatureTypes_pb2.ArrayFeatureType.FLOAT16: "float16",
    FeatureTypes_pb2.ArrayFeatureType.FLOAT32: "float32",
    FeatureTypes_pb2.ArrayFeatureType.DOUBLE: "float64",
    FeatureTypes_pb2.ArrayFeatureType.INT8: "int8",
    FeatureTypes_pb2.ArrayFeatureType.INT32: "int32",
}
"""The data types of arrays in a package's description, by numpy's names."""

_IMAGE_DTYPES = ("float16", "float32", "uint8")
"""The types that images are converted to and from."""


@dataclass(frozen=True, slots=True)
class DefaultValue:
    """The default of an optional input: an array with the same value in every element."""

    shape: tuple[int, ...]
    value: float


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An array that is an input, output or state."""

    name: str
    dtype: str
    """numpy's name of the type: int32, float16, float32, …"""
    shape: tuple[int | None, ...]
    """None for a size that varies."""
    enumerated_shapes: tuple[tuple[int, ...], ...] = ()
    """The shapes of an input with enumerated shapes, the default first."""
    size_ranges: tuple[tuple[int, int | None], ...] = ()
    """Minimum and maximum size of each dimension of an input with range shapes; None means unlimited."""
    default: DefaultValue | None = None
    """Of an optional input; None if the input is required."""

    @property
    def supported_shapes(self) -> list[tuple[int, ...]] | None:
        """Every allowed shape, or None if the shapes are ranges."""
        if self.enumerated_shapes:
            return list(self.enumerated_shapes)
        fixed = tuple(size for size in self.shape if size is not None)
        return [fixed] if len(fixed) == len(self.shape) else None

    def admits(self, shape: Sequence[int]) -> bool:
        """Return whether an array may have this shape."""
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
        """Describe the allowed shapes for a message."""
        listed = self.supported_shapes
        if listed is not None:
            return ("one of " if len(listed) > 1 else "") + ", ".join(str(list(shape)) for shape in listed)
        ranges = self.size_ranges or tuple((size or 1, size) for size in self.shape)
        sizes = [_range_text(low, high) for low, high in ranges]
        return f"rank {len(sizes)} with sizes [{', '.join(sizes)}]"


class ColorSpace(str, enum.Enum):
    """The layout of an image in a tensor."""

    RGB = "RGB"
    """Three channels of 8 bits, red first."""
    BGR = "BGR"
    """Three channels of 8 bits, blue first."""
    GRAYSCALE = "GRAYSCALE"
    """One channel of 8 bits."""
    GRAYSCALE_FLOAT16 = "GRAYSCALE_FLOAT16"
    """One channel of fp16."""

    @property
    def channels(self) -> int:
        return 3 if self in (ColorSpace.RGB, ColorSpace.BGR) else 1


_COLOR_SPACES = {getattr(FeatureTypes_pb2.ImageFeatureType, each.value): each for each in ColorSpace}


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """An image that is an input or output."""

    color_space: ColorSpace
    tensor: TensorSpec
    """Its tensor in the program: (1, channels, height, width), with values of 0 to 255 in a color space of 8
    bits."""

    @property
    def name(self) -> str:
        return self.tensor.name

    def describe_sizes(self) -> str:
        """Describe the allowed sizes for a message."""
        listed = self.tensor.supported_shapes
        if listed is not None:
            sizes = ", ".join(f"{width} x {height}" for _, _, height, width in listed)
            return f"{'one of ' if len(listed) > 1 else ''}{sizes}, width first"
        _, _, height, width = (_range_text(*bounds) for bounds in self.tensor.size_ranges)
        return f"width {width}, height {height}"


LabelType: TypeAlias = Literal["string", "int64"]


@dataclass(frozen=True, slots=True)
class LabelSpec:
    """A classifier's output: the label of the most probable class."""

    name: str
    label_type: LabelType


@dataclass(frozen=True, slots=True)
class ProbabilitiesSpec:
    """A classifier's output: a dictionary of the probabilities by label."""

    name: str
    label_type: LabelType


InputSpec: TypeAlias = TensorSpec | ImageSpec
OutputSpec: TypeAlias = TensorSpec | ImageSpec | LabelSpec | ProbabilitiesSpec


def _range_text(low: int, high: int | None) -> str:
    if high is None:
        return f"at least {low}"
    return str(low) if low == high else f"{low} to {high}"


@dataclass(frozen=True, slots=True)
class FunctionDescription:
    """The interface of one function."""

    name: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    states: tuple[TensorSpec, ...]


def choose_function(package: Package, function_name: str | None) -> str:
    """Return the name of the function to run: `function_name`, or the package's default.

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
    """Return the package's description of a function; the graph gives shapes that are not in it.

    Raises:
        PackageError: the description and the program differ.
        UnsupportedOperationError: an input or output has a type that ML Programs do not support.
    """
    description = package.spec.description
    source = next((each for each in description.functions if each.name == function_name), description)
    where = f"{package.name}, function {function_name!r}"
    declared = {graph.names[slot]: graph.types[slot] for slot in graph.inputs if slot in graph.types}
    for features, what, kind in ((source.input, "inputs", "tensor"), (source.state, "states", "state")):
        described = sorted(each.name for each in features)
        names = sorted(graph.names[slot] for slot in graph.inputs if graph.kind_of(slot) == kind)
        if described != names:
            raise PackageError(
                f"{where}: describes the {what} {described}", expected=f"those of its program, {names}"
            )
    if len(declared) != len(graph.inputs):
        raise PackageError(f"{where}: an input of its program is neither a tensor nor a state")
    returned = {graph.names[slot]: graph.types.get(slot) for slot in graph.outputs}
    classified = {graph.names[slot] for node in graph.nodes if node.op_type == "classify" for slot in node.outputs}
    inputs = _Reader(declared, frozenset(), where)
    outputs = _Reader(returned, frozenset(classified), where)
    return FunctionDescription(
        function_name,
        tuple(inputs.input(each) for each in source.input),
        tuple(outputs.output(each) for each in source.output),
        tuple(inputs.array(each.name, each.type.stateType.arrayType) for each in source.state),
    )


class _Reader:
    """Reads the description of a function's inputs or outputs, and compares it with the program's types."""

    def __init__(self, types: Mapping[str, TensorType | None], classified: frozenset[str], where: str) -> None:
        self._types = types
        self._classified = classified
        """Names of the outputs of `classify` operations."""
        self._where = where

    def input(self, feature: Model_pb2.FeatureDescription) -> InputSpec:
        kind = feature.type.WhichOneof("Type")
        if kind == "imageType":
            return self._image(feature.name, feature.type.imageType)
        if kind == "multiArrayType":
            return self._input_array(feature)
        raise UnsupportedOperationError(
            f"{self._where}: {feature.name!r} is of type {kind}", expected="a multi-array or an image"
        )

    def output(self, feature: Model_pb2.FeatureDescription) -> OutputSpec:
        kind = feature.type.WhichOneof("Type")
        if feature.name not in self._types:
            raise PackageError(
                f"{self._where}: its program has no {feature.name!r}", expected=f"one of {sorted(self._types)}"
            )
        if kind == "imageType":
            return self._image(feature.name, feature.type.imageType)
        if kind == "multiArrayType":
            return self.array(feature.name, feature.type.multiArrayType)
        if kind not in ("stringType", "int64Type", "dictionaryType"):
            raise UnsupportedOperationError(
                f"{self._where}: {feature.name!r} is of type {kind}",
                expected="a multi-array, an image, or an output of a classifier",
            )
        if feature.name not in self._classified:
            raise PackageError(
                f"{self._where}: {feature.name!r} is of type {kind}", expected="an output of a classify operation"
            )
        if kind == "dictionaryType":
            is_string = feature.type.dictionaryType.WhichOneof("KeyType") == "stringKeyType"
            return ProbabilitiesSpec(feature.name, "string" if is_string else "int64")
        return LabelSpec(feature.name, "string" if kind == "stringType" else "int64")

    def array(self, name: str, array: FeatureTypes_pb2.ArrayFeatureType) -> TensorSpec:
        """Return an output or state; its shape is the described one, or the program's if none is described."""
        shape: tuple[int | None, ...] = tuple(int(size) for size in array.shape)
        value_type = self._types[name]
        if not shape and value_type is not None:
            shape = value_type.shape or SCALAR_SHAPE
        return self._checked(TensorSpec(name, self._dtype(name, array), shape))

    def _input_array(self, feature: Model_pb2.FeatureDescription) -> TensorSpec:
        name, array = feature.name, feature.type.multiArrayType
        dtype = self._dtype(name, array)
        default = tuple(int(size) for size in array.shape)
        flexibility = array.WhichOneof("ShapeFlexibility")
        if flexibility == "enumeratedShapes":
            listed = [tuple(int(size) for size in each.shape) for each in array.enumeratedShapes.shapes]
            shapes = self._distinct(name, [default, *listed] if default else listed)
            return self._checked(TensorSpec(name, dtype, _common(shapes), enumerated_shapes=shapes))
        if flexibility == "shapeRange":
            ranges = tuple(map(_size_range, array.shapeRange.sizeRanges))
            spec = TensorSpec(name, dtype, _fixed(ranges), size_ranges=ranges)
            default = default or tuple(low for low, _ in ranges)
        else:
            spec = TensorSpec(name, dtype, default)
        kind = array.WhichOneof("defaultOptionalValue")
        if feature.type.isOptional and kind is not None:
            spec = replace(spec, default=DefaultValue(default, getattr(array, kind)))
        return self._checked(spec)

    def _image(self, name: str, image: FeatureTypes_pb2.ImageFeatureType) -> ImageSpec:
        if image.colorSpace not in _COLOR_SPACES:
            raise PackageError(f"{self._where}: {name!r} is of color space number {image.colorSpace}")
        color_space = _COLOR_SPACES[image.colorSpace]
        value_type = self._types[name]
        channels = (1, color_space.channels)
        if (
            value_type is None
            or value_type.element.dtype_name not in _IMAGE_DTYPES
            or len(value_type.shape) != 4
            or any(size not in (None, own) for size, own in zip(value_type.shape, channels, strict=False))
        ):
            raise PackageError(
                f"{self._where}: describes {name!r} as an image of color space {color_space.value}",
                expected=f"fp16, fp32 or uint8 [1, {channels[1]}, height, width]; the program has {value_type}",
            )
        dtype = value_type.element.dtype_name
        default = (*channels, int(image.height), int(image.width))
        flexibility = image.WhichOneof("SizeFlexibility")
        if flexibility == "enumeratedSizes":
            listed = [(*channels, int(each.height), int(each.width)) for each in image.enumeratedSizes.sizes]
            shapes = self._distinct(name, [default, *listed] if all(default) else listed)
            tensor = TensorSpec(name, dtype, _common(shapes), enumerated_shapes=shapes)
        elif flexibility == "imageSizeRange":
            sizes = map(_size_range, (image.imageSizeRange.heightRange, image.imageSizeRange.widthRange))
            ranges = (*((each, each) for each in channels), *sizes)
            tensor = TensorSpec(name, dtype, _fixed(ranges), size_ranges=ranges)
        else:
            tensor = TensorSpec(name, dtype, default)
        self._check_sizes(tensor)
        return ImageSpec(color_space, tensor)

    def _distinct(self, name: str, listed: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        shapes = tuple(dict.fromkeys(listed))
        if len({len(each) for each in shapes}) != 1:
            raise PackageError(f"{self._where}: the shapes of input {name!r} are of different ranks")
        return shapes

    def _dtype(self, name: str, array: FeatureTypes_pb2.ArrayFeatureType) -> str:
        if array.dataType not in ARRAY_DTYPES:
            raise PackageError(f"{self._where}: {name!r} is of data type number {array.dataType}")
        return ARRAY_DTYPES[array.dataType]

    def _checked(self, spec: TensorSpec) -> TensorSpec:
        value_type = self._types[spec.name]
        if value_type is None or spec.dtype != value_type.element.dtype_name:
            raise self._contradiction(spec)
        self._check_sizes(spec)
        return spec

    def _check_sizes(self, spec: TensorSpec) -> None:
        """Check that sizes fixed by both the description and the program are equal."""
        value_type = self._types[spec.name]
        assert value_type is not None, "the type is checked before"
        declared = value_type.shape or SCALAR_SHAPE
        if len(spec.shape) != len(declared) or any(
            None not in (size, own) and size != own for size, own in zip(spec.shape, declared, strict=True)
        ):
            raise self._contradiction(spec)

    def _contradiction(self, spec: TensorSpec) -> PackageError:
        sizes = ", ".join("?" if size is None else str(size) for size in spec.shape)
        return PackageError(
            f"{self._where}: describes {spec.name!r} as {spec.dtype} of shape [{sizes}]",
            expected=f"{self._types[spec.name] or 'an output of a classifier'}, as its program declares it",
        )


def _size_range(bounds: FeatureTypes_pb2.SizeRange) -> tuple[int, int | None]:
    return int(bounds.lowerBound), int(bounds.upperBound) if bounds.upperBound >= 0 else None


def _fixed(ranges: Sequence[tuple[int, int | None]]) -> tuple[int | None, ...]:
    """Return a shape with the sizes whose range has one value."""
    return tuple(low if low == high else None for low, high in ranges)


def _common(shapes: Sequence[tuple[int, ...]]) -> tuple[int | None, ...]:
    """Return a shape with the sizes that all shapes have in common."""
    return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))
