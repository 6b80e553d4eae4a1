"""The checkpoint's model, rewritten for conversion: few operations, safe in float16, one graph per function.

The student (`coremill.model.student`) defines what the model computes. These modules compute the same from the same
weights, and every export compares the two. They differ where a converted graph would otherwise be slow or wrong:

- **Nothing overflows in float16.** Trained models have activations of tens of thousands in a few channels, and
  their
  squares exceed float16's maximum, 65,504. :class:`ScaledRMSNorm` scales each row into [-1, 1] before it squares.
- **Few operations depend on the length.** The converter solves a symbolic equation for each reshape over a symbolic
  T. So queries, keys and values are one product and one reshape, and gate and up are one product. Query heads are
  ordered group by group, so that one concatenation repeats keys and values.
- **No division.** coremltools 9.0 computes `x / y` in float32 and `1 / x` as 1 / (x + 1e-4).
- **Constants have the model's dtype and rank**, so that a program that is cast to float16 is float16 throughout.

Legend: T tokens, S positions of the cache, V vocabulary, C d_model, H heads, K key/value heads, G = H/K heads per
key/value head, D head size, F d_ff, L layers. There is one sequence, so the batch is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coremill.model.student import Attention, Layer, RMSNorm, Student, each

MASKED_SCORE = -3.0e4
"""Added to the score of a key that must not be visible.

Finite, so that no row computes inf - inf, and well inside float16's range, ±65,504: if scores are within ±1e4, a
masked score is between -4e4 and -2e4, and its softmax weight next to any visible score is exactly 0.
"""

SMALLEST_SCALE = 2.0**-7
"""The smallest magnitude that a row is scaled by; its square is a normal float16."""


class ScaledRMSNorm(nn.Module):
    """x · w / √(mean(x²) + ε), in float16 for any x that float16 holds.

    With y = i·x, x / √(mean(x²) + ε) = y / √(mean(y²) + i²·ε) for every i > 0. Here i is about 1 / max|x|, and its
    own rounding cancels.
    """

    root_eps: Tensor
    smallest: Tensor

    def __init__(self, norm: RMSNorm, weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter((norm.weight if weight is None else weight).detach().clone())
        self.register_buffer("root_eps", torch.full((1, 1, 1), norm.eps**0.5))
        self.register_buffer("smallest", torch.full((1, 1, 1), SMALLEST_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) to (..., C)."""
        largest = torch.maximum(x.abs().amax(-1, keepdim=True), self.smallest)
        root = torch.rsqrt(largest)
        inverse = root * root
        y = x * inverse
        eps = inverse * self.root_eps
        return y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps * eps) * self.weight


class DecoderLayer(nn.Module):
    """One layer, with joined projections; see the module's docstring."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        attention = layer.self_attn
        self.n_heads, self.n_kv_heads, self.head_dim = attention.n_heads, attention.n_kv_heads, attention.head_dim
        self.input_norm = ScaledRMSNorm(layer.input_layernorm)
        self.qkv = _joined_qkv(attention)
        self.qk_norm = _joined_qk_norm(attention) if attention.qk_norm else None
        self.out = _by_group_columns(attention)
        self.post_norm = ScaledRMSNorm(layer.post_attention_layernorm)
        self.gate_up = _joined([layer.mlp.gate_proj, layer.mlp.up_proj])
        self.down = _joined([layer.mlp.down_proj])
        self.d_ff = layer.mlp.gate_proj.out_features

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (1, T, C), cos and sin (T, D) to queries (1, H, T, D), keys and values (1, K, T, D)."""
        n_rotated = self.n_heads + self.n_kv_heads
        y = self.qkv(self.input_norm(x))
        # -1 for T: with one unknown size, the target shape is a constant in the converted graph.
        y = y.view(1, -1, n_rotated + self.n_kv_heads, self.head_dim).transpose(1, 2)
        qk, v = y.split([n_rotated, self.n_kv_heads], dim=1)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        first, second = qk.chunk(2, dim=-1)
        qk = qk * cos + torch.cat((second, first), dim=-1) * sin
        q, k = qk.split([self.n_heads, self.n_kv_heads], dim=1)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q (1, H, T, D), k and v (1, K, T, D), mask (T, T) added to the scores; returns (1, H, T, D)."""
        group = self.n_heads // self.n_kv_heads
        if group > 1:
            k, v = torch.cat([k] * group, dim=1), torch.cat([v] * group, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the layer: x (1, T, C) and the output of attention (1, H, T, D) to (1, T, C)."""
        x = x + self.out(mixed.transpose(1, 2).reshape(1, -1, self.n_heads * self.head_dim))
        gate, up = self.gate_up(self.post_norm(x)).split([self.d_ff, self.d_ff], dim=-1)
        change: Tensor = self.down(F.silu(gate) * up)
        return x + change


