"""Writing GGUF files: architectures llama, qwen2 and qwen3, as llama.cpp and coremill's own reader read them.

Keys of metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The keys `tokenizer.*` come from
:mod:`coremill.formats.gguf.tokenizer`. The halt head is not written; it goes into a file of its own
(:mod:`coremill.formats.halt_head`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import gguf
import numpy as np
import numpy.typing as npt
import torch
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
from coremill.formats.gguf_file import NewTensor, Value, tensor_bytes, write_file
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
    """llama.cpp's name for a file of such matrices, which it only displays."""


_TYPES: Mapping[GgufType, _Type] = {
    "f32": _Type(_Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": _Type(_Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": _Type(_Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": _Type(_Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q4_k": _Type(_Kind.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_S),
    "q5_k": _Type(_Kind.Q5_K, gguf.LlamaFileType.MOSTLY_Q5_K_S),
    "q6_k": _Type(_Kind.Q6_K, gguf.LlamaFileType.MOSTLY_Q6_K),
}

_NAMED = 3
"""Number of matrices that an error names."""
_LARGEST = float(np.finfo(np.float16).max)
"""The largest float16, which is also the type of a block's scale."""


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    tokenizer_metadata: Mapping[str, Value],
    *,
    kind: GgufType,
    name: str,
    provenance: Mapping[str, str],
) -> None:
    """Write `checkpoint` atomically as a GGUF file; equal arguments give equal bytes.

    Matrices, the embedding among them, are stored as `kind`, norms and biases in float32. In q8_0 the projections
    of values are float16.

    Args:
        tokenizer_metadata: the `tokenizer.*` keys, with a token for each row of the embedding.
        name: `general.name`, for people.
        provenance: the origin of the file; `checkpoint` becomes the key `coremill.checkpoint`.

    Raises:
        GgufError: `kind` cannot store the model: its rows, or a value.
        UnsupportedModelError: no architecture of llama.cpp computes the model.
        VocabularyMismatchError: the tokenizer's metadata and the embedding differ in size.
        MachineError: llama.cpp, which quantises, is not installed.
        OutputError: `path` is not a regular file, or cannot be written; an earlier file is kept.
    """
    config = checkpoint.config
    check_writable(checkpoint, (kind,))
    architecture = architecture_of(config, checkpoint.model_type)
    tokens = tokenizer_metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    if len(tokens) != config.vocab_size:
        raise VocabularyMismatchError(
            f"the tokenizer's metadata has {len(tokens)} tokens, the embedding {config.vocab_size} rows",
            expected="a token for each row",
        )
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        **general_metadata(kind),
        **{f"{architecture}.{key}": value for key, value in _hyperparameters(config).items()},
        **tokenizer_metadata,
        **{f"coremill.{key}": value for key, value in provenance.items()},
    }
    with replacing(path) as file:
        write_file(file, metadata, list(_tensors(checkpoint, architecture, kind)))


# --- types ------------------------------------------------------------------------------------------


def check_writable(checkpoint: Checkpoint, kinds: Iterable[GgufType]) -> None:
    """Check that :func:`write_gguf` can store `checkpoint` as each of `kinds`, without writing.

    Raises:
        GgufError, UnsupportedModelError, MachineError: as :func:`write_gguf`.
    """
    kinds = tuple(kinds)
    architecture_of(checkpoint.config, checkpoint.model_type)
    for kind in kinds:
        check_kind(checkpoint.config, kind)
    if any(_block(kind) > 1 for kind in kinds):
        library()  # raises if it is not installed
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
        GgufError: names the matrices whose rows are not, their length, and the types that fit the model.
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
        f"{kind} stores rows in blocks of {block}, which do not fit the rows of {', '.join(named)}{more}",
        expected=f"rows of a multiple of {block}, or one of the types that fit this model: {', '.join(fitting)}",
    )


def size_bytes(config: ModelConfig, kind: GgufType) -> int:
    """Bytes of a file's tensors. Its metadata takes a few more, at most some millions."""
    return sum(
        tensor_bytes(shape, stored_kind(name, shape, kind))
        for name, shape in parameter_shapes(config).items()
        if name != HALT_HEAD
    )


def stored_kind(name: str, shape: Sequence[int], kind: GgufType) -> gguf.GGMLQuantizationType:
    """The type that a file of `kind` stores the parameter `name` as."""
    if len(shape) != 2:
        return _Kind.F32
    # Rounding these costs most: on SmolLM2-135M, float16 here reduces the KL by a fifth for 2 % of the bytes.
    # llama.cpp's own mixed types also give them more bits.
    if kind == "q8_0" and ".v_proj." in name:
        return _Kind.F16
    return _TYPES[kind].matrices


