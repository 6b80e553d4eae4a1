"""Reads Hugging Face directories: config.json with model.safetensors, or with shards and their index.

Options and defaults are those of transformers' configuration classes, in files of version 4 (`rope_theta`,
`rope_scaling`) and of version 5 (`rope_parameters`). Tensors: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
from coremill.core.plain import Plain
from coremill.formats.source import (
    WeightsSource,
    by_elements,
    check_shapes,
    huggingface_name,
    same_values,
)
from coremill.model.rope import yarn_attention_factor
from coremill.model.student import parameter_shapes

log = logging.getLogger(__name__)

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEAD, _EMBEDDING = "lm_head.weight", huggingface_name("embed_tokens.weight")
_OTHER_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "pytorch_model*.bin", "consolidated*.pth")
"""Sets of weights that a directory may have beside the one that transformers reads."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_BUFFER = ".rotary_emb.inv_freq"
"""The end of the names of tensors in old files that can be computed from the configuration."""


@dataclass(frozen=True, kw_only=True)
class _Family:
    """How an architecture differs from Llama, and its defaults for keys that config.json omits."""

    attention_bias: Literal["none", "qkv", "configured"]
    """`configured`: all four projections have a bias if `attention_bias` is true."""
    qk_norm: bool = False
    mlp_bias: bool = False
    """Whether the architecture supports `mlp_bias`."""
    n_kv_heads: int | None = None
    """None: the number of heads."""
    head_size: int | None = None
    """None: hidden_size / num_attention_heads."""
    window: Literal["cache", "always", "configured"] = "cache"
    """Whether `sliding_window` applies: only to the cache, always, or if `use_sliding_window` is true."""


FAMILIES = {
    "LlamaForCausalLM": _Family(attention_bias="configured", mlp_bias=True),
    "MistralForCausalLM": _Family(attention_bias="none", n_kv_heads=8, window="always"),
    "Qwen2ForCausalLM": _Family(attention_bias="qkv", n_kv_heads=32, window="configured"),
    "Qwen3ForCausalLM": _Family(
        attention_bias="configured", qk_norm=True, n_kv_heads=32, head_size=128, window="configured"
    ),
}
_WINDOW = 4096
"""The default of `sliding_window`, except for Llama, which has none."""
_MOST_THETA = torch.finfo(torch.float32).max
_NOT_COMPUTED = {
    "quantization_config": "quantised weights",
    "per_layer_config": "layers with options of their own",
    "attention_chunk_size": "attention in chunks",
    "final_logit_softcapping": "soft-capped logits",
    "attn_logit_softcapping": "soft-capped attention scores",
    "no_rope_layers": "layers without RoPE",
    "no_rope_layer_interval": "layers without RoPE",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
}
"""Options that change the outputs and that coremill does not support, by their keys."""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The set of weights that transformers reads."""

    shards: tuple[Path, ...]
    index: Path | None = None
    listed: Mapping[str, str] = field(default_factory=dict)
    """The file name of each tensor in the index."""


@dataclass(frozen=True, kw_only=True)
class _Located:
    """A tensor in a shard."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]


