"""The GGUF container: metadata and raw tensors of one file, memory-mapped.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The sizes of the
quantised types and their arithmetic are the `gguf` package's. Its reader is not used: it takes seconds over a
vocabulary of 50,000 tokens, and a file that is cut short in an array of numbers reads as one with fewer numbers.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from coremill.core.errors import CheckpointUnreadableError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
"""struct's code of each scalar type of metadata."""
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_BLOCK_ELEMENTS = 1 << 18
"""Elements dequantised at a time: the arithmetic takes several float32 arrays of that size, which fit a cache."""


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where one tensor lies."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    """Rows first, as torch has it; the file lists them the other way round."""
    start: int
    """Byte of the file."""
    size_bytes: int


class GgufFile:
    """A whole GGUF file; its tensors are read when they are asked for.

    Raises:
        CheckpointUnreadableError: unreadable, not GGUF, of another version, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                # A private copy that is never written: torch takes no read-only memory.
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

    def raw(self, name: str) -> np.ndarray[Any, Any]:
        """The bytes of a tensor, mapped: (size_bytes,) uint8."""
        tensor = self.tensors[name]
        return np.frombuffer(self._map, dtype=np.uint8, count=tensor.size_bytes, offset=tensor.start)

    def dequantized(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor in float32, in its shape; in new memory, some rows at a time."""
        tensor = self.tensors[name]
        raw = self.raw(name)
        out = np.empty(math.prod(tensor.shape), dtype=np.float32)
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        step = max(1, _BLOCK_ELEMENTS // block_elements)  # in blocks, each of which is read by itself
        for start in range(0, len(raw) // block_bytes, step):
            # As one row: the package goes through a matrix sixteen rows at a time, in Python.
            row = raw[start * block_bytes : (start + step) * block_bytes].reshape(1, -1)
            values = gguf.quants.dequantize(row, tensor.kind)
            first = start * block_elements
            out[first : first + values.size] = values.reshape(-1)
        return out.reshape(tensor.shape)


class _FormatError(Exception):
    """What is wrong with the file, to stand behind its name."""


def _damaged(path: Path, found: str) -> CheckpointUnreadableError:
    return CheckpointUnreadableError(f"{path} {found}", expected="a whole GGUF file of version 2 or 3")


class _Cursor:
    """Reads little-endian values off the front of a file; never past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.place:
            raise _FormatError(f"is truncated: {len(self.data)} bytes end within its header")
        self.place += size
        return self.data[self.place - size : self.place]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError as failure:
            raise _FormatError(f"is damaged: a text of its header is not UTF-8 at byte {self.place}") from failure

    def value(self) -> Any:
        kind = self.number("<I")
        if kind != _ARRAY:
            return self._scalar(kind)
        kind, length = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            return [self.text() for _ in range(length)]
        if kind not in _SCALARS:
            raise _FormatError(f"has an array of type {kind} in its metadata, which the format does not have")
        code = _SCALARS[kind]
        return np.frombuffer(self.take(length * struct.calcsize(code)), dtype=np.dtype(code)).tolist()

    def _scalar(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind not in _SCALARS:
            raise _FormatError(f"has a value of type {kind} in its metadata, which the format does not have")
        value = self.number(_SCALARS[kind])
        # The shortest decimal that is this float32: what the writer was given, such as 1e-05.
        return float(str(np.float32(value))) if kind == 6 else value


def _read_header(data: mmap.mmap) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
    cursor = _Cursor(data)
    if (magic := cursor.take(min(4, len(data)))) != MAGIC:
        raise _FormatError(f"is not a GGUF file: it begins with {magic!r}")
    version = cursor.number("<I")
    if version not in _VERSIONS:
        big_endian = " (or big-endian)" if version & 0xFFFF == 0 else ""
        raise _FormatError(f"is of GGUF version {version}{big_endian}")
    n_tensors, n_values = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        name = cursor.text()
        if name in metadata:
            raise _FormatError(f"is damaged: it has {name} twice")
        metadata[name] = cursor.value()
    listed = [_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _FormatError(f"is damaged: general.alignment is {alignment!r}")
    first = -(-cursor.place // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in listed:
        if name in tensors:
            raise _FormatError(f"is damaged: it has the tensor {name} twice")
        tensors[name] = _tensor(name, kind, shape, first + offset)
        if (end := tensors[name].start + tensors[name].size_bytes) > len(data):
            raise _FormatError(f"is truncated: {name} ends at byte {end} of a file of {len(data)}")
    return metadata, tensors


def _tensor_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """(name, type, shape with rows first, offset into the data)."""
    name = cursor.text()
    n_dims = cursor.number("<I")
    if not 1 <= n_dims <= _MAX_DIMENSIONS:
        raise _FormatError(f"is damaged: the tensor {name} has {n_dims} dimensions")
    sizes = [cursor.number("<Q") for _ in range(n_dims)]
    return name, cursor.number("<I"), tuple(reversed(sizes)), cursor.number("<Q")


def _tensor(name: str, kind: int, shape: tuple[int, ...], start: int) -> GgufTensor:
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError as failure:
        raise _FormatError(
            f"has the tensor {name} of type {kind}, which gguf {_gguf_version()} does not know"
        ) from (failure)
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[known]
    if shape[-1] % block_elements:
        raise _FormatError(
            f"is damaged: a row of {name} has {shape[-1]} elements, and a block of {known.name} {block_elements}"
        )
    size_bytes = math.prod(shape) // block_elements * block_bytes
    return GgufTensor(kind=known, shape=shape, start=start, size_bytes=size_bytes)


def _gguf_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("gguf")
