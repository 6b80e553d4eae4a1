"""GGUF files: metadata and tensors. A file is memory-mapped to be read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian; version 3 is
written. The block sizes and the arithmetic of the quantised types come from the `gguf` package. Its reader is not
used: it takes seconds for a vocabulary of 50,000 tokens, and accepts a file that is truncated in an array of
numbers. Nor is its writer, which can only write to a path.
"""

from __future__ import annotations

import importlib.metadata
import math
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from coremill.core.errors import CheckpointUnreadableError

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]
"""A value of metadata."""

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
"""struct's code of each scalar type of metadata."""
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_MAX_DIMENSIONS = 4
_BLOCK_ELEMENTS = 1 << 18
"""Elements that are dequantised at a time. The arithmetic takes several float32 arrays of that size, which fit a
cache."""


# --- reading ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """The type, shape and location of a tensor."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    """Rows first, as in torch; the file has the opposite order."""
    start: int
    """Offset in the file, in bytes."""
    size_bytes: int


class GgufFile:
    """A complete GGUF file. Its tensors are read on request.

    Raises:
        CheckpointUnreadableError: the file is unreadable, not GGUF, of another version, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                # A private copy that is never written to: torch rejects read-only memory.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as failure:
            raise CheckpointUnreadableError(
                f"cannot read {path}: {failure.strerror}", expected="a readable GGUF file"
            ) from failure
        except ValueError as failure:
            raise _damaged(self.path, "is empty") from failure
        try:
            self.metadata, self.tensors = _read_header(self._map)
        except _FormatError as failure:
            raise _damaged(self.path, str(failure)) from failure

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, mapped: (size_bytes,) uint8."""
        tensor = self.tensors[name]
        return np.frombuffer(self._map, dtype=np.uint8, count=tensor.size_bytes, offset=tensor.start)

    def dequantized(self, name: str) -> npt.NDArray[np.float32]:
        """The values of a tensor, in its shape and in new memory."""
        tensor = self.tensors[name]
        raw = self.raw(name)
        out = np.empty(math.prod(tensor.shape), dtype=np.float32)
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        step = max(1, _BLOCK_ELEMENTS // block_elements)  # in blocks, which are independent
        for start in range(0, len(raw) // block_bytes, step):
            # One row: the package loops over the rows of a matrix, sixteen at a time, in Python.
            row = raw[start * block_bytes : (start + step) * block_bytes].reshape(1, -1)
            values = gguf.quants.dequantize(row, tensor.kind)
            first = start * block_elements
            out[first : first + values.size] = values.reshape(-1)
        return out.reshape(tensor.shape)


class _FormatError(Exception):
    """What is wrong with the file; the error message has it after the file's name."""


def _damaged(path: Path, found: str) -> CheckpointUnreadableError:
    return CheckpointUnreadableError(f"{path} {found}", expected="a complete GGUF file of version 2 or 3")


class _Cursor:
    """Reads little-endian values from the beginning of a file, and never beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.offset:
            raise _FormatError(f"is truncated: {len(self.data)} bytes end within its header")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def uint64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def text(self) -> str:
        try:
            return self.take(self.uint64()).decode("utf-8")
        except UnicodeDecodeError as failure:
            raise _FormatError(f"is damaged: a text of its header is not UTF-8 at byte {self.offset}") from failure

    def value(self) -> Value:
        kind = self.uint32()
        if kind != _ARRAY:
            return self._scalar(kind)
        kind, length = self.uint32(), self.uint64()
        if kind == _STRING:
            return [self.text() for _ in range(length)]
        if kind not in _SCALARS:
            raise _FormatError(f"has an array of type {kind} in its metadata, which the format does not have")
        code = _SCALARS[kind]
        values = np.frombuffer(self.take(length * struct.calcsize(code)), dtype=np.dtype(code))
        listed: list[int] | list[float] | list[bool] = values.tolist()
        return listed

    def _scalar(self, kind: int) -> bool | int | float | str:
        if kind == _STRING:
            return self.text()
        if kind not in _SCALARS:
            raise _FormatError(f"has a value of type {kind} in its metadata, which the format does not have")
        code = _SCALARS[kind]
        value: bool | int | float = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        # The shortest decimal with this float32, which is the number that the writer was given, such as 1e-05.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value


def _read_header(data: mmap.mmap) -> tuple[Mapping[str, Value], Mapping[str, GgufTensor]]:
    cursor = _Cursor(data)
    if (magic := cursor.take(min(4, len(data)))) != MAGIC:
        raise _FormatError(f"is not a GGUF file: it begins with {magic!r}")
    version = cursor.uint32()
    if version not in _VERSIONS:
        big_endian = " (or big-endian)" if version & 0xFFFF == 0 else ""
        raise _FormatError(f"is of GGUF version {version}{big_endian}")
    n_tensors, n_values = cursor.uint64(), cursor.uint64()
    metadata: dict[str, Value] = {}
    for _ in range(n_values):
        name = cursor.text()
        if name in metadata:
            raise _FormatError(f"is damaged: it has {name} twice")
        metadata[name] = cursor.value()
    listed = [_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _FormatError(f"is damaged: general.alignment is {alignment!r}")
    first = _aligned(cursor.offset, alignment)
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in listed:
        if name in tensors:
            raise _FormatError(f"is damaged: it has the tensor {name} twice")
        tensors[name] = _tensor(name, kind, shape, first + offset)
        if (end := tensors[name].start + tensors[name].size_bytes) > len(data):
            raise _FormatError(f"is truncated: {name} ends at byte {end} of a file of {len(data)}")
    return metadata, tensors


def _aligned(offset: int, alignment: int) -> int:
    """The first multiple of `alignment` from `offset` on."""
    return -(-offset // alignment) * alignment


def _tensor_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """(name, type, shape with rows first, offset in the data)."""
    name = cursor.text()
    n_dims = cursor.uint32()
    if not 1 <= n_dims <= _MAX_DIMENSIONS:
        raise _FormatError(f"is damaged: the tensor {name} has {n_dims} dimensions")
    sizes = [cursor.uint64() for _ in range(n_dims)]
    return name, cursor.uint32(), tuple(reversed(sizes)), cursor.uint64()


def _tensor(name: str, kind: int, shape: tuple[int, ...], start: int) -> GgufTensor:
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError as failure:
        version = importlib.metadata.version("gguf")
        raise _FormatError(f"has the tensor {name} of type {kind}, which gguf {version} does not know") from failure
    if shape[-1] % (block_elements := gguf.GGML_QUANT_SIZES[known][0]):
        raise _FormatError(
            f"is damaged: a row of {name} has {shape[-1]} elements, and a block of {known.name} {block_elements}"
        )
    return GgufTensor(kind=known, shape=shape, start=start, size_bytes=tensor_bytes(shape, known))


def tensor_bytes(shape: Sequence[int], kind: gguf.GGMLQuantizationType) -> int:
    """Bytes of a tensor whose rows are whole blocks of `kind`."""
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(math.prod(shape) // block_elements * block_bytes)


# --- writing ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    """Rows first."""
    data: Callable[[], npt.NDArray[np.generic]]
    """Makes its bytes when it is written, so that one tensor is in memory at a time."""


def write_file(file: BinaryIO, metadata: Mapping[str, Value], tensors: Sequence[NewTensor]) -> None:
    """Write a GGUF file of version 3 to `file`, which is empty.

    Whole numbers become uint32, but int32 in lists; numbers with a fraction become float32.
    """
    file.write(struct.pack("<4sIQQ", MAGIC, 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        file.write(_packed_text(key) + _packed_value(value))
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        info = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.kind, offset)
        file.write(_packed_text(tensor.name) + info)
        offset += _aligned(tensor_bytes(tensor.shape, tensor.kind), gguf.GGUF_DEFAULT_ALIGNMENT)
    _write_padding(file)
    for tensor in tensors:
        file.write(np.ascontiguousarray(tensor.data()).data)
        _write_padding(file)


def _write_padding(file: BinaryIO) -> None:
    file.write(bytes(_aligned(file.tell(), gguf.GGUF_DEFAULT_ALIGNMENT) - file.tell()))


def _packed_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed_value(value: Value) -> bytes:
    if isinstance(value, list):
        kind = _STRING if isinstance(value[0], str) else _INT32
        packed = (_packed_text(each) if isinstance(each, str) else struct.pack("<i", each) for each in value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(packed)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _packed_text(value)
    kind = _BOOL if isinstance(value, bool) else _UINT32 if isinstance(value, int) else _FLOAT32
    return struct.pack("<I" + _SCALARS[kind][1:], kind, value)
