"""A small Magic 8 Ball dataset and its tokenizer, made once by the command for all tests of a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from coremill.data.make_toy_kd import main
from coremill.data.rows import Row, read_rows
from coremill.text.student_tokenizer import Tokenizer


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    arguments = ["--out", str(folder / "ball.jsonl"), "--n", "2048", "--heldout-n", "512", "--magic-8-ball"]
    assert main(arguments) == 0
    return folder / "ball.jsonl"


@pytest.fixture(scope="session")
def tokenizer(dataset: Path) -> Tokenizer:
    return Tokenizer.load(dataset.with_name("tokenizer.json"))


@pytest.fixture(scope="session")
def train_rows(dataset: Path) -> list[Row]:
    return list(read_rows(dataset))


@pytest.fixture(scope="session")
def heldout_rows(dataset: Path) -> list[Row]:
    return list(read_rows(dataset.with_name("ball.heldout.jsonl")))
