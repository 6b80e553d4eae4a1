"""Measurements of the functions with a key/value cache: `prefill` and `decode` against `main`, and the cache.

Legend: n tokens of a prompt, T sequence length, S positions of the cache, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coremill.core.errors import CacheFullError, CoremillError
from coremill.core.reports import Answer, StatefulError, StatefulMeasured, StatefulReport
from coremill.data.prompts import Chat, TextPrompts
from coremill.measures import Float32Array, max_abs_err, power, ratio_db, sqnr_db
from coremill.model.decoding import generate, greedy
from coremill.model.reference import Reference
from coremill.model.student import LOGITS
from coremill.verification.backends import StatefulRunner
from coremill.verification.main_checks import Outputs

CONTINUED = 2
"""Tokens decoded after each prompt: the first reads what `prefill` wrote, the second also what `decode` wrote."""
ANSWERS = 4
"""Questions answered greedily through the cache."""
ANSWER_TOKENS = 32
"""The maximum number of tokens of such an answer."""


class Prompted(NamedTuple):
    """A prompt to read: the first `length` tokens of a text, padded to `seq_len`."""

    seq_len: int
    length: int


def planned_prompts(lengths: Sequence[int]) -> tuple[Prompted, ...]:
    """Return the prompts that are read at `lengths`.

    At the shortest, prompts of one token, of an odd number of tokens, of all but one and of all; at each other,
    where a prompt may take ten seconds, of all but one.
    """
    shortest, *others = sorted(lengths)
    at_shortest = sorted({1, _odd(shortest), max(1, shortest - 1), shortest})
    return (
        *(Prompted(shortest, length) for length in at_shortest),
        *(Prompted(seq_len, seq_len - 1) for seq_len in others),
    )


def _odd(seq_len: int) -> int:
    """Return an odd length in the first half."""
    return max(1, seq_len // 4 * 2 - 1)


class Said(NamedTuple):
    """The outputs of a function after the token at a position of the text."""

    place: int
    outputs: Outputs


class MainRows:
    """The outputs of `main` at some positions of a text.

    Args:
        ids: the text, of the longest length that runs.
        outputs: `main`'s for it.
        lengths: those that there is a `prefill` for.
        decoded: how many of the first positions are compared with tokens decoded one by one.
    """

    def __init__(self, ids: Sequence[int], outputs: Outputs, lengths: Sequence[int], decoded: int) -> None:
        self.ids = ids
        self.prompts = [prompt for prompt in planned_prompts(lengths) if prompt.length <= len(ids)]
        self.decoded = min(decoded, len(ids))
        wanted = set(range(self.decoded))
        for prompt in self.prompts:
            wanted |= set(range(prompt.length - 1, min(prompt.length + CONTINUED, len(ids))))
        # Copies, so that the rest of the outputs, up to 800 MB, can be freed.
        self._rows = {
            place: {name: array[place].copy() for name, array in outputs.items()} for place in sorted(wanted)
        }

    def __contains__(self, place: int) -> bool:
        return place in self._rows

    def sqnr_db(self, found: Sequence[Said]) -> float:
        """Return the SQNR over all given positions, of the worst output; NaN without positions.

        That of fp16 noise varies between positions by 20 dB, so that none is judged alone: one that is wrong leaves
        at most 10·log10(their number) of it.
        """
        if not found:
            return math.nan
        return float(
            np.min(
                [
                    ratio_db(
                        sum(power(self._rows[place][name]) for place, _ in found),
                        sum(power(_difference(self._rows[place][name], said[name])) for place, said in found),
                    )
                    for name in found[0].outputs
                ]
            )
        )


def _difference(reference: Float32Array, measured: Float32Array) -> npt.NDArray[np.float64]:
    return reference.astype(np.float64) - measured.astype(np.float64)


def measure_stateful(runner: StatefulRunner, main: MainRows) -> StatefulReport:
    """Run `prefill` and `decode` and compare them with `main`; see :class:`StatefulMeasured`."""
    try:
        said = {prompt: list(_read(runner, main, prompt)) for prompt in main.prompts}
        prefilled = [first for first, *_ in said.values()]
        continued = [each for _, *others in said.values() for each in others]
        decoded = list(_one_by_one(runner, main))
        middle = _middle(main)
        return StatefulMeasured(
            backend=runner.backend,
            cache_positions=runner.capacity,
            prefills=len(prefilled),
            prefill_sqnr_db=main.sqnr_db(prefilled),
            decoded=len(decoded),
            decode_sqnr_db=main.sqnr_db(decoded),
            continued=len(continued),
            continued_sqnr_db=main.sqnr_db(continued),
            padding_err=_padding_err(runner, main, middle, said[middle]),
            emptied_sqnr_db=_emptied(runner, main, middle, said[middle]),
            end_problem=end_problem(runner, main.ids[0]),
        )
    except CoremillError as failure:
        return StatefulError(backend=runner.backend, error=failure.found)
    except (RuntimeError, ValueError) as failure:  # from the backend, or because outputs are not finite
        return StatefulError(backend=runner.backend, error=f"{type(failure).__name__}: {failure}")


def _middle(main: MainRows) -> Prompted:
    """Return the prompt with the most padding that is longer than one token."""
    shortest = min(prompt.seq_len for prompt in main.prompts)
    return Prompted(shortest, _odd(shortest))


def _read(runner: StatefulRunner, main: MainRows, prompt: Prompted, *, pad_id: int | None = None) -> Iterator[Said]:
    """Return the outputs after a prompt, and after each of the tokens that follow it in the text."""
    runner.reset()
    outputs = runner.prefill(main.ids[: prompt.length], seq_len=prompt.seq_len, pad_id=pad_id)
    yield Said(prompt.length - 1, outputs)
    for place in range(prompt.length, prompt.length + CONTINUED):
        if place in main and place < runner.capacity:
            yield Said(place, runner.decode(main.ids[place]))


def _one_by_one(runner: StatefulRunner, main: MainRows) -> Iterator[Said]:
    """Return the outputs after each token, starting with an empty cache."""
    runner.reset()
    for place in range(min(main.decoded, runner.capacity)):
        yield Said(place, runner.decode(main.ids[place]))


def _padding_err(runner: StatefulRunner, main: MainRows, prompt: Prompted, before: Sequence[Said]) -> float:
    """Return the largest change of any output, after the prompt and the tokens that follow, with other padding."""
    other = next(token for token in (*main.ids, 0, 1) if token != runner.pad_id)
    again = _read(runner, main, prompt, pad_id=other)
    changes = [
        max_abs_err(said.outputs[name], found.outputs[name])
        for said, found in zip(before, again, strict=True)
        for name in said.outputs
    ]
    return float(np.max(changes))


def _emptied(runner: StatefulRunner, main: MainRows, prompt: Prompted, before: Sequence[Said]) -> float:
    """Return the SQNR of the logits after the prompt with zeros as the prompt's keys and values.

    The reference is `decode` with the cache: a function that ignores the cache gives equal logits.
    """
    if len(before) < 2:
        raise ValueError(f"no token of the text follows a prompt of {prompt.length}")
    place, outputs = before[1]
    runner.reset(position=place)
    return sqnr_db(outputs[LOGITS], runner.decode(main.ids[place])[LOGITS])


def end_problem(runner: StatefulRunner, token: int) -> str | None:
    """Return why a full cache is not an error, or None: the last position takes a token, and the next one fails."""
    runner.reset(position=runner.capacity - 1)
    runner.decode(token)
    for what, beyond in (
        ("a token", lambda: runner.decode(token)),
        ("a prompt", lambda: _prompt_beyond(runner, token)),
    ):
        try:
            beyond()
        except CacheFullError:
            continue
        except (CoremillError, RuntimeError) as failure:
            return f"{what} after the {runner.capacity} positions of the cache was run: {failure}"
        return f"{what} after the {runner.capacity} positions of the cache was accepted"
    return None


def _prompt_beyond(runner: StatefulRunner, token: int) -> None:
    runner.reset()
    runner.prefill([token] * (runner.capacity + 1))


def answer_greedily(
    runner: StatefulRunner, reference: Reference, prompts: TextPrompts, *, margin: float
) -> tuple[Answer, ...]:
    """Answer a few questions through the cache, greedily.

    An answer is right where every token of it is the checkpoint's own choice after the same tokens, or within
    `margin` logits of it: there, rounding alone may turn the order.
    """
    fitting = [chat for chat in prompts.chats if len(chat.ids) <= min(runner.lengths[-1], runner.capacity - 1)]
    answers = []
    for chat in fitting[:ANSWERS]:
        ids = _answer(runner, chat, prompts)
        asked = slice(len(chat.ids) - 1, None)
        scores = reference.score([*chat.ids, *ids[:-1]]).at(asked)[LOGITS]  # row i scores token i
        lost = [float(row.max() - row[token]) for row, token in zip(scores, ids, strict=True)]
        is_ended = ids[-1] in prompts.tokenizer.eos_ids
        known = [token for token in ids[: len(ids) - is_ended] if token < prompts.tokenizer.vocab_size]
        answers.append(
            Answer(
                prompt=chat.text,
                answer=prompts.tokenizer.decode(known),
                mood=None,
                right=all(each <= margin for each in lost),
            )
        )
    return tuple(answers)


def _answer(runner: StatefulRunner, chat: Chat, prompts: TextPrompts) -> list[int]:
    runner.reset()

    def next_logits(tokens: list[int]) -> Float32Array:
        said: Mapping[str, Float32Array] = runner.decode(tokens[-1]) if runner.position else runner.prefill(tokens)
        return said[LOGITS]

    count = min(ANSWER_TOKENS, runner.capacity - len(chat.ids) + 1)  # the last token need not be in the cache
    stop_ids = prompts.tokenizer.eos_ids
    return generate(next_logits, chat.ids, stop_ids=stop_ids, max_new_tokens=count, sampler=greedy)