def _block(kind: GgufType) -> int:
    return int(gguf.GGML_QUANT_SIZES[_TYPES[kind].matrices][0])


def _row_lengths(config: ModelConfig) -> dict[str, int]:
    """The number of elements in a row of each matrix in the file."""
    shapes = parameter_shapes(config).items()
    return {name: shape[1] for name, shape in shapes if len(shape) == 2 and name != HALT_HEAD}


# --- architectures ----------------------------------------------------------------------------------


def architecture_of(config: ModelConfig, model_type: str) -> str:
    """The architecture of llama.cpp that computes a model of `config`.

    This is `model_type` if that is an architecture that computes the model, else the first one that does: llama for
    a toy, and for Mistral.

    Raises:
        UnsupportedModelError: none does; names the options that cannot be combined.
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
    """Check that the scaling has the defaults that llama.cpp uses for these architectures, whatever a file sets."""
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
    """Whether each frequency has a divisor of its own."""
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
"""By architecture, in the order in which they are tried. They were found by loading files, since llama.cpp rejects
a file with tensors that its graph does not use."""


def _options(config: ModelConfig) -> list[str]:
    """The model's options that only some architectures compute."""
    options = {
        "`qk_norm`": config.qk_norm,
        f"`attention_bias` {config.attention_bias}": config.attention_bias != "none",
        "`mlp_bias`": config.mlp_bias,
        "a divisor for each RoPE frequency": _factors_scale(config),
    }
    return [name for name, is_set in options.items() if is_set]


# --- metadata ---------------------------------------------------------------------------------------


def general_metadata(kind: GgufType) -> dict[str, Value]:
    """The keys `general.*`, without the architecture and the name."""
    return {
        "general.type": "model",
        "general.file_type": int(_TYPES[kind].file),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


def _hyperparameters(config: ModelConfig) -> dict[str, Value]:
    """The keys of an architecture."""
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


def _rope_scaling(config: ModelConfig) -> dict[str, Value]:
    """The keys of a RoPE scaling. Divisors of frequencies are a tensor instead."""
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if isinstance(scaling, YarnScaling):
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": scaling.original_max_seq_len,
            # llama.cpp multiplies it by YaRN's own factor.
            "rope.scaling.attn_factor": scaling.attention_factor / yarn_attention_factor(scaling.factor),
        }
    return {}


# --- tensors ----------------------------------------------------------------------------------------


def _tensors(checkpoint: Checkpoint, architecture: str, kind: GgufType) -> Iterator[NewTensor]:
    config = checkpoint.config
    if _factors_scale(config):
        factors = _frequency_factors(config)
        yield NewTensor(name=ROPE_FACTORS, kind=_Kind.F32, shape=factors.shape, data=lambda: factors)
    for name, shape in parameter_shapes(config).items():
        if name != HALT_HEAD:
            stored_as = stored_kind(name, shape, kind)
            maker = _maker(checkpoint, architecture, name, stored_as)
            yield NewTensor(name=gguf_name(name), kind=stored_as, shape=shape, data=maker)


def _maker(
    checkpoint: Checkpoint, architecture: str, name: str, kind: gguf.GGMLQuantizationType
) -> Callable[[], npt.NDArray[np.generic]]:
    """A function that makes the stored values of one tensor."""

    def make() -> npt.NDArray[np.generic]:
        value = checkpoint.state_dict[name].detach().cpu().to(torch.float32)
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            config = checkpoint.config
            value = to_interleaved(value, config.n_heads if ".q_proj." in name else config.n_kv_heads)
        return _stored(value, kind)

    return make


def _stored(value: Tensor, kind: gguf.GGMLQuantizationType) -> npt.NDArray[np.generic]:
    """float32 values as `kind`, rounded as llama.cpp does."""
    array: npt.NDArray[np.float32] = value.contiguous().numpy()
    if kind == _Kind.F32:
        return array
    return array.astype(np.float16) if kind == _Kind.F16 else quantize(array, kind)


def _frequency_factors(config: ModelConfig) -> npt.NDArray[np.float32]:
    """The divisor of each frequency: (D/2,) float32. llama.cpp lacks Llama 3.1's rule, which is written out."""
    if isinstance(config.rope_scaling, FrequencyFactors):
        return np.array(config.rope_scaling.factors, np.float32)
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    plain = config.rope_theta ** -(half / config.head_dim)
    factors: npt.NDArray[np.float32] = (plain / inverse_frequencies(config)).to(torch.float32).numpy()
    return factors
