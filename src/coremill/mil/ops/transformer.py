"""Attention.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS18.transformers`.

Legend: L queries, S keys, E size of a query and of a key, EV of a value.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from coremill.mil.ops.registry import op

_LEAST_CAUSAL = 1024
"""Number of queries from which inspecting the mask costs less than a causal kernel saves (half of the work)."""

_BLOCK_ROWS = 256
"""Rows of a mask that are inspected at a time."""


@op("scaled_dot_product_attention", since=18)
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """scaled_dot_product_attention: softmax(Q · Kᵀ / sqrt(E) + mask) · V.

    query (B, …, L, E), key (B, …, S, E), value (B, …, S, EV). A bool mask keeps where it is true, any other is
    added. Computed in fp32 as one operation: only its result is rounded.
    """
    if attn_mask is not None and _is_causal(query, key, attn_mask):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


def _is_causal(query: Tensor, key: Tensor, mask: Tensor) -> bool:
    """Whether `mask` has exactly the effect of a causal mask for these queries and keys.

    It must not change the scores up to the diagonal, and must lower the others so far that their weights are
    0. A weight is exp(score − the row's largest score); no score is beyond the longest query times the longest key,
    and the diagonal's is among those that are seen.
    """
    length = mask.shape[-1]
    if length < _LEAST_CAUSAL or mask.shape[-2] != length or mask.numel() != length * length:
        return False
    if query.shape[-2] != length or key.shape[-2] != length:  # a mask may be broadcast
        return False
    largest_hidden = _largest_hidden(mask.reshape(length, length))
    if largest_hidden is None:
        return False
    limits = torch.finfo(query.dtype)
    underflow = math.log(limits.tiny) + math.log(limits.eps) - 1  # of exp, below the smallest subnormal number
    largest_score = float(_longest(query) * _longest(key)) / math.sqrt(query.shape[-1])
    return largest_hidden + 2 * largest_score < underflow  # false where one is not a number


def _largest_hidden(mask: Tensor) -> float | None:
    """The largest value that `mask` (L, L) adds after the diagonal; None if it changes a score up to the diagonal.

    By rows, because a copy of the mask may need more memory than the attention itself.
    """
    largest, is_bool = -math.inf, mask.dtype is torch.bool
    for start in range(0, len(mask), _BLOCK_ROWS):
        rows = mask[start : start + _BLOCK_ROWS]
        added = torch.zeros_like(rows, dtype=torch.float32).masked_fill(~rows, -math.inf) if is_bool else rows
        is_hidden = torch.ones_like(added[:, start:], dtype=torch.bool).triu(1)  # (rows, L - start)
        if added[:, :start].any() or added[:, start:].masked_fill(is_hidden, 0.0).any():
            return None
        largest = max(largest, float(added[:, start:].masked_fill(~is_hidden, -math.inf).max()))
    return largest


def _longest(vectors: Tensor) -> Tensor:
    """The largest Euclidean norm of the vectors (…, E)."""
    longest: Tensor = vectors.norm(dim=-1).amax()
    return longest
