"""The record of each test: one JSON line."""

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
    """The exception of a failed test, or why the suite skips it; empty if the test passed."""
    predictions: int
    """Number of times the test ran a program."""
    compared: int
    """Number of outputs compared with expected values."""
    operations: tuple[str, ...]
    """Types of the operations in the programs that the test ran."""
    precision: str
    """fp16 or fp32; empty if the test compares without `compare_backend`."""


def append_record(path: Path, record: Record) -> None:
    with path.open("ab") as file:
        file.write(msgspec.json.encode(record) + b"\n")


def read_records(path: Path) -> list[Record]:
    """Return the records of a file, or none if it does not exist; an unfinished last line is ignored."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [msgspec.json.decode(line, type=Record) for line in lines[:-1]]


def drop_unfinished_line(path: Path) -> None:
    """Remove an unfinished last line of a stopped run, so that the next record starts on a new line."""
    if path.exists():
        content = path.read_bytes()
        path.write_bytes(content[: content.rfind(b"\n") + 1])
