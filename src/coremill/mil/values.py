"""Element types of the Model Intermediate Language, and the torch tensors that store its values.

The numbers of the types are those of `MIL_pb2.DataType` in coremltools' protobuf definitions.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class ElementType:
    """One element type of MIL.

    `storage` is the torch type that stores its values: the type itself if torch computes with it, otherwise a wider
    type that represents every value (int32 for uint16, int8 for int4, …).
    """

    name: str
    bits: int
    storage: torch.dtype
    packed: np.dtype[np.generic] | None
    """numpy type of one element in a file, or None if elements are smaller than a byte."""
    low: int = 0
    high: int = 0
    """Range of an integer type; 0 for other types."""

    @property
    def dtype_name(self) -> str:
        """The name of the type in numpy and torch: float16, int32, …"""
        return self.name.replace("bf", "bfloat").replace("fp", "float")

    @property
    def is_float(self) -> bool:
        return bool(self.storage.is_floating_point)

    @property
    def is_integer(self) -> bool:
        return self.high > 0

    @property
    def is_half(self) -> bool:
        """Whether operations compute in fp32 and round the result."""
        return self.storage in (torch.float16, torch.bfloat16)


def _integer(name: str, bits: int, storage: torch.dtype, *, packed: str | None = None) -> ElementType:
    signed = not name.startswith("u")
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return ElementType(name, bits, storage, np.dtype(packed) if packed else None, low, high)


FP16 = ElementType("fp16", 16, torch.float16, np.dtype("<f2"))
FP32 = ElementType("fp32", 32, torch.float32, np.dtype("<f4"))
INT32 = _integer("int32", 32, torch.int32, packed="<i4")
BOOL = ElementType("bool", 8, torch.bool, np.dtype("?"))

ELEMENT_TYPES: Mapping[int, ElementType] = MappingProxyType(
    {
        1: BOOL,
        10: FP16,
        11: FP32,
        12: ElementType("fp64", 64, torch.float64, np.dtype("<f8")),
        13: ElementType("bf16", 16, torch.bfloat16, np.dtype("<u2")),
        21: _integer("int8", 8, torch.int8, packed="<i1"),
        22: _integer("int16", 16, torch.int16, packed="<i2"),
        23: INT32,
        24: _integer("int64", 64, torch.int64, packed="<i8"),
        25: _integer("int4", 4, torch.int8),
        31: _integer("uint8", 8, torch.uint8, packed="<u1"),
        32: _integer("uint16", 16, torch.int32, packed="<u2"),
        33: _integer("uint32", 32, torch.int64, packed="<u4"),
        35: _integer("uint4", 4, torch.uint8),
        36: _integer("uint2", 2, torch.uint8),
        37: _integer("uint1", 1, torch.uint8),
        38: _integer("uint6", 6, torch.uint8),
        39: _integer("uint3", 3, torch.uint8),
    }
)
"""By the number in the file. uint64, the fp8 types and strings are missing: no tensor operation supports them."""

STRING = 2
"""The number of the string type."""

BY_NAME: Mapping[str, ElementType] = MappingProxyType({each.name: each for each in ELEMENT_TYPES.values()})


class Numerics(str, enum.Enum):
    """The types in which floating-point values are stored and computed. No device computes exactly the same
    values."""

    DECLARED = "declared"
    """Every value is rounded to its declared type; sums and products accumulate in fp32."""

    ORACLE = "oracle"
    """fp16 and bf16 values are stored and computed in fp32, without the rounding that the program declares."""

    ORACLE_FP64 = "oracle-fp64"
    """Every floating-point value is stored and computed in fp64."""

    def storage(self, element: ElementType) -> torch.dtype:
        """Return the torch type that stores values of a type."""
        if self is Numerics.ORACLE_FP64 and element.is_float:
            return torch.float64
        if self is Numerics.ORACLE and element.is_half:
            return torch.float32
        return element.storage


@dataclass(frozen=True, slots=True)
class TensorType:
    """A declared type: element type and shape, with None for a dimension that is known only at run time."""

    element: ElementType
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.element.name}[{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True, slots=True)
class ListType:
    """A declared list of tensors. The type has no length, because lists grow."""

    element: TensorType

    def __str__(self) -> str:
        return f"list of {self.element}"


@dataclass(frozen=True, slots=True)
class TensorList:
    """A value of list type: tensors of one shape. Writing returns a new list."""

    length: int
    written: Mapping[int, torch.Tensor]
    """By index; every other element is 0."""
    shape: tuple[int | None, ...]
    """Of an element; None for a size that the first write sets."""
    dtype: torch.dtype
    is_dynamic: bool
    """Whether a write past the end extends the list."""


class StateCell:
    """Holds a state's tensor while a function runs; a write replaces the tensor."""

    __slots__ = ("_before", "_overwritten", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._before = tensor
        self._overwritten: list[tuple[torch.Tensor, torch.Tensor]] = []

    def remember(self, part: torch.Tensor, before: torch.Tensor) -> None:
        """Record that a part of the state's memory was overwritten, and its content before."""
        self._overwritten.append((part, before))

    def restore(self) -> None:
        """Restore the content that the state had when the function started."""
        for part, before in reversed(self._overwritten):
            part.copy_(before)
        self._overwritten.clear()
        self.tensor = self._before


Constant: TypeAlias = "torch.Tensor | str | int | float | list[Constant] | tuple[Constant, ...]"
"""A constant of a program; a tuple contains the elements of a list, a list the numbers of a tensor in it."""

Value: TypeAlias = "Constant | TensorList | StateCell | dict[int | str, float] | tuple[Value, ...] | None"
"""A value of a running program: a dictionary has the probabilities of a classifier, a tuple the results of an
operation with several outputs, and None is an optional input that is missing."""


def as_tensor(value: Value) -> torch.Tensor:
    """Return a value that must be a tensor.

    Raises:
        TypeError: it is not a tensor.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{type(value).__name__} is not a tensor")
    return value


def unpack_bits(
    packed: npt.NDArray[np.uint8], element: ElementType, count: int
) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8]:
    """Unpack elements smaller than a byte: consecutive, least significant bit first, across byte boundaries.

    Source: the layout that coremltools documents for `constexpr_lut_to_dense` (iOS16).

    Args:
        packed: (bytes,) uint8, as many as `count` elements need.
        count: elements to read.

    Returns:
        (count,) int8 or uint8.

    Raises:
        ValueError: the number of bytes is wrong.
    """
    needed = -(-count * element.bits // 8)
    if packed.shape != (needed,):
        raise ValueError(f"{packed.size} bytes for {count} elements of {element.name}, which need {needed}")
    bits = np.unpackbits(packed, bitorder="little", count=count * element.bits).reshape(count, element.bits)
    values = bits @ (1 << np.arange(element.bits, dtype=np.int16))
    if element.low < 0:
        values = np.where(values > element.high, values - (1 << element.bits), values)
        return values.astype(np.int8)
    return values.astype(np.uint8)


def tensor_from_numbers(values: Sequence[float], element: ElementType, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of the numbers that a program stores inline.

    Raises:
        ValueError: their count does not match the shape.
    """
    return torch.tensor(list(values), dtype=element.storage).reshape(shape)


def tensor_from_bytes(data: bytes, element: ElementType, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor copied from elements in their file layout.

    Raises:
        ValueError: the number of bytes does not match the shape.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if element.packed is None:
        return torch.from_numpy(unpack_bits(np.frombuffer(data, np.uint8), element, count)).reshape(shape)
    if len(data) != count * element.packed.itemsize:
        raise ValueError(f"{len(data)} bytes for {count} elements of {element.name}")
    raw = np.frombuffer(data, element.packed)
    if element.storage is torch.bfloat16:
        return torch.from_numpy(raw.view(np.int16).copy()).view(torch.bfloat16).reshape(shape)
    native = raw.astype(element.packed.newbyteorder("="))
    if element.storage in (torch.int32, torch.int64):
        native = native.astype(np.int32 if element.storage is torch.int32 else np.int64)
    return torch.from_numpy(native).reshape(shape)
