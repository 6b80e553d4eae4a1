"""The token ids that a model is run on when it is exported and verified.

The inputs of a distilled model are held-out questions with the teacher's answers. Those of an imported model are
real texts, and questions in its chat format.

Legend: T sequence length.
"""

from __future__ import annotations

import abc
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from coremill.core.answer_key import AnswerKey
from coremill.core.errors import DatasetError
from coremill.core.layout import answer_key_file, chat_prompts_file, texts_file
from coremill.data.judge import read_answer_key
from coremill.data.rows import Row, read_rows
from coremill.data.texts import ChatPrompt, Text, read_chat_prompts, read_texts
from coremill.text.model_tokenizer import TextTokenizer
from coremill.text.student_tokenizer import Tokenizer

HELDOUT_PATTERN = "*heldout.jsonl"

PACKED_ROWS = 4
"""The packed sequences of rows that export and verification compare at each length."""
CONVERSATIONS = 64
"""The conversations compared at each length: enough that 2 % of their answer tokens are more than one or two."""
PADDED_CONVERSATIONS = 8
"""The conversations of rows that are compared with padding, at every length."""
PADDED_CHATS = 2
"""The questions compared with padding, at one length each, because an imported model may take seconds per run."""
PROBED_ROWS = 2
"""The packed sequences of rows in which tokens are changed, at each length."""


_PIECE = 200
"""Characters of a piece of a text."""


class Compared(NamedTuple):
    """A sequence on which a package is compared with its checkpoint."""

    ids: list[int]
    """At most T of them."""
    judged: slice
    """The positions whose top-1 token counts; errors, SQNR and KL are over all positions."""
    scored: bool
    """Whether the perplexity of these ids is measured."""


class Probe(NamedTuple):
    """A sequence of exactly T tokens, and changes of single tokens."""

    ids: list[int]
    changes: tuple[tuple[int, int], ...]
    """Positions, never the first, and the new token at each, which differs from the old one."""


