"""A small real dataset, made by make_toy_kd once per test run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from coremill.core.config import DatasetConfig
from coremill.data.make_toy_kd import DatasetFiles, make_dataset
from coremill.data.rows import Row, read_rows
from coremill.text.student_tokenizer import Tokenizer


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetFiles:
    """128 training rows, 64 held-out rows and their tokenizer, with the default file names of the command."""
    folder = tmp_path_factory.mktemp("dataset")
    files = DatasetFiles(
        train=folder / "magic_8_ball.jsonl",
        heldout=folder / "magic_8_ball.heldout.jsonl",
        tokenizer=folder / "tokenizer.json",
    )
    make_dataset(DatasetConfig(kind="magic-8-ball", n=128, heldout_n=64, seed=8), files)
    return files


@pytest.fixture(scope="session")
def tokenizer(dataset: DatasetFiles) -> Tokenizer:
    return Tokenizer.load(dataset.tokenizer)


@pytest.fixture(scope="session")
def rows(dataset: DatasetFiles) -> list[Row]:
    return list(read_rows(dataset.train))


@pytest.fixture(scope="session")
def heldout_rows(dataset: DatasetFiles) -> list[Row]:
    return list(read_rows(dataset.heldout))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Run the rest of each test on two threads; training sets the number of threads itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
