"""Compares a Hugging Face directory, loaded with transformers, with the checkpoint.

Compared are the files, the settings as transformers reads them, the weights, logits, greedy answers, token ids and
rendered conversations. Both models compute in float32. transformers reads only the directory, without network
access, and runs no code from it.

Legend: T sequence length, V vocabulary, C d_model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from coremill.core import layout
from coremill.core.config import ModelConfig
from coremill.core.errors import ParityError, TokenizerError
from coremill.core.gates import Gate, Severity, at_most, not_run
from coremill.core.parity import TokenDifference
from coremill.data.prompts import Prompts
from coremill.formats.halt_head import HALT_HEAD
from coremill.formats.huggingface.reader import WHOLE
from coremill.formats.huggingface.settings import ExpectedSettings, check_represented, settings
from coremill.formats.parity import ODD_TEXTS, greedy_differences, none_of, questions, sequences, texts
from coremill.formats.source import huggingface_name
from coremill.measures import Float32Array
from coremill.model.float32 import Float32Bounds
from coremill.model.reference import Reference
from coremill.model.student import HALT_LOGITS, LOGITS
from coremill.text.chat import Message
from coremill.text.model_tokenizer import TextTokenizer

NEW_TOKENS = 32
_POSITIONS = 1024
"""The approximate number of positions whose logits are compared."""
_BY_HAND = "not installed in coremill's environments; benchmarks/huggingface_readers.py runs it"

_TEXT_ANSWERS, _ROW_ANSWERS = 4, 16
_QUESTIONS = 8
"""The number of questions that conversations are made from."""


@dataclass(frozen=True, kw_only=True)
class ExpectedOutputs:
    """The outputs that the model and the tokenizer in a directory must have."""

    config: ModelConfig
    """The checkpoint's."""
    reference: Reference
    """The checkpoint's model, with its weights rounded to the directory's type."""
    tokenizer: TextTokenizer
    prompts: Prompts
    halt_head: Path | None
    """The file of the halt head, or None if the model has none."""


@dataclass(frozen=True, kw_only=True)
class Expected(ExpectedOutputs):
    """The contents and outputs that a directory must have."""

    architecture: str
    """The class of transformers that computes it."""
    stored: Mapping[str, Tensor]
    """The tensors of the file, by the student's names."""
    dtype: torch.dtype
    """Their type."""
    files: Mapping[str, bytes]
    """The contents of all files except the weights, by name."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    gates: tuple[Gate, ...]
    logits_max_abs: float
    differences: tuple[TokenDifference, ...]


def compare(folder: Path, expected: Expected) -> Findings:
    """Load `folder` with transformers and compare it with `expected`.

    Raises:
        TokenizerError: transformers replaces the rules of the tokenizer by those of a class of its own.
        DatasetError: every prompt fills the model's context.
    """
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    check_represented(tokenizer, expected.tokenizer, model.config.model_type)
    with torch.no_grad():
        compared = sequences(expected.prompts, expected.config.max_seq_len, _POSITIONS)
        bounds = Float32Bounds(expected.reference, compared)
        logits, max_abs = _logits(model, expected, compared, bounds)
        answers, differences = _answers(model, expected, bounds)
    gates = (
        _files(folder, expected),
        _settings(folder, model, tokenizer, expected),
        _weights(folder, expected),
        *logits,
        answers,
        *_tokenizer(tokenizer, expected),
        *(not_run(_BY_HAND).gate(name, Severity.NICE) for name in ("logits under mlx-lm", "llama.cpp's converter")),
    )
    return Findings(gates=gates, logits_max_abs=max_abs, differences=differences)


def compare_source(folder: Path, expected: ExpectedOutputs, compared: Sequence[Sequence[int]]) -> tuple[Gate, ...]:
    """Load a model that coremill did not write, and return the gates on its logits, token ids and conversations.

    Args:
        compared: the sequences whose logits are compared.

    Raises:
        ParityError: transformers does not load it.
    """
    try:
        model, tokenizer = load_model(folder), load_tokenizer(folder)
    except Exception as failure:  # transformers has no error type of its own
        cause = (str(failure).strip().splitlines() or [""])[0]
        raise ParityError(
            f"transformers does not load {folder}: {type(failure).__name__}: {cause}",
            expected="a directory that transformers loads; the import is compared with what it computes",
            run=f"python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}')\"",
        ) from failure
    with torch.no_grad():
        logits, _ = _logits(model, expected, compared, Float32Bounds(expected.reference, compared))
    return (*logits, *_tokenizer(tokenizer, expected))


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Return the tokenizer that transformers loads from `folder`."""
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_model(folder: Path) -> transformers.PreTrainedModel:
    """Return the model that transformers loads from `folder`, in float32."""
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()