class Prompts(abc.ABC):
    """Real token ids for one model."""

    tokenizer: Tokenizer | TextTokenizer
    """The model's tokenizer, whose size and digest `check_vocabulary` compares."""
    export_count: int
    """The number of packed sequences that an export compares at each length."""

    imported: ClassVar[bool]
    """Whether they are those of an imported model: texts instead of a held-out set."""

    @property
    @abc.abstractmethod
    def exchanges(self) -> Sequence[tuple[str, str]]:
        """Questions, each with a text that may answer it: the teacher's answer, or another question."""

    @abc.abstractmethod
    def own_texts(self) -> Iterator[str]:
        """Yield every text, as it is and as the model reads it."""

    @property
    def pad_id(self) -> int:
        """The id that sequences are padded with, on the right."""
        return self.tokenizer.pad_id

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer as other programs need it, with special tokens and a chat template."""
        own = self.tokenizer
        return TextTokenizer.of_student(own) if isinstance(own, Tokenizer) else own

    @abc.abstractmethod
    def packed(self, seq_len: int, count: int) -> list[list[int]]:
        """Return `count` sequences of exactly `seq_len` tokens; the first has the same beginning at every length.

        Raises:
            DatasetError: there is not enough text.
        """

    @abc.abstractmethod
    def packed_up_to(self, seq_len: int, count: int) -> list[list[int]]:
        """Return the sequences of :meth:`packed`, or fewer (even none) if there is not enough text."""

    @abc.abstractmethod
    def compared(self, seq_len: int) -> Iterator[Compared]:
        """Yield the sequences to compare at `seq_len`, a packed one first. Raises as :meth:`packed` does."""

    @abc.abstractmethod
    def probes(self, seq_len: int) -> list[Probe]:
        """Return the changes to try at `seq_len`, those of the first packed sequence first.

        Raises as :meth:`packed` does.
        """

    @abc.abstractmethod
    def padded(self, lengths: Sequence[int]) -> Mapping[tuple[int, ...], list[int]]:
        """Return conversations, each with the longer ones of `lengths` to pad it to."""


class RowPrompts(Prompts):
    """Questions of a dataset, with the teacher's answers."""

    imported = False
    export_count = PACKED_ROWS

    tokenizer: Tokenizer

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer, answer_key: Path) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self._answer_key = answer_key

    @functools.cached_property
    def answer_key(self) -> AnswerKey:
        """The answers that the dataset of the rows accepts. Raises as :func:`read_answer_key` does."""
        return read_answer_key(self._answer_key)

    @property
    def exchanges(self) -> Sequence[tuple[str, str]]:
        return [(row.prompt, row.teacher_text) for row in self.rows]

    def own_texts(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.exchanges)

    def packed(self, seq_len: int, count: int) -> list[list[int]]:
        """Return sequences of consecutive conversations; each sequence begins with a new one.

        The last conversation of a sequence is truncated. After the last row, the rows are repeated from the first.
        """
        stream: Iterator[Row] = itertools.cycle(self.rows)
        sequences = []
        for _ in range(count):
            ids: list[int] = []
            while len(ids) < seq_len:
                ids += conversation(next(stream), self.tokenizer)
            sequences.append(ids[:seq_len])
        return sequences

    def packed_up_to(self, seq_len: int, count: int) -> list[list[int]]:
        return self.packed(seq_len, count)

    def compared(self, seq_len: int) -> Iterator[Compared]:
        """Yield packed sequences, then conversations, of which the tokens of the answers are judged.

        A conversation is shorter than `seq_len`, so it is run with padding, as when a package answers. Tokens of
        questions are not judged: a toy is not trained to predict them, and near-ties are frequent there.
        """
        for ids in self.packed(seq_len, PACKED_ROWS):
            yield Compared(ids, slice(0, 0), scored=False)
        fitting = (row for row in self.rows if len(conversation(row, self.tokenizer)) <= seq_len)
        for row in itertools.islice(fitting, CONVERSATIONS):
            ids = conversation(row, self.tokenizer)
            start = len(ids) - len(self.tokenizer.encode_answer(row.teacher_text)) - 1
            yield Compared(ids, slice(start, -1), scored=False)

    def probes(self, seq_len: int) -> list[Probe]:
        """Return changes at the quarters and the last position, to the end token and to another of the sequence."""
        return [Probe(ids, tuple(self._changes(ids))) for ids in self.packed(seq_len, PROBED_ROWS)]

    def _changes(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        for index in sorted({len(ids) // 4, len(ids) // 2, 3 * len(ids) // 4, len(ids) - 1}):
            # There are no outputs before the first position to compare.
            for token in {self.tokenizer.end_id, ids[index // 2]} - {ids[index]} if index else set():
                yield index, token

    def padded(self, lengths: Sequence[int]) -> Mapping[tuple[int, ...], list[int]]:
        conversations = [tuple(conversation(row, self.tokenizer)) for row in self.rows[:PADDED_CONVERSATIONS]]
        return {ids: [length for length in lengths if length > len(ids)] for ids in conversations}


class Chat(NamedTuple):
    """A question in the model's chat format, up to the beginning of the answer."""

    text: str
    """The question without the chat format."""
    ids: list[int]


class TextPrompts(Prompts):
    """Real texts, and questions in the model's chat format."""

    imported = True
    export_count = 1
    """A large model takes seconds for one, which is as long as all conversations of a toy."""

    tokenizer: TextTokenizer

    def __init__(self, texts: Sequence[Text], chat_prompts: Sequence[ChatPrompt], tokenizer: TextTokenizer) -> None:
        self.texts = texts
        self.chat_prompts = chat_prompts
        self.tokenizer = tokenizer

    @property
    def exchanges(self) -> Sequence[tuple[str, str]]:
        questions = [prompt.text for prompt in self.chat_prompts]
        return list(zip(questions, [*questions[1:], *questions[:1]], strict=True))

    def own_texts(self) -> Iterator[str]:
        """The questions, also in the model's chat format; then pieces of the texts, from each text in turn."""
        for prompt, chat in zip(self.chat_prompts, self.chats, strict=True):
            yield prompt.text
            yield self.tokenizer.decode(chat.ids)
        for some in itertools.zip_longest(*(_pieces(text.text) for text in self.texts)):
            yield from (piece for piece in some if piece is not None)

    @functools.cached_property
    def chats(self) -> tuple[Chat, ...]:
        """The questions in the chat format, or unchanged if the model has no chat template.

        Raises:
            TokenizerError: the template rejects a question.
        """
        template = self.tokenizer.chat_template
        if template is None:
            return tuple(Chat(prompt.text, self._with_bos(prompt.text)) for prompt in self.chat_prompts)
        texts = [
            template.render([{"role": "user", "content": prompt.text}], add_generation_prompt=True)
            for prompt in self.chat_prompts
        ]
        return tuple(
            Chat(prompt.text, self.tokenizer.encode(text, allow_special=True))
            for prompt, text in zip(self.chat_prompts, texts, strict=True)
        )

    def packed(self, seq_len: int, count: int) -> list[list[int]]:
        """Return sequences of continuous text: one of each text, then the continuation of each."""
        return [self._part(number % len(self.texts), number // len(self.texts), seq_len) for number in range(count)]

    def _part(self, text: int, part: int, seq_len: int) -> list[int]:
        encoded = self._encoded[text]
        ids = encoded[part * seq_len : (part + 1) * seq_len]
        if len(ids) < seq_len:
            raise DatasetError(
                f"the text {self.texts[text].id} has {len(encoded)} tokens",
                expected=f"at least {(part + 1) * seq_len}; texts.max_characters limits how much of a text is read",
                run="nox -s texts -- --help",
            )
        return ids

    def packed_up_to(self, seq_len: int, count: int) -> list[list[int]]:
        parts, text = min((len(ids) // seq_len, text) for text, ids in enumerate(self._encoded))
        return self.packed(seq_len, min(count, parts * len(self._encoded) + text))

    @functools.cached_property
    def _encoded(self) -> list[list[int]]:
        return [self._with_bos(text.text) for text in self.texts]

    def _with_bos(self, text: str) -> list[int]:
        start = [self.tokenizer.bos_id] if self.tokenizer.add_bos and self.tokenizer.bos_id is not None else []
        return [*start, *self.tokenizer.encode(text)]

    def compared(self, seq_len: int) -> Iterator[Compared]:
        """Yield one packed sequence, all of whose positions are judged."""
        (ids,) = self.packed(seq_len, 1)
        yield Compared(ids, slice(0, seq_len), scored=True)

    def probes(self, seq_len: int) -> list[Probe]:
        """Return a change of the token in the middle to another of the text."""
        (ids,) = self.packed(seq_len, 1)
        middle = seq_len // 2
        other = next((token for token in ids if token != ids[middle]), None)
        return [Probe(ids, () if other is None or not middle else ((middle, other),))]

    def padded(self, lengths: Sequence[int]) -> Mapping[tuple[int, ...], list[int]]:
        fitting = [chat.ids for chat in self.chats if len(chat.ids) < max(lengths)]
        return {
            tuple(ids): [min(length for length in lengths if length > len(ids))] for ids in fitting[:PADDED_CHATS]
        }


def load_prompts(tokenizer: Path, source: Path, *, rows: int) -> Prompts:
    """Read the prompts in `source`: the output of the texts stage, or a held-out set of the dataset stage.

    Args:
        tokenizer: the model's tokenizer.json.
        source: a directory, or the file of a held-out set.
        rows: the most rows of a held-out set that are read.

    Raises:
        TokenizerError: the tokenizer cannot be read.
        DatasetError: the directory contains neither or both, or they cannot be read.
    """
    texts = texts_file(source)
    if not texts.is_file():
        heldout = find_heldout(source) if source.is_dir() or not source.exists() else source
        backend = Tokenizer.load(tokenizer)
        return RowPrompts(read_some(heldout, rows), backend, answer_key_file(heldout.parent))
    if heldout_too := sorted(source.glob(HELDOUT_PATTERN)):
        raise DatasetError(f"{source} has {texts.name} and {heldout_too[0].name}", expected="one of them")
    return TextPrompts(
        read_texts(texts), read_chat_prompts(chat_prompts_file(source)), TextTokenizer.load(tokenizer)
    )


def check_kind(prompts: Prompts, *, imported: bool) -> None:
    """Check that `prompts` are of the model's kind: texts if it was imported, a held-out set otherwise.

    The kind of the prompts determines how the tokenizer is read.

    Raises:
        DatasetError: they are of the other kind.
    """
    if prompts.imported != imported:
        kinds = ("texts", "a held-out set")
        found, expected = kinds if not imported else kinds[::-1]
        raise DatasetError(
            f"the prompts are {found}, but the model was {'imported' if imported else 'distilled'}",
            expected=f"{expected}: see --prompts",
        )


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def find_heldout(folder: Path) -> Path:
    """Return the path of the held-out set in `folder`.

    Raises:
        DatasetError: there is none, or more than one.
    """
    found = sorted(Path(folder).glob(HELDOUT_PATTERN))
    if len(found) != 1:
        what = f"{len(found)} held-out sets" if found else "no held-out set"
        raise DatasetError(
            f"{folder} has {what}" + "".join(f" {path.name}" for path in found),
            expected=f"one file {HELDOUT_PATTERN}",
            run="python -m coremill.data.make_toy_kd --help",
        )
    return found[0]


def read_some(path: Path, count: int) -> list[Row]:
    """Return the first `count` rows of the dataset at `path`, or all of them; raises as :func:`read_rows` does."""
    return list(itertools.islice(read_rows(path), count))


def conversation(row: Row, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the prompt and of the teacher's answer, with the end token."""
    return [*tokenizer.encode_prompt(row.prompt), *tokenizer.encode_answer(row.teacher_text)]
