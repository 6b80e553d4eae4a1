"""Weights in Hugging Face directories: config.json beside model.safetensors, or beside shards and their index.

Options and their defaults are those of transformers' configuration classes, for files of version 4 (`rope_theta`,
`rope_scaling`) and of version 5 (`rope_parameters`). Tensors: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coremill.core.config import LinearScaling, Llama3Scaling, ModelConfig, RopeScaling, YarnScaling
from coremill.core.contract import ModelArch
from coremill.core.errors import (
    CheckpointContentError,
    CheckpointUnreadableError,
    DocumentError,
    UnsafeCheckpointError,
    UnsupportedModelError,
)
from coremill.formats.source import (
    WeightsSource,
    by_elements,
    check_shapes,
    elements,
    huggingface_name,
    same_values,
)
from coremill.model.rope import yarn_attention_factor
from coremill.model.student import parameter_shapes

log = logging.getLogger(__name__)

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BUFFER = ".rotary_emb.inv_freq"
"""The end of a tensor's name that old files have and that follows from the configuration."""


@dataclass(frozen=True, kw_only=True)
class _Family:
    """How an architecture differs from Llama, and its defaults for what config.json leaves out."""

    attention_bias: Literal["none", "qkv", "asked"]
    """`asked`: all four projections, where `attention_bias` says so."""
    qk_norm: bool = False
    mlp_bias: bool = False
    """Whether `mlp_bias` may ask for one."""
    n_kv_heads: int | None = None
    """None: as many as there are heads."""
    head_size: int | None = None
    """None: hidden_size / num_attention_heads."""
    window: Literal["none", "always", "asked"] = "none"
    """Whether `sliding_window` holds: never, always, or where `use_sliding_window` says so."""


FAMILIES = {
    "LlamaForCausalLM": _Family(attention_bias="asked", mlp_bias=True),
    "MistralForCausalLM": _Family(attention_bias="none", n_kv_heads=8, window="always"),
    "Qwen2ForCausalLM": _Family(attention_bias="qkv", n_kv_heads=32, window="asked"),
    "Qwen3ForCausalLM": _Family(attention_bias="asked", qk_norm=True, n_kv_heads=32, head_size=128, window="asked"),
}
_WINDOW = 4096
"""The default of `sliding_window` where it is left out."""
_NOT_COMPUTED = {
    "quantization_config": "quantised weights",
    "final_logit_softcapping": "soft-capped logits",
    "attn_logit_softcapping": "soft-capped attention scores",
    "no_rope_layers": "layers without RoPE",
    "no_rope_layer_interval": "layers without RoPE",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
}
"""Keys that change what the model computes, should a model of the family have them."""


