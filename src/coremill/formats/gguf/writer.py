"""GGUF files, written: architectures llama, qwen2 and qwen3, as llama.cpp and our own reader have them.

Keys of metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; `tokenizer.*` is made by
:mod:`coremill.formats.gguf.tokenizer`. The halt head is left out, and goes into a file of its own
(:mod:`coremill.formats.halt_head`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args

import gguf
import numpy as np
import torch
from gguf.gguf_writer import WriterState
from torch import Tensor

from coremill.core.config import (
    FrequencyFactors,
    GgufType,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from coremill.core.errors import GgufError, UnsupportedModelError, VocabularyMismatchError
from coremill.core.publish import replacing
from coremill.formats.gguf.reader import ROPE_FACTORS, to_interleaved
from coremill.formats.halt_head import HALT_HEAD
from coremill.formats.llamacpp.library import library
from coremill.formats.llamacpp.quantize import quantize
from coremill.formats.source import gguf_name
from coremill.model.checkpoint import Checkpoint
from coremill.model.rope import inverse_frequencies, yarn_attention_factor
from coremill.model.student import parameter_shapes

_Kind = gguf.GGMLQuantizationType


class _Type(NamedTuple):
    matrices: gguf.GGMLQuantizationType
    file: gguf.LlamaFileType
    """What llama.cpp calls a file of such matrices; it is shown, and nothing follows from it."""


_TYPES: Mapping[GgufType, _Type] = {
    "f32": _Type(_Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": _Type(_Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": _Type(_Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": _Type(_Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q4_k": _Type(_Kind.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_S),
    "q5_k": _Type(_Kind.Q5_K, gguf.LlamaFileType.MOSTLY_Q5_K_S),
    "q6_k": _Type(_Kind.Q6_K, gguf.LlamaFileType.MOSTLY_Q6_K),
}
logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells the byte order of each file

_NAMED = 3
"""Matrices that an error names."""
_LARGEST = float(np.finfo(np.float16).max)
"""Beyond it float16 has infinity; it is what the scale of a block is kept in, too."""


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    tokenizer_metadata: Mapping[str, Any],
    *,
    kind: GgufType,
    name: str,
    provenance: Mapping[str, str],
) -> None:
    """Write `checkpoint` as a GGUF file, whole or not at all; what is equal gives equal bytes.

    Matrices are stored as `kind`, the embedding too, and norms and biases in float32; in q8_0 the projections of
    values as float16.

    Args:
        tokenizer_metadata: the `tokenizer.*` keys, a token for each row of the embedding.
        name: `general.name`, for people.
        provenance: where the file comes from; `checkpoint` becomes the key `coremill.checkpoint`.

    Raises:
        GgufError: `kind` cannot store the model: its rows, or a value.
        UnsupportedModelError: no architecture of llama.cpp computes the model.
        VocabularyMismatchError: the tokenizer's metadata is of another size than the embedding.
        MachineError: there is no llama.cpp to quantise with.
        OutputError: `path` is in the way, or cannot be written; what was there is left.
    """
    config = checkpoint.config
    check_writable(checkpoint, (kind,))
    architecture = architecture_of(config, checkpoint.model_type)
    if (tokens := len(tokenizer_metadata["tokenizer.ggml.tokens"])) != config.vocab_size:
        raise VocabularyMismatchError(
            f"the tokenizer's metadata has {tokens} tokens, the embedding {config.vocab_size} rows",
            expected="a token for each row",
        )
    metadata = {
        **general_metadata(name, kind),
        **{f"{architecture}.{key}": value for key, value in _hyperparameters(config).items()},
        **tokenizer_metadata,
        **{f"coremill.{key}": value for key, value in provenance.items()},
    }
    with replacing(path) as file:
        writer = _Writer(file, architecture)
        for key, value in metadata.items():
            writer.add_value(key, value)
        tensors = list(_tensors(checkpoint, architecture, kind))
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),
                _tensor_bytes(tensor.shape, tensor.kind),
                raw_dtype=tensor.kind,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.data())


class _Writer(gguf.GGUFWriter):
    """The package's writer on a file that is open: its own would open one by name, and leave a part of it there."""

    def __init__(self, file: BinaryIO, architecture: str) -> None:
        super().__init__(None, architecture)
        self._file = file

    def open_output_file(self, path: Path | None = None) -> None:
        self.fout = [self._file]
        self.state = WriterState.EMPTY

    def add_value(self, key: str, value: Any) -> None:
        """A key of metadata in the type that llama.cpp wants: whole numbers unsigned, but for lists of them."""
        if isinstance(value, bool):
            self.add_bool(key, value)
        elif isinstance(value, int):
            self.add_uint32(key, value)
        elif isinstance(value, float):
            self.add_float32(key, value)
        elif isinstance(value, str):
            self.add_string(key, value)
        else:
            self.add_array(key, value)


