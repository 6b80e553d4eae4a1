"""Digests of files, directories and values, as manifests record them and their readers check them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from coremill.core.plain import Plain

_CHUNK_BYTES = 1 << 20


def bytes_digest(data: bytes) -> str:
    """Return the SHA-256 of `data`, as `sha256:<hex>`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def value_digest(value: Plain) -> str:
    """Return the digest of a plain value, independent of the order of keys."""
    import msgspec  # here, so that coremill.mil can be imported without it

    return bytes_digest(msgspec.json.encode(value, order="sorted"))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of the file at `path`, read in chunks."""
    hasher = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return "sha256:" + hasher.hexdigest()


def digest(path: Path) -> str:
    """Return the digest of a file, or of all files in a directory with their relative paths."""
    path = Path(path)
    if not path.is_dir():
        return file_digest(path)
    files = (file for file in path.rglob("*") if file.is_file())
    # As JSON, so that no file name can be mistaken for another file's digest.
    return value_digest({file.relative_to(path).as_posix(): file_digest(file) for file in files})


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a directory."""
    path = Path(path)
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
