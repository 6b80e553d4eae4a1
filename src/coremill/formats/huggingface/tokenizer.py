"""Reads the tokenizer of a Hugging Face directory as transformers does.

A directory states its tokens in tokenizer.json, `added_tokens_decoder`, added_tokens.json and
special_tokens_map.json, and its template in four places. transformers may also replace the rules of tokenizer.json
by those of a class that it chooses by the model's type. So `AutoTokenizer` loads the directory, and its result is
kept as one tokenizer.json.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
import transformers

from coremill.core.errors import TokenizerError
from coremill.formats.huggingface.reader import CONFIG
from coremill.text.model_tokenizer import (
    GENERATION_CONFIG,
    LEGACY,
    TOKENIZER,
    TOKENIZER_CONFIG,
    SpecialTokens,
    TextTokenizer,
    end_ids,
    json_object,
    pipeline_steps,
    unique_ids,
)
from coremill.text.student_tokenizer import is_library_failure, parse_backend

log = logging.getLogger(__name__)

_OTHER_VOCABULARIES = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json")
"""Files that transformers converts to a tokenizer.json; it needs further packages for some of them."""
_PROCESSOR_TEMPLATE = "chat_template.json"
"""transformers reads it for a processor of images or sounds, not for a tokenizer."""


def read_tokenizer(folder: Path) -> TextTokenizer:
    """Return the tokenizer that transformers loads from `folder`, with its ids, special tokens and chat template.

    Raises:
        TokenizerError: there is no tokenizer.json, transformers cannot read a file, or coremill cannot represent
        the tokenizer.
    """
    path = folder / TOKENIZER
    own = _own_backend(path)
    for name in (TOKENIZER_CONFIG, *LEGACY):
        json_object(folder / name)  # names the file and the fault, which transformers does not
    ends = end_ids(folder / GENERATION_CONFIG) or end_ids(folder / CONFIG)
    theirs = _auto_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    backend.no_truncation()  # some files contain the settings of their last use
    backend.no_padding()
    if replaced := list(replaced_parts(own, backend)):
        log.warning(
            "%s: transformers reads it as %s, which replaces its %s",
            path,
            type(theirs).__name__,
            " and its ".join(replaced),
        )
    special = SpecialTokens(
        tokens={role: str(token) for role, token in theirs.special_tokens_map.items()},
        eos_ids=unique_ids(theirs.eos_token_id, *ends),
    )
    return TextTokenizer(backend.to_str().encode("utf-8"), special, _template_of(folder, theirs), where=str(path))


def _own_backend(path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer in the tokenizer.json at `path` alone."""
    folder = path.parent
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as failure:
        if others := [name for name in _OTHER_VOCABULARIES if (folder / name).is_file()]:
            raise TokenizerError(
                f"{folder} has {others[0]} and no {path.name}",
                expected=f"a {path.name}; transformers makes it of {others[0]}, with the packages that it asks for",
                run=(
                    'python -c "from transformers import AutoTokenizer; '
                    f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
                ),
            ) from failure
        raise TokenizerError(
            f"cannot read {path}: {failure.strerror}", expected="a tokenizer.json, as AutoTokenizer saves it"
        ) from failure
    except (OSError, UnicodeDecodeError) as failure:
        raise TokenizerError(
            f"cannot read {path}: {failure}", expected="a tokenizer.json, as AutoTokenizer saves it"
        ) from failure
    return parse_backend(text, str(path))


def _auto_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    try:
        found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BaseException as failure:
        if not is_library_failure(failure):
            raise
        raise TokenizerError(
            f"transformers cannot read the tokenizer of {folder}: {type(failure).__name__}: {failure}",
            expected="a tokenizer that AutoTokenizer loads",
        ) from failure
    if not isinstance(found, transformers.PreTrainedTokenizerFast):
        raise TokenizerError(
            f"transformers reads the tokenizer of {folder} as {type(found).__name__}, which ignores {TOKENIZER}",
            expected="a tokenizer that transformers reads from its tokenizer.json",
        )
    return found


def replaced_parts(own: tokenizers.Tokenizer, read: tokenizers.Tokenizer) -> Iterator[str]:
    """Yield the names of the parts of `own` that differ in `read`: normalizer, pre-tokenizer, decoder, model."""
    ours, theirs = (_parts(each) for each in (own, read))
    for name, part in ours.items():
        if part != theirs[name]:
            yield name


def _parts(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    parts: dict[str, Any] = msgspec.json.decode(backend.to_str())
    return {
        "normalizer": pipeline_steps(parts["normalizer"], "normalizers"),
        "pre-tokenizer": pipeline_steps(parts["pre_tokenizer"], "pretokenizers"),
        "decoder": pipeline_steps(parts["decoder"], "decoders"),
        "model": _model_options(parts["model"]),
    }


def _model_options(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a model without its vocabulary; null, false and an empty text have one meaning."""
    unknown = model.get("unk_token")
    unused = {"vocab", "merges", *(() if unknown else ("fuse_unk",))}
    return {key: value for key, value in model.items() if value and key not in unused}


def _template_of(folder: Path, theirs: transformers.PreTrainedTokenizerFast) -> str | None:
    """Return the template that transformers takes for a chat; log the ones that it does not take."""
    template: str | dict[str, str] | None = theirs.chat_template
    if isinstance(template, dict):
        others = ", ".join(sorted(template.keys() - {"default"}))
        if "default" not in template:
            log.warning("%s: its chat templates, %s, are not taken: none is the default", folder, others)
        elif others:
            log.warning("%s: of its chat templates, the default one is kept, not %s", folder, others)
        return template.get("default")
    if template is None and (path := folder / _PROCESSOR_TEMPLATE).is_file():
        log.warning(
            "%s is not taken: transformers reads a tokenizer's chat template from chat_template.jinja or %s",
            path,
            TOKENIZER_CONFIG,
        )
    return template
