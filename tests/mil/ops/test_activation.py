"""Activations, against their formulas in float64 and coremltools' value inference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813

X = np.linspace(-6, 7, 24, dtype=np.float32).reshape(1, 2, 3, 4)
PER_CHANNEL = np.array([0.25, 0.5], np.float32)

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _channels(values):
    return values.astype(np.float64).reshape(1, 2, 1, 1)


CASES = {
    "clamped_relu": ({"alpha": 0.5, "beta": 3.0}, lambda x: np.minimum(3.0, np.where(x >= 0, x, 0.5 * x))),
    "elu": ({"alpha": 1.5}, lambda x: np.where(x > 0, x, 1.5 * np.expm1(np.minimum(x, 0)))),
    "gelu": ({}, lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2)))),
    "gelu/TANH_APPROXIMATION": (
        {"mode": "TANH_APPROXIMATION"},
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "gelu/SIGMOID_APPROXIMATION": ({"mode": "SIGMOID_APPROXIMATION"}, lambda x: x * _sigmoid(1.702 * x)),
    "leaky_relu": ({"alpha": 0.125}, lambda x: np.where(x >= 0, x, 0.125 * x)),
    "linear_activation": ({"alpha": 0.5, "beta": 3.0}, lambda x: 0.5 * x + 3),
    "prelu": ({"alpha": PER_CHANNEL}, lambda x: np.where(x > 0, x, _channels(PER_CHANNEL) * x)),
    "relu": ({}, lambda x: np.maximum(x, 0)),
    "relu6": ({}, lambda x: np.clip(x, 0, 6)),
    "scaled_tanh": ({"alpha": 0.5, "beta": 2.0}, lambda x: 0.5 * np.tanh(2 * x)),
    "sigmoid": ({}, _sigmoid),
    "sigmoid_hard": ({"alpha": 0.25, "beta": 0.5}, lambda x: np.clip(0.25 * x + 0.5, 0, 1)),
    "silu": ({}, lambda x: x * _sigmoid(x)),
    "softmax": ({"axis": 2}, lambda x: np.exp(x) / np.exp(x).sum(2, keepdims=True)),
    "softplus": ({}, lambda x: np.log1p(np.exp(x))),
    "softplus_parametric": (
        {"alpha": PER_CHANNEL, "beta": PER_CHANNEL * 2},
        lambda x: _channels(PER_CHANNEL) * np.log1p(np.exp(2 * _channels(PER_CHANNEL) * x)),
    ),
    "softsign": ({}, lambda x: x / (1 + np.abs(x))),
    "thresholded_relu": ({"alpha": 1.0}, lambda x: np.where(x >= 1, x, 0)),
}
WITHOUT_INFERENCE = {"silu"}


def _apply(name, x, dtype=np.float32):
    arguments = {
        key: value if isinstance(value, (str, int)) else np.asarray(value, dtype)
        for key, value in CASES[name][0].items()
    }
    return getattr(mb, name.partition("/")[0])(x=x, **arguments)


@pytest.fixture(scope="module", params=[np.float32, np.float16], ids=["fp32", "fp16"])
def results(request, evaluate):
    dtype = request.param
    outputs = evaluate({"x": X.astype(dtype)}, lambda x: tuple(_apply(name, x, dtype) for name in CASES))
    return dtype, dict(zip(CASES, outputs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_matches_the_formula(results, name):
    dtype, outputs = results
    exact = CASES[name][1](X.astype(dtype).astype(np.float64))
    assert outputs[name].dtype == dtype
    if dtype == np.float16:
        np.testing.assert_array_max_ulp(outputs[name], exact.astype(np.float16), maxulp=1)
    else:
        np.testing.assert_allclose(outputs[name], exact, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_matches_value_inference(results, inferred, name):
    dtype, outputs = results
    if dtype != np.float32:
        return
    expected = inferred({"x": X}, lambda x: _apply(name, x))
    if name in WITHOUT_INFERENCE:
        assert expected is None
        return
    assert expected is not None
    np.testing.assert_allclose(outputs[name], expected[0], rtol=1e-5, atol=2e-6)


def test_softplus_of_large_inputs_is_finite(evaluate):
    (found,) = evaluate({"x": np.array([200.0, -200.0], np.float32)}, lambda x: mb.softplus(x=x))
    assert found.tolist() == [200.0, 0.0]


def test_softmax_of_a_masked_row_of_halves(evaluate):
    x = np.array([[3.0, 1.0, -30000.0, -np.inf]], np.float16)
    (found,) = evaluate({"x": x}, lambda x: mb.softmax(x=x))
    share = 1 / (1 + math.exp(-2))
    assert found.tolist() == [[np.float16(share), np.float16(1 - share), 0.0, 0.0]]
