"""Updates of a state in its own memory: found where nothing reads the old content, and undone by a failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from hypothesis import given, settings
from hypothesis import strategies as st

from coremill.core.errors import PredictionInputError
from coremill.mil import MLModel
from coremill.mil.in_place import updates_in_place

SIZE = 8
TABLE = np.arange(4, dtype=np.float16) * 16


def model_of(body: Callable[[Any, Any, Any], Any]) -> MLModel:
    """A model with a state `kept` of SIZE, and the inputs `at` (1,) int32 and `x` (1,) fp16."""

    @mb.program(
        input_specs=[
            mb.StateTensorSpec((SIZE,), dtype=types.fp16),
            mb.TensorSpec((1,), dtype=types.int32),
            mb.TensorSpec((1,), dtype=types.fp16),
        ],
        opset_version=ct.target.iOS18,
    )
    def program(kept, at, x):
        return body(kept, at, x)

    converted = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    return MLModel(converted)


def write(kept: Any, old: Any, at: Any, x: Any) -> Any:
    """The state with `x` at position `at`."""
    end = mb.add(x=at, y=np.int32(1))
    return mb.coreml_update_state(state=kept, value=mb.slice_update(x=old, update=x, begin=at, end=end))


def written_once(kept, at, x):
    new = write(kept, mb.read_state(input=kept), at, x)
    return mb.reduce_sum(x=new)


def written_twice(kept, at, x):
    first = write(kept, mb.read_state(input=kept), at, x)
    start = mb.add(x=at, y=np.int32(1))
    return mb.reduce_sum(x=write(kept, first, start, mb.add(x=x, y=x)))


def written_again_after_attention(kept, at, x):
    """As a layer's keys are read between the writes of two layers; what attention returns is memory of its own."""
    first = write(kept, mb.read_state(input=kept), at, x)
    rows = mb.reshape(x=first, shape=[1, 1, SIZE // 2, 2])
    query = np.ones((1, 1, 1, 2), np.float16)
    mixed = mb.scaled_dot_product_attention(query=query, key=rows, value=rows)
    start = mb.add(x=at, y=np.int32(1))
    new = write(kept, first, start, mb.add(x=x, y=x))
    return mb.add(x=mb.reduce_sum(x=new), y=mb.mul(x=mb.reduce_sum(x=mixed), y=np.float16(0)))


def old_content_is_read_afterwards(kept, at, x):
    old = mb.read_state(input=kept)
    new = write(kept, old, at, x)
    return mb.reduce_sum(x=mb.sub(x=new, y=old))


def a_view_of_the_old_content_is_returned(kept, at, x):
    old = mb.read_state(input=kept)
    view = mb.reshape(x=old, shape=[2, SIZE // 2])
    write(kept, old, at, x)
    return view


def the_result_is_not_what_is_written(kept, at, x):
    old = mb.read_state(input=kept)
    new = mb.slice_update(x=old, update=x, begin=at, end=mb.add(x=at, y=np.int32(1)))
    mb.coreml_update_state(state=kept, value=mb.mul(x=new, y=np.float16(2)))
    return mb.reduce_sum(x=new)


CASES = {
    written_once: 1,
    written_twice: 2,
    written_again_after_attention: 2,
    old_content_is_read_afterwards: 0,
    a_view_of_the_old_content_is_returned: 0,
    the_result_is_not_what_is_written: 0,
}


@pytest.fixture(scope="module")
def models() -> dict[Callable[..., Any], MLModel]:
    return {body: model_of(body) for body in CASES}


@pytest.mark.parametrize("body", CASES, ids=lambda body: body.__name__)
def test_updates_in_place_are_found(models, body):
    model = models[body]
    assert len(updates_in_place(model.program.graph)) == CASES[body]
    state = model.make_state()
    before = state._tensor("kept").data_ptr()
    model.predict({"at": np.array([2], np.int32), "x": np.array([3], np.float16)}, state)
    assert (state._tensor("kept").data_ptr() == before) == (CASES[body] > 0)


def expected(body: Callable[..., Any], kept: np.ndarray, at: int, x: float) -> tuple[Any, np.ndarray]:
    """What the body returns and leaves, worked out with copies."""
    new = kept.copy()
    new[at] = x
    if body is written_once:
        return [new.sum()], new
    if body in (written_twice, written_again_after_attention):
        new[at + 1] = 2 * x
        return [new.sum()], new
    if body is old_content_is_read_afterwards:
        return [(new - kept).sum()], new
    if body is a_view_of_the_old_content_is_returned:
        return kept.reshape(2, SIZE // 2), new
    return [new.sum()], 2 * new


@settings(max_examples=60, deadline=None)
@given(
    body=st.sampled_from(list(CASES)),
    steps=st.lists(st.tuples(st.integers(0, SIZE - 2), st.integers(-8, 8)), min_size=1, max_size=5),
)
def test_updates_in_place_give_equal_values(models, body, steps):
    model = models[body]
    state = model.make_state()
    kept = np.zeros(SIZE, np.float16)
    for at, x in steps:
        given_ = {"at": np.array([at], np.int32), "x": np.array([x], np.float16)}
        (found,) = model.predict(given_, state).values()
        returned, kept = expected(body, kept, at, x)
        np.testing.assert_array_equal(found, returned)
        np.testing.assert_array_equal(state.read("kept"), kept)


def fails_after_the_update(kept, at, x):
    new = write(kept, mb.read_state(input=kept), at, x)
    return mb.add(x=mb.reduce_sum(x=new), y=mb.gather(x=TABLE, indices=at))


def test_failure_restores_a_state_that_another_function_made():
    """The state's tensor was made within a run, where torch makes tensors that only a run may write into."""
    makes, fails = model_of(old_content_is_read_afterwards), model_of(fails_after_the_update)
    assert not updates_in_place(makes.program.graph)
    state = makes.make_state()
    makes.predict({"at": np.array([1], np.int32), "x": np.array([5], np.float16)}, state)
    with pytest.raises(PredictionInputError, match="index 6 is out of bounds"):
        fails.predict({"at": np.array([6], np.int32), "x": np.array([7], np.float16)}, state)
    assert state.read("kept").tolist() == [0, 5, 0, 0, 0, 0, 0, 0]


def test_failure_restores_the_state():
    model = model_of(fails_after_the_update)
    assert len(updates_in_place(model.program.graph)) == 1
    state = model.make_state()
    model.predict({"at": np.array([1], np.int32), "x": np.array([5], np.float16)}, state)
    with pytest.raises(PredictionInputError, match="index 6 is out of bounds"):
        model.predict({"at": np.array([6], np.int32), "x": np.array([7], np.float16)}, state)
    assert state.read("kept").tolist() == [0, 5, 0, 0, 0, 0, 0, 0]


def test_a_state_never_shares_the_memory_of_an_input():
    def stores(kept, x):
        mb.coreml_update_state(state=kept, value=x)
        return mb.identity(x=x)

    program = mb.program(
        input_specs=[mb.StateTensorSpec((SIZE,), dtype=types.fp16), mb.TensorSpec((SIZE,), dtype=types.fp16)],
        opset_version=ct.target.iOS18,
    )(stores)
    model = MLModel(
        ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
    )
    state = model.make_state()
    x = np.arange(SIZE, dtype=np.float16)
    model.predict({"x": x}, state)
    x[:] = -1
    assert state.read("kept").tolist() == list(range(SIZE))