# --- types ------------------------------------------------------------------------------------------


def check_writable(checkpoint: Checkpoint, kinds: Iterable[GgufType]) -> None:
    """Check that :func:`write_gguf` can store `checkpoint` as each of `kinds`; nothing is written.

    Raises:
        GgufError, UnsupportedModelError, MachineError: as :func:`write_gguf`.
    """
    kinds = tuple(kinds)
    architecture_of(checkpoint.config, checkpoint.model_type)
    for kind in kinds:
        check_kind(checkpoint.config, kind)
    if any(_block(kind) > 1 for kind in kinds):
        library()  # that it is there
    if rounded := [kind for kind in kinds if kind != "f32"]:
        _check_values(checkpoint, rounded[0])


def _check_values(checkpoint: Checkpoint, kind: GgufType) -> None:
    for name in _row_lengths(checkpoint.config):
        if (largest := float(checkpoint.state_dict[name].abs().max())) > _LARGEST:
            raise GgufError(
                f"{name} has values up to {largest:g}, beyond what {kind} can store",
                expected=f"values up to {_LARGEST:g}, or the type f32",
            )


def check_kind(config: ModelConfig, kind: GgufType) -> None:
    """Check that each row of each matrix is a whole number of the type's blocks.

    Raises:
        GgufError: names the matrices whose rows are not, their length, and the types that fit.
    """
    block = _block(kind)
    if not (odd := {name: size for name, size in _row_lengths(config).items() if size % block}):
        return
    named = [f"{name} ({odd[name]})" for name in list(odd)[:_NAMED]]
    more = f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
    fitting = [
        other for other in get_args(GgufType) if not any(s % _block(other) for s in _row_lengths(config).values())
    ]
    raise GgufError(
        f"{kind} stores rows in blocks of {block}, which those of {', '.join(named)}{more} are not",
        expected=f"rows of a multiple of {block}, or one of the types that fit this model: {', '.join(fitting)}",
    )


def size_bytes(config: ModelConfig, kind: GgufType) -> int:
    """Bytes of the tensors of a file; its metadata, a few million at most, come on top."""
    return sum(
        _tensor_bytes(shape, stored_kind(name, shape, kind))
        for name, shape in parameter_shapes(config).items()
        if name != HALT_HEAD
    )


def stored_kind(name: str, shape: Sequence[int], kind: GgufType) -> gguf.GGMLQuantizationType:
    """What a file of `kind` stores the parameter `name` as."""
    if len(shape) != 2:
        return _Kind.F32
    # What attention passes on is rounded nowhere as much as here: on SmolLM2-135M this takes a fifth off the KL for
    # 2 % of the bytes. llama.cpp's own mixtures of few bits have more of them for it, too.
    if kind == "q8_0" and ".v_proj." in name:
        return _Kind.F16
    return _TYPES[kind].matrices


