"""Joining, splitting, ordering and filling, against numpy and coremltools' value inference."""

from __future__ import annotations

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.mil.ops.registry import OperationError, find

X = np.array([[3.0, -1.0, 4.0, -1.5], [5.0, 9.0, -2.0, 6.0]], np.float32)
Y = X + 100

INFERRED = {
    "band_part": lambda x, y: mb.band_part(x=x, lower=0, upper=1),
    "band_part of the upper triangle": lambda x, y: mb.band_part(x=x, lower=0, upper=-1),
    "concat": lambda x, y: mb.concat(values=[x, y], axis=-1),
    "cumsum": lambda x, y: mb.cumsum(x=x, axis=1),
    "cumsum reversed": lambda x, y: mb.cumsum(x=x, axis=1, reverse=True),
    "fill_like": lambda x, y: mb.fill_like(ref_tensor=x, value=np.float32(2.5)),
    "identity": lambda x, y: mb.identity(x=x),
    "shape": lambda x, y: mb.shape(x=x),
    "stack": lambda x, y: mb.stack(values=[x, y], axis=1),
    "tile": lambda x, y: mb.tile(x=x, reps=[2, 3]),
    "argsort": lambda x, y: mb.argsort(x=x, axis=1),
    "argsort ascending": lambda x, y: mb.argsort(x=x, axis=0, ascending=True),
    "pad": lambda x, y: mb.pad(x=x, pad=[1, 0, 2, 1], constant_val=np.float32(7)),
    "pad of the last axis": lambda x, y: mb.pad(x=x, pad=[2, 1]),
    "pad by reflection": lambda x, y: mb.pad(x=x, pad=[1, 1, 2, 3], mode="reflect"),
    "pad by replication": lambda x, y: mb.pad(x=x, pad=[2, 1, 1, 2], mode="replicate"),
}


@pytest.fixture(scope="module")
def results(evaluate):
    outputs = evaluate({"x": X, "y": Y}, lambda x, y: tuple(body(x, y) for body in INFERRED.values()))
    return dict(zip(INFERRED, outputs, strict=True))


@pytest.mark.parametrize("name", INFERRED)
def test_matches_value_inference(results, inferred, name):
    (expected,) = inferred({"x": X, "y": Y}, INFERRED[name])
    assert results[name].shape == expected.shape
    np.testing.assert_array_equal(results[name], expected)


def test_concat_interleaved(evaluate):
    (found,) = evaluate({"x": X, "y": Y}, lambda x, y: mb.concat(values=[x, y], axis=0, interleave=True))
    np.testing.assert_array_equal(found, np.stack([X[0], Y[0], X[1], Y[1]]))


def test_cumsum_exclusive(evaluate):
    (found, back) = evaluate(
        {"x": X},
        lambda x: (
            mb.cumsum(x=x, axis=1, exclusive=True),
            mb.cumsum(x=x, axis=1, exclusive=True, reverse=True),
        ),
    )
    np.testing.assert_array_equal(found[0], [0.0, 3.0, 2.0, 6.0])
    np.testing.assert_array_equal(back[0], [1.5, 2.5, -1.5, 0.0])


def test_split(evaluate):
    equal = evaluate({"x": X}, lambda x: mb.split(x=x, num_splits=2, axis=1))
    uneven = evaluate({"x": X}, lambda x: mb.split(x=x, split_sizes=[1, 3], axis=-1))
    for found, expected in zip(equal, np.split(X, 2, axis=1), strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(uneven, np.split(X, [1], axis=1), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_topk(evaluate):
    values, indices, smallest, smallest_at = evaluate(
        {"x": X}, lambda x: (*mb.topk(x=x, k=2), *mb.topk(x=x, k=1, axis=0, ascending=True))
    )
    assert values.tolist() == [[4.0, 3.0], [9.0, 6.0]]
    assert indices.dtype == np.int32
    assert indices.tolist() == [[2, 0], [1, 3]]
    assert smallest.tolist() == [[3.0, -1.0, -2.0, -1.5]]
    assert smallest_at.tolist() == [[0, 0, 1, 0]]


def test_topk_without_indices(evaluate):
    (values,) = evaluate({"x": X}, lambda x: mb.topk(x=x, k=1, return_indices=False))
    assert values.tolist() == [[4.0], [9.0]]


def test_fill_with_a_computed_shape(evaluate):
    (found,) = evaluate(
        {"shape": np.array([2, 3], np.int32)}, lambda shape: mb.fill(shape=shape, value=np.float16(0.1))
    )
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, np.full((2, 3), np.float16(0.1)))


@pytest.mark.parametrize("bounds", [(0, 5, 1), (5, -1, -2), (1, 8, 3)])
def test_range(evaluate, bounds):
    inputs = {
        name: np.array([value], np.int32) for name, value in zip(("start", "end", "step"), bounds, strict=True)
    }
    (found,) = evaluate(
        inputs, lambda start, end, step: mb.range_1d(start=_scalar(start), end=_scalar(end), step=_scalar(step))
    )
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.arange(*bounds))


def _scalar(x):
    return mb.squeeze(x=x, axes=[0])


def test_non_zero(evaluate):
    x = np.array([[0, 2], [0, 0], [1, 5]], np.int32)
    (found,) = evaluate({"x": x}, lambda x: mb.non_zero(x=x))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.argwhere(x))


def test_one_hot(evaluate):
    last, first = evaluate(
        {"indices": np.array([0, 2, 1], np.int32)},
        lambda indices: (
            mb.one_hot(indices=indices, one_hot_vector_size=3, on_value=np.float32(5), off_value=np.float32(-1)),
            mb.one_hot(indices=indices, one_hot_vector_size=4, axis=0),
        ),
    )
    np.testing.assert_array_equal(last, np.eye(3, dtype=np.float32)[[0, 2, 1]] * 6 - 1)
    assert first.dtype == np.int32
    np.testing.assert_array_equal(first, np.eye(4, dtype=np.int32)[[0, 2, 1]].T)


def test_impossible_parts_are_refused():
    import torch

    x = torch.zeros(2, 5)
    with pytest.raises(OperationError, match="5 elements along axis 1 in 2 equal parts"):
        find("split", 18).kernel(x, axis=1, num_splits=2)
    with pytest.raises(OperationError, match="6 largest of 5 elements along axis 1"):
        find("topk", 18).kernel(x, k=6, axis=1)
    with pytest.raises(OperationError, match="reflecting 2 elements of axis 0, which has 2"):
        find("pad", 18).kernel(x, pad=(2, 0, 0, 0), mode="reflect")
