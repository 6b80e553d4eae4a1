"""What is written down of each test: one JSON line."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One test of coremltools' suite, run against coremill.mil."""

    test: str
    """pytest's node id."""
    outcome: str
    """passed, failed or skipped."""
    reason: str
    """Of what did not pass: the exception, or why the suite leaves it out."""
    predictions: int
    """How often the test ran a program."""
    compared: int
    """Outputs that were compared with expected values."""
    operations: tuple[str, ...]
    """Types of the operations in the programs that it ran."""
    precision: str
    """fp16 or fp32; empty where the test compares by itself."""


def append_record(path: Path, record: Record) -> None:
    with path.open("ab") as file:
        file.write(msgspec.json.encode(record) + b"\n")


def read_records(path: Path) -> list[Record]:
    """The records of a file; none where there is no file. A line that a stopped run left unfinished is not one."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [msgspec.json.decode(line, type=Record) for line in lines[:-1]]


def drop_unfinished_line(path: Path) -> None:
    """Cut off what a stopped run left of its last line, so that the next record begins a line of its own."""
    if path.exists():
        content = path.read_bytes()
        path.write_bytes(content[: content.rfind(b"\n") + 1])
