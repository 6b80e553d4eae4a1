"""Elementwise operations with two inputs, against numpy on shapes that broadcast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coremill.core.errors import PredictionInputError
from coremill.mil import MLModel
from coremill.mil.ops.registry import find

FLOAT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "real_div": np.divide,
    "floor_div": np.floor_divide,
    "mod": np.mod,
    "maximum": np.maximum,
    "minimum": np.minimum,
}
COMPARISONS = {
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}
LOGICAL = {"logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor}


def kernel(name: str):
    definition = find(name, 18)
    assert definition is not None
    return definition.kernel


def pairs(dtype, elements):
    """Draw two arrays whose shapes broadcast."""
    return hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4).flatmap(
        lambda shapes: st.tuples(*(hnp.arrays(dtype, shape, elements=elements) for shape in shapes.input_shapes))
    )


HALVES = st.floats(-1024, 1024, width=16)
FLOATS = st.floats(-(2.0**40), 2.0**40, width=32)
SMALL_INTS = st.integers(-50, 50)


def compute(name, x, y):
    return kernel(name)(torch.from_numpy(x), torch.from_numpy(y)).numpy()


@pytest.mark.parametrize("name", ["add", "sub", "mul", "maximum", "minimum"])
@given(data=st.data())
def test_floats_broadcast_as_in_numpy(name, data):
    x, y = data.draw(pairs(np.float32, FLOATS))
    np.testing.assert_array_equal(compute(name, x, y), FLOAT[name](x, y))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "maximum", "minimum"])
@given(data=st.data())
def test_halves_are_rounded_once(name, data):
    x, y = data.draw(pairs(np.float16, HALVES))
    with np.errstate(over="ignore"):
        exact = FLOAT[name](x.astype(np.float64), y.astype(np.float64)).astype(np.float16)
    np.testing.assert_array_equal(compute(name, x, y), exact)


@pytest.mark.parametrize("name", ["real_div", "floor_div", "mod"])
@given(data=st.data())
def test_division_matches_numpy(name, data):
    x, y = data.draw(pairs(np.float32, st.floats(-1024, 1024, width=16).filter(lambda v: abs(v) > 2**-10)))
    np.testing.assert_allclose(compute(name, x, y), FLOAT[name](x, y), rtol=1e-6)


@pytest.mark.parametrize("name", COMPARISONS)
@given(data=st.data())
def test_comparisons_return_bools(name, data):
    x, y = data.draw(pairs(np.float32, st.sampled_from([-1.0, 0.0, 0.5, np.inf, np.nan])))
    result = compute(name, x, y)
    assert result.dtype == np.bool_
    np.testing.assert_array_equal(result, COMPARISONS[name](x, y))


@pytest.mark.parametrize("name", LOGICAL)
@given(data=st.data())
def test_logical(name, data):
    x, y = data.draw(pairs(np.bool_, st.booleans()))
    np.testing.assert_array_equal(compute(name, x, y), LOGICAL[name](x, y))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "floor_div", "mod", "maximum", "minimum"])
@given(data=st.data())
def test_integers_match_numpy(name, data):
    elements = SMALL_INTS.filter(bool) if name in ("floor_div", "mod") else SMALL_INTS
    x, y = data.draw(pairs(np.int32, elements))
    result = compute(name, x, y)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, FLOAT[name](x, y))


@given(data=st.data())
def test_integer_division_truncates(data):
    x, y = data.draw(pairs(np.int32, SMALL_INTS.filter(bool)))
    np.testing.assert_array_equal(compute("real_div", x, y), np.trunc(x / y).astype(np.int32))


@given(data=st.data())
def test_pow_of_halves(data):
    x, y = data.draw(pairs(np.float16, st.floats(0.125, 4, width=16)))
    exact = np.power(x.astype(np.float64), y.astype(np.float64)).astype(np.float16)
    np.testing.assert_array_max_ulp(compute("pow", x, y), exact, maxulp=1)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 0.5, -1.0, 1.5])
def test_pow_by_one_number(evaluate, exponent):
    x = np.array([0.25, 1.0, 3.0, 10.0], np.float16)
    (found,) = evaluate({"x": x}, lambda x: mb.pow(x=x, y=np.float16(exponent)))
    np.testing.assert_array_max_ulp(found, np.power(x.astype(np.float64), exponent).astype(np.float16), maxulp=1)


def test_values_of_halves_saturate_to_infinity(evaluate):
    inputs = {"x": np.array([300.0, -300.0, 255.875], np.float16)}
    (squares,) = evaluate(inputs, lambda x: mb.mul(x=x, y=x))
    assert squares.dtype == np.float16
    assert squares.tolist() == [np.inf, np.inf, 65472.0]


def test_the_oracle_does_not_round(evaluate):
    inputs = {"x": np.array([300.0, 1.0], np.float16)}
    body = lambda x: mb.add(x=mb.mul(x=x, y=x), y=np.float16(2**-11))  # noqa: E731
    (declared,) = evaluate(inputs, body)
    (oracle,) = evaluate(inputs, body, mode="oracle")
    assert declared.tolist() == [np.inf, 1.0]
    assert oracle.dtype == np.float32
    assert oracle.tolist() == [90000.0, 1.0 + 2**-11]


def test_nan_propagates(evaluate):
    inputs = {"x": np.array([np.nan, 1.0], np.float32), "y": np.array([1.0, np.nan], np.float32)}
    largest, product = evaluate(inputs, lambda x, y: (mb.maximum(x=x, y=y), mb.mul(x=x, y=y)))
    assert np.isnan(largest).all()
    assert np.isnan(product).all()


def test_integer_division_by_zero_names_the_operation(build):
    inputs = {"x": np.array([4], np.int32), "y": np.array([0], np.int32)}
    model = MLModel(build(inputs, lambda x, y: mb.floor_div(x=x, y=y, name="quotient")))
    with pytest.raises(PredictionInputError) as caught:
        model.predict(inputs)
    assert str(caught.value) == "operation 'quotient' (floor_div): integer division by zero"


@pytest.mark.parametrize("name", [*FLOAT, *COMPARISONS])
def test_matches_value_inference(name, evaluate, inferred):
    x = np.array([[4.0, -3.5, 0.25], [7.0, 2.0, -1.0]], np.float32)
    y = np.array([2.0, -0.5, 0.25], np.float32)
    operation = getattr(mb, name)
    expected = inferred({"x": x, "y": y}, lambda x, y: operation(x=x, y=y))
    assert expected is not None
    (result,) = evaluate({"x": x, "y": y}, lambda x, y: mb.cast(x=operation(x=x, y=y), dtype="fp32"))
    np.testing.assert_allclose(result, expected[0].astype(np.float32), rtol=1e-6)
