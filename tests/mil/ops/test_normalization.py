"""Normalizations, against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813

RNG = np.random.default_rng(11)
X = RNG.standard_normal((2, 4, 3, 5)).astype(np.float32)
GAMMA, BETA, MEAN = (RNG.standard_normal(4).astype(np.float32) for _ in range(3))
VARIANCE = np.array([0.5, 1.0, 2.0, 4.0], np.float32)


def _double(array):
    return torch.from_numpy(array).double()


def test_batch_norm(evaluate):
    (found,) = evaluate(
        {"x": X},
        lambda x: mb.batch_norm(x=x, mean=MEAN, variance=VARIANCE, gamma=GAMMA, beta=BETA, epsilon=1e-3),
    )
    expected = torch.nn.functional.batch_norm(
        _double(X), *(_double(each) for each in (MEAN, VARIANCE, GAMMA, BETA)), eps=1e-3
    )
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_instance_norm(evaluate):
    (found,) = evaluate({"x": X}, lambda x: mb.instance_norm(x=x, gamma=GAMMA, beta=BETA, epsilon=1e-3))
    expected = torch.nn.functional.instance_norm(_double(X), weight=_double(GAMMA), bias=_double(BETA), eps=1e-3)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_layer_norm_of_the_last_axes(evaluate, dtype):
    x = X.astype(dtype)
    gamma, beta = (RNG.standard_normal((3, 5)).astype(dtype) for _ in range(2))
    (found,) = evaluate(
        {"x": x}, lambda x: mb.layer_norm(x=x, axes=[2, 3], gamma=gamma, beta=beta, epsilon=dtype(1e-3))
    )
    expected = torch.nn.functional.layer_norm(
        _double(x), (3, 5), _double(gamma), _double(beta), float(dtype(1e-3))
    ).numpy()
    if dtype == np.float16:
        np.testing.assert_array_max_ulp(found, expected.astype(np.float16), maxulp=1)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_layer_norm_of_an_inner_axis(evaluate):
    (found,) = evaluate({"x": X}, lambda x: mb.layer_norm(x=x, axes=[1], gamma=GAMMA, beta=BETA, epsilon=1e-3))
    moved = _double(X).movedim(1, -1)
    expected = torch.nn.functional.layer_norm(moved, (4,), _double(GAMMA), _double(BETA), 1e-3).movedim(-1, 1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_layer_norm_of_halves_does_not_overflow_internally(evaluate):
    x = np.array([[1000.0, -1000.0, 500.0, -500.0]], np.float16)  # the squares overflow fp16
    (found,) = evaluate({"x": x}, lambda x: mb.layer_norm(x=x, axes=[-1]))
    np.testing.assert_allclose(found, x.astype(np.float64) / np.sqrt(625000), rtol=1e-3)


def test_l2_norm(evaluate, inferred):
    body = lambda x: mb.l2_norm(x=x, epsilon=1e-3)  # noqa: E731
    (found,) = evaluate({"x": X}, body)
    np.testing.assert_allclose(found, inferred({"x": X}, body)[0].reshape(X.shape), rtol=1e-5, atol=1e-6)


def test_local_response_norm(evaluate):
    (found,) = evaluate({"x": X}, lambda x: mb.local_response_norm(x=x, size=3, alpha=0.5, beta=0.75, k=2.0))
    squares = np.pad(X.astype(np.float64) ** 2, ((0, 0), (1, 1), (0, 0), (0, 0)))
    total = sum(squares[:, shift : shift + 4] for shift in range(3))
    np.testing.assert_allclose(found, X / (2 + 0.5 / 3 * total) ** 0.75, rtol=1e-5)
