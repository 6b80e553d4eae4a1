"""The weight files of a package, mapped into memory and not copied if the element type allows it.

The format is MILBlob's storage format, version 2, as coremltools writes it: a 64-byte header (count of blobs and
version, each uint32), then for each blob, at an offset that is a multiple of 64, a 64-byte record (sentinel
0xDEADBEEF and type, each uint32; size in bytes and offset of the data, each uint64; bits of padding, uint64).
Source: mlmodel/src/MILBlob/Blob/StorageFormat.hpp in github.com/apple/coremltools.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path, PurePosixPath

import torch

from coremill.core.errors import PackageError
from coremill.mil.values import ElementType, tensor_from_bytes

_HEADER = struct.Struct("<II")
_RECORD = struct.Struct("<IIQQQ")
_RECORD_SIZE_BYTES = 64
_SENTINEL = 0xDEADBEEF
_VERSION = 2
_MODEL_PATH = "@model_path"

_BLOB_TYPES = {
    1: "fp16",
    2: "fp32",
    3: "uint8",
    4: "int8",
    5: "bf16",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}


class WeightFile:
    """One weight file, mapped into memory when its first blob is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map = _map_file(path)

    def check_size(self) -> None:
        """Check that the file was not truncated: reading beyond its end would kill the interpreter.

        A file that was removed or replaced stays mapped unchanged; a truncated one does not.

        Raises:
            PackageError: it is shorter, for example because the package was saved again in place.
        """
        size = self._map.size()
        if size < len(self._map):
            raise PackageError(
                f"{self._path}: the weight file has {size} bytes; it had {len(self._map)} when it was opened",
                expected="the package as it was opened; open it again",
            )

    def tensor(self, offset: int, element: ElementType, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the tensor of the blob whose record is at `offset`; it shares the file's memory if possible.

        Raises:
            PackageError: there is no blob at `offset`, or it has another type or size.
        """
        start, size = self._data_range(offset, element)
        count = 1
        for length in shape:
            count *= length
        expected = -(-count * element.bits // 8)
        if size != expected:
            raise PackageError(
                f"{self._path}: the blob at offset {offset} holds {size} bytes",
                expected=f"{expected} bytes, for {element.name} of shape {list(shape)}",
            )
        if element.packed is None or torch.empty(0, dtype=element.storage).element_size() * 8 != element.bits:
            return tensor_from_bytes(self._map[start : start + size], element, shape)
        if count == 0:
            return torch.empty(shape, dtype=element.storage)
        return torch.frombuffer(self._map, dtype=element.storage, count=count, offset=start).reshape(shape)

    def _data_range(self, offset: int, element: ElementType) -> tuple[int, int]:
        """Return the offset and size in bytes of a blob's data."""
        file_size = len(self._map)
        if offset < 0 or offset + _RECORD_SIZE_BYTES > file_size:
            raise PackageError(
                f"{self._path}: the program reads a blob at offset {offset}; the file has {file_size} bytes",
                expected="the complete weight file that was saved with this program",
            )
        sentinel, type_number, size, start, _ = _RECORD.unpack_from(self._map, offset)
        if sentinel != _SENTINEL:
            raise PackageError(
                f"{self._path}: no blob starts at offset {offset}",
                expected="the weight file that was saved with this program",
            )
        found = _BLOB_TYPES.get(type_number, f"type {type_number}")
        if found != element.name:
            raise PackageError(
                f"{self._path}: the blob at offset {offset} holds {found}",
                expected=f"{element.name}, as the program declares",
            )
        if start + size > file_size:
            raise PackageError(
                f"{self._path}: the blob at offset {offset} ends at byte {start + size}; the file has {file_size}",
                expected="the complete weight file that was saved with this program",
            )
        return start, size


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # Copy-on-write: torch warns about read-only buffers, and writes do not reach the file.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError as error:
        raise PackageError(f"{path}: the weight file is missing", expected="the package as it was saved") from error
    except (OSError, ValueError) as error:
        raise PackageError(
            f"{path}: the weight file cannot be read ({error})", expected="the package as it was saved"
        ) from error
    if len(mapped) < _RECORD_SIZE_BYTES:
        raise PackageError(
            f"{path}: the weight file has {len(mapped)} bytes",
            expected=f"a header of {_RECORD_SIZE_BYTES} bytes and the blobs after it",
        )
    _, version = _HEADER.unpack_from(mapped, 0)
    if version != _VERSION:
        raise PackageError(
            f"{path}: not a weight file of version {_VERSION} (its header has version {version})",
            expected="a weight file as Core ML stores it",
        )
    return mapped


class WeightStore:
    """The weight files of one package, by the names that its program uses (`@model_path/weights/weight.bin`).

    Args:
        root: the directory of the model file, which `@model_path` means. Only symbolic links lead out of it; see
            `coremill.mil.loader`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, WeightFile] = {}
        self._tensors: dict[tuple[str, int, str, tuple[int, ...]], torch.Tensor] = {}

    def tensor(self, name: str, offset: int, element: ElementType, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the tensor stored in file `name` at `offset`; each call returns the same object.

        Raises:
            PackageError: the name points outside the package, or the file is missing, truncated or malformed.
        """
        key = (name, offset, element.name, shape)
        if key not in self._tensors:
            if name not in self._files:
                self._files[name] = WeightFile(self._path(name))
            self._tensors[key] = self._files[name].tensor(offset, element, shape)
        return self._tensors[key]

    def check_sizes(self) -> None:
        """Check every open file; see :meth:`WeightFile.check_size`."""
        for file in self._files.values():
            file.check_size()

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if len(parts) < 2 or parts[0] != _MODEL_PATH or ".." in parts:
            raise PackageError(
                f"the program names the weight file {name!r}",
                expected=f"a path inside the package, {_MODEL_PATH}/…",
            )
        return self._root.joinpath(*parts[1:])
