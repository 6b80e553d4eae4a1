"""The commands' output: tables that are readable at 80 columns and in a pipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coremill.measures import MOST_DB

_STYLES = {"passed": "green", "failed": "bold red", "not_run": "yellow"}
"""Colours of result words; colour carries no further information."""


def console() -> Console:
    return Console(highlight=False)


def title(text: str) -> Text:
    return Text(text, style="bold")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table of plain texts, which wrap and are never cut; a column called `>name` has numbers."""
    # No title: rich would wrap it to the width of the table.
    made = Table(box=SIMPLE_HEAD, header_style="dim", show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        is_number = column.startswith(">")
        made.add_column(
            column.removeprefix(">"), justify="right" if is_number else "left", overflow="fold", no_wrap=is_number
        )
    for cells in rows:
        # never parsed as markup: names and shapes contain brackets
        made.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in cells))
    return made


def print_json(to: Console, document: Any) -> None:
    """Print one JSON document, not wrapped to any width."""
    to.file.write(json.dumps(document, indent=2) + "\n")


def number(value: float) -> str:
    """Format four significant digits in as few characters as possible."""
    return f"{value:.4g}"


def decibels(sqnr_db: float) -> str:
    """Format an SQNR of `coremill.measures.sqnr_db`."""
    return "equal" if sqnr_db == MOST_DB else f"{sqnr_db:.1f}"


def shape_text(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def bytes_text(size_bytes: int) -> str:
    return f"{size_bytes:,}"
