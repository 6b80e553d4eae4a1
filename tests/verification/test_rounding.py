"""Which conversions round the weights, and what is left of a good package once both sides are rounded alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coremill.core.config import ConvertConfig
from coremill.measures import sqnr_db
from coremill.model.checkpoint import Checkpoint, build_student, load_checkpoint
from coremill.model.reference import Reference
from coremill.verification.backends import reference_runner
from coremill.verification.rounding import MIN_SQNR_DB, are_rounded, rounded_reference, wide_runner

FLOAT16 = ConvertConfig()


@pytest.fixture
def checkpoint(pristine) -> Checkpoint:
    return load_checkpoint(pristine.checkpoint)


def test_a_rounded_reference_is_the_model_with_rounded_weights_and_tables(checkpoint):
    """torch's own cast of the whole model to float16 gives the same weights and tables."""
    student = build_student(checkpoint).half().float()
    ids = list(range(20, 60))
    with torch.no_grad():
        expected = student(torch.tensor([ids]))
    found = rounded_reference(checkpoint, FLOAT16).run(ids)
    exact = Reference.of(checkpoint).run(ids)
    for name, wanted in zip(found, expected, strict=True):
        assert np.abs(found[name] - wanted[0].numpy()).max() <= 1e-5
        assert np.abs(found[name] - exact[name]).max() > 1e-4


def test_a_weight_beyond_float16_leaves_all_of_them_as_they_are(checkpoint):
    assert are_rounded(checkpoint, FLOAT16)
    weight = checkpoint.state_dict["layers.0.mlp.down_proj.weight"]
    weight[0, 0] = 65504.0
    assert are_rounded(checkpoint, FLOAT16)
    weight[0, 0] = 65536.0
    assert not are_rounded(checkpoint, FLOAT16)


def test_in_float32_nothing_is_rounded(checkpoint):
    assert not are_rounded(checkpoint, ConvertConfig(compute_precision="float32"))


def test_of_a_good_package_nothing_is_left_but_the_order_of_sums(pristine, checkpoint):
    """The trained student's package, whose noise in float16 is 30 dB above the threshold."""
    contract = pristine.read_contract()
    (ids,) = pristine.read_prompts().packed(96, 1)
    as_declared = reference_runner(pristine.package, contract).run(ids)["logits"]
    wide = wide_runner(pristine.package, contract).run(ids)["logits"]
    exact = Reference.of(checkpoint).run(ids)["logits"]
    rounded = rounded_reference(checkpoint, FLOAT16).run(ids)["logits"]
    assert sqnr_db(exact, as_declared) < MIN_SQNR_DB - 20
    assert sqnr_db(exact, wide) < MIN_SQNR_DB - 10
    assert sqnr_db(rounded, wide) > MIN_SQNR_DB + 20
