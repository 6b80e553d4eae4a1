"""What a model is run on when it is exported and verified: real token ids, of a dataset's rows or of real texts.

A model that was distilled is run on held-out questions and the teacher's answers to them, one that was imported on
real texts and on questions in its own chat format.

Legend: T sequence length.
"""

from __future__ import annotations

import abc
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
"""Packed sequences of rows that are compared at each length, at the export as at the verification."""
CONVERSATIONS = 64
"""Conversations compared at each length, so that 2 % of their answer tokens are more than one or two."""
PADDED_CONVERSATIONS = 8
"""Conversations of rows that are compared with padding, at every length."""
PADDED_CHATS = 2
"""Questions compared with padding, at one length each: an imported model may take seconds a run."""
PROBED_ROWS = 2
"""Packed sequences of rows in which tokens are changed, at each length."""


class Compared(NamedTuple):
    """One sequence on which a package is compared with its checkpoint."""

    ids: list[int]
    """At most T of them."""
    judged: slice
    """The positions whose best token counts; errors, SQNR and KL are over all of them."""
    scored: bool
    """Whether the perplexity of these ids is measured."""


class Probe(NamedTuple):
    """A sequence of exactly T tokens, and single tokens to be put in the place of others."""

    ids: list[int]
    changes: tuple[tuple[int, int], ...]
    """A place, never the first, and the token that it gets; a token other than its own."""


class Prompts(abc.ABC):
    """Real token ids for one model."""

    tokenizer: Tokenizer | TextTokenizer
    """The model's own; its size and digest are what `check_vocabulary` compares."""
    export_count: int
    """How many packed sequences an export compares at each length."""

    @property
    def pad_id(self) -> int:
        """What sequences are padded with, on the right."""
        return self.tokenizer.pad_id

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer with what other programs need to know of it."""
        own = self.tokenizer
        return TextTokenizer.of_student(own) if isinstance(own, Tokenizer) else own

    @abc.abstractmethod
    def packed(self, seq_len: int, count: int) -> list[list[int]]:
        """`count` sequences of exactly `seq_len` tokens; the first of a length begins as that of any other.

        Raises:
            DatasetError: there is not that much text.
        """

    @abc.abstractmethod
    def packed_up_to(self, seq_len: int, count: int) -> list[list[int]]:
        """As :meth:`packed`, but as many of `count` as there are, be it none."""

    @abc.abstractmethod
    def compared(self, seq_len: int) -> Iterator[Compared]:
        """What is compared at `seq_len`: a packed sequence first. Raises as :meth:`packed` does."""

    @abc.abstractmethod
    def probes(self, seq_len: int) -> list[Probe]:
        """Where tokens are changed at `seq_len`: the first packed sequence first. Raises as :meth:`packed` does."""

    @abc.abstractmethod
    def padded(self, lengths: Sequence[int]) -> Mapping[tuple[int, ...], list[int]]:
        """Conversations, each with those of `lengths`, all longer than it, that it is to be padded to."""


class RowPrompts(Prompts):
    """Questions of a dataset, with the teacher's answers."""

    export_count = PACKED_ROWS

    tokenizer: Tokenizer

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer, answer_key: Path) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self._answer_key = answer_key

    @functools.cached_property
    def answer_key(self) -> AnswerKey:
        """The answers that the rows' dataset accepts. Raises as :func:`read_answer_key` does."""
        return read_answer_key(self._answer_key)

    def packed(self, seq_len: int, count: int) -> list[list[int]]:
        """Each sequence is of whole conversations, one after another, and the next begins with another one.

        The last conversation of a sequence is cut where it is full; rows are used again from the first when they
        run out.
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
        """Packed sequences, where each position up to the last has a real token; then conversations, padded as they
        are when the package answers, of which the tokens of answers are judged.

        What a toy says within a question was never trained, and near-ties are frequent there.
        """
        for ids in self.packed(seq_len, PACKED_ROWS):
            yield Compared(ids, slice(0, 0), scored=False)
        fitting = (row for row in self.rows if len(conversation(row, self.tokenizer)) <= seq_len)
        for row in itertools.islice(fitting, CONVERSATIONS):
            ids = conversation(row, self.tokenizer)
            start = len(ids) - len(self.tokenizer.encode_answer(row.teacher_text)) - 1
            yield Compared(ids, slice(start, -1), scored=False)

    def probes(self, seq_len: int) -> list[Probe]:
        """Places are the quarters and the last, tokens an end, which a conversation holds anywhere, and another of
        the sequence."""
        return [Probe(ids, tuple(self._changes(ids))) for ids in self.packed(seq_len, PROBED_ROWS)]

    def _changes(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        for place in sorted({len(ids) // 4, len(ids) // 2, 3 * len(ids) // 4, len(ids) - 1}):
            # Before the first position there is nothing to compare.
            for token in {self.tokenizer.end_id, ids[place // 2]} - {ids[place]} if place else set():
                yield place, token

    def padded(self, lengths: Sequence[int]) -> Mapping[tuple[int, ...], list[int]]:
        talks = [tuple(conversation(row, self.tokenizer)) for row in self.rows[:PADDED_CONVERSATIONS]]
        return {ids: [length for length in lengths if length > len(ids)] for ids in talks}


class Chat(NamedTuple):
    """A question in the model's chat format, up to where its answer begins."""

    text: str
    """The question alone."""
    ids: list[int]