def _tensor_bytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(math.prod(shape) // block_elements * block_bytes)


def _block(kind: GgufType) -> int:
    return int(gguf.GGML_QUANT_SIZES[_TYPES[kind].matrices][0])


def _row_lengths(config: ModelConfig) -> dict[str, int]:
    """Elements in a row, of each matrix that goes into the file."""
    shapes = parameter_shapes(config).items()
    return {name: shape[1] for name, shape in shapes if len(shape) == 2 and name != HALT_HEAD}


# --- architectures ----------------------------------------------------------------------------------


def architecture_of(config: ModelConfig, model_type: str) -> str:
    """llama.cpp's architecture that computes a model of `config`.

    It is `model_type` where that is one and computes the model, else the first that does: llama for a toy, and for
    Mistral.

    Raises:
        UnsupportedModelError: none does; names the options that do not go together.
    """
    _check_yarn(config.rope_scaling)
    order = [model_type, *_COMPUTES] if model_type in _COMPUTES else [*_COMPUTES]
    for architecture in order:
        if _COMPUTES[architecture](config):
            return architecture
    raise UnsupportedModelError(
        f"no architecture of llama.cpp computes a model with {' and '.join(_options(config))}",
        expected=f"the options of one of {', '.join(_COMPUTES)}",
    )


def _check_yarn(scaling: RopeScaling | None) -> None:
    """Of these architectures llama.cpp reads no betas and knows no `truncate`: it would compute another model."""
    if not isinstance(scaling, YarnScaling):
        return
    own = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    if other := [name for name, value in own.items() if getattr(scaling, name) != value]:
        name = other[0]
        raise UnsupportedModelError(
            f"llama.cpp does not compute YaRN with `{name}` {getattr(scaling, name)}",
            expected=", ".join(f"`{name}` {value}" for name, value in own.items()),
        )


def _factors_scale(config: ModelConfig) -> bool:
    """Whether the frequencies are divided one by one."""
    return isinstance(config.rope_scaling, (Llama3Scaling, FrequencyFactors))


_COMPUTES: Mapping[str, Callable[[ModelConfig], bool]] = {
    "llama": lambda config: not config.qk_norm,
    "qwen2": lambda config: (
        config.attention_bias == "qkv" and not (config.mlp_bias or config.qk_norm or _factors_scale(config))
    ),
    "qwen3": lambda config: (
        config.qk_norm and config.attention_bias != "qkvo" and not (config.mlp_bias or _factors_scale(config))
    ),
}
"""By architecture, in the order in which they are tried. llama.cpp refuses a file with tensors that its graph does
not use, so that what it computes was found by loading files."""


def _options(config: ModelConfig) -> list[str]:
    """What a model has of the options that not every architecture computes."""
    options = {
        "`qk_norm`": config.qk_norm,
        f"`attention_bias` {config.attention_bias}": config.attention_bias != "none",
        "`mlp_bias`": config.mlp_bias,
        "a divisor for each RoPE frequency": _factors_scale(config),
    }
    return [name for name, is_set in options.items() if is_set]


# --- metadata ---------------------------------------------------------------------------------------


def general_metadata(name: str | None, kind: GgufType) -> dict[str, Any]:
    """The keys `general.*`, but for the architecture."""
    return {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(_TYPES[kind].file),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


def _hyperparameters(config: ModelConfig) -> dict[str, Any]:
    """The keys of an architecture; numbers with a fraction are float32 there."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_seq_len,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        **_rope_scaling(config),
    }


def _rope_scaling(config: ModelConfig) -> dict[str, Any]:
    """What :func:`coremill.formats.gguf.reader._rope_scaling` reads. Divisors of frequencies are a tensor."""
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if isinstance(scaling, YarnScaling):
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": scaling.original_max_seq_len,
            # llama.cpp multiplies it by YaRN's own.
            "rope.scaling.attn_factor": scaling.attention_factor / yarn_attention_factor(scaling.factor),
        }
    return {}


# --- tensors ----------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """A tensor of the file, its bytes not yet made."""

    name: str
    """llama.cpp's."""
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray[Any, Any]]


def _tensors(checkpoint: Checkpoint, architecture: str, kind: GgufType) -> Iterator[_Stored]:
    config = checkpoint.config
    if _factors_scale(config):
        factors = _frequency_factors(config)
        yield _Stored(ROPE_FACTORS, _Kind.F32, factors.shape, lambda: factors)
    for name, shape in parameter_shapes(config).items():
        if name == HALT_HEAD:
            continue
        stored_as = stored_kind(name, shape, kind)
        yield _Stored(gguf_name(name), stored_as, shape, _maker(checkpoint, architecture, name, stored_as))


def _maker(
    checkpoint: Checkpoint, architecture: str, name: str, kind: gguf.GGMLQuantizationType
) -> Callable[[], np.ndarray[Any, Any]]:
    """What makes the stored bytes of one tensor, when its turn comes: one is in memory at a time."""

    def make() -> np.ndarray[Any, Any]:
        value = checkpoint.state_dict[name].detach().cpu().to(torch.float32)
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            config = checkpoint.config
            value = to_interleaved(value, config.n_heads if ".q_proj." in name else config.n_kv_heads)
        return _stored(value, kind)

    return make


def _stored(value: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """float32 values as `kind`, rounded as llama.cpp does."""
    array: np.ndarray[Any, Any] = value.contiguous().numpy()
    if kind in (_Kind.F32, _Kind.F16):
        return array.astype(np.float32 if kind == _Kind.F32 else np.float16, copy=False)
    return quantize(array, kind)


def _frequency_factors(config: ModelConfig) -> np.ndarray[Any, Any]:
    """What each frequency is divided by: (D/2,) float32. Llama 3.1's rule is written out, as llama.cpp has none."""
    if isinstance(config.rope_scaling, FrequencyFactors):
        return np.array(config.rope_scaling.factors, np.float32)
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    plain = config.rope_theta ** -(half / config.head_dim)
    factors: np.ndarray[Any, Any] = (plain / inverse_frequencies(config)).to(torch.float32).numpy()
    return factors
