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

_BLOCK_ROWS = 256
"""Queries that are computed at a time, with the keys that they see. The number of keys is rounded up to a multiple,
so that the same keys are summed in the same order whatever comes after them."""


@op("scaled_dot_product_attention", since=18, native=True)
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """scaled_dot_product_attention: softmax(Q · Kᵀ / sqrt(E) + mask) · V.

    query (B, …, L, E), key (B, …, S, E), value (B, …, S, EV). A bool mask keeps where it is true, any other is
    added. Computed in fp32 as one operation: only its result is rounded. Keys after the last one that a block of
    queries sees are left out: half of the work of a causal mask, and most of an almost empty cache.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    wide_query = query.to(wide)
    if attn_mask is None:
        return F.scaled_dot_product_attention(wide_query, key.to(wide), value.to(wide)).to(query.dtype)
    blocks = _blocks(wide_query, key, value, attn_mask)
    if blocks is None:
        mask = attn_mask if attn_mask.dtype is torch.bool else attn_mask.to(wide)
        mixed = F.scaled_dot_product_attention(wide_query, key.to(wide), value.to(wide), attn_mask=mask)
        return mixed.to(query.dtype)
    most = max(count for _, _, count in blocks)
    key, value = key[..., :most, :].to(wide), value[..., :most, :].to(wide)
    parts = [
        F.scaled_dot_product_attention(
            wide_query[..., rows, :],
            key[..., :count, :],
            value[..., :count, :],
            attn_mask=added[:, :count].to(wide),
        ).to(query.dtype)
        for rows, added, count in blocks
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> list[tuple[slice, Tensor, int]] | None:
    """Return blocks of queries: their rows, what is added to their scores (rows or 1, S), and the keys they read.

    The weights of other keys are 0 in the type of `query`. A weight is at most exp(score − the row's largest
    score), and no score is beyond the longest query times the longest key, over sqrt(E). None if the mask differs
    between heads, or if a value is not finite: 0 times it is not 0.
    """
    n_queries, n_keys = query.shape[-2], key.shape[-2]
    if mask.dim() < 2 or mask.shape[-1] != n_keys or mask.shape[-2] not in (1, n_queries):
        return None
    if not mask.numel() or mask.numel() != mask.shape[-2] * n_keys:
        return None
    limits = torch.finfo(query.dtype)
    underflow = math.log(limits.tiny) + math.log(limits.eps) - 1  # of exp, below the smallest subnormal number
    spread = 2 * float(_longest(query) * _longest(key)) / math.sqrt(query.shape[-1])
    if not math.isfinite(spread) or not bool(torch.stack(torch.aminmax(value)).isfinite().all()):
        return None
    table = mask.reshape(-1, n_keys)
    blocks = []
    for start in range(0, len(table), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS) if len(table) > 1 else slice(None)
        added = table[start : start + _BLOCK_ROWS]
        if added.dtype is torch.bool:
            added = torch.zeros(added.shape, dtype=query.dtype, device=added.device).masked_fill(~added, -math.inf)
        largest = added.amax(0).to(query.dtype)  # of each key
        least = float(added.amax(1).amin())  # of the row whose largest is the smallest
        is_hidden = largest - least + spread < underflow  # false where one is not a number
        seen = int((~is_hidden).nonzero()[-1]) + 1
        blocks.append((rows, added, min(n_keys, -(-seen // _BLOCK_ROWS) * _BLOCK_ROWS)))
    return blocks


def _longest(vectors: Tensor) -> Tensor:
    """The largest Euclidean norm of the vectors (…, E), in fp32 at least."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    longest: Tensor = vectors.norm(dim=-1, dtype=dtype).amax()
    return longest
