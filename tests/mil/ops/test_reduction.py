"""Reductions, against numpy in float64 and coremltools' value inference."""

from __future__ import annotations

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813

X = (np.arange(24).reshape(2, 3, 4) * 7 % 11 + 0.5).astype(np.float32)

REFERENCES = {
    "reduce_sum": np.sum,
    "reduce_mean": np.mean,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum_square": lambda x, **k: np.sum(x * x, **k),
    "reduce_l1_norm": lambda x, **k: np.sum(np.abs(x), **k),
    "reduce_l2_norm": lambda x, **k: np.sqrt(np.sum(x * x, **k)),
    "reduce_log_sum": lambda x, **k: np.log(np.sum(x, **k)),
    "reduce_log_sum_exp": lambda x, **k: np.log(np.sum(np.exp(x), **k)),
}
AXES = [None, [0], [-1], [0, 2], [1, -1]]


@pytest.fixture(scope="module", params=[False, True], ids=["dropped", "kept"])
def results(request, evaluate):
    keep = request.param

    def body(x):
        return tuple(
            getattr(mb, name)(x=x, keep_dims=keep, **({} if axes is None else {"axes": axes}))
            for name in REFERENCES
            for axes in AXES
        )

    outputs = iter(evaluate({"x": X}, body))
    return keep, {(name, str(axes)): next(outputs) for name in REFERENCES for axes in AXES}


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("name", REFERENCES)
def test_matches_numpy(results, name, axes):
    keep, outputs = results
    expected = REFERENCES[name](X.astype(np.float64), axis=None if axes is None else tuple(axes), keepdims=keep)
    found = outputs[name, str(axes)]
    assert found.shape == (expected.shape or (1,))  # Core ML has no scalars
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_matches_value_inference(results, inferred, name):
    keep, outputs = results
    expected = inferred({"x": X}, lambda x: getattr(mb, name)(x=x, axes=[0, 2], keep_dims=keep))
    assert expected is not None
    np.testing.assert_allclose(outputs[name, "[0, 2]"], expected[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["reduce_argmax", "reduce_argmin"])
def test_argument(evaluate, name):
    x = np.array([[3, 9, -2], [8, 1, 4]], np.float32)
    rows, columns = evaluate(
        {"x": x}, lambda x: (getattr(mb, name)(x=x), getattr(mb, name)(x=x, axis=0, keep_dims=True))
    )
    reference = np.argmax if name == "reduce_argmax" else np.argmin
    assert rows.dtype == np.int32
    assert rows.tolist() == reference(x, axis=-1).tolist()
    assert columns.tolist() == [reference(x, axis=0).tolist()]


def test_halves_accumulate_in_fp32(evaluate):
    """2,048 ones and a thousand halves: in fp16 the sum would stop growing at 2,048."""
    x = np.array([1.0] * 2048 + [0.5] * 1000, np.float16)
    total, mean = evaluate({"x": x}, lambda x: (mb.reduce_sum(x=x), mb.reduce_mean(x=x)))
    assert total.dtype == np.float16
    assert total.tolist() == [2548.0]
    assert mean.tolist() == [np.float16(2548 / 3048)]


def test_sum_of_squares_of_halves_does_not_overflow_internally(evaluate):
    x = np.full(4, 200.0, np.float16)  # 4 · 40,000 overflows fp16, but its root does not
    (norm,) = evaluate({"x": x}, lambda x: mb.reduce_l2_norm(x=x))
    assert norm.tolist() == [400.0]


def test_integers_stay_integers(evaluate):
    x = np.array([[1, 2], [4, 4]], np.int32)
    total, mean, product = evaluate(
        {"x": x}, lambda x: (mb.reduce_sum(x=x), mb.reduce_mean(x=x), mb.reduce_prod(x=x, axes=[0]))
    )
    assert [total.dtype, mean.dtype, product.dtype] == [np.int32] * 3
    assert [each.tolist() for each in (total, mean, product)] == [[11], [2], [4, 8]]
