"""The same model as a tutorial would write it for conversion: the baseline of `benchmarks/conversion.py convert`.

Grouped-query attention with repeat_interleave, heads with view and transpose, one product per projection, RMSNorm
by its definition, a mask sliced from a triangular matrix. It has the weights of a checkpoint's student.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coremill.model.student import Layer, RMSNorm, Student, each


class TutorialNorm(nn.Module):
    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps))


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class TutorialLayer(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.attention = layer.self_attn
        self.mlp = layer.mlp
        self.input_norm = TutorialNorm(layer.input_layernorm)
        self.post_norm = TutorialNorm(layer.post_attention_layernorm)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        attention = self.attention
        batch, length, _ = x.shape
        y = self.input_norm(x)
        n_heads, n_kv_heads, size = attention.n_heads, attention.n_kv_heads, attention.head_dim
        q = attention.q_proj(y).view(batch, length, n_heads, size).transpose(1, 2)
        k = attention.k_proj(y).view(batch, length, n_kv_heads, size).transpose(1, 2)
        v = attention.v_proj(y).view(batch, length, n_kv_heads, size).transpose(1, 2)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k = k.repeat_interleave(n_heads // n_kv_heads, dim=1)
        v = v.repeat_interleave(n_heads // n_kv_heads, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attention.o_proj(mixed.transpose(1, 2).reshape(batch, length, n_heads * size))
        y = self.post_norm(x)
        change: Tensor = self.mlp.down_proj(F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))
        return x + change


class TutorialDecoder(nn.Module):
    """Token ids (1, T) to logits (1, T, V)."""

    cos: Tensor
    sin: Tensor
    mask: Tensor

    def __init__(self, student: Student, longest: int) -> None:
        super().__init__()
        self.embed_tokens = student.embed_tokens
        self.layers = nn.ModuleList(map(TutorialLayer, each(Layer, student.layers)))
        self.norm = TutorialNorm(student.norm)
        self.register_buffer("cos", student.cos[:longest].clone())
        self.register_buffer("sin", student.sin[:longest].clone())
        # A large negative number that float16 can represent; -inf would make NaNs.
        self.register_buffer("mask", torch.full((longest, longest), -3e4).triu(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        cos, sin, mask = self.cos[:length], self.sin[:length], self.mask[:length, :length]
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return F.linear(self.norm(x), self.embed_tokens.weight)
