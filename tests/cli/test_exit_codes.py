"""docs/exit-codes.md lists the exit codes of `coremill.core.errors` and `coremill.core.command`."""

from __future__ import annotations

from pathlib import Path

from coremill.core.command import INTERRUPTED, PIPE_CLOSED
from coremill.core.errors import exit_code_table

PAGE = Path(__file__).parents[2] / "docs" / "exit-codes.md"


def test_page_lists_every_exit_code():
    lines = PAGE.read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and line[2].isdigit()]
    codes = [line.split(maxsplit=1) for line in exit_code_table().splitlines()]
    assert [[code, kind] for code, kind, _ in rows] == [
        *codes,
        [str(INTERRUPTED), "interrupted"],
        [str(PIPE_CLOSED), "closed pipe"],
    ]
