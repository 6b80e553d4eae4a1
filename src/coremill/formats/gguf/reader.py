"""Weights in GGUF files: architectures llama (also used for Mistral), qwen2 and qwen3.

Keys of metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the `gguf` package's constants.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from coremill.core.config import FrequencyFactors, LinearScaling, ModelConfig, RopeScaling, YarnScaling
from coremill.core.contract import ModelArch
from coremill.core.errors import CheckpointContentError, UnsupportedModelError
from coremill.formats.gguf_file import GgufFile
from coremill.formats.source import TensorsOnDemand, WeightsSource, by_elements, check_shapes, gguf_name
from coremill.model.rope import yarn_attention_factor
from coremill.model.student import parameter_shapes

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"
_EXPECTED = f"a GGUF file of one of the architectures {', '.join(ARCHITECTURES)}"
_FLOATS = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
_READ = frozenset(
    {
        "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "attention.sliding_window",
        "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor",
        "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
        "expert_count", "expert_used_count",
    }
)  # fmt: skip
"""The supported keys of an architecture. Any other key might change what the model computes."""


class GgufWeights(WeightsSource):
    """The weights of a GGUF file."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._open(path)
        self.file = GgufFile(path)
        facts = _Facts(self.file)
        for name, tensor in self.file.tensors.items():
            if not _is_readable(tensor.kind):
                raise UnsupportedModelError(
                    f"{path}: {name} is of type {tensor.kind.name}, which the gguf package does not dequantise",
                    expected="floats, or a type that gguf.quants.dequantize handles",
                )
        self.model_type = facts.architecture
        self.config = _config(facts)
        self.notes = ()
        self._permuted = facts.architecture == "llama"
        names = {gguf_name(name): name for name in parameter_shapes(self.config)} if facts.plausible else {}
        self._names = {names.get(name, name): name for name in self.file.tensors if name != ROPE_FACTORS}
        shapes = {name: self.file.tensors[theirs].shape for name, theirs in self._names.items()}
        check_shapes(self.config, shapes, where=str(path))

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def dtypes(self) -> tuple[str, ...]:
        counts: Counter[str] = Counter()
        for tensor in self.file.tensors.values():
            counts[tensor.kind.name] += math.prod(tensor.shape)
        return by_elements(counts)

    @property
    def size_bytes(self) -> int:
        return sum(self._read_bytes(name) for name in self._names)

    def kind(self, name: str) -> gguf.GGMLQuantizationType:
        """The type that the parameter `name` is stored as."""
        return self.file.tensors[self._names[name]].kind

    def _read_bytes(self, name: str) -> int:
        tensor = self.file.tensors[self._names[name]]
        return math.prod(tensor.shape) * int(_FLOATS.get(tensor.kind, torch.float32).itemsize)

    def _is_permuted(self, name: str) -> bool:
        return self._permuted and (".q_proj." in name or ".k_proj." in name)

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.tensors.items()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by the student's names, each read when it is looked up."""
        return TensorsOnDemand(self._names, self._tensor)

    def _tensor(self, name: str) -> Tensor:
        tensor = self.file.tensors[self._names[name]]
        if (dtype := _FLOATS.get(tensor.kind)) is not None:
            value = torch.from_numpy(self.file.raw(self._names[name])).view(dtype).view(tensor.shape)
        else:
            value = torch.from_numpy(self.file.dequantized(self._names[name]))
        if self._is_permuted(name):
            n_heads = self.config.n_heads if ".q_proj." in name else self.config.n_kv_heads
            value = from_interleaved(value, n_heads)
        return value