# --- files and settings ------------------------------------------------------------------------------------------


def _files(folder: Path, expected: Expected) -> Gate:
    """Return the gate on the bytes of every file except the weights, and on additional files."""
    weights = {WHOLE, *([] if expected.halt_head is None else [expected.halt_head.name])}
    found = {path.name for path in folder.iterdir()} - weights - {layout.parity_report(folder).name}
    different = [
        name
        for name in sorted(found | expected.files.keys())
        if name not in found or name not in expected.files or (folder / name).read_bytes() != expected.files[name]
    ]
    return none_of("files that differ", different, len(expected.files))


def _settings(
    folder: Path,
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    expected: Expected,
) -> Gate:
    meant = ExpectedSettings(
        config=expected.config,
        architecture=expected.architecture,
        dtype=expected.dtype,
        tokenizer=expected.tokenizer,
    )
    compared = settings(folder, model, tokenizer, meant)
    return none_of("settings that differ", [each for each in compared if each.differs], len(compared))


# --- weights and logits -----------------------------------------------------------------------------


def _weights(folder: Path, expected: Expected) -> Gate:
    names = {huggingface_name(name): name for name in expected.stored if name != HALT_HEAD}
    found = load_file(folder / WHOLE)  # memory-mapped
    if expected.halt_head is not None:
        names[HALT_HEAD] = HALT_HEAD
        found |= load_file(expected.halt_head)
    different = [
        name
        for name in sorted(found.keys() | names.keys())
        if name not in found or name not in names or not _are_equal(found[name], expected.stored[names[name]])
    ]
    return none_of("tensors that differ", different, len(names))


def _are_equal(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


def _logits(
    model: transformers.PreTrainedModel,
    expected: ExpectedOutputs,
    compared: Sequence[Sequence[int]],
    bounds: Float32Bounds,
) -> tuple[list[Gate], float]:
    """Return the gates on the logits and on those of a halt head, and the largest difference of logits."""
    logits, halting = _Difference(), _Difference()
    halt_head = load_file(expected.halt_head)[HALT_HEAD] if expected.halt_head is not None else None
    for ids, scores in zip(compared, expected.reference.score_all(compared), strict=True):
        outputs = model(input_ids=torch.tensor([ids]), output_hidden_states=halt_head is not None, use_cache=False)
        for rows, wanted in scores.chunks():
            logits.add(outputs.logits[0, rows], wanted[LOGITS])  # (rows, V)
            if halt_head is not None:
                halting.add(outputs.hidden_states[-1][0, rows] @ halt_head.T, wanted[HALT_LOGITS])  # (rows, 2)
    measured = [(LOGITS, "relative error of logits", logits.relative)]
    if halt_head is not None:
        measured.append((HALT_LOGITS, "relative error of halt logits", halting.relative))
    gates = [bounds.bound(name, err).finding(err).gate(gate, Severity.MUST) for name, gate, err in measured]
    return gates, logits.max_abs


class _Difference:
    """The largest absolute difference between outputs, and the largest absolute value of the expected ones."""

    def __init__(self) -> None:
        self.max_abs = 0.0
        self.scale = 0.0

    def add(self, found: Tensor, expected: Float32Array) -> None:
        difference = np.abs(found.numpy() - expected).max()
        self.max_abs = float(np.maximum(self.max_abs, difference))  # NaN if one is; Python's max may drop it
        self.scale = max(self.scale, float(np.abs(expected).max()))

    @property
    def relative(self) -> float:
        if self.scale == 0:
            return 0.0 if self.max_abs == 0 else math.inf
        return self.max_abs / self.scale


# --- greedy answers ---------------------------------------------------------------------------------


def _answers(
    model: transformers.PreTrainedModel, expected: Expected, bounds: Float32Bounds
) -> tuple[Gate, tuple[TokenDifference, ...]]:
    """Return the gate on greedy answers, and each token that the checkpoint would not choose at its position."""
    count = _TEXT_ANSWERS if expected.prompts.imported else _ROW_ANSWERS
    limit = expected.config.max_seq_len
    wrong = 0
    differences: list[TokenDifference] = []
    for number, ids in enumerate(questions(expected.prompts, limit, count)):
        wanted = min(NEW_TOKENS, limit - len(ids))
        answer = _generated(model, ids, wanted)
        wrong += not _ends_well(answer, wanted, expected.tokenizer.eos_ids)
        following = expected.reference.score([*ids, *answer[:-1]]).at(slice(len(ids) - 1, None))
        differences += greedy_differences(number, answer, following[LOGITS], bounds)
    wrong += sum(not difference.is_tie for difference in differences)
    return at_most(wrong, 0).gate("greedy tokens that differ", Severity.MUST), tuple(differences)


def _generated(model: transformers.PreTrainedModel, ids: Sequence[int], wanted: int) -> list[int]:
    inputs = torch.tensor([ids])  # (1, T)
    # Without a mask, transformers derives one from the padding token, which may also be the end token.
    found = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=wanted
    )
    return [int(token) for token in found[0, len(ids) :]]


