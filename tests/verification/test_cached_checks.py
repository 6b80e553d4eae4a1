"""What each fault of the functions with a cache does to the measurement, and the gate that is there for it."""

from __future__ import annotations

import numpy as np
import pytest
from tests.reading import changed

from coremill.core.gates import Outcome
from coremill.core.reports import Backend, StatefulError, StatefulMeasured
from coremill.mil import MLModel
from coremill.model.checkpoint import load_checkpoint
from coremill.model.reference import Reference
from coremill.verification.backends import StatefulRunner, reference_runner
from coremill.verification.cached_checks import (
    MainRows,
    Prompted,
    answer_greedily,
    measure_stateful,
    planned_prompts,
)
from coremill.verification.checklist import evaluate

PAD = 0
LENGTHS = (16, 24, 40)
PREFILL = "Prefill matches main"
DECODE = "Decode from an empty cache matches main"
CONTINUED = "Decode after a prompt matches main"
PADDING = "Prompt padding has no effect"
MATTERS = "Decode depends on the cache"
END = "A full cache is an error"
GATES = {PREFILL, DECODE, CONTINUED, PADDING, MATTERS, END}


@pytest.fixture(scope="module")
def prompts(pristine_imported):
    return pristine_imported.read_prompts()


@pytest.fixture(scope="module")
def contract(pristine_imported):
    return pristine_imported.read_contract()


@pytest.fixture(scope="module")
def models(pristine_imported) -> dict[str, MLModel]:
    names = ("prefill_T16", "prefill_T24", "prefill_T40", "decode")
    return {name: MLModel(pristine_imported.package, function_name=name) for name in names}


@pytest.fixture(scope="module")
def main(pristine_imported, prompts, contract) -> MainRows:
    (ids,) = prompts.packed(40, 1)
    outputs = reference_runner(pristine_imported.package, contract).run(ids)
    return MainRows(ids, outputs, LENGTHS, decoded=20)


@pytest.fixture
def runner(models, contract) -> StatefulRunner:
    return StatefulRunner(models, Backend.MIL_REFERENCE, contract, pad_id=PAD)


@pytest.fixture
def failing(good_imported):
    """The gates about the cache that do not pass on a measurement, and why."""

    def of(found) -> dict[str, str | None]:
        gates = evaluate(changed(good_imported, stateful=found))
        return {
            gate.name: gate.reason for gate in gates if gate.name in GATES and gate.outcome is not Outcome.PASSED
        }

    return of


def test_prompts_of_one_token_and_of_odd_lengths_up_to_all_of_a_length_are_read():
    assert planned_prompts((24, 16, 40)) == (
        Prompted(16, 1),
        Prompted(16, 7),
        Prompted(16, 15),
        Prompted(16, 16),
        Prompted(24, 23),
        Prompted(40, 39),
    )
    assert planned_prompts((512, 4096))[1] == Prompted(512, 255)
    assert planned_prompts((1,)) == (Prompted(1, 1),)


def test_good_functions_pass(runner, main, failing):
    found = measure_stateful(runner, main)
    assert isinstance(found, StatefulMeasured)
    assert (found.backend, found.cache_positions, found.prefills, found.decoded) == (
        Backend.MIL_REFERENCE,
        40,
        6,
        20,
    )
    # Two after each prompt; the one of 39 tokens leaves room for one.
    assert found.continued == 11
    assert min(found.prefill_sqnr_db, found.decode_sqnr_db, found.continued_sqnr_db) > 50
    assert found.padding_err == 0.0
    assert found.emptied_sqnr_db < 20
    assert found.end_problem is None
    assert failing(found) == {}


class Bent:
    """A function that does something else than it is asked."""

    def __init__(self, model) -> None:
        self._model = model
        self.make_state = model.make_state

    def predict(self, data, state):
        return self._model.predict(data, state)


def bent(models, *kinds, function="decode"):
    return {name: kinds[0](model) if name.startswith(function) else model for name, model in models.items()}


def measured_with(predictors, contract, main):
    return measure_stateful(StatefulRunner(predictors, Backend.MIL_REFERENCE, contract, pad_id=PAD), main)


class IgnoresCache(Bent):
    def predict(self, data, state):
        return self._model.predict(data, self._model.make_state())


def test_decode_that_ignores_the_cache_is_caught(models, contract, main, failing):
    found = measured_with(bent(models, IgnoresCache), contract, main)
    assert found.emptied_sqnr_db == 300.0
    bad = failing(found)
    assert bad.keys() == {DECODE, CONTINUED, MATTERS}
    assert bad[MATTERS] == "300 dB with an emptied cache is above 20 dB with an emptied cache"


class OnePlaceLate(Bent):
    def predict(self, data, state):
        return self._model.predict({**data, "position": np.minimum(data["position"] + 1, 39)}, state)


def test_a_position_off_by_one_is_caught(models, contract, main, failing):
    bad = failing(measured_with(bent(models, OnePlaceLate), contract, main))
    assert {DECODE, CONTINUED} <= bad.keys()
    assert bad[CONTINUED].endswith(" dB is below 40 dB")


class OneTokenShort(Bent):
    def predict(self, data, state):
        return self._model.predict({**data, "length": np.maximum(data["length"] - 1, 1)}, state)


@pytest.mark.parametrize("function", ["prefill_T16", "prefill_T24", "prefill_T40"])
def test_a_prefill_of_one_length_that_reads_the_wrong_position_is_caught(models, contract, main, failing, function):
    found = measured_with(bent(models, OneTokenShort, function=function), contract, main)
    # The last token's keys and values are those of a token that does not see itself: what follows may suffer too.
    assert {PREFILL} <= failing(found).keys() <= {PREFILL, CONTINUED}


