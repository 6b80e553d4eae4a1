"""Damaged packages: whatever is wrong with the bytes, an error of coremill's own says so, or the package runs."""

from __future__ import annotations

import os
import shutil

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coremill.core.errors import CoremillError
from coremill.mil import MLModel

CASES = int(os.environ.get("COREMILL_FUZZ_CASES", "150"))
"""More by hand: COREMILL_FUZZ_CASES=20000 pytest tests/mil/test_fuzz.py."""

IDS = {"ids": np.array([[1, 2, 3, 4]], np.int32)}


@pytest.fixture(scope="module")
def package(build, tmp_path_factory):
    """Ids through an embedding, a product, a norm, a branch and a softmax."""
    rng = np.random.default_rng(3)
    table = rng.standard_normal((16, 32)).astype(np.float16)
    weight = rng.standard_normal((48, 32)).astype(np.float16)

    def body(ids):
        x = mb.linear(x=mb.gather(x=table, indices=ids, axis=0), weight=weight)
        x = mb.layer_norm(x=x, axes=[-1])
        some = mb.reduce_max(x=mb.cast(x=ids, dtype="fp32"), keep_dims=False)
        x = mb.cond(pred=mb.greater(x=some, y=np.float32(0)), _true_fn=lambda: mb.relu(x=x), _false_fn=lambda: x)
        parts = mb.split(x=x, num_splits=2, axis=-1)
        return mb.softmax(x=mb.concat(values=[parts[1], parts[0]], axis=-1), axis=-1)

    path = tmp_path_factory.mktemp("fuzz") / "whole.mlpackage"
    model = build({"ids": IDS["ids"]}, body)
    assert isinstance(model, ct.models.MLModel)
    model.save(str(path))
    assert MLModel(path).predict(IDS)
    return path


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Some bytes changed, removed, doubled, or all that follows cut off."""
    result = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(result) - 1)))
        length = data.draw(st.integers(1, 16))
        match data.draw(st.sampled_from(["set", "remove", "double", "cut"])):
            case "set":
                result[at : at + length] = data.draw(st.binary(min_size=1, max_size=length))
            case "remove":
                del result[at : at + length]
            case "double":
                result[at:at] = result[at : at + length]
            case "cut":
                del result[at:]
    return bytes(result)


PARTS = ("Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin")


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.rpartition("/")[2])
def test_damage_is_an_error_or_nothing(package, tmp_path_factory, part):
    copy = tmp_path_factory.mktemp("copy") / "damaged.mlpackage"
    shutil.copytree(package, copy)
    content = (package / part).read_bytes()
    outcomes = {"error": 0, "ran": 0}

    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(data=st.data())
    def damage(data):
        (copy / part).write_bytes(damaged(data, content))
        try:
            MLModel(copy).predict(IDS)
        except CoremillError:
            outcomes["error"] += 1
        else:
            outcomes["ran"] += 1

    damage()
    assert sum(outcomes.values()) >= CASES
    if part.endswith((".mlmodel", ".json")):
        assert outcomes["error"] > CASES / 4, outcomes
