"""Files of typed records, one JSON object a line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from coremill.core.documents import Record
from coremill.core.errors import DatasetError
from coremill.core.publish import replacing

AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_lines(path: Path, kind: type[AnyRecord], *, whole: str, each: str, run: str) -> Iterator[AnyRecord]:
    """Yield the records in `path` in order; only one is in memory at a time.

    Args:
        whole: the name of such a file in messages, such as `a dataset`.
        each: the name of a record in messages, such as `row`.
        run: the command that writes such a file.

    Raises:
        DatasetError: the file is unreadable or empty, or a line is not a `kind`; states the file and the line.
    """
    decoder = msgspec.json.Decoder(kind)
    number = 0
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _decode(decoder, kind, line, where=f"{path}:{number}", each=each, run=run)
    except OSError as failure:
        raise DatasetError(
            f"cannot read {path}: {failure.strerror}", expected=f"{whole}, one JSON object a line", run=run
        ) from failure
    if number == 0:
        raise DatasetError(f"{path} has no {each}s", expected="one JSON object a line", run=run)


def _decode(
    decoder: msgspec.json.Decoder[AnyRecord], kind: type[AnyRecord], line: bytes, *, where: str, each: str, run: str
) -> AnyRecord:
    try:
        return decoder.decode(line)
    except msgspec.ValidationError as failure:
        expected = f"a {each} with {', '.join(kind.__struct_fields__)}"
        raise DatasetError(f"{where}: {failure}", expected=expected, run=run) from failure
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise DatasetError(f"{where}: not JSON: {failure}", expected="one JSON object a line", run=run) from failure


def write_lines(path: Path, records: Iterable[Record]) -> str:
    """Write `records` to `path` atomically, one at a time; memory does not grow with their number.

    Returns:
        The digest of the file, as `sha256:<hex>`; equal records give equal bytes.

    Raises:
        OutputError: `path` cannot be written, or the disk is full; an existing file is left unchanged.
    """
    path = Path(path)
    hasher = hashlib.sha256()
    encoder = msgspec.json.Encoder()
    with replacing(path) as file:
        buffer = bytearray()
        for record in records:
            encoder.encode_into(record, buffer)
            buffer += b"\n"
            hasher.update(buffer)
            file.write(buffer)
    return "sha256:" + hasher.hexdigest()