def from_interleaved(value: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of Q or K from the order of GGUF's `llama`, whose RoPE rotates neighbours, to rotate-half's.

    Pair i of a head is in rows (2i, 2i + 1) there and (i, i + D/2) here.

    Args:
        value: (n_heads · D, ...), a weight or a bias.
    """
    size = value.shape[0] // n_heads
    return value.reshape(n_heads, size // 2, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def to_interleaved(value: Tensor, n_heads: int) -> Tensor:
    """The inverse of :func:`from_interleaved`."""
    size = value.shape[0] // n_heads
    return value.reshape(n_heads, 2, size // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _is_readable(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the gguf package can dequantise `kind`; one block of zeros is tried."""
    if kind in _FLOATS:
        return True
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class _Facts:
    """The metadata of an architecture, with their types checked.

    Raises:
        UnsupportedModelError: the architecture or a key of it is not supported.
        CheckpointContentError: from the methods, for a value that is missing or of another type.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.where = str(file.path)
        self.architecture = self._architecture()
        unknown = sorted(
            key
            for key in file.metadata
            if key.startswith(f"{self.architecture}.") and key.split(".", 1)[1] not in _READ
        )
        if unknown:
            raise UnsupportedModelError(
                f"{self.where}: {', '.join(unknown)} is set, which coremill does not support",
                expected="a model without it",
            )

    def _architecture(self) -> str:
        metadata = self.file.metadata
        if (found := metadata.get("general.architecture")) not in ARCHITECTURES:
            raise UnsupportedModelError(f"{self.where}: the architecture {found!r}", expected=_EXPECTED)
        if (kind := metadata.get("general.type", "model")) != "model":
            raise UnsupportedModelError(f"{self.where}: a GGUF file of type {kind!r}", expected="a model")
        if (parts := metadata.get("split.count", 1)) != 1:
            raise UnsupportedModelError(
                f"{self.where}: one of {parts} parts of a model", expected="the parts merged into one file",
                run="llama-gguf-split --merge FIRST_PART MERGED",
            )  # fmt: skip
        return str(found)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"{self.architecture}.{key} is {'missing' if value is None else repr(value)}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int):
            raise self.error(f"{self.architecture}.{key} is {value!r}")
        return value

    def text(self, key: str, default: str) -> str:
        return str(self.file.metadata.get(f"{self.architecture}.{key}", default))

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.metadata

    @property
    def plausible(self) -> bool:
        """Whether the file has enough tensors for its layers; otherwise listing a model's names might take long."""
        return self.integer("block_count") <= len(self.file.tensors)

    def error(self, found: str) -> CheckpointContentError:
        return CheckpointContentError(f"{self.where}: {found}", expected="the metadata of a complete model")


def _config(facts: _Facts) -> ModelConfig:
    tensors = facts.file.tensors
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise facts.error("token_embd.weight is missing, or is not a matrix")
    d_model, n_heads = facts.integer("embedding_length"), facts.integer("attention.head_count")
    max_seq_len = facts.integer("context_length")
    head_size = facts.integer("attention.key_length", d_model // n_heads if n_heads else 0)
    _check_supported(facts, head_size=head_size, max_seq_len=max_seq_len)
    biased = [name for name in "qkv" if f"blk.0.attn_{name}.bias" in tensors]
    try:
        return ModelConfig(
            vocab_size=tensors["token_embd.weight"].shape[0],
            d_model=d_model,
            n_layers=facts.integer("block_count"),
            n_heads=n_heads,
            n_kv_heads=facts.integer("attention.head_count_kv", n_heads),
            head_size=None if head_size * n_heads == d_model else head_size,
            d_ff=facts.integer("feed_forward_length"),
            max_seq_len=max_seq_len,
            rope_theta=facts.number("rope.freq_base", 10_000.0),
            rope_scaling=_rope_scaling(facts, max_seq_len=max_seq_len),
            norm_eps=facts.number("attention.layer_norm_rms_epsilon"),
            attention_bias="none" if not biased else "qkvo" if "blk.0.attn_output.bias" in tensors else "qkv",
            mlp_bias="blk.0.ffn_up.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
            arch=ModelArch(use_halt_head=False, tie_embeddings="output.weight" not in tensors),
        )
    except ValueError as failure:
        raise facts.error(str(failure)) from failure


def _check_supported(facts: _Facts, *, head_size: int, max_seq_len: int) -> None:
    if (experts := facts.integer("expert_count", 0)) > 0:
        raise UnsupportedModelError(f"{facts.where}: a mixture of {experts} experts", expected="a dense model")
    window = facts.integer("attention.sliding_window", 0)
    if 0 < window < max_seq_len:
        raise UnsupportedModelError(
            f"{facts.where}: a sliding window of {window} positions in a context of {max_seq_len}",
            expected="attention over the whole context",
        )
    if (values := facts.integer("attention.value_length", head_size)) != head_size:
        raise UnsupportedModelError(
            f"{facts.where}: heads of {head_size} for keys and {values} for values", expected="heads of one size"
        )
    if (rotated := facts.integer("rope.dimension_count", head_size)) != head_size:
        raise UnsupportedModelError(
            f"{facts.where}: RoPE on {rotated} of a head's {head_size} dimensions", expected="RoPE on all of them"
        )


def _rope_scaling(facts: _Facts, *, max_seq_len: int) -> RopeScaling | None:
    """The scaling as llama.cpp reads it: a factor without a type is linear, and `rope_freqs.weight` has
    divisors."""
    factor = facts.number("rope.scaling.factor", facts.number("rope.scale_linear", 0.0))
    kind = facts.text("rope.scaling.type", "linear" if factor else "none")
    if kind != "yarn" and (factor_of_attention := facts.number("rope.scaling.attn_factor", 1.0)) != 1:
        raise UnsupportedModelError(
            f"{facts.where}: RoPE's attention factor {factor_of_attention} with the scaling {kind!r}",
            expected="yarn",
        )
    factors = facts.file.tensors.get(ROPE_FACTORS)
    scaling: RopeScaling | None = None
    if kind == "yarn":
        scaling = YarnScaling(
            factor=factor,
            original_max_seq_len=facts.integer("rope.scaling.original_context_length", max_seq_len),
            beta_fast=facts.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=facts.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=facts.number("rope.scaling.attn_factor", 1.0) * yarn_attention_factor(factor),
        )
    elif kind == "linear":
        scaling = LinearScaling(factor=factor) if factor not in (0, 1) else None
    elif kind != "none":
        raise UnsupportedModelError(f"{facts.where}: RoPE scaling {kind!r}", expected="none, linear or yarn")
    if factors is None:
        return scaling
    if scaling is not None:
        raise UnsupportedModelError(
            f"{facts.where}: RoPE scaling {kind!r} and {ROPE_FACTORS}", expected="one of them"
        )
    values = facts.file.dequantized(ROPE_FACTORS).reshape(-1).tolist()
    return None if all(value == 1 for value in values) else FrequencyFactors(factors=tuple(values))
