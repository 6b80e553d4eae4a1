"""Causality: what a longer sequence with the same beginning shows, and which tokens are changed besides."""

from __future__ import annotations

import numpy as np
import pytest

from coremill.data.prompts import Probe
from coremill.verification.backends import reference_runner
from coremill.verification.main_checks import ShapeRun, causality_leak, compact

SHORT, LONG = 80, 128


class Counted:
    """The package's runner, and the sequences that it ran."""

    def __init__(self, runner):
        self._runner = runner
        self.backend = runner.backend
        self.ran = []

    def run(self, ids):
        self.ran.append(list(ids))
        return self._runner.run(ids)


@pytest.fixture(scope="module")
def runner(pristine):
    return reference_runner(pristine.package, pristine.read_contract())


@pytest.fixture
def counted(runner):
    return Counted(runner)


@pytest.fixture(scope="module")
def runs(pristine, runner):
    """The runs of the first packed sequence at both lengths."""
    prompts = pristine.read_prompts()
    found = []
    for length in (SHORT, LONG):
        (ids,) = prompts.packed(length, 1)
        found.append(ShapeRun(None, ids, compact(runner.run(ids))))
    return found


def probe(ids, *places):
    """Change each of the positions to the token of the first one."""
    return Probe(ids, tuple((place, ids[0] if ids[place] != ids[0] else ids[1]) for place in places))


def test_a_longer_sequence_stands_for_changes_before_its_shorter_beginning_ends(runs, counted):
    shorter, longer = runs
    assert longer.ids[:SHORT] == shorter.ids
    changes = probe(longer.ids, 32, SHORT, SHORT + 1, LONG - 1)
    assert causality_leak(counted, [changes], longer, shorter) == 0.0
    assert [ids[:SHORT] == shorter.ids for ids in counted.ran] == [True, True]
    assert causality_leak(counted, [probe(longer.ids, 32)], longer, shorter) == 0.0
    assert len(counted.ran) == 2


def test_without_a_shorter_run_every_change_is_made(runs, counted):
    _, longer = runs
    assert causality_leak(counted, [probe(longer.ids, 32, LONG - 1)], longer) == 0.0
    assert len(counted.ran) == 2
    assert causality_leak(counted, [], longer) is None


def test_one_bit_of_difference_makes_every_change(runs, counted):
    shorter, longer = runs
    altered = {name: array.copy() for name, array in shorter.outputs.items()}
    altered["logits"][SHORT - 1, 7] = np.nextafter(altered["logits"][SHORT - 1, 7], np.float16(np.inf))
    other = shorter._replace(outputs=altered)
    assert causality_leak(counted, [probe(longer.ids, 32, SHORT)], longer, other) == 0.0
    assert len(counted.ran) == 2


def test_another_beginning_shows_nothing(runs, counted):
    shorter, longer = runs
    other = shorter._replace(ids=[*shorter.ids[:-1], shorter.ids[0]])
    assert causality_leak(counted, [probe(longer.ids, 32)], longer, other) == 0.0
    assert len(counted.ran) == 1


def test_the_changes_of_another_sequence_are_made(runs, counted):
    shorter, longer = runs
    others = [probe(longer.ids[::-1], 32)]
    assert causality_leak(counted, others, longer, shorter) == 0.0
    assert len(counted.ran) == 2  # the sequence itself, too


def test_outputs_are_kept_in_float16_only_if_it_holds_them_exactly(pristine, runner):
    (ids,) = pristine.read_prompts().packed(SHORT, 1)
    outputs = runner.run(ids)
    kept = compact(outputs)
    assert {name: array.dtype for name, array in kept.items()} == dict.fromkeys(outputs, np.float16)
    for name, array in outputs.items():
        np.testing.assert_array_equal(kept[name].astype(np.float32), array)
    for number in (0.1, 7e4, np.nan):
        exact = {"logits": np.array([[1.0, number]], np.float32)}
        assert compact(exact)["logits"].dtype == np.float32
    assert compact({"logits": np.array([[np.inf, 1.0]], np.float32)})["logits"].dtype == np.float16
