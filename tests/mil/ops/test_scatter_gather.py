"""Gathers and scatters, against numpy; errors for indices out of bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.core.errors import PredictionInputError
from coremill.mil import MLModel
from coremill.mil.ops.registry import OperationError, find

TABLE = np.arange(24, dtype=np.float32).reshape(6, 4)


def _int(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize("indices", [_int(0, 5, 5), np.array([[1], [4]], np.int32)], ids=["list", "matrix"])
@pytest.mark.parametrize("axis", [0, 1, -2])
def test_gather(evaluate, indices, axis):
    indices = indices % TABLE.shape[axis]
    (found,) = evaluate({"indices": indices}, lambda indices: mb.gather(x=TABLE, indices=indices, axis=axis))
    np.testing.assert_array_equal(found, np.take(TABLE, indices, axis))


def test_gather_of_one_index(evaluate):
    (found,) = evaluate({"x": TABLE}, lambda x: mb.gather(x=x, indices=np.int32(3), axis=0), ios=17)
    np.testing.assert_array_equal(found, TABLE[3])


def test_gather_with_batches(evaluate):
    x = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    indices = np.array([[4, 0], [1, 1]], np.int32)
    (found,) = evaluate(
        {"x": x, "indices": indices}, lambda x, indices: mb.gather(x=x, indices=indices, axis=1, batch_dims=1)
    )
    np.testing.assert_array_equal(found, np.stack([x[0][indices[0]], x[1][indices[1]]]))


@pytest.mark.parametrize(("ios", "index", "bounds"), [(16, 6, "-6 to 5"), (16, -7, "-6 to 5"), (18, 6, "0 to 5")])
@pytest.mark.parametrize("validate", [False, True])
def test_gather_out_of_bounds_is_an_error(build, ios, index, bounds, validate):
    """The evaluator always checks; without `validate_indices` Core ML's result is undefined."""
    options = {"validate_indices": validate} if ios >= 17 else {}
    inputs = {"ids": _int(1, 2)}
    model = MLModel(build(inputs, lambda ids: mb.gather(x=TABLE, indices=ids, name="embed", **options), ios=ios))
    with pytest.raises(PredictionInputError) as caught:
        model.predict({"ids": _int(1, index)})
    assert str(caught.value) == (
        f"operation 'embed' (gather): index {index} is out of bounds: axis 0 has 6 elements, indices are {bounds}"
    )


def test_negative_indices_count_from_the_end_before_ios17(build):
    body = lambda ids: mb.gather(x=TABLE, indices=ids, name="embed")  # noqa: E731
    inputs = {"ids": _int(-1, -6)}
    old = MLModel(build(inputs, body, ios=16))
    np.testing.assert_array_equal(next(iter(old.predict(inputs).values())), TABLE[[-1, -6]])
    new = MLModel(build(inputs, body, ios=17))
    with pytest.raises(PredictionInputError, match=r"index -6 is out of bounds: .* indices are 0 to 5"):
        new.predict(inputs)


def test_gather_along_axis(evaluate):
    indices = np.array([[3, 0, 1, 2, 3, 0]], np.int32).T
    (found,) = evaluate(
        {"indices": indices}, lambda indices: mb.gather_along_axis(x=TABLE, indices=indices, axis=1)
    )
    np.testing.assert_array_equal(found, np.take_along_axis(TABLE, indices, 1))


def test_gather_nd(evaluate):
    rows, elements, batched = evaluate(
        {"indices": np.array([[5], [0]], np.int32), "pairs": np.array([[1, 2], [5, 3]], np.int32)},
        lambda indices, pairs: (
            mb.gather_nd(x=TABLE, indices=indices),
            mb.gather_nd(x=TABLE, indices=pairs),
            mb.gather_nd(x=TABLE[:2], indices=mb.mod(x=indices, y=4), batch_dims=1),
        ),
    )
    np.testing.assert_array_equal(rows, TABLE[[5, 0]])
    np.testing.assert_array_equal(elements, [TABLE[1, 2], TABLE[5, 3]])
    np.testing.assert_array_equal(batched, [TABLE[0, 1], TABLE[1, 0]])


