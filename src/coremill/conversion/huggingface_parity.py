"""Whether a Hugging Face directory computes what its checkpoint computes: transformers loads it and is compared.

All in float32, from the folder alone, without the network and without code that the folder might bring.

Legend: T sequence length, V vocabulary, C d_model.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from coremill.conversion.prompts import Prompts, RowPrompts, TextPrompts, conversation
from coremill.core.errors import DatasetError, TokenizerError
from coremill.core.gates import Gate, Severity, at_most, failed, not_run, passed
from coremill.core.parity import Tie
from coremill.data.chat import Message
from coremill.data.text_tokenizer import TextTokenizer
from coremill.model.student import Student
from coremill.model.weights_huggingface import WHOLE
from coremill.model.weights_source import huggingface_name

MAX_RELATIVE_ERR = 1e-5
"""Of the largest logit; what float32 leaves when two programs add in another order."""
NEW_TOKENS = 32
TEXTS = 1000
"""Texts on which the tokenizers are compared."""

_TEXT_ANSWERS, _ROW_ANSWERS = 4, 16
_TEXT_LENGTH = 256
"""Tokens of each text that logits are compared on."""
_RANDOM_SEED = 4
_RANDOM_SHARE = 0.3
"""Of the texts, at least."""
_PIECE = 200
"""Characters."""
_QUESTIONS = 8
"""That conversations are made of."""

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
_RANGES = (
    *((0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x7FF), (0x800, 0x2FFF), (0x3000, 0xD7FF)),
    *((0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x10FFFF)),
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a directory is compared with."""

    student: Student
    """The checkpoint's model, its weights rounded as the file's are."""
    stored: Mapping[str, Tensor]
    """The tensors that the file should have, by the student's names."""
    tokenizer: TextTokenizer
    prompts: Prompts
    halt_head: Path | None
    """The file of the halt head, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    gates: tuple[Gate, ...]
    logits_max_abs: float
    ties: tuple[Tie, ...]


def compare(folder: Path, reference: Reference) -> Findings:
    """Load `folder` with transformers and compare it with `reference`.

    Raises:
        DatasetError: no prompt leaves room for an answer in the model's context.
    """
    transformers.utils.logging.disable_progress_bar()
    model = load_model(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.no_grad():
        logits, max_abs = _logits(model, reference)
        answers, ties = _answers(model, reference)
    gates = [_weights(folder, reference.stored), *logits, answers, *_tokenizer(tokenizer, reference)]
    return Findings(gates=tuple(gates), logits_max_abs=max_abs, ties=ties)


def load_model(folder: Path) -> Any:
    """The model that transformers makes of `folder`, to compute in float32."""
    transformers.utils.logging.disable_progress_bar()  # of a second's work
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()


# --- weights and logits -----------------------------------------------------------------------------


def _weights(folder: Path, stored: Mapping[str, Tensor]) -> Gate:
    expected = {huggingface_name(name): tensor for name, tensor in stored.items()}
    found = load_file(folder / WHOLE)
    different = [
        name
        for name in sorted(found.keys() | expected.keys())
        if name not in found
        or name not in expected
        or found[name].dtype != expected[name].dtype
        or not torch.equal(found[name], expected[name])
    ]
    return at_most("tensors that differ", Severity.MUST, len(different), 0)


def _logits(model: Any, reference: Reference) -> tuple[list[Gate], float]:
    """Gates on the logits and, where there is one, the halt head's; and the largest difference of logits."""
    logits, halting = _Difference(), _Difference()
    halt_head = load_file(reference.halt_head)["halt_head.weight"] if reference.halt_head is not None else None
    for ids in _sequences(reference):
        inputs = torch.tensor([ids])  # (1, T)
        outputs = model(input_ids=inputs, output_hidden_states=halt_head is not None, use_cache=False)
        expected = reference.student(inputs)
        logits.add(outputs.logits, expected[0])  # (1, T, V)
        if halt_head is not None:
            halting.add(outputs.hidden_states[-1] @ halt_head.T, expected[1])  # (1, T, 2)
    gates = [at_most("relative error of logits", Severity.MUST, logits.relative, MAX_RELATIVE_ERR)]
    if halt_head is not None:
        gates.append(at_most("relative error of halt logits", Severity.MUST, halting.relative, MAX_RELATIVE_ERR))
    return gates, logits.max_abs