def _ends_well(answer: Sequence[int], wanted: int, eos_ids: Sequence[int]) -> bool:
    """Return whether the answer ends at its first end token or, without one, has `wanted` tokens."""
    ended = next((length for length, token in enumerate(answer, 1) if token in eos_ids), wanted)
    return len(answer) == ended


# --- tokenizer --------------------------------------------------------------------------------------


def _tokenizer(theirs: transformers.PreTrainedTokenizerBase, expected: ExpectedOutputs) -> Iterator[Gate]:
    ours = expected.tokenizer
    # Their tokens too: ours may lack one.
    compared = [*texts(expected.prompts, ours), *(f"a{token}b" for token in theirs.added_tokens_encoder)]
    wrong = [text for text in compared if not _same_encoding(ours, theirs, text)]
    yield none_of("texts that are tokenized differently", wrong, len(compared))
    name = "conversations that are rendered differently"
    if ours.chat_template is None:
        yield not_run("the model has no chat template").gate(name, Severity.NICE)
        return
    if theirs.chat_template is None:
        yield none_of(name, ["every conversation: transformers finds no chat template"], 1)
        return
    chats = list(_conversations(expected))
    differing = [chat for chat, ends in chats if not _same_chat(ours, theirs, chat, ends)]
    yield none_of(name, differing, len(chats))


def _same_encoding(ours: TextTokenizer, theirs: transformers.PreTrainedTokenizerBase, text: str) -> bool:
    """Compare the ids with special tokens parsed, as plain text and with a text's first token; and decode them."""
    plain, special = ours.encode(text), ours.encode(text, allow_special=True)
    begun = [ours.bos_id, *special] if ours.add_bos else special
    found = (
        theirs(text, add_special_tokens=False)["input_ids"],
        theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        theirs(text)["input_ids"],
        theirs.decode(special, skip_special_tokens=False),
    )
    return bool(found == (special, plain, begun, ours.decode(special)))


def _conversations(expected: ExpectedOutputs) -> Iterator[tuple[list[Message], bool]]:
    """Yield conversations, and whether the start of an answer is appended to each.

    Questions are alone, answered, repeated, after a system prompt and after an answer. The last is unusual text.
    """
    for question, answer in expected.prompts.exchanges[:_QUESTIONS]:
        user: Message = {"role": "user", "content": question}
        assistant: Message = {"role": "assistant", "content": answer}
        system: Message = {"role": "system", "content": "Answer briefly."}
        chats = ([user], [user, assistant], [user, assistant, user], [system, user], [assistant, user])
        yield from itertools.product(chats, (True, False))
    yield [{"role": "user", "content": "\n".join(ODD_TEXTS)}], True


def _same_chat(
    ours: TextTokenizer, theirs: transformers.PreTrainedTokenizerBase, chat: Sequence[Message], ends: bool
) -> bool:
    """Compare the text and its token ids; a conversation that one template rejects, both must reject."""
    assert ours.chat_template is not None
    try:
        expected = ours.chat_template.render(chat, add_generation_prompt=ends)
    except TokenizerError:
        try:
            theirs.apply_chat_template(list(chat), add_generation_prompt=ends, tokenize=False)
        except jinja2.TemplateError:
            return True
        return False
    text = theirs.apply_chat_template(list(chat), add_generation_prompt=ends, tokenize=False)
    ids = theirs.apply_chat_template(list(chat), add_generation_prompt=ends, return_dict=False)
    return bool(text == expected and ids == ours.encode(expected, allow_special=True))
