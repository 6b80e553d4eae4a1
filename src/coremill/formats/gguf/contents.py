"""The contents of a GGUF file, compared with the checkpoint: its weights up to rounding, and its metadata.

The outputs of a quantised file do not show every defect; its contents do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from coremill.core.config import GgufType, ModelConfig
from coremill.core.errors import GgufError, TokenizerError
from coremill.core.parity import SettingDifference
from coremill.formats.gguf.reader import GgufWeights
from coremill.formats.gguf.tokenizer import gguf_metadata, unheld_ends
from coremill.formats.gguf.writer import general_metadata, stored_kind
from coremill.formats.gguf_file import Value
from coremill.formats.halt_head import HALT_HEAD
from coremill.formats.llamacpp.process import LlamaCpp
from coremill.formats.llamacpp.quantize import quantize
from coremill.formats.llamacpp.template import render_with_llamacpp
from coremill.model.checkpoint import Checkpoint
from coremill.model.rope import attention_factor, inverse_frequencies
from coremill.model.student import parameter_shapes
from coremill.text.chat import Message
from coremill.text.model_tokenizer import TextTokenizer

_Kind = gguf.GGMLQuantizationType

MOST_WEIGHTS_ERR = 1e6
"""The result of `weights_err` for a file with unrelated weights."""

_ROWS = 4096
"""Rows of a tensor that are compared at a time."""
_SHOWN = 60
"""Characters of a value that a difference shows."""
_TEXT = "Will it rain?"
_CONVERSATIONS: tuple[list[Message], ...] = (
    [{"role": "user", "content": _TEXT}],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": _TEXT},
        {"role": "assistant", "content": "It will."},
        {"role": "user", "content": "  Where?\n{{ messages }} 'caf\u00e9' \U0001f3b1 "},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n"},
        {"role": "user", "content": "c"},
    ],
)
"""Each ends with a question, since llama.cpp's server would continue an answer at the end."""


_FACTOR_ERR = 2.0**-22
"""The largest relative error of RoPE's factor as read. A file has its quotient by YaRN's own factor as float32:
half an ulp, and another half as the shortest decimal. YaRN's factor, whose logarithm weighs a tenth, has the same
error: 1.1 ulp of at most 2⁻²³."""


class _Rounding(NamedTuple):
    """The largest error of a type's rounding, in a block of values."""

    block: int
    share: float
    """As a share of the block's largest magnitude."""
    absolute: float = 0.0
    """In addition: the error of a block's scale, a float16, if it is tiny."""


_TINY = 128 * 2.0**-25
_ROUNDINGS: Mapping[gguf.GGMLQuantizationType, _Rounding] = {
    _Kind.F32: _Rounding(1, 2.0**-24),
    _Kind.F16: _Rounding(1, 2.0**-11, 2.0**-25),
    # A step is 1/127 of the largest value, its scale a float16.
    _Kind.Q8_0: _Rounding(32, 0.5 / 127 + 2.0**-11, _TINY),
    # A step is 1/8; values are from -8 to 7, so that one at the short end may be off by a whole step.
    _Kind.Q4_0: _Rounding(32, 1 / 8 + 2.0**-10, _TINY),
}
_SEARCHED = frozenset({_Kind.Q4_K, _Kind.Q5_K, _Kind.Q6_K})
"""llama.cpp searches for the scales of these, so that no bound is tight. It quantises the weights again instead."""


def weights_err(source: GgufWeights, checkpoint: Checkpoint) -> float:
    """Return the largest error of a stored weight, relative to the largest error of its type's rounding.

    Returns:
        1 is the bound; at most `MOST_WEIGHTS_ERR`.

    Raises:
        GgufError: the file and the checkpoint have different tensors.
    """
    # GGUF files have no halt head.
    ours = {name: tensor for name, tensor in checkpoint.state_dict.items() if name != HALT_HEAD}
    stored = source.tensors
    if stored.keys() != ours.keys():
        odd = sorted(stored.keys() ^ ours.keys())
        raise GgufError(
            f"{source.path} and the checkpoint do not both have {odd[0]}",
            expected="a file that was made from the checkpoint",
            run="python -m coremill.conversion.export_gguf --help",
        )
    shares = [_share(*_rounded_so_far(ours[name], source.kind(name)), stored[name]) for name in ours]
    largest = float(torch.stack(shares).max())  # NaN if one of them is NaN
    return min(largest, MOST_WEIGHTS_ERR) if math.isfinite(largest) else MOST_WEIGHTS_ERR