class _Difference:
    """The largest difference between outputs, and how large the expected ones are."""

    def __init__(self) -> None:
        self.max_abs = 0.0
        self.scale = 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        # Of tensors, whose maximum of a NaN is one; Python's would pass over it.
        difference = (found - expected).abs().max()
        self.max_abs = float(torch.maximum(torch.tensor(self.max_abs), difference))
        self.scale = max(self.scale, float(expected.abs().max()))

    @property
    def relative(self) -> float:
        return self.max_abs / self.scale


def _sequences(reference: Reference) -> Iterator[list[int]]:
    """Real token ids, each at most as long as the model's context."""
    prompts, limit = reference.prompts, reference.student.config.max_seq_len
    if isinstance(prompts, RowPrompts):
        for row in prompts.rows[:_ROW_ANSWERS]:
            yield conversation(row, prompts.tokenizer)[:limit]
        yield from prompts.packed(limit, 1)
    else:
        yield from prompts.packed(min(_TEXT_LENGTH, limit), _TEXT_ANSWERS)
        yield from (ids[:limit] for ids in _questions(prompts)[:_TEXT_ANSWERS])


# --- greedy answers ---------------------------------------------------------------------------------


def _questions(prompts: Prompts) -> list[list[int]]:
    if isinstance(prompts, RowPrompts):
        return [prompts.tokenizer.encode_prompt(row.prompt) for row in prompts.rows]
    assert isinstance(prompts, TextPrompts)
    return [chat.ids for chat in prompts.chats]


def _answers(model: Any, reference: Reference) -> tuple[Gate, tuple[Tie, ...]]:
    """Answers as transformers generates them, each token judged by the checkpoint after the same tokens.

    Were a token another than the checkpoint's own choice, the next is judged after transformers' choice: so one tie
    does not hide what comes after it.
    """
    count = _ROW_ANSWERS if isinstance(reference.prompts, RowPrompts) else _TEXT_ANSWERS
    limit = reference.student.config.max_seq_len
    prompts = [ids for ids in _questions(reference.prompts) if len(ids) < limit][:count]
    if not prompts:
        raise DatasetError(
            f"no question leaves room for an answer in a context of {limit} tokens", expected="shorter questions"
        )
    wrong, ties = 0, []
    for number, ids in enumerate(prompts):
        wanted = min(NEW_TOKENS, limit - len(ids))
        answer = _generated(model, ids, wanted)
        wrong += not _ends_well(answer, wanted, reference.tokenizer.eos_ids)
        for tie, is_tie in _disagreements(number, ids, answer, reference.student):
            if is_tie:
                ties.append(tie)
            else:
                wrong += 1
    return at_most("greedy tokens that differ", Severity.MUST, wrong, 0), tuple(ties)


def _generated(model: Any, ids: Sequence[int], wanted: int) -> list[int]:
    inputs = torch.tensor([ids])  # (1, T)
    # The mask is given: transformers guesses one from the padding token, which may be the end token.
    found = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=wanted
    )
    return [int(token) for token in found[0, len(ids) :]]


def _ends_well(answer: Sequence[int], wanted: int, eos_ids: Sequence[int]) -> bool:
    """Whether the answer ends at its first end token, or at its last where it has none."""
    ended = next((place for place, token in enumerate(answer, 1) if token in eos_ids), wanted)
    return len(answer) == ended


def _disagreements(
    number: int, ids: Sequence[int], answer: Sequence[int], student: Student
) -> Iterator[tuple[Tie, bool]]:
    """Each token of `answer` that is not the student's choice, and whether rounding explains it.

    Both logits may be off by the bound, so that two as near as twice that are a tie.
    """
    rows = student(torch.tensor([[*ids, *answer]]))[0][0, len(ids) - 1 : -1]  # (tokens, V)
    for place, (row, token) in enumerate(zip(rows, answer, strict=True)):
        best = int(row.argmax())
        if best != token:
            gap = float(row[best] - row[token])
            tie = Tie(prompt=number, token=place, chosen=token, expected=best, gap=gap)
            yield tie, gap <= 2 * MAX_RELATIVE_ERR * float(rows.abs().max())


# --- tokenizer --------------------------------------------------------------------------------------


