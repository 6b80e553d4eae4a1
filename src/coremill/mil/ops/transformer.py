"""Attention.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS18.transformers`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from coremill.mil.ops.registry import op


@op("scaled_dot_product_attention", since=18)
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """scaled_dot_product_attention: softmax(Q · Kᵀ / sqrt(E) + mask) · V.

    query (B, …, L, E), key (B, …, S, E), value (B, …, S, EV). A bool mask keeps where it is true, any other is
    added. Computed in fp32 as one operation: only its result is rounded.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