class Decoder(nn.Module):
    """The weights and tables that all functions of a package share.

    Args:
        student: the checkpoint's model.
        positions: how many positions the tables cover: the longest T, or S if that is more.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor
    masked: Tensor

    def __init__(self, student: Student, positions: int) -> None:
        super().__init__()
        config = student.config
        self.n_kv_heads, self.head_dim = config.n_kv_heads, config.head_dim
        self.embed_tokens = student.embed_tokens
        self.layers = nn.ModuleList(map(DecoderLayer, each(Layer, student.layers)))
        self.norm = ScaledRMSNorm(student.norm)
        self.lm_head = student.embed_tokens.weight if config.arch.tie_embeddings else student.lm_head.weight
        self.halt_head = student.halt_head if config.arch.use_halt_head else None
        # One longer than the longest sequence: if T can equal the table's length, torch.export specialises T to
        # that length, and the exported program runs at no other.
        half = config.head_dim // 2
        sin = student.sin[: positions + 1]
        self.register_buffer("cos", student.cos[: positions + 1].clone())
        # The sign of the rotation, (-second, first), is in the table: one operation less per layer.
        self.register_buffer("sin", torch.cat((-sin[:, :half], sin[:, half:]), dim=1))
        self.register_buffer("positions", torch.arange(positions + 1, dtype=torch.int32))
        self.register_buffer("masked", torch.full((1, 1), MASKED_SCORE))

    def mask(self, hidden: Tensor) -> Tensor:
        """The mask to add to the scores, of `masked`'s dtype; `hidden` (bool) is True for each hidden key."""
        # A product: torch.where would expand each of its two values to the size of the mask, and a package of a
        # fixed length would store both.
        return hidden.type_as(self.masked) * self.masked

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (1, T, C) to logits (1, T, V) and, if there is a halt head, (1, T, 2)."""
        x = self.norm(x)
        logits = F.linear(x, self.lm_head)
        return (logits,) if self.halt_head is None else (logits, self.halt_head(x))


class Main(nn.Module):
    """`main`: scores every position of a sequence, `input_ids` (1, T) int32."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        decoder = self.decoder
        length = input_ids.shape[1]
        cos, sin, positions = decoder.cos[:length], decoder.sin[:length], decoder.positions[:length]
        mask = decoder.mask(positions.unsqueeze(0) > positions.unsqueeze(1))  # (T, T)
        x = decoder.embed_tokens(input_ids)
        for layer in each(DecoderLayer, decoder.layers):
            q, k, v = layer.project(x, cos, sin)
            x = layer.finish(x, layer.attend(q, k, v, mask))
        return decoder.heads(x)