def _tokenizer(theirs: Any, reference: Reference) -> Iterator[Gate]:
    ours = reference.tokenizer
    texts = texts_to_compare(reference)
    wrong = [text for text in texts if not _same_encoding(ours, theirs, text)]
    yield _counted("texts that are tokenized otherwise", wrong, len(texts))
    name = "conversations that are written otherwise"
    if ours.chat_template is None:
        yield not_run(name, Severity.NICE, "the model has no chat template")
        return
    chats = list(_conversations(reference))
    differing = [chat for chat, ends in chats if not _same_chat(ours, theirs, chat, ends)]
    yield _counted(name, differing, len(chats))


def _counted(name: str, wrong: Sequence[Any], count: int) -> Gate:
    if not wrong:
        return passed(name, Severity.MUST, measured=0, threshold=0)
    reason = f"{len(wrong)} of {count}, such as {wrong[0]!r}"
    return failed(name, Severity.MUST, reason, measured=len(wrong), threshold=0)


def _same_encoding(ours: TextTokenizer, theirs: Any, text: str) -> bool:
    """With special tokens as such, as text, with what goes before a text, and back."""
    plain, special = ours.encode(text), ours.encode(text, allow_special=True)
    begun = [ours.bos_id, *special] if ours.add_bos else special
    found = (
        theirs(text, add_special_tokens=False)["input_ids"],
        theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        theirs(text)["input_ids"],
        theirs.decode(special, skip_special_tokens=False),
    )
    return bool(found == (special, plain, begun, ours.decode(special)))


def texts_to_compare(reference: Reference) -> list[str]:
    """`TEXTS` texts: odd ones, special tokens spelled out, the run's own, and for the rest random Unicode."""
    special = [reference.tokenizer.decode([token]) for token in sorted({0, 1, 2, *reference.tokenizer.eos_ids})]
    texts = [*ODD_TEXTS, *(f"{form}{text}{form}b" for text in special for form in ("", " ", "a"))]
    most = int(TEXTS * (1 - _RANDOM_SHARE))
    texts += itertools.islice(_own_texts(reference.prompts), most - len(texts))
    return [*texts, *random_texts(TEXTS - len(texts))]


def random_texts(count: int) -> Iterator[str]:
    """Texts of up to 40 code points from everywhere in Unicode; the same each time."""
    source = random.Random(_RANDOM_SEED)
    for _ in range(count):
        places = (source.choice(_RANGES) for _ in range(source.randint(1, 40)))
        yield "".join(chr(source.randint(first, last)) for first, last in places)


def _own_texts(prompts: Prompts) -> Iterator[str]:
    if isinstance(prompts, RowPrompts):
        for row in prompts.rows:
            yield row.prompt
            yield row.teacher_text
        return
    assert isinstance(prompts, TextPrompts)
    yield from (prompt.text for prompt in prompts.chat_prompts)
    pieces = [_pieces(text.text) for text in prompts.texts]
    for some in itertools.zip_longest(*pieces):  # of each text in turn
        yield from (piece for piece in some if piece is not None)


def _pieces(text: str) -> Iterable[str]:
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def _conversations(reference: Reference) -> Iterator[tuple[list[Message], bool]]:
    """Questions alone, answered, asked again, under a system's word, and after an answer; each with and without the
    start of an answer, and one that is odd."""
    for question, answer in itertools.islice(_asked(reference.prompts), _QUESTIONS):
        asked: Message = {"role": "user", "content": question}
        said: Message = {"role": "assistant", "content": answer}
        system: Message = {"role": "system", "content": "Answer briefly."}
        forms = ([asked], [asked, said], [asked, said, asked], [system, asked], [said, asked])
        yield from itertools.product(map(list, forms), (True, False))
    yield [{"role": "user", "content": "\n".join(ODD_TEXTS)}], True


def _asked(prompts: Prompts) -> Iterator[tuple[str, str]]:
    if isinstance(prompts, RowPrompts):
        yield from ((row.prompt, row.teacher_text) for row in prompts.rows)
    else:
        assert isinstance(prompts, TextPrompts)
        questions = [prompt.text for prompt in prompts.chat_prompts]
        yield from zip(questions, itertools.islice(itertools.cycle(questions), 1, None), strict=False)


def _same_chat(ours: TextTokenizer, theirs: Any, chat: Sequence[Message], ends: bool) -> bool:
    """The text and its tokens; a conversation that the template refuses is refused by both."""
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
