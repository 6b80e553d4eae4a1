"""check_checkpoint: its output for a valid checkpoint, and the exit code for each kind of invalid one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coremill.core.command import exit_on_error
from coremill.core.contract import TokenizerRef
from coremill.data.make_toy_kd import DatasetFiles
from coremill.model.checkpoint import checkpoint_of, save_checkpoint
from coremill.model.student import new_student
from coremill.text.student_tokenizer import Tokenizer
from coremill.training.check_checkpoint import main
from coremill.training.recipe import default_recipe

MODEL = default_recipe("magic-8-ball", vocab_size=512).model


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A checkpoint with its tokenizer next to it."""
    path = tmp_path / "magic_8_ball.ckpt"
    tokenizer.save(tmp_path / "tokenizer.json")
    reference = TokenizerRef(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest)
    student = new_student(MODEL, seed=0)
    save_checkpoint(path, checkpoint_of(student, model_type="magic-8-ball", step=64, tokenizer=reference))
    return path


Change = Callable[[dict[str, Any]], None]


def outcome(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str], str]:
    """Exit code, lines on stdout, and the first line on stderr."""
    code = exit_on_error(lambda: main([str(path), *options]))
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.partition("\n")[0]


def test_a_valid_checkpoint_passes_every_check(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    n_tensors = len(new_student(MODEL, seed=0).state_dict())
    assert outcome(saved, capsys) == (
        0,
        [
            f"structure: magic-8-ball, {n_tensors} tensors, all finite, with the shapes of its config",
            "model_arch: use_halt_head True, tie_embeddings True",
            "step: 64",
            f"vocabulary: 512 tokens, the same as in {saved.with_name('tokenizer.json')}",
            "forward: logits (1, 128, 512), halt_logits (1, 128, 2), finite",
        ],
        "",
    )


def test_without_a_tokenizer_the_vocabulary_check_is_not_run(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.with_name("tokenizer.json").unlink()
    code, lines, _ = outcome(saved, capsys)
    assert code == 0
    assert lines[3] == (
        "vocabulary: not_run, there is no tokenizer.json for magic_8_ball.ckpt; give one with --tokenizer"
    )


def test_a_build_uses_the_tokenizer_of_the_dataset_stage(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training, dataset = tmp_path / "training", tmp_path / "dataset"
    training.mkdir()
    dataset.mkdir()
    checkpoint = saved.rename(training / saved.name)
    tokenizer = saved.with_name("tokenizer.json").rename(dataset / "tokenizer.json")
    code, lines, _ = outcome(checkpoint, capsys)
    assert code == 0
    assert lines[3] == f"vocabulary: 512 tokens, the same as in {tokenizer}"


def test_a_tokenizer_of_another_size_is_an_error(
    saved: Path, dataset: DatasetFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    Tokenizer.train((line for line in dataset.train.read_text().splitlines()), 400).save(other)
    code, lines, error = outcome(saved, capsys, "--tokenizer", str(other))
    assert (code, error) == (25, "vocabulary mismatch error: the tokenizer has 400 tokens, the model 512")
    assert len(lines) == 3


def change(path: Path, how: Change) -> None:
    value = torch.load(path, weights_only=True)
    how(value)
    torch.save(value, path)


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("/tmp/never",)


@pytest.mark.parametrize(
    ("how", "code", "found"),
    [
        (lambda v: v.update(schema_version="2.0"), 12, "format version error: {path}: schema_version '2.0'"),
        (lambda v: v.update(extra=Payload()), 23, "unsafe checkpoint error: {path} names posix.mkdir"),
        (
            lambda v: v.pop("model_arch"),
            24,
            "checkpoint content error: {path}: Object missing required field `model_arch` at `$`",
        ),
        (
            lambda v: v.pop("step"),
            24,
            "checkpoint content error: {path}: Object missing required field `step` at `$`",
        ),
        (lambda v: v.update(step=0), 24, "checkpoint content error: {path}: `step` is 0"),
        (
            lambda v: v["state_dict"].pop("norm.weight"),
            24,
            "checkpoint content error: {path}: `state_dict` lacks norm.weight",
        ),
        (
            lambda v: v["state_dict"]["norm.weight"].fill_(float("nan")),
            24,
            "checkpoint content error: {path}: `state_dict['norm.weight']` has 128 NaN or infinite values",
        ),
        (
            # Finite weights whose products are not finite.
            lambda v: v["state_dict"]["norm.weight"].fill_(3e38),
            24,
            "checkpoint content error: {path}: `logits` of a forward pass is (1, 128, 512) with ",
        ),
    ],
)
def test_each_kind_of_invalid_checkpoint_has_its_exit_code(
    saved: Path, capsys: pytest.CaptureFixture[str], how: Change, code: int, found: str
) -> None:
    change(saved, how)
    found_code, _, error = outcome(saved, capsys)
    assert found_code == code
    assert error.startswith(found.format(path=saved))


def test_a_truncated_checkpoint_is_unreadable(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved.write_bytes(saved.read_bytes()[:100_000])
    assert outcome(saved, capsys) == (
        22,
        [],
        f"unreadable checkpoint error: {saved} is truncated: 100000 bytes",
    )
