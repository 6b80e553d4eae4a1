"""Real token sequences of exact lengths, from held-out questions and the teacher's answers to them.

Legend: T sequence length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from coremill.core.errors import DatasetError
from coremill.data.rows import Row, read_rows
from coremill.data.tokenizer import Tokenizer

HELDOUT_PATTERN = "*heldout.jsonl"


def find_heldout(folder: Path) -> Path:
    """The held-out set in `folder`.

    Raises:
        DatasetError: there is none, or more than one.
    """
    found = sorted(Path(folder).glob(HELDOUT_PATTERN))
    if len(found) != 1:
        what = f"{len(found)} held-out sets" if found else "no held-out set"
        raise DatasetError(
            f"{folder} has {what}" + "".join(f" {path.name}" for path in found),
            expected=f"one file {HELDOUT_PATTERN}",
            run="python -m coremill.data.make_toy_kd --help",
        )
    return found[0]


def read_some(path: Path, count: int) -> list[Row]:
    """The first `count` rows of the dataset at `path`, or as many as there are.

    Raises:
        DatasetError: unreadable, malformed, or without a row.
    """
    rows = list(itertools.islice(read_rows(path), count))
    if not rows:
        raise DatasetError(
            f"{path} has no rows",
            expected="questions and answers",
            run="python -m coremill.data.make_toy_kd --help",
        )
    return rows


def conversation(row: Row, tokenizer: Tokenizer) -> list[int]:
    """The prompt's ids and the teacher's answer's ids, to the end token."""
    return [*tokenizer.encode_prompt(row.prompt), *tokenizer.encode_answer(row.teacher_text)]


def packed(rows: Sequence[Row], tokenizer: Tokenizer, seq_len: int, count: int) -> list[list[int]]:
    """`count` sequences of exactly `seq_len` tokens, each of whole conversations one after another.

    The last conversation of a sequence is cut where it is full; the next sequence begins with another one.
    Rows are used again from the first when they run out.
    """
    stream: Iterator[Row] = itertools.cycle(rows)
    sequences = []
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < seq_len:
            ids += conversation(next(stream), tokenizer)
        sequences.append(ids[:seq_len])
    return sequences
