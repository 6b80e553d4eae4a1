"""The inputs on which exported formats are compared with the checkpoint, and the comparison of greedy tokens.

GGUF files under llama.cpp and Hugging Face directories under transformers share them.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import random
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from coremill.core.errors import DatasetError
from coremill.core.gates import Gate, Severity, failed, passed
from coremill.core.parity import TokenDifference
from coremill.data.prompts import Prompts, RowPrompts, TextPrompts, conversation
from coremill.model.float32 import Float32Bounds
from coremill.model.student import LOGITS
from coremill.text.model_tokenizer import TextTokenizer

TEXTS = 1000
"""The number of texts on which tokenizers are compared."""

POSITIONS = 2048
"""The number of positions that gives the mean KL divergence to within 2 %."""

LENGTH = 256
"""Tokens of a sequence of text."""
_BEGINNING = 32
"""Tokens of the beginning of a text that replaces a missing question."""
_SEED = 7
_SPELLED = 64
"""The most special tokens with texts of their own; Llama 3 has 256, most of them reserved."""
_RANDOM_SHARE = 0.3
"""The minimum share of random texts."""


def none_of(name: str, wrong: Sequence[object], count: int) -> Gate:
    """Return a must-gate that passes if `wrong` is empty, and otherwise shows the first of them.

    Args:
        count: the number of items that were compared.
    """
    if not wrong:
        return passed(measured=0, threshold=0).gate(name, Severity.MUST)
    reason = f"{len(wrong)} of {count}, such as {wrong[0]!r}"
    return failed(reason, measured=len(wrong), threshold=0).gate(name, Severity.MUST)


# --- token ids --------------------------------------------------------------------------------------


def sequences(prompts: Prompts, context: int, positions: int = POSITIONS) -> list[list[int]]:
    """Return about `positions` real tokens on which logits are compared, in sequences of at most `context` tokens.

    Of a student they are single conversations and one sequence of several; of an imported model, parts of texts.

    Raises:
        DatasetError: there is not enough text.
    """
    length = min(LENGTH, context)
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
    """Return `count` encoded prompts; if there are too few, the beginnings of texts as well.

    Raises:
        DatasetError: every one fills the context of `context` tokens.
    """
    if isinstance(prompts, RowPrompts):
        asked = [prompts.tokenizer.encode_prompt(row.prompt) for row in prompts.rows[:count]]
    else:
        assert isinstance(prompts, TextPrompts)
        asked = [chat.ids for chat in prompts.chats[:count]]
        asked += prompts.packed_up_to(min(_BEGINNING, context // 2), count - len(asked))
    if fitting := [ids for ids in asked if len(ids) < context]:
        return fitting
    raise DatasetError(f"every question fills the context of {context} tokens", expected="shorter questions")


def greedy_differences(
    number: int, answer: Sequence[int], logits: npt.NDArray[np.float32], bounds: Float32Bounds
) -> Iterator[TokenDifference]:
    """Yield the tokens of `answer` that are not the checkpoint's choice after the same tokens.

    The token after a different one is compared with the checkpoint's choice after that one, so a tie does not hide
    later differences. Without any difference, the answer is the checkpoint's greedy answer.

    Args:
        number: the index of the prompt.
        logits: the checkpoint's logits (A, V), float32, before each token of the answer.
        bounds: those of the checkpoint's logits.
    """
    # Rounding may change both logits, so two that differ by at most twice the bound may swap ranks.
    twice_largest = 2 * float(np.abs(logits).max(initial=0))
    for place in np.flatnonzero(logits.argmax(-1) != np.asarray(answer)).tolist():
        row, token = logits[place], answer[place]
        best = int(row.argmax())
        gap = float(row[best] - row[token])
        near = bounds.bound(LOGITS, gap / twice_largest if gap else 0.0).limit * twice_largest
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
    """Return `TEXTS` texts: unusual ones, spelled-out special tokens, texts of the run, and random Unicode."""
    special = [token.content for token in tokenizer.added_tokens.values()]
    found = [*ODD_TEXTS, *(f"{prefix}{text}{prefix}b" for text in special[:_SPELLED] for prefix in ("", " ", "a"))]
    if len(special) > _SPELLED:
        found.append(" and ".join(special))
    most = int(TEXTS * (1 - _RANDOM_SHARE))
    found += itertools.islice(prompts.own_texts(), most - len(found))
    return [*found, *random_texts(TEXTS - len(found), special)]


def random_texts(count: int, special: Sequence[str] = ()) -> Iterator[str]:
    """Yield random texts with a fixed seed: words and arbitrary code points by turns.

    Args:
        special: tokens that occur among the words.
    """
    source = random.Random(_SEED)
    for number in range(count):
        make = _characters if number % 2 else functools.partial(_word, special)
        yield "".join(make(source) for _ in range(source.randint(2, 12)))


def _word(special: Sequence[str], source: random.Random) -> str:
    """Return characters of one kind: letters of one script, digits or white space; or a special token."""
    if (kind := source.random()) < 0.2:
        return source.choice(_SPACES)
    if kind < 0.25 and special:
        return source.choice(special)
    return _drawn(source, source.choice(_alphabets()), source.randint(1, 6))


def _characters(source: random.Random) -> str:
    """Return three characters, each from a random part of Unicode."""
    return "".join(_drawn(source, source.choice(_PLANES), 1) for _ in range(3))


def _drawn(source: random.Random, points: range, count: int) -> str:
    """Return assigned characters; programs disagree about unassigned ones."""
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
"""Unicode without surrogates and empty planes."""


@functools.cache
def _alphabets() -> tuple[range, ...]:
    """Return ranges of code points whose words, digits and marks tokenizers split differently."""
    bounds = (
        (0x20, 0x7F), (0x30, 0x3A), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0x980),
        (0xE00, 0xE80), (0x1100, 0x1200), (0x2000, 0x2070), (0x2150, 0x2190), (0x3040, 0x3100), (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A4), (0xFF00, 0xFFF0), (0x1D7CE, 0x1D800), (0x1F300, 0x1F700), (0xE000, 0xE100),
    )  # fmt: skip
    return tuple(range(*each) for each in bounds)
