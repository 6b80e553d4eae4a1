"""Selection, branches and loops."""

from __future__ import annotations

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.core.errors import PredictionInputError
from coremill.mil import MLModel


def test_select_broadcasts(evaluate):
    inputs = {"flags": np.array([[1], [0]], np.int32), "a": np.float32([1, 2, 3]), "b": np.float32([[7], [8]])}
    (found,) = evaluate(inputs, lambda flags, a, b: mb.select(cond=mb.cast(x=flags, dtype="bool"), a=a, b=b))
    np.testing.assert_array_equal(found, [[1, 2, 3], [8, 8, 8]])


def _branching(x):
    scale = mb.add(x=x, y=np.float32(1))  # captured by one branch, together with a constant
    positive = mb.greater(x=mb.reduce_sum(x=x), y=np.float32(0))
    return mb.cond(
        pred=positive,
        _true_fn=lambda: mb.mul(x=scale, y=np.float32(10)),
        _false_fn=lambda: mb.real_div(x=x, y=np.float32(2)),
    )


def test_branches_capture_outer_values(evaluate):
    (found,) = evaluate({"x": np.float32([1, 2])}, _branching)
    assert found.tolist() == [20.0, 30.0]
    (found,) = evaluate({"x": np.float32([-1, -2])}, _branching)
    assert found.tolist() == [-0.5, -1.0]


def test_only_the_selected_branch_runs(build):
    """An index out of bounds in the other branch is not an error."""
    table = np.arange(3, dtype=np.float32)

    def body(index):
        inside = mb.less(x=index, y=np.int32(3))
        return mb.cond(
            pred=mb.squeeze(x=inside),
            _true_fn=lambda: mb.gather(x=table, indices=index, name="look_up"),
            _false_fn=lambda: mb.cast(x=index, dtype="fp32"),
        )

    model = MLModel(build({"index": np.array([2], np.int32)}, body))
    assert [next(iter(model.predict({"index": np.array([n], np.int32)}).values())).tolist() for n in (2, 9)] == [
        [2.0],
        [9.0],
    ]
    with pytest.raises(PredictionInputError, match=r"^operation 'look_up' \(gather\): index -1 is out of bounds"):
        model.predict({"index": np.array([-1], np.int32)})


def test_loop_runs_until_its_condition_is_false(evaluate):
    """The sum of 1 to n; the condition captures n and the body captures the step."""

    def body(n, step):
        def condition(i, total):
            return mb.less_equal(x=i, y=mb.squeeze(x=n))

        def advance(i, total):
            return mb.add(x=i, y=mb.squeeze(x=step)), mb.add(x=total, y=i)

        return mb.while_loop(_cond=condition, _body=advance, loop_vars=(np.int32(1), np.int32(0)))

    i, total = evaluate({"n": np.array([10], np.int32), "step": np.array([1], np.int32)}, body)
    assert (i.tolist(), total.tolist()) == ([11], [55])
    i, total = evaluate({"n": np.array([0], np.int32), "step": np.array([1], np.int32)}, body)
    assert (i.tolist(), total.tolist()) == ([1], [0])