class HuggingFaceWeights(WeightsSource):
    """The model in a Hugging Face directory."""

    format = "huggingface"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        if (path / ADAPTER).exists():
            raise UnsupportedModelError(
                f"{path}: an adapter, {ADAPTER}", expected="weights with the adapter merged"
            )
        self._open(path / CONFIG)
        settings = _Settings(path / CONFIG)
        self.model_type = settings.model_type
        self.config = _config(settings)
        stored = _stored(path, settings)
        self.notes = (*_notes(settings), *_ignored(path, stored))
        self._shards = stored.shards
        for file in (*self._shards, *filter(None, [stored.index])):
            self._open(file)
        self._tensors = _located(self._shards)  # by their names in the source
        for name, shard in stored.listed.items():
            if name not in self._tensors or self._tensors[name].shard.name != shard:
                raise CheckpointContentError(
                    f"{stored.index}: {name} is not in {shard}",
                    expected="shards with the tensors that the index lists",
                )
        plausible = self.config.n_layers <= len(self._tensors)
        known = {huggingface_name(name): name for name in parameter_shapes(self.config)} if plausible else {}
        if self.config.arch.tie_embeddings and _HEAD in self._tensors:
            if _EMBEDDING in self._tensors:
                self._drop_tied_head()
            else:  # either name may have the weights, as in transformers
                known[_HEAD] = known.pop(_EMBEDDING, _HEAD)
        self._names = {known.get(name, name): name for name in self._tensors}  # by the student's names
        shapes = {name: self._tensors[theirs].shape for name, theirs in self._names.items()}
        check_shapes(self.config, shapes, where=str(path))

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path / CONFIG, *self._shards)

    @property
    def dtypes(self) -> tuple[str, ...]:
        counts: Counter[str] = Counter()
        for located in self._tensors.values():
            counts[located.dtype] += math.prod(located.shape)
        return by_elements(counts)

    @property
    def size_bytes(self) -> int:
        return sum(math.prod(each.shape) * DTYPES[each.dtype].itemsize for each in self._tensors.values())

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        for number, shard in enumerate(self._shards, 1):
            names = [name for name, theirs in self._names.items() if self._tensors[theirs].shard == shard]
            log.info("%s, %d of %d: %d tensors", shard.name, number, len(self._shards), len(names))
            with _opened(shard) as file:
                for name in names:
                    yield name, file.get_tensor(self._names[name])

    def _drop_tied_head(self) -> None:
        """Ignore a tied head that is stored as well, if it equals the embedding."""
        with _opened(self._tensors[_HEAD].shard) as one, _opened(self._tensors[_EMBEDDING].shard) as other:
            if not same_values(one.get_tensor(_HEAD), other.get_tensor(_EMBEDDING)):
                raise CheckpointContentError(
                    f"{self.path}: {CONFIG} ties lm_head.weight to the embedding, and the two differ",
                    expected="a tied model without a separate head, or `tie_word_embeddings` false",
                )
        del self._tensors[_HEAD]


# --- files ------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Mapping[str, Plain]:
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