class TextPrompts(Prompts):
    """Real texts, and questions in the model's chat format."""

    export_count = 1
    """A large model takes seconds for one, and it is as long as a toy's conversations together."""

    tokenizer: TextTokenizer

    def __init__(self, texts: Sequence[Text], chat_prompts: Sequence[ChatPrompt], tokenizer: TextTokenizer) -> None:
        self.texts = texts
        self.chat_prompts = chat_prompts
        self.tokenizer = tokenizer

    @functools.cached_property
    def chats(self) -> tuple[Chat, ...]:
        """The questions as the model reads them; as they are where it has no chat template.

        Raises:
            TokenizerError: the template does not take a question.
        """
        template = self.tokenizer.chat_template
        if template is None:
            return tuple(Chat(prompt.text, self._begun(prompt.text)) for prompt in self.chat_prompts)
        texts = [
            template.render([{"role": "user", "content": prompt.text}], add_generation_prompt=True)
            for prompt in self.chat_prompts
        ]
        return tuple(
            Chat(prompt.text, self.tokenizer.encode(text, allow_special=True))
            for prompt, text in zip(self.chat_prompts, texts, strict=True)
        )

    def packed(self, seq_len: int, count: int) -> list[list[int]]:
        """Each sequence is continuous text, the next of another text; then each goes on where it was cut."""
        return [self._part(number % len(self.texts), number // len(self.texts), seq_len) for number in range(count)]

    def _part(self, text: int, part: int, seq_len: int) -> list[int]:
        encoded = self._encoded[text]
        ids = encoded[part * seq_len : (part + 1) * seq_len]
        if len(ids) < seq_len:
            raise DatasetError(
                f"the text {self.texts[text].id} has {len(encoded)} tokens",
                expected=f"at least {(part + 1) * seq_len}; texts.max_characters limits what is taken of a text",
                run="nox -s texts -- --help",
            )
        return ids

    def packed_up_to(self, seq_len: int, count: int) -> list[list[int]]:
        parts, text = min((len(ids) // seq_len, text) for text, ids in enumerate(self._encoded))
        return self.packed(seq_len, min(count, parts * len(self._encoded) + text))

    @functools.cached_property
    def _encoded(self) -> list[list[int]]:
        return [self._begun(text.text) for text in self.texts]

    def _begun(self, text: str) -> list[int]:
        start = [self.tokenizer.bos_id] if self.tokenizer.add_bos and self.tokenizer.bos_id is not None else []
        return [*start, *self.tokenizer.encode(text)]

    def compared(self, seq_len: int) -> Iterator[Compared]:
        """One packed sequence, of which every position is judged."""
        (ids,) = self.packed(seq_len, 1)
        yield Compared(ids, slice(0, seq_len), scored=True)

    def probes(self, seq_len: int) -> list[Probe]:
        """One token in the middle becomes another of the text."""
        (ids,) = self.packed(seq_len, 1)
        place = seq_len // 2
        other = next((token for token in ids if token != ids[place]), None)
        return [Probe(ids, () if other is None or not place else ((place, other),))]

    def padded(self, lengths: Sequence[int]) -> Mapping[tuple[int, ...], list[int]]:
        fitting = [chat.ids for chat in self.chats if len(chat.ids) < max(lengths)]
        return {
            tuple(ids): [min(length for length in lengths if length > len(ids))] for ids in fitting[:PADDED_CHATS]
        }


def load_prompts(tokenizer: Path, source: Path, *, rows: int) -> Prompts:
    """What lies in `source`: texts as the texts stage writes them, or a held-out set as the dataset stage does.

    Args:
        tokenizer: the model's tokenizer.json.
        source: a folder, or a held-out set itself.
        rows: how many rows of a held-out set are read at most.

    Raises:
        TokenizerError: the tokenizer does not read.
        DatasetError: there is neither or both in the folder, or it does not read.
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
    """Check that `prompts` are of the kind that the model is run on: texts, where it was imported.

    Raises:
        DatasetError: they are not; their tokenizer would be read as another kind than the model's.
    """
    if isinstance(prompts, RowPrompts) == imported:
        kinds = ("texts", "a held-out set")
        found, expected = kinds if not imported else kinds[::-1]
        raise DatasetError(
            f"the prompts are {found}, and the model was {'imported' if imported else 'distilled'}",
            expected=f"{expected}: see --prompts",
        )


def find_heldout(folder: Path) -> Path:
    """The held-out set in `folder`.

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
    """The first `count` rows of the dataset at `path`, or as many as there are.

    Raises:
        DatasetError: unreadable, malformed, or without a row.
    """
    rows = list(itertools.islice(read_rows(path), count))
    if not rows:
        raise DatasetError(
            f"{path} has no rows",
            expected="questions and answers",
            run="python -m coremill.data.make_toy_kd --help",
        )
    return rows


def conversation(row: Row, tokenizer: Tokenizer) -> list[int]:
    """The prompt's ids and the teacher's answer's ids, to the end token."""
    return [*tokenizer.encode_prompt(row.prompt), *tokenizer.encode_answer(row.teacher_text)]
