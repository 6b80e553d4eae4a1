"""Random tensors: draws from the documented distributions, which differ from any device's draws.

A seed other than -1 starts a generator of its own in each run of the operation: a run repeats itself, in any mode
(up to the rounding of the results) and on any device, and two operations of one seed and shape draw the same. With
-1, the default, draws come from torch's generator for the CPU, which `torch.manual_seed` governs.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.random`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coremill.mil.ops.registry import Ints, OperationError, op

_UNSEEDED = -1


def _generator(seed: int) -> torch.Generator | None:
    return None if seed == _UNSEEDED else torch.Generator("cpu").manual_seed(seed)


def _uniform(shape: Ints, seed: int) -> Tensor:
    """Draws from [0, 1), fp64: the same for each mode and device."""
    draws = torch.rand(shape, generator=_generator(seed), dtype=torch.float64, device="cpu")
    return draws.to(torch.empty(()).device)


def _check_shape(shape: Ints) -> None:
    if any(size < 1 for size in shape):
        raise OperationError(f"shape {list(shape)}; every size must be above 0")


def _number(value: Tensor | None, default: float) -> Tensor:
    return torch.tensor(default, dtype=torch.float32) if value is None else value


@op("random_bernoulli", pure=False, native=True)
def random_bernoulli(prob: Tensor | None = None, *, shape: Ints, seed: int = _UNSEEDED) -> Tensor:
    """random_bernoulli: 1 with probability `prob` (by default 0.5), else 0; of the probability's type."""
    _check_shape(shape)
    prob = _number(prob, 0.5)
    if not 0 <= prob.item() <= 1:
        raise OperationError(f"prob {prob.item()}; it must be from 0 to 1")
    return (_uniform(shape, seed) < prob).to(prob.dtype)


@op("random_normal", pure=False, native=True)
def random_normal(
    mean: Tensor | None = None, stddev: Tensor | None = None, *, shape: Ints, seed: int = _UNSEEDED
) -> Tensor:
    """random_normal: draws from the normal distribution of a mean and a deviation (by default 0 and 1)."""
    _check_shape(shape)
    mean, stddev = _number(mean, 0), _number(stddev, 1)
    if not stddev.item() >= 0:
        raise OperationError(f"stddev {stddev.item()}; it must not be below 0")
    draws = torch.randn(shape, generator=_generator(seed), dtype=torch.float64, device="cpu")
    return (mean.double() + stddev.double() * draws.to(mean.device)).to(mean.dtype)


@op("random_uniform", pure=False, native=True)
def random_uniform(
    low: Tensor | None = None, high: Tensor | None = None, *, shape: Ints, seed: int = _UNSEEDED
) -> Tensor:
    """random_uniform: draws from [low, high), by default [0, 1); `low` where both are equal."""
    _check_shape(shape)
    low, high = _number(low, 0), _number(high, 1)
    if not low.item() <= high.item():
        raise OperationError(f"low {low.item()} and high {high.item()}; low must not be above high")
    width = high.double() - low.double()
    draws = (low.double() + width * _uniform(shape, seed)).to(low.dtype)
    # Rounding to a narrower type must not reach the excluded upper bound.
    return torch.minimum(draws, torch.maximum(low, torch.nextafter(high, low)))


@op("random_categorical", pure=False, native=True)
def random_categorical(x: Tensor, *, mode: str = "logits", size: int = 1, seed: int = _UNSEEDED) -> Tensor:
    """random_categorical: `size` indices along the last axis, drawn with replacement, in x's type.

    x (…, K) holds logits or, in mode "probs", probabilities, which need not sum to 1. Returns (…, size).
    """
    if mode not in ("logits", "probs"):
        raise OperationError(f"mode {mode!r}, expected logits or probs")
    if size < 1:
        raise OperationError(f"size {size}; it must be above 0")
    weights = torch.softmax(x.double(), -1) if mode == "logits" else x.double()
    cumulative = torch.cumsum(weights, -1)  # (…, K)
    total = cumulative[..., -1:]
    if not (bool((weights >= 0).all()) and bool(((total > 0) & torch.isfinite(total)).all())):
        raise OperationError(f"{mode} do not give a distribution: each must have a finite sum above 0")
    draws = _uniform((*x.shape[:-1], size), seed) * total
    # The product may round up to the total, which is past the last possible entry.
    draws = torch.minimum(draws, torch.nextafter(total, torch.zeros_like(total)))
    # The number of entries below a draw is the index of the entry that contains it.
    return torch.searchsorted(cumulative, draws, right=True).to(x.dtype)
