"""Compares the settings that transformers reads from a directory with those of the model and its tokenizer.

Logits show none of these, but users depend on them: which tokens end an answer, how long a text may be, whether
tokens are sampled, and how special tokens in a text are split. The names are those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import tokenizers
import torch
import transformers
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from coremill.core.config import ModelConfig
from coremill.core.errors import TokenizerError
from coremill.core.plain import Plain
from coremill.formats.huggingface.tokenizer import replaced_parts
from coremill.formats.huggingface.writer import rope_parameters
from coremill.text.model_tokenizer import TextTokenizer

Value: TypeAlias = "Plain | torch.dtype"


@dataclass(frozen=True, kw_only=True)
class ExpectedSettings:
    """What determines the settings of a directory."""

    config: ModelConfig
    architecture: str
    """The class of transformers."""
    dtype: torch.dtype
    """The type of the tensors in the file."""
    tokenizer: TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    found: Value
    expected: Value

    @property
    def differs(self) -> bool:
        return self.found != self.expected

    def __repr__(self) -> str:
        return f"{self.name}: {self.found!r} instead of {self.expected!r}"


def settings(
    folder: Path,
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    expected: ExpectedSettings,
) -> list[Setting]:
    """Return the settings of the configuration, of generation and of the tokenizer, as transformers reads them.

    Args:
        model: the model that transformers loads from `folder`.
        tokenizer: the tokenizer that it loads from there.
    """
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    compared = (
        *_of_model(config, model, expected),
        *_of_generation(model.generation_config, expected.tokenizer),
        *_of_tokenizer(tokenizer, expected.tokenizer),
    )
    return [Setting(name=name, found=found, expected=value) for name, found, value in compared]


def _of_model(
    found: transformers.PreTrainedConfig, model: transformers.PreTrainedModel, expected: ExpectedSettings
) -> Iterator[tuple[str, Value, Value]]:
    yield "class", type(model).__name__, expected.architecture
    yield "architectures", found.architectures, [expected.architecture]
    yield "dtype", found.dtype, expected.dtype
    yield "max_position_embeddings", found.max_position_embeddings, expected.config.max_seq_len
    yield "rope_parameters", found.rope_parameters, rope_parameters(expected.config)
    yield "rms_norm_eps", found.rms_norm_eps, expected.config.norm_eps
    yield "tie_word_embeddings", found.tie_word_embeddings, expected.config.arch.tie_embeddings
    yield "attention_dropout", found.attention_dropout, 0.0
    yield "sliding_window", getattr(found, "sliding_window", None), None
    tokenizer = expected.tokenizer
    yield "bos_token_id", found.bos_token_id, tokenizer.bos_id
    yield "eos_token_id", _id_list(found.eos_token_id), list(tokenizer.eos_ids)
    yield "pad_token_id", found.pad_token_id, tokenizer.pad_id


def _of_generation(
    found: transformers.GenerationConfig, tokenizer: TextTokenizer
) -> Iterator[tuple[str, Value, Value]]:
    """Yield the token ids, and whatever else the configuration of generation sets, such as sampling or a length."""
    expected: dict[str, Value] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    values = found.to_diff_dict()
    values["eos_token_id"] = _id_list(values.get("eos_token_id"))
    for name in sorted(expected.keys() | values.keys() - {"transformers_version"}):
        yield f"generation's {name}", values.get(name), expected.get(name)


def _of_tokenizer(
    found: transformers.PreTrainedTokenizerBase, tokenizer: TextTokenizer
) -> Iterator[tuple[str, Value, Value]]:
    special = tokenizer.special_tokens
    # If a model declares no padding or unknown token, some classes use one of their own, which is harmless.
    for role in sorted({"bos_token", "eos_token", "pad_token"} | special.keys()):
        default = found.pad_token if role == "pad_token" else None
        yield f"tokenizer's {role}", found.special_tokens_map.get(role), special.get(role, default)
    yield "tokenizer's model_max_length", found.model_max_length, VERY_LARGE_INTEGER
    # Compared as text: the library's tokens compare equal if their content is, whatever their other fields.
    theirs = {token_id: repr(token) for token_id, token in found.added_tokens_decoder.items()}
    expected = {token_id: repr(token) for token_id, token in tokenizer.added_tokens.items()}
    for token_id in sorted(theirs.keys() | expected.keys()):
        yield f"token {token_id}", theirs.get(token_id), expected.get(token_id)


def check_represented(
    theirs: transformers.PreTrainedTokenizerBase, tokenizer: TextTokenizer, model_type: str
) -> None:
    """Check that transformers does not replace the rules of a written tokenizer.

    It chooses the class of some models' tokenizers by the model's type, whatever tokenizer_config.json names.

    Args:
        theirs: the tokenizer that transformers loads from the written directory.
        model_type: of its config.json.

    Raises:
        TokenizerError: that class has a normalizer or a pre-tokenizer of its own, or adds tokens.
    """
    assert isinstance(theirs, transformers.PreTrainedTokenizerFast)
    name = type(theirs).__name__
    if name == transformers.PreTrainedTokenizerFast.__name__:
        return
    own = tokenizers.Tokenizer.from_str(tokenizer.data.decode("utf-8"))
    replaced = " and ".join(f"its {part}" for part in replaced_parts(own, theirs.backend_tokenizer))
    added = " and ".join(str(theirs.convert_ids_to_tokens(token)) for token in sorted(theirs.added_tokens_decoder)
                         if token >= tokenizer.vocab_size)  # fmt: skip
    changes = [f"{verb} {what}" for verb, what in (("replaces", replaced), ("adds", added)) if what]
    if changes:
        raise TokenizerError(
            f"a Hugging Face directory cannot hold the tokenizer of {tokenizer.where}: transformers reads every "
            f"{model_type} model's as {name}, which {', and '.join(changes)}",
            expected=f'a tokenizer that {name} represents; or `formats = ["gguf"]` in the configuration',
        )


def _id_list(ids: int | Sequence[int] | None) -> list[int]:
    """Return the end tokens as a list; transformers gives one id, several or None."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
