"""The student: a Llama-family decoder in eager PyTorch, the reference for every exported format.

Legend: B batch, T sequence length, V vocabulary, C d_model, H heads, K key/value heads, G = H/K heads per
key/value head, D head size, F d_ff.

Grouped-query attention: Ainslie et al. 2023, arXiv:2305.13245. RoPE: Su et al. 2021, arXiv:2104.09864, in the
rotate-half layout of Hugging Face's Llama, whose parameter names (without `model.`) this follows.
RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467. SwiGLU: Shazeer 2020, arXiv:2002.05202.

The options of the family (biases, a norm of queries and keys, an explicit head size) add parameters only if the
configuration sets them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coremill.core.config import ModelConfig
from coremill.model.rope import rotary_tables

M = TypeVar("M", bound=nn.Module)

LOGITS, HALT_LOGITS = "logits", "halt_logits"


def output_names(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the outputs of `Student.forward`, in order."""
    return (LOGITS, HALT_LOGITS) if config.arch.use_halt_head else (LOGITS,)


class Linear(nn.Linear):
    """A linear layer that starts at zero: random weights take seconds to draw, and a checkpoint replaces them."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """An embedding that starts at zero, as :class:`Linear` does."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def each(kind: type[M], modules: nn.ModuleList) -> Iterator[M]:
    """Yield the modules of a list with their type, which `nn.ModuleList` cannot declare."""
    for module in modules:
        assert isinstance(module, kind)
        yield module


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (..., C) to a root mean square of 1, then by `weight` (C,)."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by the angle of its position; x (B, H, T, D), cos and sin (T, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        bias = config.attention_bias != "none"
        self.q_proj = Linear(config.d_model, q_size, bias=bias)
        self.k_proj = Linear(config.d_model, kv_size, bias=bias)
        self.v_proj = Linear(config.d_model, kv_size, bias=bias)
        self.o_proj = Linear(q_size, config.d_model, bias=config.attention_bias == "qkvo")
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def _heads(self, x: Tensor, n_heads: int) -> Tensor:
        return x.view(*x.shape[:2], n_heads, self.head_dim).transpose(1, 2)  # (B, n_heads, T, D)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply causal self-attention: x (B, T, C), cos and sin (T, D); returns (B, T, C)."""
        q = self._heads(self.q_proj(x), self.n_heads)  # (B, H, T, D)
        k = self._heads(self.k_proj(x), self.n_kv_heads)  # (B, K, T, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        v = self._heads(self.v_proj(x), self.n_kv_heads)  # (B, K, T, D)
        # (B, H, T, D); with enable_gqa query head h reads key/value head h // G
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up_proj = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, C) through (B, T, F)."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = FeedForward(config)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Add attention, the half of the layer that mixes positions: x (B, T, C) to (B, T, C)."""
        attended: Tensor = self.self_attn(self.input_layernorm(x), cos, sin)
        return x + attended

    def transform(self, x: Tensor) -> Tensor:
        """Add the feed-forward, the half of the layer that treats each position alone: x (..., C) to (..., C)."""
        transformed: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + transformed

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.transform(self.attend(x, cos, sin))


