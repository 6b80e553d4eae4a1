"""Frequencies, compared with independent implementations of the published formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coremill.core.config import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from coremill.core.contract import ModelArch
from coremill.core.plain import Plain
from coremill.model.rope import attention_factor, inverse_frequencies, rotary_tables, yarn_attention_factor


def config(scaling: RopeScaling | None, *, head_size: int = 64, theta: float = 1e4) -> ModelConfig:
    return ModelConfig(
        vocab_size=8,
        d_model=64,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_size=head_size,
        d_ff=8,
        max_seq_len=64,
        rope_theta=theta,
        rope_scaling=scaling,
        arch=ModelArch(use_halt_head=False, tie_embeddings=True),
    )


def test_frequencies_without_scaling() -> None:
    assert inverse_frequencies(config(None, head_size=4, theta=100.0)).tolist() == [1.0, 0.1]
    assert attention_factor(config(None)) == 1.0


def test_linear_scaling_divides_every_frequency() -> None:
    plain, scaled = inverse_frequencies(config(None)), inverse_frequencies(config(LinearScaling(factor=4.0)))
    assert torch.equal(scaled, plain / 4)


def test_frequency_factors_divide_each_frequency() -> None:
    factors = tuple(float(index) for index in range(1, 33))
    plain, scaled = (
        inverse_frequencies(config(None)),
        inverse_frequencies(config(FrequencyFactors(factors=factors))),
    )
    assert torch.allclose(scaled * torch.tensor(factors, dtype=torch.float64), plain, rtol=1e-15)


@given(
    factor=st.floats(1, 64),
    low=st.floats(0.5, 3),
    width=st.floats(0.1, 8),
    original=st.integers(16, 8192),
    theta=st.sampled_from([500.0, 1e4, 5e5]),
)
def test_llama3_scaling_matches_its_definition_by_wavelengths(
    factor: float, low: float, width: float, original: int, theta: float
) -> None:
    """One frequency at a time, as in Meta's reference: by wavelengths, not by rotations."""
    high = low + width
    scaling = Llama3Scaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_seq_len=original
    )
    found = inverse_frequencies(config(scaling, theta=theta))
    for index, frequency in enumerate(found.tolist()):
        plain = theta ** (-2 * index / 64)
        wavelength = 2 * math.pi / plain
        if wavelength < original / high:
            expected = plain
        elif wavelength > original / low:
            expected = plain / factor
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected = (1 - smooth) * plain / factor + smooth * plain
        assert math.isclose(frequency, expected, rel_tol=1e-12)


@given(factor=st.floats(1, 64), original=st.integers(64, 32768), theta=st.sampled_from([500.0, 1e4, 1e6]))
def test_yarn_keeps_high_frequencies_and_interpolates_low_ones(factor: float, original: int, theta: float) -> None:
    scaling = YarnScaling(factor=factor, original_max_seq_len=original, attention_factor=1.0, truncate=False)
    plain, found = inverse_frequencies(config(None, theta=theta)), inverse_frequencies(config(scaling, theta=theta))
    for before, after in zip(plain.tolist(), found.tolist(), strict=True):
        turns = original * before / (2 * math.pi)
        if turns > 32:
            assert math.isclose(after, before, rel_tol=1e-9)
        elif turns < 1:
            assert math.isclose(after, before / factor, rel_tol=1e-9)
        else:
            assert before / factor <= after * (1 + 1e-12)
            assert after <= before * (1 + 1e-12)


def test_yarn_of_qwen2_5_matches_a_calculation_by_hand() -> None:
    """Qwen2.5 at four times its context: factor 4, 32,768 positions, θ 1e6, heads of 128.

    Pairs up to floor(128 ln(32768 / 64π) / 2 ln 1e6) = 23 are kept, those from ceil(… / 2π …) = 40 divided by 4.
    """
    scaling = YarnScaling(factor=4.0, original_max_seq_len=32768, attention_factor=yarn_attention_factor(4.0))
    plain = inverse_frequencies(config(None, head_size=128, theta=1e6))
    ratio = inverse_frequencies(config(scaling, head_size=128, theta=1e6)) / plain
    assert torch.allclose(ratio[:24], torch.ones(24, dtype=torch.float64))
    assert torch.allclose(ratio[40:], torch.full((24,), 0.25, dtype=torch.float64))
    assert torch.allclose(ratio[24:40], 1 - 0.75 * torch.arange(1, 17, dtype=torch.float64) / 17)
    assert attention_factor(config(scaling, head_size=128)) == pytest.approx(1.1386294361119891)


def test_the_attention_factor_scales_both_tables() -> None:
    scaling = YarnScaling(factor=1.0, original_max_seq_len=32, attention_factor=1.5)
    positions = torch.arange(9)
    plain, scaled = rotary_tables(config(None), positions), rotary_tables(config(scaling), positions)
    for before, after in zip(plain, scaled, strict=True):
        assert torch.allclose(after, before * 1.5)
        assert after.dtype == torch.float32


@pytest.mark.parametrize(
    ("factor", "mscale", "expected"),
    [(1.0, 1.0, 1.0), (0.5, 1.0, 1.0), (math.e, 1.0, 1.1), (math.e**2, 0.5, 1.1)],
)
def test_yarn_attention_factor(factor: float, mscale: float, expected: float) -> None:
    assert yarn_attention_factor(factor, mscale) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rope_scaling": FrequencyFactors(factors=(1.0,))},
            "rope_scaling has 1 factors, and a head of size 4 has 2 frequencies",
        ),
        ({"head_size": 5}, "the head size must be even for RoPE, found 5"),
        ({"head_size": 0}, "`head_size` must be positive, found 0"),
        ({"head_size": 4, "n_kv_heads": 3}, "n_heads 2 must be a multiple of n_kv_heads 3"),
        (
            {
                "rope_theta": 1.0,
                "rope_scaling": YarnScaling(factor=2.0, original_max_seq_len=8, attention_factor=1.0),
            },
            "`rope_theta` must be more than 1 for YaRN, found 1.0",
        ),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Plain], message: str) -> None:
    sizes = {
        "vocab_size": 8,
        "d_model": 8,
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 1,
        "d_ff": 8,
        "max_seq_len": 8,
    }
    with pytest.raises(ValueError, match=f"^{message}$"):
        ModelConfig(**{**sizes, **options}, arch=ModelArch(use_halt_head=False, tie_embeddings=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(factor=0.0), "`factor` must be positive, found 0.0"),
        (lambda: FrequencyFactors(factors=(1.0, -1.0)), "`factors` must all be positive"),
        (
            lambda: Llama3Scaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_seq_len=8),
            "`low_freq_factor` 4.0 must be less than `high_freq_factor` 4.0",
        ),
        (
            lambda: YarnScaling(
                factor=2.0, original_max_seq_len=8, attention_factor=1.0, beta_fast=1.0, beta_slow=2.0
            ),
            "`beta_slow` 2.0 must be at most `beta_fast` 1.0",
        ),
    ],
)
def test_invalid_scalings_are_rejected(make: Callable[[], RopeScaling], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()