class Stateful(nn.Module):
    """Base of `prefill` and `decode`: a key/value cache of S positions, (L, 1, K, S, D) each."""

    key_cache: Tensor
    value_cache: Tensor

    def __init__(self, decoder: Decoder, context: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.context = context
        shape = (len(decoder.layers), 1, decoder.n_kv_heads, context, decoder.head_dim)
        self.register_buffer("key_cache", torch.zeros(shape))
        self.register_buffer("value_cache", torch.zeros(shape))

    def write(self, layer: int, start: Tensor | int, end: Tensor | int, k: Tensor, v: Tensor) -> None:
        """Write keys and values (1, K, end - start, D) of one layer to the cache."""
        self.key_cache[layer : layer + 1, :, :, start:end] = k.unsqueeze(0)
        self.value_cache[layer : layer + 1, :, :, start:end] = v.unsqueeze(0)


class Prefill(Stateful):
    """`prefill`: reads a prompt into an empty cache and scores the token after it.

    `input_ids` (1, T) is right-padded; `length` (1,) is the number of tokens in the prompt. Keys and values of
    padding are written too: decoding overwrites each of them before it becomes visible.
    """

    def forward(self, input_ids: Tensor, length: Tensor) -> tuple[Tensor, ...]:
        decoder = self.decoder
        n = input_ids.shape[1]
        cos, sin, positions = decoder.cos[:n], decoder.sin[:n], decoder.positions[:n]
        last = length - 1
        # `last` does not change the result. It keeps the mask from being a constant, T × T, stored in the package.
        visible = torch.minimum(positions, last).unsqueeze(1)
        mask = decoder.mask(positions.unsqueeze(0) > visible)  # (T, T)
        x = decoder.embed_tokens(input_ids)
        for number, layer in enumerate(each(DecoderLayer, decoder.layers)):
            q, k, v = layer.project(x, cos, sin)
            self.write(number, 0, n, k, v)
            x = layer.finish(x, layer.attend(q, k, v, mask))
        return decoder.heads(x.index_select(1, last))


class Decode(Stateful):
    """`decode`: scores the token after `input_ids` (1, 1), which is at `position` (1,) of the cache."""

    def forward(self, input_ids: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        decoder = self.decoder
        cos, sin = decoder.cos.index_select(0, position), decoder.sin.index_select(0, position)  # (1, D)
        mask = decoder.mask((decoder.positions[: self.context] > position).unsqueeze(0))  # (1, S)
        start = position[0]
        end = start + 1
        x = decoder.embed_tokens(input_ids)
        for number, layer in enumerate(each(DecoderLayer, decoder.layers)):
            q, k, v = layer.project(x, cos, sin)
            self.write(number, start, end, k, v)
            x = layer.finish(x, self._attend(layer, number, q, mask))
        return decoder.heads(x)

    def _attend(self, layer: DecoderLayer, number: int, q: Tensor, mask: Tensor) -> Tensor:
        """q (1, H, 1, D) over the layer's cache; the G heads of a key/value head are adjacent rows."""
        group, n_kv_heads, size = layer.n_heads // layer.n_kv_heads, layer.n_kv_heads, layer.head_dim
        q = q.view(1, group, n_kv_heads, size).transpose(1, 2)  # (1, K, G, D)
        # coremltools reads a state as float32, whatever the dtype of the program.
        keys, values = self.key_cache[number].type_as(q), self.value_cache[number].type_as(q)
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(1, layer.n_heads, 1, size)


def _by_group(rows: Tensor, attention: Attention) -> Tensor:
    """Reorder rows of the query projection (H·D, …), from grouped by key/value head to group by group."""
    group = attention.n_heads // attention.n_kv_heads
    heads = rows.view(attention.n_kv_heads, group, attention.head_dim, -1)
    return heads.transpose(0, 1).reshape(rows.shape)


def _joined_qkv(attention: Attention) -> nn.Linear:
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    joined = _joined(projections)
    n_query_rows = attention.n_heads * attention.head_dim
    with torch.no_grad():
        for tensor in [joined.weight] if joined.bias is None else [joined.weight, joined.bias]:
            tensor[:n_query_rows] = _by_group(tensor[:n_query_rows].clone(), attention)
    return joined


def _by_group_columns(attention: Attention) -> nn.Linear:
    """The output projection, with its columns in the order of the query heads here."""
    joined = _joined([attention.o_proj])
    with torch.no_grad():
        joined.weight.copy_(_by_group(attention.o_proj.weight.T.contiguous(), attention).T)
    return joined


def _joined_qk_norm(attention: Attention) -> ScaledRMSNorm:
    """The norms of queries and keys as one, with a weight of (H + K, 1, D)."""
    weights: list[Tensor] = [attention.q_norm.weight] * attention.n_heads
    weights += [attention.k_norm.weight] * attention.n_kv_heads
    return ScaledRMSNorm(attention.q_norm, torch.stack(weights).unsqueeze(1))


def _joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One product for several layers of the same input: their rows, concatenated."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    has_bias = linears[0].bias is not None
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device="meta")
    joined.weight = nn.Parameter(weight)
    if has_bias:
        joined.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]))
    return joined