class Student(nn.Module):
    """A causal decoder. Its weights start at zero; :func:`new_student` or a checkpoint sets them.

    `state_dict` contains only the weights: the rotary tables are computed from the configuration. With
    `tie_embeddings` there is no `lm_head.weight`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.arch.tie_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.arch.use_halt_head:
            self.halt_head = Linear(config.d_model, 2, bias=False)
        # One longer than the longest sequence, which the exported graphs need: see `coreml.decoder.Decoder`.
        cos, sin = rotary_tables(config, torch.arange(config.max_seq_len + 1))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Compute the logits of the token after each position.

        Args:
            input_ids: (B, T) int32 or int64, T at most `max_seq_len`; right-padded if rows differ in length.

        Returns:
            `(logits,)` or `(logits, halt_logits)`, see :func:`output_names`: (B, T, V) and (B, T, 2), float32.
            Position i of either depends only on tokens 0 to i. The halt columns are [continue, halt].

        Raises:
            ValueError: T exceeds `max_seq_len`.
        """
        last, x = self._attended(input_ids)
        return self._heads(last.transform(x))

    def score_at(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of `forward` at some positions, without the work that only the others need.

        Most tokens of a training row belong to its question and have no target. Without them, the last layer's
        feed-forward and the logits, a good third of all the work, shrink in proportion.

        Args:
            input_ids: (B, T), as for `forward`.
            positions: (M,) int64, indices into the flattened batch (B·T).

        Returns:
            `(logits,)` or `(logits, halt_logits)`: (M, V) and (M, 2).
        """
        last, x = self._attended(input_ids)
        return self._heads(last.transform(x.flatten(0, 1).index_select(0, positions)))  # of (M, C)

    def _attended(self, input_ids: Tensor) -> tuple[Layer, Tensor]:
        """Compute all that mixes positions: return the last layer, and (B, T, C) after its attention."""
        seq_len = input_ids.shape[1]
        if seq_len > self.config.max_seq_len:
            raise ValueError(f"{seq_len} tokens exceed the model's max_seq_len of {self.config.max_seq_len}")
        cos, sin = self.cos[:seq_len], self.sin[:seq_len]  # (T, D)
        x: Tensor = self.embed_tokens(input_ids)  # (B, T, C)
        *layers, last = each(Layer, self.layers)
        for layer in layers:
            x = layer(x, cos, sin)
        return last, last.attend(x, cos, sin)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map x (..., C) to logits (..., V) and, with a halt head, halt logits (..., 2)."""
        x = self.norm(x)
        unembedding = self.embed_tokens.weight if self.config.arch.tie_embeddings else self.lm_head.weight
        logits = F.linear(x, unembedding)
        return (logits, self.halt_head(x)) if self.config.arch.use_halt_head else (logits,)

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of each tensor in the `state_dict` of a model of `config`, in order.

    They are computed here because even a model on torch's "meta" device takes two seconds to import.
    """
    c, f, d = config.d_model, config.d_ff, config.head_dim
    q, kv = config.n_heads * d, config.n_kv_heads * d
    linears = {
        "self_attn.q_proj": ((q, c), config.attention_bias != "none"),
        "self_attn.k_proj": ((kv, c), config.attention_bias != "none"),
        "self_attn.v_proj": ((kv, c), config.attention_bias != "none"),
        "self_attn.o_proj": ((c, q), config.attention_bias == "qkvo"),
        "mlp.gate_proj": ((f, c), config.mlp_bias),
        "mlp.up_proj": ((f, c), config.mlp_bias),
        "mlp.down_proj": ((c, f), config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, c)}
    for layer in (f"layers.{index}" for index in range(config.n_layers)):
        shapes[f"{layer}.input_layernorm.weight"] = (c,)
        for name, (shape, biased) in linears.items():
            if name == "mlp.gate_proj":
                if config.qk_norm:
                    shapes |= {f"{layer}.self_attn.{norm}.weight": (d,) for norm in ("q_norm", "k_norm")}
                shapes[f"{layer}.post_attention_layernorm.weight"] = (c,)
            shapes[f"{layer}.{name}.weight"] = shape
            if biased:
                shapes[f"{layer}.{name}.bias"] = shape[:1]
    shapes["norm.weight"] = (c,)
    if not config.arch.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, c)
    if config.arch.use_halt_head:
        shapes["halt_head.weight"] = (2, c)
    return shapes


def new_student(config: ModelConfig, *, seed: int) -> Student:
    """Return an untrained student, in training mode; the same configuration and seed give the same weights.

    Matrices are normal with a standard deviation of 1/√(columns). That of the matrices that write into the residual
    stream is smaller by 1/√(2 · n_layers), so that the stream's variance does not grow with depth (GPT-2).
    Embeddings are normal with 2/√C. On the toy, this doubling of 1/√C reduced the held-out KL from 0.018 to 0.012
    in as many steps; four times 1/√C was no better, and a quarter gave 0.034.
    """
    student = Student(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.dim() < 2:
                continue  # the weights of norms start at 1, biases at 0
            std = parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= (2 * config.n_layers) ** -0.5
            elif name == "embed_tokens.weight":
                std *= 2
            parameter.normal_(0.0, std, generator=generator)
    return student