@dataclass(frozen=True, kw_only=True)
class _Located:
    """A tensor that a shard holds."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]


class HuggingFaceWeights(WeightsSource):
    format = "huggingface"

    def __init__(self, path: Path) -> None:
        self.path = path
        settings = _Settings(path / CONFIG)
        self.model_type = settings.architecture.removesuffix("ForCausalLM").lower()
        self.config = _config(settings)
        self.notes = _notes(settings)
        self._shards, listed = _shards(path)
        self._tensors = _located(self._shards)  # by the source's names
        for name, shard in listed.items():
            if name not in self._tensors or self._tensors[name].shard.name != shard:
                raise CheckpointContentError(
                    f"{path / INDEX}: {name} is not in {shard}", expected="shards that hold what the index lists"
                )
        if self.config.arch.tie_embeddings:
            self._drop_tied_head()
        plausible = self.config.n_layers <= len(self._tensors)
        known = {huggingface_name(name): name for name in parameter_shapes(self.config)} if plausible else {}
        self._names = {known.get(name, name): name for name in self._tensors}  # by the student's
        shapes = {name: self._tensors[theirs].shape for name, theirs in self._names.items()}
        check_shapes(self.config, shapes, where=str(path))

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path / CONFIG, *self._shards)

    @property
    def dtypes(self) -> tuple[str, ...]:
        counts: Counter[str] = Counter()
        for located in self._tensors.values():
            counts[located.dtype] += elements(located.shape)
        return by_elements(counts)

    @property
    def size_bytes(self) -> int:
        return sum(elements(each.shape) * DTYPES[each.dtype].itemsize for each in self._tensors.values())

    @property
    def memory_bytes(self) -> int:
        return 0  # every tensor is mapped

    def read(self) -> Iterator[tuple[str, Tensor]]:
        for place, shard in enumerate(self._shards, 1):
            names = [name for name, theirs in self._names.items() if self._tensors[theirs].shard == shard]
            log.info("%s, %d of %d: %d tensors", shard.name, place, len(self._shards), len(names))
            with _opened(shard) as file:
                for name in names:
                    yield name, file.get_tensor(self._names[name])

    def _drop_tied_head(self) -> None:
        """A tied head may be stored beside its embedding, if it is that."""
        head, embedding = "lm_head.weight", huggingface_name("embed_tokens.weight")
        if head not in self._tensors or embedding not in self._tensors:
            return
        with _opened(self._tensors[head].shard) as one, _opened(self._tensors[embedding].shard) as other:
            if not same_values(one.get_tensor(head), other.get_tensor(embedding)):
                raise CheckpointContentError(
                    f"{self.path}: {CONFIG} ties lm_head.weight to the embedding, and the two differ",
                    expected="a tied model without a head of its own, or `tie_word_embeddings` false",
                )
        del self._tensors[head]


# --- files ------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(path.read_bytes())
    except OSError as failure:
        raise DocumentError(
            f"cannot read {path}: {failure.strerror}", expected="a Hugging Face model's directory"
        ) from failure
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise DocumentError(f"{path} is not JSON: {failure}", expected="a JSON object") from failure
    if not isinstance(value, dict):
        raise DocumentError(f"{path}: found {type(value).__name__} at `$`", expected="a JSON object")
    return value


def _shards(path: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files with tensors, and what the index says is where (empty without one)."""
    if (path / INDEX).exists():
        listed = _read_json(path / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()) or not listed:
            raise DocumentError(f"{path / INDEX}: no `weight_map` at `$`", expected="the file of each tensor")
        names = sorted(set(listed.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise DocumentError(f"{path / INDEX}: the shard {outside[0]!r}", expected="files beside the index")
        if missing := [name for name in names if not (path / name).is_file()]:
            raise CheckpointUnreadableError(
                f"{path} lacks {', '.join(missing)}", expected=f"the {len(names)} shards that {INDEX} lists"
            )
        return [path / name for name in names], listed
    if (path / WHOLE).is_file():
        return [path / WHOLE], {}
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
    if pickles:
        raise UnsafeCheckpointError(
            f"{path} has its weights in {', '.join(pickles)} alone, pickles that may hold code",
            expected=f"{WHOLE}, or shards and {INDEX}; nothing of the pickle was executed",
        )
    raise CheckpointUnreadableError(f"{path} holds no weights", expected=f"{WHOLE}, or shards and {INDEX}")


@contextlib.contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    """The shard, mapped.

    Raises:
        CheckpointUnreadableError: it is unreadable, truncated or something else.
    """
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as failure:
        raise CheckpointUnreadableError(
            f"{shard} is not a whole safetensors file: {failure}", expected="a file as safetensors saves it"
        ) from failure


def _located(shards: list[Path]) -> dict[str, _Located]:
    found: dict[str, _Located] = {}
    for shard in shards:
        with _opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name.endswith(_BUFFER):
                    continue
                if name in found:
                    raise CheckpointContentError(
                        f"{shard}: {name} is in {found[name].shard.name} too", expected="each tensor once"
                    )
                part = file.get_slice(name)
                if (dtype := part.get_dtype()) not in DTYPES:
                    raise UnsupportedModelError(
                        f"{shard}: {name} is of type {dtype}", expected=f"one of {', '.join(DTYPES)}"
                    )
                found[name] = _Located(shard=shard, dtype=dtype, shape=tuple(part.get_shape()))
    return found


# --- config.json ------------------------------------------------------------------------------------


class _Settings:
    """config.json, read with the types that its values must have."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = _read_json(path)
        names = self.values.get("architectures")
        self.architecture = str(names[0]) if isinstance(names, list) and len(names) == 1 else str(names)
        if self.architecture not in FAMILIES:
            raise UnsupportedModelError(
                f"{path}: the architecture {self.architecture}", expected=f"one of {', '.join(FAMILIES)}"
            )
        self.family = FAMILIES[self.architecture]

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, value, "a whole number")
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value not in (None, True, False):
            raise self.refuse(key, value, "true or false")
        return bool(value)

    def number(self, key: str, default: float | None = None, *, among: Mapping[str, Any] | None = None) -> float:
        value = (self.values if among is None else among).get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(key, value, "a number")
        return float(value)

    def refuse(self, key: str, value: Any, expected: str) -> DocumentError:
        found = f"`{key}` is missing" if value is None else f"`{key}` is {value!r}"
        return DocumentError(f"{self.path}: {found}", expected=expected)


def _config(settings: _Settings) -> ModelConfig:
    family = settings.family
    d_model, n_heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    _refuse_what_is_not_computed(settings)
    head_size = settings.whole("head_dim", family.head_size or d_model // max(n_heads, 1))
    biased = family.attention_bias == "asked" and settings.flag("attention_bias")
    try:
        return ModelConfig(
            vocab_size=settings.whole("vocab_size"),
            d_model=d_model,
            n_layers=settings.whole("num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=settings.whole("num_key_value_heads", _default_kv_heads(settings, n_heads)),
            head_size=None if head_size * n_heads == d_model else head_size,
            d_ff=settings.whole("intermediate_size"),
            max_seq_len=settings.whole("max_position_embeddings"),
            rope_theta=_rope_theta(settings),
            rope_scaling=_rope_scaling(settings),
            norm_eps=settings.number("rms_norm_eps", 1e-6),
            attention_bias="qkvo" if biased else "qkv" if family.attention_bias == "qkv" else "none",
            mlp_bias=family.mlp_bias and settings.flag("mlp_bias"),
            qk_norm=family.qk_norm,
            arch=ModelArch(use_halt_head=False, tie_embeddings=settings.flag("tie_word_embeddings")),
        )
    except ValueError as failure:
        raise DocumentError(f"{settings.path}: {failure}", expected="the options of a possible model") from failure


def _default_kv_heads(settings: _Settings, n_heads: int) -> int:
    """transformers takes an explicit null for "as many as heads", and a missing key for the class's default."""
    missing = "num_key_value_heads" not in settings.values
    return settings.family.n_kv_heads if missing and settings.family.n_kv_heads else n_heads


def _refuse_what_is_not_computed(settings: _Settings) -> None:
    values = settings.values

    def refuse(found: str, expected: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{settings.path}: {found}", expected=expected)

    for key, what in _NOT_COMPUTED.items():
        if values.get(key):
            raise refuse(f"{what}, `{key}`", "a model without them")
    if (activation := values.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise refuse(f"the activation {activation!r}", "silu")
    if (part := settings.number("partial_rotary_factor", 1.0)) != 1:
        raise refuse(f"RoPE on {part:g} of each head", "RoPE on all of a head's dimensions")
    window, max_seq_len = _window(settings), settings.whole("max_position_embeddings")
    if window is not None and window < max_seq_len:
        raise refuse(
            f"a sliding window of {window} positions in a context of {max_seq_len}",
            "attention over the whole context",
        )


def _window(settings: _Settings) -> int | None:
    """The sliding window that some layer has."""
    family, values = settings.family, settings.values
    used = family.window == "always" or (family.window == "asked" and settings.flag("use_sliding_window"))
    if not used or values.get("sliding_window", _WINDOW) is None:
        return None
    if family.window == "asked":
        layer_types = values.get("layer_types")
        if isinstance(layer_types, list):
            windowed = "sliding_attention" in layer_types
        else:
            windowed = settings.whole("max_window_layers", 28) < settings.whole("num_hidden_layers")
        if not windowed:
            return None
    return settings.whole("sliding_window", _WINDOW)


def _rope_values(settings: _Settings) -> Mapping[str, Any]:
    """RoPE's options, from wherever either version of transformers puts them; those of v4 win, as in v5."""
    values = settings.values.get("rope_scaling") or settings.values.get("rope_parameters") or {}
    if isinstance(values, dict) and set(values) == {"full_attention"}:
        values = values["full_attention"]
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise UnsupportedModelError(
            f"{settings.path}: RoPE that differs between layers", expected="the same for all layers"
        )
    return values


def _rope_theta(settings: _Settings) -> float:
    values = _rope_values(settings)
    return settings.number("rope_theta", settings.number("rope_theta", 10_000.0), among=values)


def _rope_type(values: Mapping[str, Any]) -> str:
    return str(values.get("rope_type") or values.get("type") or "default")


def _rope_scaling(settings: _Settings) -> RopeScaling | None:
    values = _rope_values(settings)
    kind = _rope_type(values)

    def number(key: str, default: float | None = None) -> float:
        return settings.number(key, default, among=values)

    if number("partial_rotary_factor", 1.0) != 1:
        raise UnsupportedModelError(
            f"{settings.path}: RoPE on {number('partial_rotary_factor'):g} of each head",
            expected="RoPE on all of a head's dimensions",
        )
    if kind in ("default", "dynamic"):
        return None  # dynamic NTK is plain RoPE within the context; see _notes
    if kind == "linear":
        return LinearScaling(factor=number("factor"))
    max_seq_len = settings.number("max_position_embeddings")
    original = int(
        settings.number("original_max_position_embeddings", number("original_max_position_embeddings", max_seq_len))
    )
    if kind == "llama3":
        return Llama3Scaling(
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_max_seq_len=original,
        )
    if kind == "yarn":
        return _yarn(settings, values, original=original, max_seq_len=max_seq_len)
    raise UnsupportedModelError(
        f"{settings.path}: RoPE scaling {kind!r}", expected="one of default, linear, dynamic, llama3, yarn"
    )


def _yarn(settings: _Settings, values: Mapping[str, Any], *, original: int, max_seq_len: float) -> YarnScaling:
    def number(key: str, default: float) -> float:
        return settings.number(key, default, among=values)

    factor = number("factor", max_seq_len / max(original, 1))
    attention = yarn_attention_factor(factor)
    mscale, over_all = number("mscale", 0.0), number("mscale_all_dim", 0.0)
    if mscale and over_all:
        attention = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, over_all)
    return YarnScaling(
        factor=factor,
        original_max_seq_len=original,
        beta_fast=number("beta_fast", 0.0) or 32.0,
        beta_slow=number("beta_slow", 0.0) or 1.0,
        attention_factor=number("attention_factor", attention),
        truncate=bool(values.get("truncate", True)),
    )


def _notes(settings: _Settings) -> tuple[str, ...]:
    notes = []
    if _rope_type(_rope_values(settings)) == "dynamic":
        notes.append(
            "dynamic NTK scaling is plain RoPE up to max_position_embeddings, "
            f"{settings.whole('max_position_embeddings')}, and the imported model's context ends there"
        )
    if "auto_map" in settings.values:
        notes.append(f"{CONFIG} names code of its own (`auto_map`), which is neither read nor run")
    return tuple(notes)
