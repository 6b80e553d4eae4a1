"""What the forms of a model that others run are asked, and how their greedy tokens are judged.

The same for GGUF files under llama.cpp and a Hugging Face directory under transformers.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import random
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from coremill.core.errors import DatasetError
from coremill.core.parity import MAX_RELATIVE_ERR, TokenDifference
from coremill.data.prompts import Prompts, RowPrompts, TextPrompts, conversation
from coremill.text.model_tokenizer import TextTokenizer

TEXTS = 1000
"""Texts on which a tokenizer is compared."""

POSITIONS = 2048
"""So many tell the mean of a KL to 2 % of it."""

_LENGTH = 256
"""Tokens of a part of running text."""
_BEGINNING = 32
"""Tokens of a text's beginning, where there are too few questions."""
_SEED = 7
_SPELLED = 64
"""Special tokens that have texts of their own; Llama 3 has 256, most of them reserved."""
_RANDOM_SHARE = 0.3
"""Of the texts, at least."""
_PIECE = 200
"""Characters of a piece of a text."""


# --- token ids --------------------------------------------------------------------------------------


def sequences(prompts: Prompts, context: int, positions: int = POSITIONS) -> list[list[int]]:
    """What logits are compared on: about so many real tokens, in sequences no longer than `context`.

    A student's conversations, whole, and one sequence of several, one behind another; of running text parts.

    Raises:
        DatasetError: there is not that much text.
    """
    length = min(_LENGTH, context)
    if not isinstance(prompts, RowPrompts):
        return prompts.packed_up_to(length, -(-positions // length)) or prompts.packed(length, 1)
    found, count = prompts.packed(context, 1), context
    for row in prompts.rows:
        if count >= positions:
            break
        found.append(conversation(row, prompts.tokenizer)[:context])
        count += len(found[-1])
    return found


def questions(prompts: Prompts, context: int, count: int) -> list[list[int]]:
    """`count` prompts as the model is given them; where there are too few, the beginnings of texts too.

    Raises:
        DatasetError: none leaves room for an answer in `context` tokens.
    """
    if isinstance(prompts, RowPrompts):
        asked = [prompts.tokenizer.encode_prompt(row.prompt) for row in prompts.rows[:count]]
    else:
        assert isinstance(prompts, TextPrompts)
        asked = [chat.ids for chat in prompts.chats[:count]]
        asked += prompts.packed_up_to(min(_BEGINNING, context // 2), count - len(asked))
    if fitting := [ids for ids in asked if len(ids) < context]:
        return fitting
    raise DatasetError(
        f"no question leaves room for an answer in a context of {context} tokens", expected="shorter questions"
    )


def greedy_differences(
    number: int, ids: Sequence[int], answer: Sequence[int], logits: np.ndarray[Any, Any]
) -> Iterator[TokenDifference]:
    """Where a token of `answer` is not the checkpoint's own choice after the same tokens.

    Were a token another, the next is judged after it: so one tie does not hide what comes behind it. Without a
    difference the answer is the checkpoint's own, decoded greedily.

    Args:
        number: of the prompt, from 0.
        ids: the prompt.
        logits: the checkpoint's, (N, V) float32, after each token of prompt and answer, or all but the last.
    """
    rows = logits[len(ids) - 1 :][: len(answer)]
    # Both sides may be off by rounding, so that two as near as twice that may change places.
    near = 2 * MAX_RELATIVE_ERR * float(np.abs(rows).max(initial=0))
    for place in np.flatnonzero(rows.argmax(-1) != np.asarray(answer)).tolist():
        row, token = rows[place], answer[place]
        best = int(row.argmax())
        gap = float(row[best] - row[token])
        yield TokenDifference(prompt=number, place=place, token=token, expected=best, gap=gap, is_tie=gap <= near)


# --- texts ------------------------------------------------------------------------------------------

ODD_TEXTS = (
    "",
    " ",
    "\n",
    "\r\n\r\n\t \u00a0\u2003\u3000",
    "a" * 300,
    "   leading and trailing   ",
    "it's we'LL I'm THEY'VE don\u2019t",
    "0123456789 3.14159 1,000,000 ٣٤٥ Ⅻ ½",
    "cafe\u0301 café \u212b Å ﬁ ﬀ",
    "漢字かな交じり文 한국어 ไทย हिन्दी",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u202e abc \u202c",
    "\U0001f3b1 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1f0 \U0001f44d\U0001f3fd \u2764\ufe0f",
    "\x00\x01\x1b[0m\x7f\x85",
    "\ufeff\u200b\u200d\ufffd\ufffe\uffff",
    "\U000e0001\U0010ffff\U00020000",
    "Zalgo\u0300\u0301\u0302\u0303\u0304\u0305\u0306",
    "<s> </s> <unk> <pad> <mask> [INST] <0x0A> ▁ Ġ Ċ",
    "def f(x):\n\treturn {k: v for k, v in x.items()}  # ok\n",
    "https://example.com/a?b=c&d=%20#e",
)


def texts(prompts: Prompts, tokenizer: TextTokenizer) -> list[str]:
    """`TEXTS` texts: odd ones, special tokens spelled out, the run's own, and for the rest random Unicode."""
    special = [token["content"] for token in added_tokens(tokenizer)]
    found = [*ODD_TEXTS, *(f"{form}{text}{form}b" for text in special[:_SPELLED] for form in ("", " ", "a"))]
    if len(special) > _SPELLED:
        found.append(" and ".join(special))
    most = int(TEXTS * (1 - _RANDOM_SHARE))
    found += itertools.islice(_own_texts(prompts), most - len(found))
    return [*found, *random_texts(TEXTS - len(found), special)]


def added_tokens(tokenizer: TextTokenizer) -> list[dict[str, Any]]:
    """The tokens that were added to a vocabulary and stand for themselves in a text: `id`, `content`, `special`."""
    added: list[dict[str, Any]] = msgspec.json.decode(tokenizer.data).get("added_tokens") or []
    return added


def _own_texts(prompts: Prompts) -> Iterator[str]:
    if isinstance(prompts, RowPrompts):
        for row in prompts.rows:
            yield row.prompt
            yield row.teacher_text
        return
    assert isinstance(prompts, TextPrompts)
    for prompt, chat in zip(prompts.chat_prompts, prompts.chats, strict=True):
        yield prompt.text
        yield prompts.tokenizer.decode(chat.ids)  # in the model's chat format
    for some in itertools.zip_longest(*(_pieces(text.text) for text in prompts.texts)):  # of each text in turn
        yield from (piece for piece in some if piece is not None)


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def random_texts(count: int, special: Sequence[str] = ()) -> Iterator[str]:
    """Texts of Unicode, the same each time: in turn of a few words, and of code points from everywhere.

    Args:
        special: tokens that are spelled out among the words.
    """
    source = random.Random(_SEED)
    for number in range(count):
        make = _characters if number % 2 else functools.partial(_word, special)
        yield "".join(make(source) for _ in range(source.randint(2, 12)))


def _word(special: Sequence[str], source: random.Random) -> str:
    """A few characters of one kind: letters of one script, digits, white space, or a special token spelled out."""
    if (kind := source.random()) < 0.2:
        return source.choice(_SPACES)
    if kind < 0.25 and special:
        return source.choice(special)
    return _drawn(source, source.choice(_alphabets()), source.randint(1, 6))


def _characters(source: random.Random) -> str:
    """Three characters, each of another part of Unicode."""
    return "".join(_drawn(source, source.choice(_PLANES), 1) for _ in range(3))


def _drawn(source: random.Random, points: range, count: int) -> str:
    """Characters that Unicode knows: of others the tables of two programs say different things."""
    drawn: list[str] = []
    while len(drawn) < count:
        if unicodedata.category(char := chr(source.choice(points))) != "Cn":
            drawn.append(char)
    return "".join(drawn)


_SPACES = (
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", " \n ", "\u00a0", "\u2003", "\u3000", "\x00", "\x7f"),
    *("\u200d", "\ufeff"),
)
_PLANES = (
    *(range(0x20, 0x7F), range(0xA0, 0x250), range(0x300, 0x370), range(0x370, 0x800), range(0x800, 0x3000)),
    *(range(0x3000, 0xD800), range(0xE000, 0x10000), range(0x10000, 0x20000), range(0x20000, 0x32000)),
    range(0xE0000, 0x110000),
)
"""Unicode but for surrogates, and for planes that have nothing."""


@functools.cache
def _alphabets() -> tuple[range, ...]:
    """Code points whose words, digits and marks are cut differently."""
    bounds = (
        (0x20, 0x7F), (0x30, 0x3A), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0x980),
        (0xE00, 0xE80), (0x1100, 0x1200), (0x2000, 0x2070), (0x2150, 0x2190), (0x3040, 0x3100), (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A4), (0xFF00, 0xFFF0), (0x1D7CE, 0x1D800), (0x1F300, 0x1F700), (0xE000, 0xE100),
    )  # fmt: skip
    return tuple(range(*each) for each in bounds)
