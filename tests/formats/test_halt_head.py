"""The halt head in a file of its own gives the logits of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from coremill.core.config import ModelConfig
from coremill.core.contract import ModelArch, TokenizerRef
from coremill.core.errors import CheckpointContentError, OutputError
from coremill.formats.halt_head import save_halt_head
from coremill.model.checkpoint import Checkpoint, checkpoint_of
from coremill.model.student import Student, new_student


def a_student(*, halt_head: bool = True) -> Student:
    config = ModelConfig(
        vocab_size=96, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=32, max_seq_len=32,
        arch=ModelArch(use_halt_head=halt_head, tie_embeddings=True),
    )  # fmt: skip
    return new_student(config, seed=9).eval()


def of(student: Student) -> Checkpoint:
    ref = TokenizerRef(vocab_size=96, digest="sha256:0")
    return checkpoint_of(student, model_type="toy", step=1, tokenizer=ref)


def test_weight_gives_the_halt_logits_from_the_last_norm(tmp_path: Path) -> None:
    student, path = a_student(), tmp_path / "halt_head-toy.safetensors"
    save_halt_head(path, of(student))
    ((name, weight),) = load_file(path).items()
    assert (name, weight.shape, weight.dtype) == ("halt_head.weight", (2, 32), torch.float32)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    hidden = []
    student.norm.register_forward_hook(lambda module, args, out: hidden.append(out))
    with torch.no_grad():
        _, halt = student(torch.arange(20).unsqueeze(0))
    assert torch.equal(hidden[0] @ weight.T, halt)
    first = path.read_bytes()
    save_halt_head(path, of(student))
    assert path.read_bytes() == first


def test_non_contiguous_weight_gives_the_same_bytes(tmp_path: Path) -> None:
    """A checkpoint of another program may contain one."""
    checkpoint = of(a_student())
    save_halt_head(tmp_path / "a", checkpoint)
    weight = checkpoint.state_dict["halt_head.weight"]
    checkpoint.state_dict["halt_head.weight"] = weight.T.contiguous().T
    assert not checkpoint.state_dict["halt_head.weight"].is_contiguous()
    save_halt_head(tmp_path / "b", checkpoint)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_model_without_halt_head_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointContentError) as caught:
        save_halt_head(tmp_path / "a", of(a_student(halt_head=False)))
    assert caught.value.found == "the checkpoint has no halt head"
    assert not any(tmp_path.iterdir())


def test_path_of_a_directory_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not a regular file"):
        save_halt_head(tmp_path, of(a_student()))
