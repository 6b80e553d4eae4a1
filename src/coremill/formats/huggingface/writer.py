"""Writes Hugging Face directories: config.json and model.safetensors, as transformers reads them.

Options have the names of transformers' configuration classes in version 5 (`rope_parameters`). RoPE is also written
with the names of version 4 (`rope_theta`, `rope_scaling`), because mlx-lm and older readers support only those. If
both are present, transformers 5 reads `rope_scaling` and `rope_theta`; the values are equal.
Tensors: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

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
from coremill.core.plain import Plain
from coremill.core.publish import replacing, write_atomic
from coremill.formats.halt_head import HALT_HEAD
from coremill.formats.huggingface.reader import CONFIG, DTYPES, WHOLE
from coremill.formats.source import TensorsOnDemand, huggingface_name
from coremill.model.checkpoint import Checkpoint

HuggingFaceDtype = Literal["float32", "float16", "bfloat16"]
"""The type of the tensors in model.safetensors."""

_SAFETENSORS = {dtype: name for name, dtype in DTYPES.items()}


class TokenIds(NamedTuple):
    """The ids of the special tokens that config.json contains."""

    bos: int | None
    eos: tuple[int, ...]
    """Each of them ends an answer."""
    pad: int | None


def write_huggingface(
    folder: Path, checkpoint: Checkpoint, *, dtype: HuggingFaceDtype, tokens: TokenIds
) -> Mapping[str, Tensor]:
    """Write config.json and model.safetensors into `folder`, each atomically.

    Equal checkpoints give equal bytes. The halt head is excluded. Other files in `folder` are not changed.

    Returns:
        The tensors of the file, and the halt head as the checkpoint has it, by the student's names; each is made
        when it is looked up.

    Raises:
        UnsupportedModelError: no class of transformers computes the model.
        CheckpointContentError: a value exceeds the range of `dtype`.
        OutputError: a file cannot be written.
    """
    config = config_json(checkpoint, dtype=dtype, tokens=tokens)
    tensors = stored_tensors(checkpoint, dtype)
    with replacing(folder / WHOLE) as file:
        _write_safetensors(file, checkpoint, tensors, dtype)
    write_atomic(folder / CONFIG, config)
    return tensors


def _write_safetensors(
    file: BinaryIO, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], dtype: HuggingFaceDtype
) -> None:
    """Write the length of the header in eight bytes, the header, and the tensors in the order of their names.

    The safetensors package writes only whole dictionaries, and reports a full disk with an error type of its own.
    """
    names = {huggingface_name(name): name for name in tensors if name != HALT_HEAD}
    stored: torch.dtype = getattr(torch, dtype)
    header: dict[str, Plain] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for theirs in sorted(names):
        shape = checkpoint.state_dict[names[theirs]].shape
        start, end = end, end + shape.numel() * stored.itemsize
        header[theirs] = {"dtype": _SAFETENSORS[stored], "shape": list(shape), "data_offsets": [start, end]}
    data = msgspec.json.encode(header)
    data += b" " * (-len(data) % 8)  # aligns the tensors, so that they can be memory-mapped
    file.write(struct.pack("<Q", len(data)) + data)
    for theirs in sorted(names):
        file.write(tensors[names[theirs]].reshape(-1).view(torch.uint8).numpy().data)


def stored_tensors(checkpoint: Checkpoint, dtype: HuggingFaceDtype) -> Mapping[str, Tensor]:
    """Return the checkpoint's tensors by the student's names, rounded to nearest in `dtype`, except the halt head.

    Looking one up raises CheckpointContentError if a value exceeds the range of `dtype`; it would become infinite.
    """

    def make(name: str) -> Tensor:
        tensor = checkpoint.state_dict[name]
        return tensor if name == HALT_HEAD else _stored(name, tensor, dtype)

    return TensorsOnDemand(checkpoint.state_dict, make)


def _stored(name: str, tensor: Tensor, dtype: HuggingFaceDtype) -> Tensor:
    value: Tensor = tensor.detach().cpu().to(getattr(torch, dtype))
    if value.dtype != tensor.dtype and (beyond := int((~torch.isfinite(value)).sum())):
        largest, limit = float(tensor.abs().max()), torch.finfo(value.dtype).max
        raise CheckpointContentError(
            f"{name}: {beyond} values exceed the range of {dtype}, the largest is {largest:g}",
            expected=f"values up to {limit:g}; or `dtype` bfloat16 or float32",
        )
    return value


# --- config.json ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Class:
    """A class of transformers: the models that it computes, and the options of its own."""

    architecture: str
    computes: Callable[[ModelConfig], bool]
    own: Callable[[ModelConfig], dict[str, Plain]]
    """Returns the keys of config.json that not every class has."""


def _heads_fit(config: ModelConfig) -> bool:
    """Return whether `d_model` is a multiple of `n_heads`; Llama's configuration class requires it."""
    return config.d_model % config.n_heads == 0


def _bias(config: ModelConfig) -> dict[str, Plain]:
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
"""The classes by transformers' model type, in the order in which they are tried."""


def family_of(config: ModelConfig, model_type: str) -> str:
    """Return transformers' model type for the class that computes a model of `config`.

    It is `model_type` if that is one and its class computes the model. Otherwise it is the first that does, such
    as Llama for a toy.

    Raises:
        UnsupportedModelError: no class does; the error names the options that no class combines.
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
    """Return the options of a model that not every class computes."""
    heads = f"`d_model` {config.d_model}, not a multiple of `n_heads` {config.n_heads}"
    options = {
        f"`attention_bias` {config.attention_bias}": config.attention_bias != "none",
        "`mlp_bias`": config.mlp_bias,
        "`qk_norm`": config.qk_norm,
        heads: not _heads_fit(config),
    }
    return [name for name, is_set in options.items() if is_set]


def architecture_of(config: ModelConfig, model_type: str) -> str:
    """Return the name of the class that :func:`family_of` finds, such as `LlamaForCausalLM`; raises as it does."""
    return _CLASSES[family_of(config, model_type)].architecture


def config_json(checkpoint: Checkpoint, *, dtype: HuggingFaceDtype, tokens: TokenIds) -> bytes:
    """Return config.json as :func:`write_huggingface` writes it; raises as :func:`family_of` does."""
    config = huggingface_config(checkpoint.config, checkpoint.model_type, dtype=dtype, tokens=tokens)
    return msgspec.json.format(msgspec.json.encode(config, order="sorted"), indent=2) + b"\n"


def huggingface_config(
    config: ModelConfig, model_type: str, *, dtype: HuggingFaceDtype, tokens: TokenIds
) -> dict[str, Plain]:
    """Return the contents of config.json; raises as :func:`family_of` does."""
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


def rope_parameters(config: ModelConfig) -> dict[str, Plain]:
    """Return RoPE's options as transformers 5 names them."""
    return {"rope_theta": config.rope_theta, **_scaling(config.rope_scaling, config.max_seq_len)}


def _scaling(scaling: RopeScaling | None, max_seq_len: int) -> dict[str, Plain]:
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
    # LongRoPE divides each frequency by a factor of its own. With equal factors for short and long contexts, and an
    # attention factor of 1, the context length that separates the two has no effect.
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_factor": list(scaling.factors),
        "long_factor": list(scaling.factors),
        "original_max_position_embeddings": max_seq_len,
    }