def _stored(path: Path, settings: _Settings) -> _Stored:
    """Choose among several sets of weights as transformers does (`_get_resolved_checkpoint_files`): the file that
    config.json names, else model.safetensors, else the shards of model.safetensors.index.json."""
    named = settings.values.get("transformers_weights")
    if named is not None and not (
        isinstance(named, str)
        and Path(named).name == named
        and named.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise settings.refuse("transformers_weights", named, "a safetensors file or an index next to it")
    for name in (WHOLE, INDEX) if named is None else (named,):
        if (path / name).is_file():
            return _sharded(path / name) if name.endswith(".json") else _Stored(shards=(path / name,))
    expected = f"{WHOLE}, or shards and {INDEX}" if named is None else f"{named}, which {CONFIG} names"
    if others := [name for name in _files(path, _OTHER_WEIGHTS) if name.endswith((".safetensors", ".gguf"))]:
        raise CheckpointUnreadableError(f"{path} has its weights only in {_some(others)}", expected=expected)
    if pickles := _files(path, _PICKLES):
        raise UnsafeCheckpointError(
            f"{path} has its weights only in {', '.join(pickles)}, pickles that may contain code",
            expected=f"{expected}; the pickle was not executed",
        )
    raise CheckpointUnreadableError(f"{path} contains no weights", expected=expected)


def _sharded(index: Path) -> _Stored:
    listed = _read_json(index).get("weight_map")
    files = {key: name for key, name in listed.items() if isinstance(name, str)} if isinstance(listed, dict) else {}
    if not files or files != listed:
        raise DocumentError(f"{index}: no `weight_map` at `$`", expected="the file of each tensor")
    names = sorted(set(files.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise DocumentError(f"{index}: the shard {outside[0]!r}", expected="files next to the index")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointUnreadableError(
            f"{index.parent} lacks {', '.join(missing)}",
            expected=f"the {len(names)} shards that {index.name} lists",
        )
    return _Stored(shards=tuple(index.with_name(name) for name in names), index=index, listed=files)


def _ignored(path: Path, stored: _Stored) -> tuple[str, ...]:
    chosen = stored.index or stored.shards[0]
    read = {chosen.name, *(shard.name for shard in stored.shards)}
    others = [name for name in _files(path, _OTHER_WEIGHTS) if name not in read]
    return (
        (f"the weights are those of {chosen.name}, as in transformers; ignored: {_some(others)}",) if others else ()
    )


def _files(path: Path, patterns: Sequence[str]) -> list[str]:
    return sorted({file.name for pattern in patterns for file in path.glob(pattern)})


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


@contextlib.contextmanager
def _opened(shard: Path) -> Iterator[safe_open]:
    """Open the shard, memory-mapped.

    Raises:
        CheckpointUnreadableError: it is unreadable, truncated or not a safetensors file.
    """
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as failure:
        raise CheckpointUnreadableError(
            f"{shard} is not a complete safetensors file: {failure}", expected="a file as safetensors saves it"
        ) from failure


def _located(shards: Sequence[Path]) -> dict[str, _Located]:
    found: dict[str, _Located] = {}
    for shard in shards:
        with _opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.endswith(_BUFFER):
                    continue
                if name in found:
                    raise CheckpointContentError(
                        f"{shard}: {name} is also in {found[name].shard.name}", expected="each tensor once"
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
    """The values of config.json, checked for their types."""

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
        self.model_type = self.architecture.removesuffix("ForCausalLM").lower()
        if (found := self.values.get("model_type", self.model_type)) != self.model_type:
            raise UnsupportedModelError(
                f"{path}: the architecture {self.architecture} with `model_type` {found!r}",
                expected=f"`model_type` {self.model_type!r}",
            )

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, value, "an integer")
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value not in (None, True, False):
            raise self.refuse(key, value, "true or false")
        return bool(value)

    def number(self, key: str, default: float | None = None, *, among: Mapping[str, Plain] | None = None) -> float:
        value = (self.values if among is None else among).get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(key, value, "a number")
        return float(value)

    def refuse(self, key: str, value: Plain, expected: str) -> DocumentError:
        found = f"`{key}` is missing" if value is None else f"`{key}` is {value!r}"
        return DocumentError(f"{self.path}: {found}", expected=expected)


def _config(settings: _Settings) -> ModelConfig:
    family = settings.family
    d_model, n_heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    _refuse_unsupported(settings)
    head_size = settings.integer("head_dim", family.head_size or d_model // max(n_heads, 1))
    biased = family.attention_bias == "configured" and settings.flag("attention_bias")
    try:
        return ModelConfig(
            vocab_size=settings.integer("vocab_size"),
            d_model=d_model,
            n_layers=settings.integer("num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=settings.integer("num_key_value_heads", _default_kv_heads(settings, n_heads)),
            head_size=None if head_size * n_heads == d_model else head_size,
            d_ff=settings.integer("intermediate_size"),
            max_seq_len=settings.integer("max_position_embeddings"),
            rope_theta=_rope_theta(settings),
            rope_scaling=_rope_scaling(settings),
            norm_eps=settings.number("rms_norm_eps", 1e-6),
            attention_bias="qkvo" if biased else "qkv" if family.attention_bias == "qkv" else "none",
            mlp_bias=family.mlp_bias and settings.flag("mlp_bias"),
            qk_norm=family.qk_norm,
            arch=ModelArch(use_halt_head=False, tie_embeddings=settings.flag("tie_word_embeddings")),
        )
    except ValueError as failure:
        raise DocumentError(f"{settings.path}: {failure}", expected="valid options of a model") from failure


def _default_kv_heads(settings: _Settings, n_heads: int) -> int:
    """As transformers does, return the number of heads for null, and the class's default for a missing key."""
    missing = "num_key_value_heads" not in settings.values
    return settings.family.n_kv_heads if missing and settings.family.n_kv_heads else n_heads


def _refuse_unsupported(settings: _Settings) -> None:
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
    if values.get("is_causal", True) is not True:
        raise refuse("attention to later positions, `is_causal`", "causal attention")
    window, max_seq_len = _window(settings), settings.integer("max_position_embeddings")
    if window is not None and window < max_seq_len:
        raise refuse(
            f"a sliding window of {window} positions in a context of {max_seq_len}",
            "attention over the whole context",
        )


def _window(settings: _Settings) -> int | None:
    """Return the sliding window, or None if no layer has one.

    transformers ignores a window in Llama if it computes a whole text, but not if it has a cache.
    """
    family, values = settings.family, settings.values
    layer_types = values.get("layer_types")
    if layer_types is not None:
        _check_layer_types(settings, layer_types)
    if family.window == "configured":
        if not settings.flag("use_sliding_window"):
            return None
        if layer_types is None:
            windowed = settings.integer("max_window_layers", 28) < settings.integer("num_hidden_layers")
        else:
            windowed = isinstance(layer_types, list) and "sliding_attention" in layer_types
        if not windowed:
            return None
    default = None if family.window == "cache" else _WINDOW
    return None if values.get("sliding_window", default) is None else settings.integer("sliding_window", default)


def _check_layer_types(settings: _Settings, found: Plain) -> None:
    """Check that `layer_types` has a supported type for each layer.

    Raises:
        UnsupportedModelError: it has another type, or windows that the family or `use_sliding_window` excludes.
    """
    kinds = found if isinstance(found, list) else [found]
    supported = ["full_attention"]
    if settings.family.window == "configured" and settings.flag("use_sliding_window"):
        supported.append("sliding_attention")
    if unsupported := [kind for kind in kinds if kind not in supported]:
        raise UnsupportedModelError(
            f"{settings.path}: a layer of type {unsupported[0]!r}, `layer_types`", expected=" or ".join(supported)
        )
    if len(kinds) != settings.integer("num_hidden_layers"):
        raise settings.refuse("layer_types", found, "a list with the type of each layer")


def _rope_values(settings: _Settings) -> Mapping[str, Plain]:
    """Return RoPE's options; the key of version 4 takes precedence over that of version 5, as in transformers 5."""
    values = settings.values.get("rope_scaling") or settings.values.get("rope_parameters") or {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise UnsupportedModelError(
            f"{settings.path}: RoPE that differs between layers", expected="the same for all layers"
        )
    return values


def _rope_theta(settings: _Settings) -> float:
    values = next((each for each in (_rope_values(settings), settings.values) if "rope_theta" in each), None)
    theta = 10_000.0 if values is None else settings.number("rope_theta", among=values)
    if theta > _MOST_THETA:
        raise settings.refuse("rope_theta", theta, "a number that float32 has")
    return theta


def _rope_type(values: Mapping[str, Plain]) -> str:
    return str(values.get("rope_type", values.get("type", "default")))


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
    if kind == "default":
        return None
    if kind == "dynamic":
        number("factor")
        return None  # dynamic NTK equals plain RoPE within the context; see _notes
    if kind == "linear":
        return LinearScaling(factor=number("factor"))
    max_seq_len = settings.integer("max_position_embeddings")
    original = _original_max_seq_len(settings, values, default=max_seq_len)
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


def _original_max_seq_len(settings: _Settings, values: Mapping[str, Plain], *, default: int) -> int:
    """Return the length that the model was first trained with; the key outside RoPE's options takes precedence."""
    key = "original_max_position_embeddings"
    among = next((each for each in (settings.values, values) if key in each), {key: default})
    value = settings.number(key, among=among)
    if not value.is_integer():
        raise settings.refuse(key, value, "an integer")
    return int(value)


def _yarn(settings: _Settings, values: Mapping[str, Plain], *, original: int, max_seq_len: int) -> YarnScaling:
    def number(key: str, default: float) -> float:
        return settings.number(key, default, among=values)

    if "factor" not in values:
        raise settings.refuse("factor", None, "a number")
    factor = number("factor", max_seq_len / max(original, 1))  # for null
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
            "dynamic NTK scaling equals plain RoPE up to max_position_embeddings, "
            f"{settings.integer('max_position_embeddings')}, where the imported model's context ends"
        )
    if "auto_map" in settings.values:
        notes.append(f"{CONFIG} refers to code (`auto_map`), which is neither read nor run")
    return tuple(notes)
