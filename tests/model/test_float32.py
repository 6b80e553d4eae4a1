"""float32's own error: other orders of sums, float64, and the bound for a model with sharp attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.sharp import sharpened

from coremill.core.config import ModelArch, ModelConfig
from coremill.core.contract import TokenizerRef
from coremill.model.checkpoint import Checkpoint, checkpoint_of
from coremill.model.float32 import Float32Bounds
from coremill.model.reference import Reference
from coremill.model.student import HALT_LOGITS, LOGITS, new_student

TOKENIZER = TokenizerRef(vocab_size=96, digest="sha256:" + 64 * "0")
SEQUENCES = [[(7 * place + start) % 96 for place in range(48)] for start in (1, 5)]


def a_model(**options: object) -> Checkpoint:
    arch = ModelArch(use_halt_head=True, tie_embeddings=bool(options.pop("tied", True)))
    config = ModelConfig(
        vocab_size=96, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=64,
        arch=arch, **options,
    )  # fmt: skip
    student = new_student(config, seed=3)
    with torch.no_grad():
        for parameter in student.parameters():  # norms and biases that differ from one another
            if parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return checkpoint_of(student, model_type="llama", step=0, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    "options", [{}, {"tied": False, "qk_norm": True}, {"attention_bias": "qkvo", "mlp_bias": True}]
)
def test_another_order_of_the_channels_is_the_same_model(options: dict[str, object]) -> None:
    reference = Reference.of(a_model(**options))
    expected = reference.in_float64().run(SEQUENCES[0])
    other = reference.reordered(1, angles=torch.float64).run(SEQUENCES[0])
    assert other.keys() == {LOGITS, HALT_LOGITS}
    for name, values in other.items():
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-5 * np.abs(expected[name]).max())
    assert not np.array_equal(other[LOGITS], reference.run(SEQUENCES[0])[LOGITS])  # the sums are in another order


def test_float32_is_measured_only_where_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = Float32Bounds(Reference.of(a_model()), SEQUENCES)
    with monkeypatch.context() as patch:
        patch.setattr(Reference, "in_float64", None)
        for relative_err in (0.0, 1e-5, 1.1e-3, float("nan")):
            assert bounds.bound(LOGITS, relative_err) == (1e-5, None)
    assert bounds.bound(LOGITS, 2e-5) == (1e-5, None)
    assert 1e-8 < bounds.own_err[LOGITS] < 2.5e-6


def test_sharp_attention_has_a_wider_bound(caplog: pytest.LogCaptureFixture) -> None:
    plain, sharp = (
        Float32Bounds(Reference.of(sharpened(a_model(), factor)), SEQUENCES).own_err[LOGITS] for factor in (1, 30)
    )
    assert sharp > 10 * plain
    assert "float32's own error in this model: " in caplog.text


def test_a_value_that_is_not_a_number_has_the_usual_bound() -> None:
    checkpoint = a_model()
    checkpoint.state_dict["norm.weight"][0] = torch.nan
    bounds = Float32Bounds(Reference.of(checkpoint), SEQUENCES)
    assert bounds.bound(LOGITS, 1e-4) == (1e-5, None)
    assert np.isnan(bounds.own_err[LOGITS])