REFERENCES = {
    "update": lambda old, new: new,
    "add": lambda old, new: old + new,
    "sub": lambda old, new: old - new,
    "mul": lambda old, new: old * new,
    "div": lambda old, new: old / new,
    "max": np.maximum,
    "min": np.minimum,
}


@pytest.mark.parametrize("mode", REFERENCES)
def test_scatters(evaluate, mode):
    combine = REFERENCES[mode]
    rows = np.array([[8.0, 8, 8, 8], [16, 16, 16, 16]], np.float32)
    column = np.full((6, 1), 4.0, np.float32)
    at_rows, at_column, at_pairs = evaluate(
        {"rows": rows, "column": column, "indices": _int(4, 1)},
        lambda rows, column, indices: (
            mb.scatter(data=TABLE, indices=indices, updates=rows, axis=0, mode=mode),
            mb.scatter_along_axis(
                data=TABLE, indices=np.full((6, 1), 2, np.int32), updates=column, axis=1, mode=mode
            ),
            mb.scatter_nd(
                data=TABLE, indices=np.array([[0, 3], [5, 0]], np.int32), updates=np.float32([2, 4]), mode=mode
            ),
        ),
    )
    expected = TABLE.copy()
    expected[[4, 1]] = combine(TABLE[[4, 1]], rows)
    np.testing.assert_allclose(at_rows, expected)
    expected = TABLE.copy()
    expected[:, 2:3] = combine(TABLE[:, 2:3], column)
    np.testing.assert_allclose(at_column, expected)
    expected = TABLE.copy()
    expected[[0, 5], [3, 0]] = combine(TABLE[[0, 5], [3, 0]], np.float32([2, 4]))
    np.testing.assert_allclose(at_pairs, expected)


def test_scatter_add_accumulates_repeated_indices(evaluate):
    (found,) = evaluate(
        {"updates": np.ones((3, 4), np.float32)},
        lambda updates: mb.scatter(data=TABLE, indices=_int(2, 2, 0), updates=updates, mode="add"),
    )
    expected = TABLE.copy()
    np.add.at(expected, [2, 2, 0], 1)
    np.testing.assert_array_equal(found, expected)


X = torch.arange(24.0).reshape(2, 3, 4)


def _zeros(*shape):
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("op_type", "arguments", "attributes", "message"),
    [
        ("gather", (X, _zeros(2, 3)), {"axis": 0, "batch_dims": 1}, "batch_dims 1, expected 0 to 0"),
        ("gather", (X, _zeros(2)), {"axis": 2, "batch_dims": 2}, "batch_dims 2, expected 0 to 1"),
        ("gather", (X, _zeros(2, 3)), {"axis": 1, "batch_dims": -1}, "batch_dims -1, expected 0 to 1"),
        ("gather", (X, _zeros(3, 2)), {"axis": 2, "batch_dims": 2}, "expected 2 equal first sizes"),
        ("gather_nd", (X, _zeros(3, 2)), {"batch_dims": 1}, "expected 1 equal first sizes"),
        ("gather_nd", (X, _zeros(2, 4)), {}, r"indices of shape \[2, 4\] into the sizes \[2, 3, 4\]"),
        ("gather_along_axis", (X, _zeros(1, 3, 4)), {"axis": 1}, r"must be \[2, 3, 4\] but along axis 1"),
        ("scatter", (X, _zeros(2), X[:1]), {"axis": 0}, r"updates of shape \[1, 3, 4\], which must be \[2, 3, 4\]"),
        ("scatter_along_axis", (X, _zeros(2, 1, 3), X), {"axis": 1}, r"must be \[2, 3, 4\] but along axis 1"),
        ("scatter_along_axis", (X, _zeros(2, 1, 4), X), {"axis": 1}, r"which must be \[2, 1, 4\]"),
        ("scatter_nd", (X, _zeros(1, 1), X), {}, r"updates of shape \[2, 3, 4\], which must be \[1, 3, 4\]"),
        ("scatter_nd", (X, _zeros(2, 4), X), {}, r"indices of shape \[2, 4\] into the sizes \[2, 3, 4\]"),
    ],
)
def test_mismatched_shapes_are_rejected(op_type, arguments, attributes, message):
    """torch would broadcast, wrap or ignore; coremltools' definitions reject them."""
    with pytest.raises(OperationError, match=message):
        find(op_type, 18).kernel(*arguments, **attributes)
