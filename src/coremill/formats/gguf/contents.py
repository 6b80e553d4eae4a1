"""What a GGUF file holds, read back: its weights to the rounding of their types, and all that it says of the model.

Numbers that llama.cpp computes do not show every defect of a quantised file; the file itself does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import gguf
import msgspec
import numpy as np
import torch
from torch import Tensor

from coremill.core.config import GgufType, ModelConfig
from coremill.core.errors import GgufError, TokenizerError
from coremill.core.parity import SettingDifference
from coremill.formats.gguf.reader import GgufWeights
from coremill.formats.gguf.tokenizer import gguf_metadata
from coremill.formats.gguf.writer import general_metadata, stored_kind
from coremill.formats.halt_head import HALT_HEAD
from coremill.formats.llamacpp.process import LlamaCpp
from coremill.formats.llamacpp.quantize import quantize
from coremill.formats.llamacpp.template import render_with_llamacpp
from coremill.formats.parity import added_tokens
from coremill.model.checkpoint import Checkpoint
from coremill.model.rope import attention_factor, inverse_frequencies
from coremill.model.student import parameter_shapes
from coremill.text.chat import Message
from coremill.text.model_tokenizer import TextTokenizer

_Kind = gguf.GGMLQuantizationType

MOST_WEIGHTS_ERR = 1e6
"""What `weights_err` says of a file that has nothing of the checkpoint's weights."""

_SHOWN = 60
"""Characters of a value in a difference."""
_BEGINNING = "Will it rain?"
_CONVERSATIONS: tuple[list[Message], ...] = (
    [{"role": "user", "content": _BEGINNING}],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": _BEGINNING},
        {"role": "assistant", "content": "It will."},
        {"role": "user", "content": "  Where?\n{{ messages }} 'caf\u00e9' \U0001f3b1 "},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n"},
        {"role": "user", "content": "c"},
    ],
)
"""Each ends with a question: an answer at the end llama.cpp's server would go on with."""


class _Rounding(NamedTuple):
    """The most that a type's rounding makes of an error, in a block of values."""

    block: int
    share: float
    """Of the block's largest magnitude."""
    absolute: float = 0.0
    """On top: what the scale of a block, in float16, loses where it is tiny."""


_TINY = 128 * 2.0**-25
_ROUNDINGS: Mapping[gguf.GGMLQuantizationType, _Rounding] = {
    _Kind.F32: _Rounding(1, 2.0**-24),
    _Kind.F16: _Rounding(1, 2.0**-11, 2.0**-25),
    # A step is 1/127 of the largest value, its scale a float16.
    _Kind.Q8_0: _Rounding(32, 0.5 / 127 + 2.0**-11, _TINY),
    # A step is 1/8; values run from -8 to 7, so that one at the short end is a whole step off.
    _Kind.Q4_0: _Rounding(32, 1 / 8 + 2.0**-10, _TINY),
}
_SEARCHED = frozenset({_Kind.Q4_K, _Kind.Q5_K, _Kind.Q6_K})
"""llama.cpp searches for the scales of these, so that no bound is tight: it is asked what they come to."""


def weights_err(source: GgufWeights, stored: Mapping[str, Tensor], checkpoint: Checkpoint) -> float:
    """The largest error of a stored weight, as a share of the most that rounding makes; at most `MOST_WEIGHTS_ERR`.

    Args:
        stored: the file's weights in float32, by the checkpoint's names.

    Raises:
        GgufError: the file has other tensors than the checkpoint.
    """
    # GGUF has no place for the halt head.
    ours = {name: tensor for name, tensor in checkpoint.state_dict.items() if name != HALT_HEAD}
    if stored.keys() != ours.keys():
        odd = sorted(stored.keys() ^ ours.keys())
        raise GgufError(
            f"{source.path} and the checkpoint do not both have {odd[0]}",
            expected="the file that was made of the checkpoint",
            run="python -m coremill.conversion.export_gguf --help",
        )
    shares = [_share(*_rounded_so_far(ours[name], source.kind(name)), stored[name]) for name in ours]
    largest = float(torch.stack(shares).max())  # NaN where there is one
    return min(largest, MOST_WEIGHTS_ERR) if math.isfinite(largest) else MOST_WEIGHTS_ERR


def _rounded_so_far(value: Tensor, kind: gguf.GGMLQuantizationType) -> tuple[Tensor, _Rounding]:
    """What a stored weight is compared with, and the rounding that is left."""
    if kind not in _SEARCHED:
        return value, _ROUNDINGS.get(kind, _ROUNDINGS[_Kind.F32])  # of a type that is not written here, nothing is
    blocks = quantize(value.detach().float().contiguous().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(blocks, kind)), _ROUNDINGS[_Kind.F32]


def _share(expected: Tensor, rounding: _Rounding, found: Tensor) -> Tensor:
    """The largest |w − w'| over what is allowed in its block."""
    blocks = (tensor.float().reshape(-1, rounding.block).abs().amax(1) for tensor in (found - expected, expected))
    error, largest = blocks
    return (error / (rounding.share * largest + max(rounding.absolute, torch.finfo(torch.float32).tiny))).max()


# --- settings ---------------------------------------------------------------------------------------


def setting_differences(
    kind: GgufType, source: GgufWeights, checkpoint: Checkpoint, tokenizer: TextTokenizer, llamacpp: LlamaCpp
) -> list[SettingDifference]:
    """What the file, or llama.cpp of it, says otherwise than the checkpoint and its tokenizer."""
    return [
        *_of_types(kind, source),
        *_of_model(source.config, checkpoint.config),
        *_of_tokenizer(source.file.metadata, gguf_metadata(tokenizer, vocab_size=checkpoint.config.vocab_size)),
        *_of_others(kind, source, checkpoint),
        *_of_vocabulary(llamacpp, tokenizer),
    ]


