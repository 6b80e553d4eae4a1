"""Runners: what goes in and comes out is the contract's, and no token goes where the cache has no room."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from coremill.core.contract import ShapeFailed
from coremill.core.errors import CacheFullError, ContractMismatchError, PackageError, PredictionInputError
from coremill.core.reports import Backend
from coremill.measures import sqnr_db
from coremill.mil import MLModel
from coremill.verification.backends import (
    StatefulRunner,
    core_ml_stateful_runner,
    reference_runner,
    reference_stateful_runner,
)

PAD = 0


@pytest.fixture(scope="module")
def contract(pristine_imported):
    return pristine_imported.read_contract()


@pytest.fixture(scope="module")
def models(pristine_imported) -> dict[str, MLModel]:
    names = ("prefill_T16", "prefill_T24", "prefill_T40", "decode")
    return {name: MLModel(pristine_imported.package, function_name=name) for name in names}


@pytest.fixture
def runner(models, contract) -> StatefulRunner:
    return StatefulRunner(models, Backend.MIL_REFERENCE, contract, pad_id=PAD)


@pytest.fixture(scope="module")
def text(pristine_imported) -> tuple[list[int], np.ndarray]:
    """40 tokens, and what `main` says of them."""
    (ids,) = pristine_imported.read_prompts().packed(40, 1)
    main = reference_runner(pristine_imported.package, pristine_imported.read_contract())
    return ids, main.run(ids)["logits"]


def test_a_prompt_and_tokens_after_it_say_what_main_says(runner, text):
    ids, expected = text
    assert (runner.backend, runner.capacity, runner.lengths) == (Backend.MIL_REFERENCE, 40, (16, 24, 40))
    found = [runner.prefill(ids[:17])]
    assert runner.position == 17
    found += [runner.decode(token) for token in ids[17:]]
    assert runner.position == 40
    assert [each["logits"].shape for each in found] == [(300,)] * 24
    assert sqnr_db(expected[16:], np.stack([each["logits"] for each in found])) > 50


class Recording:
    """Notes what a function is asked."""

    def __init__(self, model) -> None:
        self.asked = []
        self._model = model

    def make_state(self):
        return self._model.make_state()

    def predict(self, data, state):
        self.asked.append({name: value.tolist() for name, value in data.items()})
        return self._model.predict(data, state)


@pytest.mark.parametrize(("n", "seq_len"), [(1, 16), (16, 16), (17, 24), (24, 24), (25, 40), (40, 40)])
def test_a_prompt_is_padded_to_the_smallest_length_that_holds_it(models, contract, text, n, seq_len):
    recorded = {name: Recording(model) for name, model in models.items()}
    StatefulRunner(recorded, Backend.MIL_REFERENCE, contract, pad_id=PAD).prefill(text[0][:n])
    padded = [*text[0][:n], *[PAD] * (seq_len - n)]
    assert {name: model.asked for name, model in recorded.items() if model.asked} == {
        f"prefill_T{seq_len}": [{"input_ids": [padded], "length": [n]}]
    }


def test_the_length_and_the_padding_can_be_chosen(models, contract, text):
    recorded = {name: Recording(model) for name, model in models.items()}
    runner = StatefulRunner(recorded, Backend.MIL_REFERENCE, contract, pad_id=PAD)
    runner.prefill(text[0][:3], seq_len=24, pad_id=7)
    assert recorded["prefill_T24"].asked == [{"input_ids": [[*text[0][:3], *[7] * 21]], "length": [3]}]


def test_at_the_end_of_the_cache_nothing_runs(models, contract, text):
    recorded = {name: Recording(model) for name, model in models.items()}
    runner = StatefulRunner(recorded, Backend.MIL_REFERENCE, contract, pad_id=PAD)
    runner.prefill(text[0][:39])
    runner.decode(text[0][39])
    asked = len(recorded["decode"].asked)
    with pytest.raises(CacheFullError) as caught:
        runner.decode(text[0][0])
    assert str(caught.value) == (
        "the cache holds 40 tokens; 1 more exceed its 40 positions\n"
        "  expected: a shorter conversation, or a package with more positions: export.context"
    )
    assert caught.value.exit_code == 47
    assert (len(recorded["decode"].asked), runner.position) == (asked, 40)
    runner.reset()
    with pytest.raises(CacheFullError, match=r"^the cache holds 0 tokens; 41 more exceed its 40 positions\n"):
        runner.prefill([*text[0], 1])
    assert runner.position == 0
    runner.prefill(text[0])


def test_a_reset_cache_is_empty_and_one_state_serves_all(runner, text):
    ids, _ = text
    first = runner.prefill(ids[:5])["logits"]
    after = runner.decode(ids[5])["logits"]
    runner.reset()
    assert runner.position == 0
    np.testing.assert_array_equal(runner.prefill(ids[:5])["logits"], first)
    np.testing.assert_array_equal(runner.decode(ids[5])["logits"], after)
    runner.reset(position=5)
    assert np.abs(runner.decode(ids[5])["logits"] - after).max() > 0.1


@pytest.mark.parametrize("position", [-1, 41])
def test_a_place_that_the_cache_has_not_is_refused(runner, position):
    with pytest.raises(ValueError, match=f"^position {position} of a cache of 40$"):
        runner.reset(position=position)


def test_a_prompt_comes_first_and_has_tokens(runner, text):
    with pytest.raises(ValueError, match=r"^a prompt of 0 tokens for a cache that holds 0$"):
        runner.prefill([])
    runner.decode(text[0][0])
    with pytest.raises(ValueError, match=r"^a prompt of 2 tokens for a cache that holds 1$"):
        runner.prefill(text[0][:2])


def test_a_length_that_does_not_hold_the_prompt_is_refused(models, contract, text):
    validation = {**contract.shape_validation, "T40": ShapeFailed(error="no")}
    shorter = msgspec.structs.replace(contract, shape_validation=validation)
    runner = StatefulRunner(models, Backend.MIL_REFERENCE, shorter, pad_id=PAD)
    assert runner.lengths == (16, 24)
    with pytest.raises(PredictionInputError) as caught:
        runner.prefill(text[0][:30])
    assert str(caught.value) == "a prompt of 30 tokens\n  expected: at most one of [16, 24]"
    with pytest.raises(PredictionInputError, match=r"^a prompt of 20 tokens padded to 16\n"):
        runner.prefill(text[0][:20], seq_len=16)


class Renamed(Recording):
    def predict(self, data, state):
        return {"var_292": super().predict(data, state)["logits"]}


class Wide(Recording):
    def predict(self, data, state):
        return {"logits": super().predict(data, state)["logits"][..., :-1]}


@pytest.mark.parametrize(
    ("bent", "found"),
    [
        (Renamed, "the package returns `var_292`"),
        (Wide, r"the package returns `logits` as float32 \[1, 1, 299\]"),
    ],
)
def test_outputs_that_are_not_the_contracts_are_refused(models, contract, text, bent, found):
    runner = StatefulRunner(
        {**models, "decode": bent(models["decode"])}, Backend.MIL_REFERENCE, contract, pad_id=PAD
    )
    with pytest.raises(ContractMismatchError, match=f"^{found}\n"):
        runner.decode(text[0][0])
    assert runner.position == 0


def test_a_contract_without_a_cache_has_no_such_runner(pristine, models):
    with pytest.raises(ValueError, match=r"^the contract has the functions \[\] in addition to `main`$"):
        StatefulRunner(models, Backend.MIL_REFERENCE, pristine.read_contract(), pad_id=PAD)


def test_a_package_without_the_functions_does_not_load_as_one_with_them(pristine, contract):
    with pytest.raises(PackageError, match="prefill_T16"):
        reference_stateful_runner(pristine.package, contract, pad_id=PAD)


@pytest.mark.needs_macos
def test_core_ml_itself_reads_on_from_a_prompt(pristine_imported, contract, text):
    ids, expected = text
    runner = core_ml_stateful_runner(pristine_imported.package, contract, pad_id=PAD)
    found = [runner.prefill(ids[:17]), *(runner.decode(token) for token in ids[17:])]
    assert sqnr_db(expected[16:], np.stack([each["logits"] for each in found])) > 40
