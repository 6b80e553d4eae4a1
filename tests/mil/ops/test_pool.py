"""Pooling, against torch.nn in float64 and numpy windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.core.errors import PredictionInputError
from coremill.mil import MLModel

RNG = np.random.default_rng(29)
SIZES = (7, 8, 9)
KERNEL, STRIDES, PADDING = (3, 2, 4), (2, 3, 1), (1, 1, 2)
MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _random(*shape):
    return (
        RNG.standard_normal(shape).astype(np.float32) - 3
    )  # mostly negative, so that zero padding would be the maximum


def _windows(rank):
    options = {"kernel_sizes": KERNEL[:rank], "strides": STRIDES[:rank]}
    return options, options | {"pad_type": "custom", "pad": np.repeat(PADDING[:rank], 2)}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_matches_torch(evaluate, rank):
    x = _random(2, 3, *SIZES[:rank])
    plain, padded = _windows(rank)
    found = evaluate(
        {"x": x},
        lambda x: (
            mb.max_pool(x=x, pad_type="valid", **plain),
            mb.max_pool(x=x, **padded),
            mb.avg_pool(x=x, pad_type="valid", **plain),
            mb.avg_pool(x=x, **padded),
            mb.avg_pool(x=x, exclude_padding_from_average=True, **padded),
        ),
        ios=15,
    )
    exact = torch.from_numpy(x).double()
    windows = KERNEL[:rank], STRIDES[:rank]
    for one, other in zip(
        found,
        (
            MAX[rank](exact, *windows),
            MAX[rank](exact, *windows, PADDING[:rank]),
            AVERAGE[rank](exact, *windows),
            AVERAGE[rank](exact, *windows, PADDING[:rank]),
            AVERAGE[rank](exact, *windows, PADDING[:rank], count_include_pad=False),
        ),
        strict=True,
    ):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [6, 8])
def test_ceil_mode_matches_torch(evaluate, size):
    """At size 6 a window would begin in the padding after x and is omitted; at 8 the last one extends beyond it."""
    x = _random(1, 2, size, 8)
    options = {"kernel_sizes": [3, 2], "strides": [4, 3], "ceil_mode": True}
    padded = options | {"pad_type": "custom", "pad": [1, 1, 1, 1]}
    found = evaluate(
        {"x": x},
        lambda x: (
            mb.max_pool(x=x, **padded),
            mb.avg_pool(x=x, **padded),
            mb.avg_pool(x=x, exclude_padding_from_average=True, **padded),
            mb.l2_pool(x=x, **padded),
            mb.avg_pool(x=x, pad_type="valid", **options | {"strides": [3, 3]}),
        ),
    )
    exact = torch.from_numpy(x).double()
    windows = (3, 2), (4, 3)
    for one, other in zip(
        found,
        (
            F.max_pool2d(exact, *windows, 1, ceil_mode=True),
            F.avg_pool2d(exact, *windows, 1, ceil_mode=True),
            F.avg_pool2d(exact, *windows, 1, ceil_mode=True, count_include_pad=False),
            F.avg_pool2d(exact.square(), *windows, 1, ceil_mode=True, divisor_override=1).sqrt(),
            F.avg_pool2d(exact, (3, 2), 3, ceil_mode=True),
        ),
        strict=True,
    ):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-6)


def test_ceil_mode_without_padding(evaluate):
    """The documented number of windows includes one that begins after x; torch omits it."""
    x = np.float32([[[1, 2, 3, 4]]])
    (found,) = evaluate(
        {"x": x}, lambda x: mb.max_pool(x=x, kernel_sizes=[1], strides=[4], pad_type="valid", ceil_mode=True)
    )
    np.testing.assert_array_equal(found, [[[1, -np.inf]]])


def test_same_padding(evaluate):
    """Windows of 3 with stride 2 on 4 elements need one element of padding, after or before."""
    x = np.float32([[[-1, -2, -3, -4]]])
    after, before, averages, counted, norms = evaluate(
        {"x": x},
        lambda x: (
            mb.max_pool(x=x, kernel_sizes=[3], strides=[2], pad_type="same"),
            mb.max_pool(x=x, kernel_sizes=[3], strides=[2], pad_type="same_lower"),
            mb.avg_pool(x=x, kernel_sizes=[3], strides=[2], pad_type="same"),
            mb.avg_pool(
                x=x, kernel_sizes=[3], strides=[2], pad_type="same_lower", exclude_padding_from_average=True
            ),
            mb.l2_pool(x=x, kernel_sizes=[3], strides=[2], pad_type="same", pad=[5, 5]),
        ),
        ios=16,
    )
    np.testing.assert_array_equal(after, [[[-1, -3]]])
    np.testing.assert_array_equal(before, [[[-1, -2]]])
    np.testing.assert_allclose(averages, [[[-2, -7 / 3]]], rtol=1e-6)
    np.testing.assert_allclose(counted, [[[-1.5, -3]]])
    np.testing.assert_allclose(norms, [[[np.sqrt(14), 5]]], rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_l2_pool(evaluate, rank):
    x = _random(1, 2, *SIZES[:rank])
    plain, _ = _windows(rank)
    (found,) = evaluate({"x": x}, lambda x: mb.l2_pool(x=x, pad_type="valid", **plain))
    axes = tuple(range(2, 2 + rank))
    cut = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), KERNEL[:rank], axes)
    cut = cut[(..., *(slice(None, None, step) for step in STRIDES[:rank]), *(slice(None),) * rank)]
    np.testing.assert_allclose(found, np.linalg.norm(cut.reshape(*found.shape, -1), axis=-1), rtol=1e-5)


def test_pools_of_halves(evaluate):
    x = (_random(1, 2, 9, 9) * 100).astype(np.float16)
    x[0, 0, 0, 0] = np.nan
    maxima, means, norms = evaluate(
        {"x": x},
        lambda x: tuple(
            pool(x=x, kernel_sizes=[3, 3], strides=[3, 3], pad_type="valid")
            for pool in (mb.max_pool, mb.avg_pool, mb.l2_pool)
        ),
    )
    cut = x.reshape(1, 2, 3, 3, 3, 3).swapaxes(3, 4).reshape(1, 2, 3, 3, 9)
    np.testing.assert_array_equal(maxima, cut.max(-1))
    exact = cut.astype(np.float64)
    np.testing.assert_allclose(means, exact.mean(-1).astype(np.float16), rtol=1e-3)
    # The squares overflow fp16, but the root does not.
    np.testing.assert_allclose(norms, np.linalg.norm(exact, axis=-1).astype(np.float16), rtol=1e-3)


def test_window_larger_than_the_input_is_rejected(build):
    model = MLModel(
        build(
            {"x": ((1, 1, (2, 8)), np.float32)},
            lambda x: mb.max_pool(x=x, kernel_sizes=[5], pad_type="custom", pad=[1, 1], name="pool"),
        )
    )
    np.testing.assert_array_equal(
        next(iter(model.predict({"x": np.ones((1, 1, 3), np.float32)}).values())), [[[1]]]
    )
    with pytest.raises(PredictionInputError) as caught:
        model.predict({"x": np.ones((1, 1, 2), np.float32)})
    assert str(caught.value) == "operation 'pool' (max_pool): a window of 5 for 2 elements with padding [1, 1]"


def test_unequal_padding_in_ceil_mode_is_rejected(build):
    """With `same` padding of a flexible size, unequal padding is detected only at run time."""
    model = MLModel(
        build(
            {"x": ((1, 1, (3, 8)), np.float32)},
            lambda x: mb.avg_pool(
                x=x, kernel_sizes=[3], strides=[2], pad_type="same_lower", ceil_mode=True, name="pool"
            ),
        )
    )
    with pytest.raises(PredictionInputError) as caught:
        model.predict({"x": np.ones((1, 1, 4), np.float32)})
    assert str(caught.value) == (
        "operation 'pool' (avg_pool): padding [[1, 0]], expected the same on both sides in ceil_mode"
    )