def _rounded_so_far(value: Tensor, kind: gguf.GGMLQuantizationType) -> tuple[Tensor, _Rounding]:
    """The values that a stored weight is compared with, and the remaining rounding."""
    if kind not in _SEARCHED:
        return value, _ROUNDINGS.get(kind, _ROUNDINGS[_Kind.F32])  # coremill does not write other types
    blocks = quantize(value.detach().float().contiguous().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(blocks, kind)), _ROUNDINGS[_Kind.F32]


def _share(expected: Tensor, rounding: _Rounding, found: Tensor) -> Tensor:
    """The largest |w − w'| relative to the bound of its block; a part of the rows is compared at a time."""
    tiny = max(rounding.absolute, torch.finfo(torch.float32).tiny)
    shares = []
    for ours, theirs in zip(expected.split(_ROWS), found.split(_ROWS), strict=True):
        values = ours.float().reshape(-1, rounding.block)
        error = (theirs.float().reshape(-1, rounding.block) - values).abs().amax(1)
        shares.append((error / (rounding.share * values.abs().amax(1) + tiny)).max())
    return torch.stack(shares).max()


# --- settings ---------------------------------------------------------------------------------------


def setting_differences(
    kind: GgufType, source: GgufWeights, checkpoint: Checkpoint, tokenizer: TextTokenizer, llamacpp: LlamaCpp
) -> list[SettingDifference]:
    """Return the differences of the file, and of llama.cpp's view of it, from the checkpoint and its tokenizer."""
    tokenizer_keys = gguf_metadata(tokenizer, vocab_size=checkpoint.config.vocab_size)
    return [
        *_type_differences(kind, source),
        *config_differences(source.config, checkpoint.config),
        *_tokenizer_differences(source.file.metadata, tokenizer_keys),
        *_general_differences(kind, source, checkpoint),
        *vocabulary_differences(llamacpp, tokenizer),
    ]


def _type_differences(kind: GgufType, source: GgufWeights) -> Iterator[SettingDifference]:
    for name, shape in parameter_shapes(source.config).items():
        if name != HALT_HEAD:
            expected = stored_kind(name, shape, kind)
            yield from _difference(f"the type of {name}", expected.name, source.kind(name).name)


def config_differences(found: ModelConfig, expected: ModelConfig) -> Iterator[SettingDifference]:
    """Yield the settings of a file that are not the checkpoint's, up to the rounding of numbers to float32."""
    for name in sorted({*ModelConfig.__struct_fields__} - {"arch", "head_size", "rope_scaling"}):
        yield from _difference(name, _rounded(getattr(expected, name)), _rounded(getattr(found, name)))
    yield from _difference("head_dim", expected.head_dim, found.head_dim)
    yield from _difference("tie_embeddings", expected.arch.tie_embeddings, found.arch.tie_embeddings)
    # A scaling may be written as divisors: the resulting frequencies are compared.
    turns, their_turns = inverse_frequencies(expected), inverse_frequencies(found)
    if turns.shape == their_turns.shape and not torch.allclose(turns, their_turns, rtol=1e-6, atol=0):
        yield SettingDifference(
            name="RoPE's frequencies", expected=_shown(turns.tolist()), found=_shown(their_turns.tolist())
        )
    factor, their_factor = attention_factor(expected), attention_factor(found)
    if not math.isclose(factor, their_factor, rel_tol=_FACTOR_ERR):
        yield SettingDifference(name="RoPE's factor", expected=_shown(factor), found=_shown(their_factor))


def _rounded(value: float | str) -> float | str:
    """`value` as the file stores it: numbers with a fraction as float32."""
    return float(np.float32(value)) if isinstance(value, float) else value


