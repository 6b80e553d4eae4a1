"""Joining, splitting, ordering and filling, against numpy and coremltools' value inference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil.ops.tests.iOS14.test_tensor_operation import TestNonMaximumSuppression

from coremill.mil.ops.registry import OperationError, find

overlaps = TestNonMaximumSuppression._compute_iou_matrix
"""Returns the (B, B) intersections over unions of (B, 4) boxes; from coremltools' test."""
del TestNonMaximumSuppression  # not collected here

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


def test_sizes_that_do_not_fit_are_rejected():
    import torch

    x = torch.zeros(2, 5)
    with pytest.raises(OperationError, match="5 elements along axis 1 in 2 equal parts"):
        find("split", 18).kernel(x, axis=1, num_splits=2)
    with pytest.raises(OperationError, match="6 largest of 5 elements along axis 1"):
        find("topk", 18).kernel(x, k=6, axis=1)
    with pytest.raises(OperationError, match="reflecting 2 elements of axis 0, which has 2"):
        find("pad", 18).kernel(x, pad=(2, 0, 0, 0), mode="reflect")


def _suppress(evaluate, boxes, scores, **options):
    return evaluate(
        {"boxes": boxes, "scores": scores},
        lambda boxes, scores: mb.non_maximum_suppression(boxes=boxes, scores=scores, **options),
        ios=16,
    )


def test_suppression_of_few_boxes(evaluate):
    """Of two boxes that overlap by half, the one with the higher score is kept, although it is second."""
    boxes = np.array([[[1, 1, 2, 2], [1, 2, 2, 2], [9, 9, 2, 2], [5, 5, 0, 0]]], np.float32)
    scores = np.array([[[0.5], [0.75], [0.25], [-1]]], np.float32)
    # The first two boxes share 2 of 6 units.
    for iou_threshold, chosen in ((0.32, [1, 2]), (0.34, [1, 0, 2])):
        found = _suppress(evaluate, boxes, scores, iou_threshold=iou_threshold, score_threshold=0.0, max_boxes=5)
        padding = 5 - len(chosen)
        assert found[0].tolist() == [[*boxes[0, chosen].tolist(), *[[0.0] * 4] * padding]]
        assert found[1].tolist() == [[*scores[0, chosen].tolist(), *[[0.0]] * padding]]
        assert found[2].tolist() == [[*chosen, *[-1] * padding]]
        assert found[3].tolist() == [len(chosen)]
        assert found[2].dtype == found[3].dtype == np.int32


def test_suppression_keeps_the_best_box_if_none_passes(evaluate):
    boxes = np.array([[[1, 1, 2, 2], [6, 6, 2, 2]]], np.float32)
    scores = np.array([[[0.25, 0.5], [0.75, 0.1]]], np.float32)
    _, _, indices, count = _suppress(evaluate, boxes, scores, iou_threshold=0.5, score_threshold=0.9, max_boxes=2)
    assert indices.tolist() == [[1, -1]]
    assert count.tolist() == [1]


def test_score_at_the_threshold_passes(evaluate):
    boxes = np.array([[[1, 1, 2, 2], [6, 6, 2, 2]]], np.float32)
    scores = np.array([[[0.25], [0.5]]], np.float32)
    indices = _suppress(evaluate, boxes, scores, iou_threshold=0.5, score_threshold=0.25, max_boxes=2)[2]
    assert indices.tolist() == [[1, 0]]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("max_boxes", [7, 60])
def test_suppression_keeps_the_best_boxes(evaluate, dtype, per_class, max_boxes):
    """Three properties determine which boxes are kept."""
    rng = np.random.default_rng(3)
    centres, sizes = rng.uniform(0, 400, (2, 50, 2)), rng.uniform(100, 300, (2, 50, 2))
    boxes = np.concatenate([centres, sizes], -1).astype(dtype)
    scores = rng.permutation(2 * 50 * 3).reshape(2, 50, 3).astype(dtype)  # all different
    options = {"iou_threshold": dtype(0.25), "max_boxes": max_boxes, "per_class_suppression": per_class}
    threshold = float(np.median(scores.max(-1)))
    found = _suppress(evaluate, boxes, scores, score_threshold=dtype(threshold), **options)
    for sample in range(2):
        count = int(found[3][sample])
        chosen = found[2][sample, :count]
        best, classes = scores[sample].max(-1), scores[sample].argmax(-1)
        overlap = overlaps(boxes[sample]) > 0.25
        if per_class:
            overlap &= classes[:, None] == classes[None, :]
        # Descending scores; no kept boxes overlap; each dropped box overlaps a kept one with a higher score.
        assert (np.diff(best[chosen]) < 0).all()
        assert overlap[np.ix_(chosen, chosen)].sum() == count
        passing = np.flatnonzero(best >= threshold)
        for other in set(passing) - set(chosen):
            better = chosen[best[chosen] > best[other]]
            assert overlap[other, better].any() or (count == max_boxes and best[other] < best[chosen].min())
        np.testing.assert_array_equal(found[0][sample, :count], boxes[sample, chosen])
        np.testing.assert_array_equal(found[1][sample, :count], scores[sample, chosen])
    assert found[0].dtype == dtype


def test_suppression_in_ios17(evaluate):
    """As in earlier versions, with the boxes last, no score threshold, and no number of boxes."""
    rng = np.random.default_rng(5)
    boxes = rng.uniform(100, 300, (2, 20, 4)).astype(np.float32)
    scores = rng.uniform(-1, 1, (2, 20, 3)).astype(np.float32)
    options = {"iou_threshold": 0.3, "max_boxes": 20, "per_class_suppression": True}
    before = _suppress(evaluate, boxes, scores, score_threshold=-10.0, **options)
    found = evaluate(
        {"boxes": boxes.swapaxes(1, 2), "scores": scores.swapaxes(1, 2)},
        lambda boxes, scores: mb.non_maximum_suppression(boxes=boxes, scores=scores, **options),
        ios=17,
    )
    assert before[3].min() > 1
    assert before[3].max() < 20
    assert len(found) == 3
    np.testing.assert_array_equal(found[0], before[0].swapaxes(1, 2))
    np.testing.assert_array_equal(found[1], before[1].swapaxes(1, 2))
    np.testing.assert_array_equal(found[2], before[2])


@pytest.mark.parametrize(
    ("ios", "layout"),
    [(16, "up to iOS16 they are (N, B, 4) and (N, B, K)"), (18, "from iOS17 on they are (N, 4, B) and (N, K, B)")],
)
def test_layout_of_another_operation_set_is_rejected(ios, layout):
    """The boxes are the last axis from iOS17 on, and the last but one before."""
    options = {"iou_threshold": 0.5, "max_boxes": 2} | ({"score_threshold": 0.0} if ios < 17 else {})
    sizes = {16: ((1, 5, 4), (1, 5, 2)), 18: ((1, 4, 5), (1, 2, 5))}
    wrong_boxes, wrong_scores = sizes[34 - ios]
    with pytest.raises(OperationError) as caught:
        find("non_maximum_suppression", ios).kernel(torch.ones(wrong_boxes), torch.ones(wrong_scores), **options)
    assert str(caught.value) == (
        f"boxes of shape {list(wrong_boxes)} and scores of shape {list(wrong_scores)}; {layout}"
    )