def _of_types(kind: GgufType, source: GgufWeights) -> Iterator[SettingDifference]:
    for name, shape in parameter_shapes(source.config).items():
        if name != HALT_HEAD:
            expected = stored_kind(name, shape, kind)
            yield from _difference(f"the type of {name}", expected.name, source.kind(name).name)


def _of_model(found: ModelConfig, expected: ModelConfig) -> Iterator[SettingDifference]:
    ours, theirs = (msgspec.structs.asdict(config) for config in (expected, found))
    for name in sorted(ours.keys() - {"arch", "head_size", "rope_scaling"}):
        yield from _difference(name, _rounded(ours[name]), _rounded(theirs[name]))
    yield from _difference("head_dim", expected.head_dim, found.head_dim)
    yield from _difference("tie_embeddings", expected.arch.tie_embeddings, found.arch.tie_embeddings)
    # A scaling may be written out as divisors: what counts is what it comes to.
    turns, their_turns = inverse_frequencies(expected), inverse_frequencies(found)
    if turns.shape == their_turns.shape and not torch.allclose(turns, their_turns, rtol=1e-6, atol=0):
        yield SettingDifference(
            name="RoPE's frequencies", expected=_shown(turns.tolist()), found=_shown(their_turns.tolist())
        )
    yield from _difference("RoPE's factor", _rounded(attention_factor(expected)), _rounded(attention_factor(found)))


def _rounded(value: Any) -> Any:
    """Numbers with a fraction are float32 in the file."""
    return float(np.float32(value)) if isinstance(value, float) else value


def _of_tokenizer(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[SettingDifference]:
    theirs = {key: value for key, value in found.items() if key.startswith("tokenizer.")}
    for key in sorted(expected.keys() | theirs.keys()):
        ours, said = expected.get(key), theirs.get(key)
        if isinstance(ours, list) and isinstance(said, list) and len(ours) == len(said):
            for place in [place for place, pair in enumerate(zip(ours, said, strict=True)) if pair[0] != pair[1]][
                :1
            ]:
                yield from _difference(f"{key}[{place}]", ours[place], said[place])
        else:
            yield from _difference(key, ours, said)


def _of_others(kind: GgufType, source: GgufWeights, checkpoint: Checkpoint) -> Iterator[SettingDifference]:
    """Keys that are of no tokenizer, and of no architecture but for one that the weights tell as well."""
    found, architecture = source.file.metadata, source.model_type
    known = {**general_metadata(None, kind), "general.architecture": architecture}
    size_key = f"{architecture}.vocab_size"
    known[size_key] = checkpoint.config.vocab_size
    for key in sorted(found):
        if key in known and known[key] is not None:
            yield from _difference(key, known[key], found[key])
        elif key not in known and not key.startswith(("tokenizer.", f"{architecture}.", "coremill.")):
            yield from _difference(key, None, found[key])


def _of_vocabulary(llamacpp: LlamaCpp, tokenizer: TextTokenizer) -> Iterator[SettingDifference]:
    """llama.cpp's own view, which knows some tokens by their names."""
    found = llamacpp.vocabulary()
    template = tokenizer.chat_template
    if tokenizer.bos_id is not None:  # else llama.cpp takes another for it, and puts it nowhere
        yield from _difference("llama.cpp's beginning token", tokenizer.bos_id, found.bos_id)
    yield from _difference("llama.cpp's chat template", template and template.source, found.chat_template)
    for token in tokenizer.eos_ids:
        yield from _difference(f"whether token {token} ends an answer", True, token in found.end_ids)
    # Some end tokens it knows to be control tokens whatever a file says.
    special = frozenset(added["id"] for added in added_tokens(tokenizer) if added["special"])
    for token in sorted((special - found.control_ids) | (found.control_ids - special - found.end_ids)):
        yield from _difference(f"whether token {token} is special", token in special, token in found.control_ids)
    begun = [tokenizer.bos_id] if tokenizer.add_bos else []
    yield from _difference(
        f"the tokens of {_BEGINNING!r}, begun",
        [*begun, *tokenizer.encode(_BEGINNING)],
        llamacpp.tokenize(_BEGINNING, allow_special=False, begin=True),
    )


def prompt_differences(llamacpp: LlamaCpp, tokenizer: TextTokenizer) -> Iterator[SettingDifference]:
    """What llama.cpp's own template engine makes otherwise of the template.

    Not every difference is a defect: its server defines variables of its own, such as `date_string` as today. A
    conversation that ours refuses is left out.

    Raises:
        GgufError: it does not read the template.
    """
    if (template := tokenizer.chat_template) is None:
        return
    expected: list[tuple[list[Message], str]] = []
    for messages in _CONVERSATIONS:
        with contextlib.suppress(TokenizerError):
            expected.append((messages, template.render(messages, add_generation_prompt=True)))
    found = render_with_llamacpp(llamacpp.path, [messages for messages, _ in expected])
    # What begins every text its server takes off a prompt, so that it is not there twice.
    begun = tokenizer.special_tokens["bos_token"] if tokenizer.add_bos else ""
    for (messages, ours), theirs in zip(expected, found, strict=True):
        name = f"llama.cpp's prompt of {len(messages)} messages"
        yield from _difference(name, ours.removeprefix(begun), theirs.removeprefix(begun))


def _difference(name: str, expected: Any, found: Any) -> Iterator[SettingDifference]:
    if found != expected:
        yield SettingDifference(name=name, expected=_shown(expected), found=_shown(found))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