class WritesNothing(Bent):
    def predict(self, data, state):
        return self._model.predict(data, self._model.make_state())


def test_a_prefill_that_writes_nothing_is_caught_by_what_follows(models, contract, main, failing):
    found = measured_with(bent(models, WritesNothing, function="prefill"), contract, main)
    assert failing(found).keys() == {CONTINUED, MATTERS}


class SeesPadding(Bent):
    def predict(self, data, state):
        return self._model.predict({**data, "length": np.array([data["input_ids"].shape[1]], np.int32)}, state)


def test_padding_that_is_seen_is_caught(models, contract, main, failing):
    found = measured_with(bent(models, SeesPadding, function="prefill"), contract, main)
    assert found.padding_err > 0.1
    bad = failing(found)
    assert bad.keys() == {PREFILL, PADDING}
    assert bad[PADDING] == (f"{found.padding_err:g} logits with other padding is above 0 logits with other padding")


class Endless(StatefulRunner):
    """Begins anew where the cache ends."""

    def _check_room(self, tokens):
        if self._position + tokens > self.capacity:
            self._position = 0


def test_a_cache_that_wraps_is_caught(models, contract, main, failing):
    found = measure_stateful(Endless(models, Backend.MIL_REFERENCE, contract, pad_id=PAD), main)
    assert failing(found) == {END: "a token after the 40 positions of the cache was accepted"}


class Unchecked(StatefulRunner):
    def _check_room(self, tokens):
        pass


def test_an_end_that_only_the_package_notices_is_caught(models, contract, main, failing):
    found = measure_stateful(Unchecked(models, Backend.MIL_REFERENCE, contract, pad_id=PAD), main)
    (reason,) = failing(found).values()
    assert reason.startswith("a token after the 40 positions of the cache was run: ")


class NotANumber(Bent):
    def predict(self, data, state):
        return {name: value * np.float32("nan") for name, value in self._model.predict(data, state).items()}


class Renamed(Bent):
    def predict(self, data, state):
        return {"var_292": self._model.predict(data, state)["logits"]}


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (NotANumber, "ValueError: `decode_sqnr_db` is nan"),
        (Renamed, "the package returns `var_292`"),
    ],
)
def test_what_cannot_be_compared_fails_every_gate(models, contract, main, failing, kind, error):
    found = measured_with(bent(models, kind), contract, main)
    assert found == StatefulError(backend=Backend.MIL_REFERENCE, error=error)
    assert failing(found) == dict.fromkeys(GATES, error)


def test_where_main_does_not_reach_the_prompts_that_it_does_are_compared(
    pristine_imported, contract, runner, prompts
):
    (ids,) = prompts.packed(24, 1)
    outputs = reference_runner(pristine_imported.package, contract).run(ids)
    found = measure_stateful(runner, MainRows(ids, outputs, LENGTHS, decoded=30))
    assert (found.prefills, found.decoded, found.continued) == (5, 24, 9)


# Answers


@pytest.fixture(scope="module")
def reference(pristine_imported) -> Reference:
    return Reference.of(load_checkpoint(pristine_imported.checkpoint))


def test_greedy_answers_are_those_of_the_checkpoint(runner, reference, prompts):
    answers = answer_greedily(runner, reference, prompts, margin=0.02)
    fitting = [chat for chat in prompts.chats if len(chat.ids) < 40]
    assert (
        [answer.prompt for answer in answers]
        == [chat.text for chat in fitting]
        == ["Why?", "Who is it?", "And how?"]
    )
    assert all(answer.right for answer in answers)
    for answer, chat in zip(answers, fitting, strict=True):
        ids = list(chat.ids)
        # The checkpoint's own, token by token; as many as the cache has room for, and the last need not go in.
        while len(ids) < min(41, len(chat.ids) + 32):
            ids.append(int(reference.run(ids)["logits"][-1].argmax()))
        assert answer.answer == prompts.tokenizer.decode(ids[len(chat.ids) :])


def test_an_answer_that_the_checkpoint_would_not_give_is_wrong(models, contract, reference, prompts, good_imported):
    class Second(Bent):
        """Says the second best token."""

        def predict(self, data, state):
            logits = self._model.predict(data, state)["logits"].copy()
            logits[..., logits.argmax()] = -100
            return {"logits": logits}

    runner = StatefulRunner(bent(models, Second), Backend.MIL_REFERENCE, contract, pad_id=PAD)
    answers = answer_greedily(runner, reference, prompts, margin=0.02)
    assert not any(answer.right for answer in answers)
    (gate,) = [
        gate
        for gate in evaluate(changed(good_imported, sampled=answers))
        if gate.name == "Greedy answers match the checkpoint's"
    ]
    assert (gate.outcome, gate.measured) == (Outcome.FAILED, "0 of 3")
    assert gate.reason == "the checkpoint answers differently to 'Why?'; 'Who is it?'; 'And how?'"


def test_an_answer_ends_at_the_end_token_which_is_not_in_its_text(models, contract, reference, prompts):
    class Ends(Bent):
        def predict(self, data, state):
            logits = self._model.predict(data, state)["logits"].copy()
            logits[..., prompts.tokenizer.eos_ids[0]] = 100
            return {"logits": logits}

    runner = StatefulRunner(bent(models, Ends), Backend.MIL_REFERENCE, contract, pad_id=PAD)
    answer = answer_greedily(runner, reference, prompts, margin=0.02)[0]
    first = reference.run(prompts.chats[0].ids)["logits"][-1].argmax()
    assert answer.answer == prompts.tokenizer.decode([int(first)])
    assert not answer.right
