"""What transformers makes of the settings of a Hugging Face directory, beside what the model is.

None of these shows in logits, and each changes what a user gets: where answers end, how long a text may be, what is
drawn at random, how a special token in a text is cut. Names are transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from coremill.core.config import ModelConfig
from coremill.formats.huggingface.writer import rope_parameters
from coremill.text.model_tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Meant:
    """What the settings are to say."""

    config: ModelConfig
    architecture: str
    """transformers' class."""
    dtype: torch.dtype
    """Of the tensors in the file."""
    tokenizer: TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    found: Any
    meant: Any

    @property
    def differs(self) -> bool:
        return bool(self.found != self.meant)

    def __repr__(self) -> str:
        return f"{self.name}: {self.found!r} instead of {self.meant!r}"


def settings(folder: Path, model: Any, tokenizer: Any, meant: Meant) -> list[Setting]:
    """Of the configuration, of generation and of the tokenizer, as transformers has them.

    Args:
        model: what transformers made of `folder`.
        tokenizer: the same.
    """
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found = (*_of_model(config, model, meant), *_of_generation(model, meant), *_of_tokenizer(tokenizer, meant))
    return [Setting(name=name, found=value, meant=expected) for name, value, expected in found]


def _of_model(found: Any, model: Any, meant: Meant) -> Iterator[tuple[str, Any, Any]]:
    yield "class", type(model).__name__, meant.architecture
    yield "architectures", found.architectures, [meant.architecture]
    yield "dtype", found.dtype, meant.dtype
    yield "max_position_embeddings", found.max_position_embeddings, meant.config.max_seq_len
    yield "rope_parameters", found.rope_parameters, rope_parameters(meant.config)
    yield "rms_norm_eps", found.rms_norm_eps, meant.config.norm_eps
    yield "tie_word_embeddings", found.tie_word_embeddings, meant.config.arch.tie_embeddings
    yield "attention_dropout", found.attention_dropout, 0.0
    yield "sliding_window", getattr(found, "sliding_window", None), None
    ours = meant.tokenizer
    yield "bos_token_id", found.bos_token_id, ours.bos_id
    yield "eos_token_id", _listed(found.eos_token_id), list(ours.eos_ids)
    yield "pad_token_id", found.pad_token_id, ours.pad_id


def _of_generation(model: Any, meant: Meant) -> Iterator[tuple[str, Any, Any]]:
    """The tokens, and nothing else: no sampling, and no length."""
    ours = meant.tokenizer
    expected = {"bos_token_id": ours.bos_id, "eos_token_id": list(ours.eos_ids), "pad_token_id": ours.pad_id}
    found = model.generation_config.to_diff_dict()
    found["eos_token_id"] = _listed(found.get("eos_token_id"))
    for name in sorted(expected.keys() | found.keys() - {"transformers_version"}):
        yield f"generation's {name}", found.get(name), expected.get(name)


def _of_tokenizer(found: Any, meant: Meant) -> Iterator[tuple[str, Any, Any]]:
    ours = meant.tokenizer
    yield "tokenizer's bos_token", found.bos_token, ours.special_tokens.get("bos_token")
    yield "tokenizer's eos_token", found.eos_token, ours.special_tokens.get("eos_token")
    # Where a model names none, some classes have one of their own, which does no harm.
    yield "tokenizer's pad_token", found.pad_token, ours.special_tokens.get("pad_token", found.pad_token)
    yield "tokenizer's model_max_length", found.model_max_length, VERY_LARGE_INTEGER
    # As text: two of the library's tokens of the same content are equal, whatever else they say.
    theirs = {place: repr(token) for place, token in found.added_tokens_decoder.items()}
    expected = {place: repr(token) for place, token in ours.added_tokens.items()}
    for place in sorted(theirs.keys() | expected.keys()):
        yield f"token {place}", theirs.get(place), expected.get(place)


def _listed(ids: int | Sequence[int] | None) -> list[int]:
    """End tokens, which are given alone or in a list."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