def _tokenizer_differences(
    found: Mapping[str, Value], expected: Mapping[str, Value]
) -> Iterator[SettingDifference]:
    theirs = {key: value for key, value in found.items() if key.startswith("tokenizer.")}
    for key in sorted(expected.keys() | theirs.keys()):
        ours, stored = expected.get(key), theirs.get(key)
        if isinstance(ours, list) and isinstance(stored, list) and len(ours) == len(stored):
            wrong = (index for index, pair in enumerate(zip(ours, stored, strict=True)) if pair[0] != pair[1])
            if (first := next(wrong, None)) is not None:
                yield from _difference(f"{key}[{first}]", ours[first], stored[first])
        else:
            yield from _difference(key, ours, stored)


def _general_differences(
    kind: GgufType, source: GgufWeights, checkpoint: Checkpoint
) -> Iterator[SettingDifference]:
    """The keys outside the tokenizer and the architecture, and the size of the vocabulary."""
    found, architecture = source.file.metadata, source.model_type
    known = {
        "general.architecture": architecture,
        f"{architecture}.vocab_size": checkpoint.config.vocab_size,
        **general_metadata(kind),
    }
    for key in sorted(found):
        if key in known:
            yield from _difference(key, known[key], found[key])
        elif key != "general.name" and not key.startswith(("tokenizer.", f"{architecture}.", "coremill.")):
            yield from _difference(key, None, found[key])


def vocabulary_differences(llamacpp: LlamaCpp, tokenizer: TextTokenizer) -> Iterator[SettingDifference]:
    """llama.cpp's own view of the tokens, some of which it recognises by their names."""
    found = llamacpp.vocabulary()
    template = None if tokenizer.chat_template is None else tokenizer.chat_template.source
    if tokenizer.bos_id is not None:  # else llama.cpp chooses one that it does not use
        yield from _difference("llama.cpp's beginning token", tokenizer.bos_id, found.bos_id)
    yield from _difference("llama.cpp's chat template", template, found.chat_template)
    for token in sorted({*tokenizer.eos_ids} - {*unheld_ends(tokenizer)}):
        yield from _difference(f"whether token {token} ends an answer", True, token in found.end_ids)
    # llama.cpp treats some end tokens as control tokens, whatever the file declares.
    special = frozenset(token_id for token_id, added in tokenizer.added_tokens.items() if added.special)
    for token in sorted((special - found.control_ids) | (found.control_ids - special - found.end_ids)):
        yield from _difference(f"whether token {token} is special", token in special, token in found.control_ids)
    begin = [tokenizer.bos_id] if tokenizer.add_bos else []
    yield from _difference(
        f"the tokens of {_TEXT!r}, with the beginning token",
        [*begin, *tokenizer.encode(_TEXT)],
        llamacpp.tokenize(_TEXT, allow_special=False, begin=True),
    )


def prompt_differences(llamacpp: LlamaCpp, tokenizer: TextTokenizer) -> Iterator[SettingDifference]:
    """The prompts that differ between llama.cpp's template engine and ours.

    Not every difference is a defect: llama.cpp's server defines variables of its own, such as today's
        `date_string`. A conversation that our engine rejects is skipped.

    Raises:
        GgufError: llama.cpp cannot parse the template.
    """
    if (template := tokenizer.chat_template) is None:
        return
    expected: list[tuple[list[Message], str]] = []
    for messages in _CONVERSATIONS:
        with contextlib.suppress(TokenizerError):
            expected.append((messages, template.render(messages, add_generation_prompt=True)))
    found = render_with_llamacpp(llamacpp.path, [messages for messages, _ in expected])
    # The server removes the token that begins every text from a prompt, so that it is not there twice.
    begin = tokenizer.special_tokens["bos_token"] if tokenizer.add_bos else ""
    for (messages, ours), theirs in zip(expected, found, strict=True):
        name = f"llama.cpp's prompt of {len(messages)} messages"
        yield from _difference(name, ours.removeprefix(begin), theirs.removeprefix(begin))


_Shown = Value | list[int | None] | list[int] | None


def _difference(name: str, expected: _Shown, found: _Shown) -> Iterator[SettingDifference]:
    if found != expected:
        yield SettingDifference(name=name, expected=_shown(expected), found=_shown(found))


def _shown(value: _Shown) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
