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

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coremill.core.config import ModelConfig
from coremill.model.rope import rotary_tables
from coremill.model.student import each

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

    def __init__(self, *shape: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))
        self.register_buffer("root_eps", torch.full((1, 1, 1), eps**0.5))
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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.d_ff = config.d_ff
        c, q_size, eps = config.d_model, config.n_heads * config.head_dim, config.norm_eps
        n_rotated = config.n_heads + config.n_kv_heads
        self.input_norm = ScaledRMSNorm(c, eps=eps)
        self.qkv = _linear(c, (n_rotated + config.n_kv_heads) * config.head_dim, config.attention_bias != "none")
        self.qk_norm = ScaledRMSNorm(n_rotated, 1, config.head_dim, eps=eps) if config.qk_norm else None
        self.out = _linear(q_size, c, config.attention_bias == "qkvo")
        self.post_norm = ScaledRMSNorm(c, eps=eps)
        self.gate_up = _linear(c, 2 * config.d_ff, config.mlp_bias)
        self.down = _linear(config.d_ff, c, config.mlp_bias)

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

    Its weights are on torch's "meta" device until :meth:`set_weights` sets them. Its tables have values.

    Args:
        positions: how many positions the tables cover: the longest T, or S if that is more.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor
    masked: Tensor

    def __init__(self, config: ModelConfig, positions: int) -> None:
        super().__init__()
        self.n_kv_heads, self.head_dim = config.n_kv_heads, config.head_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model, device="meta")
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layers))
        self.norm = ScaledRMSNorm(config.d_model, eps=config.norm_eps)
        head = torch.empty(config.vocab_size, config.d_model, device="meta")
        self.lm_head = self.embed_tokens.weight if config.arch.tie_embeddings else nn.Parameter(head)
        self.halt_head = _linear(config.d_model, 2, False) if config.arch.use_halt_head else None
        # One longer than the longest sequence: if T can equal the table's length, torch.export specialises T to
        # that length, and the exported program runs at no other.
        cos, sin = rotary_tables(config, torch.arange(positions + 1))
        half = config.head_dim // 2
        self.register_buffer("cos", cos)
        # The sign of the rotation, (-second, first), is in the table: one operation less per layer.
        self.register_buffer("sin", torch.cat((-sin[:, :half], sin[:, half:]), dim=1))
        self.register_buffer("positions", torch.arange(positions + 1, dtype=torch.int32))
        self.register_buffer("masked", torch.full((1, 1), MASKED_SCORE))

    def set_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Decoder:
        """Set parameters to tensors, which are not copied, and return this decoder.

        Args:
            weights: as :func:`decoder_weights` yields them, in any type. A tied head is the embedding.
        """
        by_name = dict(self.named_parameters(remove_duplicate=False))
        owners = [(module, name) for module in self.modules() for name, _ in module.named_parameters(recurse=False)]
        new = {id(by_name[name]): nn.Parameter(value, requires_grad=False) for name, value in weights}
        for module, name in owners:
            setattr(module, name, new[id(getattr(module, name))])
        return self

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


def _linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, device="meta")


# --- the weights ------------------------------------------------------------------------------------


def decoder_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of :class:`Decoder` by name, each in the type of `weights`.

    Joined projections are copies, made when they are yielded; the others are the tensors of `weights`.

    Args:
        weights: the model's tensors by the student's names.
    """
    yield "embed_tokens.weight", weights["embed_tokens.weight"]
    for index in range(config.n_layers):
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        for name, value in _layer_weights(config, own):
            yield prefix + name, value
    yield "norm.weight", weights["norm.weight"]
    if not config.arch.tie_embeddings:
        yield "lm_head", weights["lm_head.weight"]
    if config.arch.use_halt_head:
        yield "halt_head.weight", weights["halt_head.weight"]


def _layer_weights(config: ModelConfig, layer: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "input_norm.weight", layer["input_layernorm.weight"]
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in layer:
            q, k, v = (layer[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
            yield f"qkv.{kind}", torch.cat([_by_group(q, config), k, v])
    if config.qk_norm:
        norms = [layer["self_attn.q_norm.weight"]] * config.n_heads
        norms += [layer["self_attn.k_norm.weight"]] * config.n_kv_heads
        yield "qk_norm.weight", torch.stack(norms).unsqueeze(1)  # (H + K, 1, D)
    # The columns are in the order of the query heads here.
    yield "out.weight", _by_group(layer["self_attn.o_proj.weight"].T, config).T.contiguous()
    yield "post_norm.weight", layer["post_attention_layernorm.weight"]
    for kind in ("weight", "bias"):
        if f"mlp.gate_proj.{kind}" in layer:
            yield f"gate_up.{kind}", torch.cat([layer[f"mlp.{name}_proj.{kind}"] for name in ("gate", "up")])
            yield f"down.{kind}", layer[f"mlp.down_proj.{kind}"]
    if "self_attn.o_proj.bias" in layer:
        yield "out.bias", layer["self_attn.o_proj.bias"]


def _by_group(rows: Tensor, config: ModelConfig) -> Tensor:
    """Reorder rows of the query projection (H·D, …), from grouped by key/value head to group by group."""
    group = config.n_heads // config.n_kv_heads
    heads = rows.view(config.n_kv_heads, group, config.head_dim, *rows.shape[1:])
    return heads.transpose(0, 1).reshape(rows.shape)
