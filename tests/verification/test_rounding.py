"""Which conversions round the weights, and what is left of a good package once both sides are rounded alike."""

from __future__ import annotations

import pytest
import torch

from coremill.core.config import ConvertConfig
from coremill.measures import sqnr_db
from coremill.model.checkpoint import build_student, load_checkpoint
from coremill.model.reference import Reference
from coremill.verification.backends import reference_runner
from coremill.verification.rounding import MIN_SQNR_DB, are_rounded, round_weights, wide_runner

FLOAT16 = ConvertConfig()


@pytest.fixture
def student(pristine):
    return build_student(load_checkpoint(pristine.checkpoint))


def test_the_weights_are_those_of_float16_and_held_in_float32(student):
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    rounded = round_weights(student).state_dict()
    assert rounded.keys() == before.keys()
    for name, weight in rounded.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name].half().float())
    assert any(not torch.equal(rounded[name], before[name]) for name in before)


def test_a_weight_beyond_float16_leaves_all_of_them_as_they_are(student):
    assert are_rounded(student, FLOAT16)
    with torch.no_grad():
        student.layers[0].mlp.down_proj.weight[0, 0] = 65504.0
        assert are_rounded(student, FLOAT16)
        student.layers[0].mlp.down_proj.weight[0, 0] = 65536.0
    assert not are_rounded(student, FLOAT16)


def test_in_float32_nothing_is_rounded(student):
    assert not are_rounded(student, ConvertConfig(compute_precision="float32"))


def test_of_a_good_package_nothing_is_left_but_the_order_of_sums(pristine, student):
    """The trained student's package, whose noise in float16 is 30 dB above the threshold."""
    contract = pristine.read_contract()
    (ids,) = pristine.read_prompts().packed(96, 1)
    as_declared = reference_runner(pristine.package, contract).run(ids)["logits"]
    wide = wide_runner(pristine.package, contract).run(ids)["logits"]
    exact = Reference(student).run(ids)["logits"]
    rounded = Reference(round_weights(student)).run(ids)["logits"]
    assert sqnr_db(exact, as_declared) < MIN_SQNR_DB - 20
    assert sqnr_db(exact, wide) < MIN_SQNR_DB - 10
    assert sqnr_db(rounded, wide) > MIN_SQNR_DB + 20
