"""Atomic publishing: a stage's folder appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """A fresh directory beside `folder` that takes its place when the block ends well.

    If the block raises, the new directory is removed and `folder` stays as it was. If the process is
    killed, `folder` is the old one, the new one, or (between two renames) absent with the old one beside
    it, which the next call puts back. The caller holds the run lock.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (folder.with_name(f".{folder.name}.{part}") for part in ("new", "old"))
    recover(folder)
    fresh.mkdir()
    try:
        yield fresh
        _sync_tree(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Clear what a killed build left beside `folder`, and put its last good artifact back if it is missing."""
    fresh, old = (folder.with_name(f".{folder.name}.{part}") for part in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (fresh, old):
        if leftover.exists():
            shutil.rmtree(leftover)


def _sync_tree(folder: Path) -> None:
    """Flush every file, so that a rename never outlives the bytes it publishes."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
