"""The decoding loop: every backend that answers questions uses :func:`generate`.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Logits: TypeAlias = "npt.NDArray[np.float32] | npt.NDArray[np.float64]"
"""(V,)."""

NextLogits = Callable[[list[int]], Logits]
"""Returns the logits of the token after the given ones."""

Sampler = Callable[[Logits], int]


def generate(
    next_logits: NextLogits,
    prompt: list[int],
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    sampler: Sampler,
) -> list[int]:
    """Continue `prompt` token by token until a stop id or `max_new_tokens`.

    Returns:
        The new tokens, with the stop id if one ended the loop.

    Raises:
        ValueError: an empty prompt, `max_new_tokens` below 1, or logits that are not a vector of numbers.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_new_tokens:
        tokens.append(sampler(next_logits(tokens)))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


def greedy(logits: Logits) -> int:
    """Return the id with the highest logit; on a tie, the lowest of them."""
    return int(np.argmax(_checked(logits)))


class TemperatureSampler:
    """Draws from softmax(logits / temperature); the same seed and logits give the same draws.

    Args:
        temperature: above 0; 1 is the model's own distribution.
        seed: seeds numpy's PCG64.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, found {temperature}")
        self._temperature = temperature
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: Logits) -> int:
        scaled = _checked(logits).astype(np.float64) / self._temperature
        cumulative = np.cumsum(np.exp(scaled - scaled.max()))
        # Strictly below the total (random() is below 1): a trailing id of probability 0 is never drawn.
        threshold = self._random.random() * cumulative[-1]
        return int(np.searchsorted(cumulative, threshold, side="right"))


def _checked(logits: Logits) -> Logits:
    """Return `logits`; a ValueError unless they are a vector with a finite maximum and without NaN."""
    if logits.ndim != 1 or logits.size == 0:
        raise ValueError(f"logits must be a vector, found shape {logits.shape}")
    if not np.isfinite(logits.max()):  # the maximum of values with a NaN is NaN
        raise ValueError("logits contain NaN or +inf, or are all -inf")
    return logits
