"""Hugging Face directories, written: config.json and model.safetensors, as transformers reads them.

Names of options are those of transformers' configuration classes, in the spelling of version 5 (`rope_parameters`);
RoPE is said in that of version 4 as well (`rope_theta`, `rope_scaling`), which mlx-lm and older readers know alone.
Where both are, transformers 5 reads `rope_scaling` with `rope_theta`, and the two say the same.
Tensors: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from coremill.core.config import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from coremill.core.errors import CheckpointContentError, UnsupportedModelError
from coremill.core.publish import replacing, write_atomic
from coremill.formats.halt_head import HALT_HEAD
from coremill.formats.huggingface.reader import CONFIG, DTYPES, WHOLE
from coremill.formats.source import huggingface_name
from coremill.model.checkpoint import Checkpoint

HuggingFaceDtype = Literal["float32", "float16", "bfloat16"]
"""Of the tensors in model.safetensors."""

_SAFETENSORS = {dtype: name for name, dtype in DTYPES.items()}


class TokenIds(NamedTuple):
    """The tokens that play a part, for config.json."""

    bos: int | None
    eos: tuple[int, ...]
    """Each ends an answer."""
    pad: int | None


def write_huggingface(
    folder: Path, checkpoint: Checkpoint, *, dtype: HuggingFaceDtype, tokens: TokenIds
) -> dict[str, Tensor]:
    """Write config.json and model.safetensors into `folder`, each whole or not at all.

    Equal checkpoints give equal bytes. The halt head is left out; what stands beside the two files is not touched.

    Returns:
        The tensors as the file has them, by the student's names.

    Raises:
        UnsupportedModelError: no class of transformers computes the model.
        CheckpointContentError: a value is beyond `dtype`.
        OutputError: a file cannot be written.
    """
    config = config_json(checkpoint, dtype=dtype, tokens=tokens)
    tensors = stored_tensors(checkpoint, dtype)
    with replacing(folder / WHOLE) as file:
        _write_safetensors(file, {huggingface_name(name): tensor for name, tensor in tensors.items()})
    write_atomic(folder / CONFIG, config)
    return tensors


def _write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """The format's eight bytes of the header's length, header, and tensors by name, one after another.

    The package's own function wants the name of a file, and makes an error of its own of a full disk.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name in sorted(tensors):
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _SAFETENSORS[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    data = msgspec.json.encode(header)
    data += b" " * (-len(data) % 8)  # so that the tensors can be mapped where they lie
    file.write(struct.pack("<Q", len(data)) + data)
    for name in sorted(tensors):
        file.write(tensors[name].reshape(-1).view(torch.uint8).numpy())


def stored_tensors(checkpoint: Checkpoint, dtype: HuggingFaceDtype) -> dict[str, Tensor]:
    """The checkpoint's tensors in `dtype`, rounded to nearest, by the student's names; without the halt head.

    Raises:
        CheckpointContentError: a value is beyond `dtype`, and would become infinite.
    """
    kept = {name: tensor for name, tensor in checkpoint.state_dict.items() if name != HALT_HEAD}
    return {name: _stored(name, tensor, dtype) for name, tensor in kept.items()}


def _stored(name: str, tensor: Tensor, dtype: HuggingFaceDtype) -> Tensor:
    value: Tensor = tensor.detach().cpu().to(getattr(torch, dtype))
    if value.dtype != tensor.dtype and (beyond := int((~torch.isfinite(value)).sum())):
        largest, limit = float(tensor.abs().max()), torch.finfo(value.dtype).max
        raise CheckpointContentError(
            f"{name}: {beyond} values are beyond {dtype}, the largest is {largest:g}",
            expected=f"values up to {limit:g}; or `dtype` bfloat16 or float32",
        )
    return value


# --- config.json ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Class:
    """One of transformers' classes: what it computes, and how it says so. weights_huggingface reads the same."""

    architecture: str
    computes: Callable[[ModelConfig], bool]
    own: Callable[[ModelConfig], dict[str, Any]]
    """The keys of config.json that only some classes have."""


def _heads_fit(config: ModelConfig) -> bool:
    """Llama's configuration is refused where they do not, though nothing follows from it."""
    return config.d_model % config.n_heads == 0


def _bias(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias == "qkvo"}


_CLASSES = {
    "llama": _Class(
        architecture="LlamaForCausalLM",
        computes=lambda config: config.attention_bias != "qkv" and not config.qk_norm and _heads_fit(config),
        own=lambda config: {**_bias(config), "mlp_bias": config.mlp_bias},
    ),
    "mistral": _Class(
        architecture="MistralForCausalLM",
        computes=lambda config: config.attention_bias == "none" and not config.mlp_bias and not config.qk_norm,
        own=lambda config: {"sliding_window": None},
    ),
    "qwen2": _Class(
        architecture="Qwen2ForCausalLM",
        computes=lambda config: config.attention_bias == "qkv" and not config.mlp_bias and not config.qk_norm,
        own=lambda config: {"use_sliding_window": False},
    ),
    "qwen3": _Class(
        architecture="Qwen3ForCausalLM",
        computes=lambda config: config.attention_bias != "qkv" and not config.mlp_bias and config.qk_norm,
        own=lambda config: {**_bias(config), "use_sliding_window": False},
    ),
}
"""By transformers' model type, in the order in which they are tried."""


def family_of(config: ModelConfig, model_type: str) -> str:
    """The model type, as transformers has it, of the class that computes a model of `config`.

    It is `model_type` where that is one and computes the model, else the first that does: Llama for a toy.

    Raises:
        UnsupportedModelError: none does; names the options that do not go together.
    """
    order = [model_type, *_CLASSES] if model_type in _CLASSES else [*_CLASSES]
    for family in order:
        if _CLASSES[family].computes(config):
            return family
    raise UnsupportedModelError(
        f"no class of transformers computes a model with {' and '.join(_options(config))}",
        expected=f"the options of one of {', '.join(each.architecture for each in _CLASSES.values())}",
    )


def _options(config: ModelConfig) -> list[str]:
    """What a model has of the options that not every class computes."""
    heads = f"`d_model` {config.d_model} that is no multiple of `n_heads` {config.n_heads}"
    options = {
        f"`attention_bias` {config.attention_bias}": config.attention_bias != "none",
        "`mlp_bias`": config.mlp_bias,
        "`qk_norm`": config.qk_norm,
        heads: not _heads_fit(config),
    }
    return [name for name, is_set in options.items() if is_set]


def architecture_of(config: ModelConfig, model_type: str) -> str:
    """The name of the class that :func:`family_of` finds, such as `LlamaForCausalLM`; raises as it does."""
    return _CLASSES[family_of(config, model_type)].architecture


def config_json(checkpoint: Checkpoint, *, dtype: HuggingFaceDtype, tokens: TokenIds) -> bytes:
    """config.json, as :func:`write_huggingface` writes it; raises as :func:`family_of` does."""
    config = huggingface_config(checkpoint.config, checkpoint.model_type, dtype=dtype, tokens=tokens)
    return msgspec.json.format(msgspec.json.encode(config, order="sorted"), indent=2) + b"\n"


def huggingface_config(
    config: ModelConfig, model_type: str, *, dtype: HuggingFaceDtype, tokens: TokenIds
) -> dict[str, Any]:
    """What config.json says of a model; raises as :func:`family_of` does."""
    family = family_of(config, model_type)
    rope = rope_parameters(config)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": [_CLASSES[family].architecture],
        "model_type": family,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else scaling,
        "tie_word_embeddings": config.arch.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos[0] if len(tokens.eos) == 1 else list(tokens.eos) or None,
        "pad_token_id": tokens.pad,
        **_CLASSES[family].own(config),
    }


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """RoPE as transformers 5 has it."""
    return {"rope_theta": config.rope_theta, **_scaling(config.rope_scaling, config.max_seq_len)}


def _scaling(scaling: RopeScaling | None, max_seq_len: int) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    if isinstance(scaling, YarnScaling):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor,
            "truncate": scaling.truncate,
        }
    assert isinstance(scaling, FrequencyFactors)
    # A divisor for each frequency is LongRoPE's, the same in a short context as in a long one, with attention as it
    # is; the context that tells short from long is then of no account.
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_factor": list(scaling.factors),
        "long_factor": list(scaling.factors),
        "original_max_position_embeddings": max_seq_len,
    }
