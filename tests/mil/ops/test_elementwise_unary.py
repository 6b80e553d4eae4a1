"""Elementwise operations with one input, against numpy and coremltools' value inference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.core.errors import PredictionInputError
from coremill.mil.ops.registry import OperationError, definitions, find

ANY = np.array([[-3.75, -2.5, -1.0, -0.5], [0.0, 0.5, 1.5, 2.5], [3.25, 7.0, 11.0, -11.0]], np.float32)
UNIT = np.linspace(-0.9375, 0.9375, 12, dtype=np.float32).reshape(3, 4)
POSITIVE = np.array([[0.0625, 0.25, 0.5, 1.0], [1.5, 2.0, 3.0, 4.0], [9.0, 10.0, 16.0, 100.0]], np.float32)

CASES = {
    "abs": (ANY, mb.abs, np.abs),
    "acos": (UNIT, mb.acos, np.arccos),
    "asin": (UNIT, mb.asin, np.arcsin),
    "atan": (ANY, mb.atan, np.arctan),
    "atanh": (UNIT, mb.atanh, np.arctanh),
    "ceil": (ANY, mb.ceil, np.ceil),
    "clip": (ANY, lambda x: mb.clip(x=x, alpha=np.array(-1.5, _dtype(x)), beta=np.array(2, _dtype(x))),
             lambda x: np.clip(x, -1.5, 2)),
    "cos": (ANY, mb.cos, np.cos),
    "cosh": (ANY, mb.cosh, np.cosh),
    "erf": (ANY, mb.erf, np.vectorize(math.erf, otypes=[np.float64])),
    "exp": (ANY, mb.exp, np.exp),
    "exp2": (ANY, mb.exp2, np.exp2),
    "floor": (ANY, mb.floor, np.floor),
    "inverse": (POSITIVE, lambda x: mb.inverse(x=x, epsilon=np.array(0.5, _dtype(x))), lambda x: 1 / (x + 0.5)),
    "log": (POSITIVE, lambda x: mb.log(x=x, epsilon=np.array(0.25, _dtype(x))), lambda x: np.log(x + 0.25)),
    "round": (ANY, mb.round, np.round),
    "rsqrt": (POSITIVE, lambda x: mb.rsqrt(x=x, epsilon=np.array(0.25, _dtype(x))),
              lambda x: 1 / np.sqrt(x + 0.25)),
    "sign": (ANY, mb.sign, np.sign),
    "sin": (ANY, mb.sin, np.sin),
    "sinh": (ANY, mb.sinh, np.sinh),
    "sqrt": (POSITIVE, mb.sqrt, np.sqrt),
    "square": (ANY, mb.square, np.square),
    "tan": (UNIT, mb.tan, np.tan),
    "tanh": (ANY, mb.tanh, np.tanh),
    "threshold": (ANY, lambda x: mb.threshold(x=x, alpha=np.array(0.75, _dtype(x))),
                  lambda x: np.maximum(x, 0.75)),
}  # fmt: skip


def _dtype(x):
    return np.float16 if x.dtype.__name__ == "fp16" else np.float32


def _call(operation):
    return lambda x: operation(x=x)


@pytest.fixture(scope="module", params=[np.float32, np.float16], ids=["fp32", "fp16"])
def results(request, evaluate):
    """Return the outputs of one program that contains every case, by case."""
    inputs = {name: array.astype(request.param) for name, (array, _, _) in CASES.items()}

    def body(*arguments):
        return tuple(_call(operation)(x) for x, (_, operation, _) in zip(arguments, CASES.values(), strict=True))

    named = {f"x_{name}": array for name, array in inputs.items()}
    return request.param, dict(zip(CASES, evaluate(named, body), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_matches_numpy(results, name):
    dtype, outputs = results
    array, _, reference = CASES[name]
    exact = reference(array.astype(dtype).astype(np.float64))
    assert outputs[name].dtype == dtype
    if dtype == np.float16:
        # The fp32 value is rounded once more: the result is at most one fp16 number away from the exact rounding.
        np.testing.assert_array_max_ulp(outputs[name], exact.astype(np.float16), maxulp=1)
    else:
        np.testing.assert_allclose(outputs[name], exact, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_matches_value_inference(inferred, results, name):
    dtype, outputs = results
    if dtype == np.float16:
        return
    array, operation, _ = CASES[name]
    values = inferred({"x": array}, _call(operation))
    assert values is not None
    np.testing.assert_allclose(outputs[name], values[0], rtol=3e-6, atol=1e-6)


HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
NATIVE_UNARY = [
    each
    for each in definitions()
    if each.native
    and [parameter.name for parameter in each.tensors] == ["x"]
    and not any(attribute.required for attribute in each.attributes.values())
    and each.op_type in {*CASES, "relu", "relu6", "sigmoid", "silu"}
]


@pytest.mark.parametrize("definition", NATIVE_UNARY, ids=lambda each: each.op_type)
def test_native_kernels_round_once(definition):
    """Every fp16 number through the kernel for fp16, and through fp64 with one rounding.

    fp32 inside can differ from that only where the exact value is next to a tie, and then by one unit.
    """
    half = torch.from_numpy(HALVES.copy())
    native = definition.kernel(half).numpy()
    exact = definition.kernel(half.double()).to(torch.float16).numpy()
    np.testing.assert_array_equal(np.isnan(native), np.isnan(exact))
    known = ~np.isnan(exact)
    np.testing.assert_array_max_ulp(native[known], exact[known], maxulp=1)
    assert np.count_nonzero(native[known] != exact[known]) <= 16


def test_some_kernels_are_native():
    assert {each.op_type for each in NATIVE_UNARY} >= {"abs", "ceil", "floor", "sqrt", "square", "relu"}


def test_clip_of_ios17_is_strict():
    x = torch.tensor([-1.0, 0.0, 1.0])
    assert find("clip", 16).kernel(x, alpha=0.5, beta=0.5).tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(OperationError, match=r"alpha 0.5 and beta 0.5; alpha must be below beta"):
        find("clip", 17).kernel(x, alpha=0.5, beta=0.5)


def test_round_takes_halves_to_even(evaluate):
    (rounded,) = evaluate({"x": np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)}, lambda x: mb.round(x=x))
    assert rounded.tolist() == [0.0, 2.0, 2.0, -0.0, -2.0]


class TestCast:
    def test_truncates_fractions(self, evaluate):
        (whole,) = evaluate({"x": np.array([1.9, -1.9, 0.5], np.float32)}, lambda x: mb.cast(x=x, dtype="int32"))
        assert whole.dtype == np.int32
        assert whole.tolist() == [1, -1, 0]

    def test_clamps_floats_to_the_integer_range(self):
        cast = find("cast", 18).kernel
        from coremill.mil.values import BY_NAME

        x = torch.tensor([1e20, -1e20, float("nan"), float("inf"), 2147483520.0])
        assert cast(x, dtype=BY_NAME["int32"]).tolist() == [2147483647, -2147483648, 0, 2147483647, 2147483520]

    def test_to_half_overflows_to_infinity(self, evaluate):
        (half,) = evaluate(
            {"x": np.array([65519.0, 65520.0, 1e-8, 1.0 + 2**-11], np.float32)},
            lambda x: mb.cast(x=x, dtype="fp16"),
        )
        assert half.dtype == np.float16
        assert half.tolist() == [65504.0, math.inf, 0.0, 1.0]

    def test_number_to_bool_and_back(self, evaluate):
        (flags,) = evaluate(
            {"x": np.array([0.0, -0.5, 2.0], np.float32)},
            lambda x: mb.cast(x=mb.cast(x=x, dtype="bool"), dtype="int32"),
        )
        assert flags.tolist() == [0, 1, 1]

    def test_integer_out_of_range_is_rejected(self, build):
        """Converters narrow token ids to uint16 before a gather: 65,541 must not become 5."""
        from coremill.mil import MLModel

        inputs = {"ids": np.array([5, 65535], np.int32)}
        model = MLModel(
            build(inputs, lambda ids: mb.cast(x=mb.cast(x=ids, dtype="uint16", name="narrow"), dtype="int32"))
        )
        assert next(iter(model.predict(inputs).values())).tolist() == [5, 65535]
        with pytest.raises(PredictionInputError) as caught:
            model.predict({"ids": np.array([5, 65541], np.int32)})
        assert str(caught.value) == ("operation 'narrow' (cast): the value 65541 does not fit uint16 (0 to 65535)")
