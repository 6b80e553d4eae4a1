"""Rotary position embeddings: the frequencies of a model, with the scalings that extend its context.

RoPE: Su et al. 2021, arXiv:2104.09864, in the rotate-half layout: pair i of a head is (x[i], x[i + D/2]), and is
rotated by position · θ^(-2i/D). D is the head size. Angles are computed in float64: at position 8,192 the error of
a float32 angle is already 5e-4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coremill.core.config import FrequencyFactors, LinearScaling, Llama3Scaling, ModelConfig, YarnScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Return the radians per position of each pair, after the model's scaling: (D/2,) float64."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    plain = config.rope_theta ** -(half / config.head_dim)  # (D/2,)
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, FrequencyFactors):
        return plain / torch.tensor(scaling.factors, dtype=torch.float64)
    if isinstance(scaling, Llama3Scaling):
        return _llama3(plain, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(plain, scaling, theta=config.rope_theta)
    return plain


def attention_factor(config: ModelConfig) -> float:
    """Return the factor of cos and sin: 1, except for YaRN; attention scores grow by its square."""
    scaling = config.rope_scaling
    return scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0


def rotary_tables(
    config: ModelConfig, positions: Tensor, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles of each position: (positions, D) float32, with equal halves of D.

    Args:
        dtype: the type of the frequencies and angles; other programs compute them in float32.
    """
    frequencies = inverse_frequencies(config).to(positions.device, dtype)  # (D/2,)
    angles = positions.to(dtype).unsqueeze(1) * frequencies
    angles = torch.cat((angles, angles), dim=1)  # (positions, D)
    factor = attention_factor(config)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Return the attention factor that YaRN's authors recommend: 0.1 · ln(factor) + 1 (section 3.4).

    `mscale` weights the logarithm, in models that set it.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1's rule: `apply_scaling` in Meta's llama-models, models/llama3/reference_impl/model.py."""
    turns = scaling.original_max_seq_len * plain / (2 * math.pi)  # in the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return _blend(plain, scaling.factor, kept.clamp(0, 1))


def _yarn(plain: Tensor, scaling: YarnScaling, *, theta: float) -> Tensor:
    """YaRN's "NTK-by-parts", section 3.2: a ramp over the dimensions between two numbers of rotations."""
    n = len(plain)

    def dimension(turns: float) -> float:
        """Return the index of the pair that makes that many rotations in the original context; not rounded."""
        return n * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / math.log(theta)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # As in the reference implementation, the upper bound is D - 1, although a head has D/2 pairs.
    low, high = max(low, 0), min(high, 2 * n - 1)
    width = high - low if high != low else 0.001  # as in the reference: a ramp of no width is a step
    ramp = (torch.arange(n, dtype=torch.float64) - low) / width
    return _blend(plain, scaling.factor, 1 - ramp.clamp(0, 1))


def _blend(plain: Tensor, factor: float, kept: Tensor) -> Tensor:
    """Return `kept` (D/2,) parts of the plain frequency and the rest of the interpolated one."""
    return plain * kept + plain / factor * (1 - kept)
