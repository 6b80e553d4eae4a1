"""`coremill mil bisect`: programs whose precision is lost at a known operation, and in a known way."""

from __future__ import annotations

import dataclasses
import math
import re
import threading

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types

from coremill.core.errors import PredictionInputError
from coremill.mil import MLModel
from coremill.mil.commands import bisect as bisect_module
from coremill.mil.commands.bisect import BOUND, bisect, sqnr_db
from coremill.mil.commands.inspect import nonfinite_constants

X = np.array([1.3, 0.7, 2.1, 1.9], np.float16)


@pytest.fixture
def deviations(build):
    """`deviations(body, x)`: by name, for every operation of the body."""

    def run(body, *arrays):
        inputs = {f"x{index}" if index else "x": array for index, array in enumerate(arrays)}
        model = build(inputs, body)
        return {each.name: each for each in bisect(MLModel(model), MLModel(model, mode="oracle"), inputs)}

    return run


def _cancel(x):
    raised = mb.add(x=x, y=np.float16(2048), name="raised")
    return mb.exp(x=mb.sub(x=raised, y=np.float16(2048), name="lowered"), name="y")


def test_cancellation_is_found(deviations):
    """2049.3 is rounded to 2049 or 2050: nothing beside 2048, and much once 2048 is taken off again."""
    found = deviations(_cancel, X)
    rounded = (X.astype(np.float32) + 2048).astype(np.float16).astype(np.float64) - 2048
    noise = np.square(rounded - X.astype(np.float64)).sum()
    expected = math.sqrt(noise / np.square(X.astype(np.float64)).sum())
    assert found["raised"].relative < 0.0005 < BOUND < expected
    assert found["lowered"].relative == pytest.approx(expected, rel=1e-4)
    assert found["lowered"].inputs_relative == found["raised"].relative
    assert found["lowered"].max_abs_err == pytest.approx(np.abs(rounded - X).max(), rel=1e-4)
    assert list(found) == ["raised", "lowered", "y"]


def test_report_starts_with_the_first_deviation(mil, save, tmp_path):
    np.savez(tmp_path / "x.npz", x=X)
    package = save("cancel", {"x": X}, _cancel)
    # The figures are numpy's, of values rounded by hand.
    ended = mil("bisect", package, "--input", tmp_path / "x.npz")
    assert (ended.code, ended.err) == (0, "")
    body = ended.out.split("x.npz\n", 1)[1]
    assert body == (
        "\n"
        "the first operation with a relative error above 0.01:\n"
        "operation 'lowered' (sub): 0.3132 (10.1 dB), its inputs by at most 0.000244\n"
        "\n"
        "the worst of 3 operations\n"
        "operation  type     error    dB  of inputs  max abs\n"
        "───────────────────────────────────────────────────\n"
        "y          exp      0.352   9.1     0.3132    3.722\n"
        "lowered    sub     0.3132  10.1   0.000244   0.7002\n"
        "raised     add   0.000244  72.3          0   0.7002\n"
        "\n"
        "no operation saturates, or creates infinities or NaNs\n"
    )


def test_nothing_beyond_the_bound(mil, save):
    package = save("cancel", {"x": X}, _cancel)
    text = mil("bisect", package, "--bound", "9").out
    assert "none of 3 operations has a relative error above 9\n" in text
    exact = mil("bisect", save("relu", {"x": X}, lambda x: mb.relu(x=x, name="y"))).out
    assert exact.endswith(
        "input x [4], drawn with seed 0\n\n"
        "none of 1 operations has a relative error above 0.01\n\n"
        "no operation saturates, or creates infinities or NaNs\n"
    )


def test_at_most_ten_of_the_worst_are_listed(mil, bundle):
    text = mil("bisect", bundle / "decoder.mlpackage").out
    rows = text.split("the worst of ")[1].split("no operation")[0].splitlines()[3:]
    assert len([row for row in rows if "0." in row]) == 10
    assert max(map(len, text.splitlines())) <= 80


# --- overflow --------------------------------------------------------------------------------------------


def test_infinity_is_reported_at_its_origin(deviations):
    def body(x):
        squared = mb.square(x=mb.mul(x=x, y=np.float16(200), name="large"), name="squared")
        return mb.real_div(x=squared, y=np.float16(1000), name="y")

    found = deviations(body, X)
    squares = np.square((X.astype(np.float32) * 200).astype(np.float16).astype(np.float32))
    assert found["squared"].infinite == (squares > 65520).sum() == 3
    assert found["squared"].oracle_finite
    assert math.isinf(found["squared"].relative)
    # The division gives infinities as well, of infinite inputs.
    assert not found["y"].overflows
    assert math.isinf(found["y"].relative)
    assert not found["large"].overflows


def test_nan_is_reported_only_for_finite_inputs(deviations):
    def body(x):
        log = mb.log(x=mb.sub(x=x, y=np.float16(1), name="shifted"), epsilon=np.float16(0), name="log")
        return mb.mul(x=log, y=np.float16(2), name="y")

    found = deviations(body, X)
    assert (found["log"].nan, found["log"].infinite, found["log"].oracle_finite) == (1, 0, False)
    assert not found["y"].overflows
    # NaN on both sides is no difference; the rest is.
    assert 0 < found["log"].relative < 0.01


def test_saturation_counts_where_the_inputs_were_below_it(deviations):
    def body(x):
        clipped = mb.clip(
            x=mb.mul(x=x, y=np.float16(4e4)), alpha=np.float16(0), beta=np.float16(65504), name="clipped"
        )
        return mb.relu(x=clipped, name="y")

    found = deviations(body, np.array([0.5, 0.25, 1.6376953125, 0.1], np.float16))
    assert 1.6376953125 * 4e4 > 65504
    assert (found["clipped"].saturated, found["y"].saturated) == (0, 0)


def test_a_value_that_rounds_to_the_end_is_saturated(deviations):
    found = deviations(lambda x: mb.mul(x=x, y=np.float16(2), name="y"), np.array([32752, 1], np.float16))
    assert (found["y"].saturated, found["y"].infinite) == (1, 0)


def test_the_table_of_overflows(mil, save, tmp_path):
    def body(x):
        return mb.exp(x=mb.mul(x=x, y=np.float16(9), name="large"), name="exp"), mb.rsqrt(
            x=mb.sub(x=x, y=x, name="zero"), epsilon=np.float16(0), name="rsqrt"
        )

    np.savez(tmp_path / "x.npz", x=X)
    out = mil("bisect", save("exp", {"x": X}, body), "--input", tmp_path / "x.npz").out
    assert out.endswith(
        "operations that saturate, or create infinities or NaNs\n"
        "operation  type   saturated  infinite  NaN  inputs  oracle\n"
        "──────────────────────────────────────────────────────────────\n"
        "exp        exp            0         3    0  finite  finite\n"
        "rsqrt      rsqrt          0         4    0  finite  not finite\n"
    )
    assert "operation 'exp' (exp): inf (-inf dB), its inputs by at most 0.000" in out


def test_nan_inputs_are_reported_as_such(mil, save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=np.array([np.nan, 1, np.inf, 2], np.float16))
    save("double", {"x": X}, lambda x: mb.mul(x=x, y=np.float16(2), name="y"))
    assert mil("bisect", "double.mlpackage", "--input", "x.npz").out == (
        "double.mlpackage, function main\n"
        "input x [4], from x.npz; it contains 1 NaN, 1 inf\n"
        "\n"
        "none of 1 operations has a relative error above 0.01\n"
        "1 of them returns the same NaNs or infinities as the oracle\n"
        "\n"
        "no operation saturates, or creates infinities or NaNs\n"
    )


MASK = np.tril(np.ones((3, 3), np.float16))
LOWEST = np.float16(-np.inf)
"""What the converter saves for torch.finfo(torch.float32).min in fp16."""


def _attention(x):
    """A mask as eager attention writes it: (1 - mask) · finfo(float32).min; 0 · -inf is NaN."""
    hidden = mb.sub(x=np.float16(1), y=x, name="hidden")
    bias = mb.mul(x=hidden, y=mb.const(val=LOWEST, name="lowest"), name="bias")
    return mb.softmax(x=mb.add(x=bias, y=x, name="masked"), axis=-1, name="y")


def test_nan_of_an_infinite_constant_is_reported_at_its_origin(deviations):
    """The oracle has the same constant, so it has the same NaNs."""
    found = deviations(_attention, MASK)
    visible = int(MASK.sum())
    assert (found["bias"].nan, found["bias"].infinite, found["bias"].inputs_finite) == (visible, 0, False)
    assert {name: each.relative for name, each in found.items()} == dict.fromkeys(found, 0.0)
    assert [name for name, each in found.items() if each.overflows] == ["bias"]
    assert [name for name, each in found.items() if each.agrees_in_nonfinite] == ["bias", "masked", "y"]


def test_nan_that_both_runs_return_is_in_the_report(mil, save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=MASK)
    save("mask", {"x": MASK}, _attention)
    ended = mil("bisect", "mask.mlpackage", "--input", "x.npz")
    assert ended.out == (
        "mask.mlpackage, function main\n"
        "input x [3, 3], from x.npz\n"
        "\n"
        "none of 4 operations has a relative error above 0.01\n"
        "3 of them return the same NaNs or infinities as the oracle\n"
        "\n"
        "constants that are infinite or NaN as they are saved\n"
        "lowest fp16[]: 1 -inf, an input of bias (mul)\n"
        "\n"
        "operations that saturate, or create infinities or NaNs\n"
        "operation  type  saturated  infinite  NaN  inputs      oracle\n"
        "─────────────────────────────────────────────────────────────────\n"
        "bias       mul           0         0    6  not finite  not finite\n"
    )


def test_difference_of_infinities_is_reported(deviations):
    def body(x):
        huge = mb.exp(x=mb.mul(x=x, y=np.float16(100)), name="huge")
        return mb.relu(x=mb.sub(x=huge, y=huge, name="difference"), name="y")

    found = deviations(body, np.array([1.3, 0.01, 2.1, 0.02], np.float16))
    assert (found["huge"].infinite, found["huge"].inputs_finite) == (2, True)
    assert (found["difference"].nan, found["difference"].infinite) == (2, 0)
    assert [name for name, each in found.items() if each.overflows] == ["huge", "difference"]


def test_operation_on_constants_that_overflows_is_reported(deviations):
    """It is computed when the package is loaded, so that no run shows it."""

    def body(x):
        squared = mb.square(x=mb.const(val=np.array([300, 2], np.float16)), name="squared")
        zero = mb.sub(x=squared, y=squared, name="zero")
        return mb.add(x=x, y=mb.reduce_sum(x=zero, axes=[0], name="sum"), name="y")

    with np.errstate(over="ignore", invalid="ignore"):  # of coremltools' own inference
        found = deviations(body, X)
    assert list(found) == ["squared", "zero", "y"]
    assert (found["squared"].infinite, found["squared"].oracle_finite, found["squared"].relative) == (
        1,
        True,
        math.inf,
    )
    assert (found["zero"].nan, found["zero"].inputs_finite) == (1, False)
    assert (found["y"].nan, found["y"].overflows) == (0, False)


def test_constants_of_nested_blocks_are_named(build):
    def body(x):
        return mb.cond(
            pred=mb.greater(x=mb.reduce_max(x=x, axes=[0], keep_dims=False), y=np.float16(0)),
            _true_fn=lambda: mb.add(x=x, y=mb.const(val=np.full(4, np.inf, np.float16), name="up"), name="inner"),
            _false_fn=lambda: mb.mul(x=x, y=mb.const(val=np.float16(np.nan), name="bad"), name="other"),
        )

    graph = MLModel(build({"x": X}, body)).program.graph
    assert list(map(str, nonfinite_constants(graph))) == [
        "up fp16[4]: 4 inf, an input of inner (add)",
        "bad fp16[]: 1 NaN, an input of other (mul)",
    ]


PARTLY = np.array([1.3, np.nan, 2.1, np.inf, -60000, 1.9, 0.7, np.nan, 65504, 3.3, 0.1], np.float16)


def test_values_are_compared_in_parts(deviations, monkeypatch):
    def body(x):
        raised = mb.add(x=x, y=np.full(11, 2048, np.float16), name="raised")
        doubled = mb.mul(x=raised, y=np.float16(2), name="doubled")
        return mb.mul(x=mb.sub(x=doubled, y=x, name="lowered"), y=np.zeros((0, 11), np.float16), name="empty")

    for x in (PARTLY, PARTLY[[0, 2, 5, 6]].repeat(3)[:11]):
        whole = deviations(body, x)
        with monkeypatch.context() as patch:
            patch.setattr(bisect_module, "_PART_ELEMENTS", 3)
            parts = deviations(body, x)
        assert list(parts) == list(whole)
        for name, each in whole.items():
            other = dataclasses.asdict(parts[name])
            for key, value in dataclasses.asdict(each).items():
                assert other[key] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), key
    assert 0 < whole["raised"].relative < BOUND


def test_large_float32_values_have_an_error(deviations):
    """Their squares are beyond float32."""

    def body(x):
        return mb.mul(x=mb.cast(x=mb.sin(x=x, name="sin"), dtype="fp32"), y=np.float32(1e30), name="y")

    found = deviations(body, X)
    assert found["y"].relative == pytest.approx(found["sin"].relative, rel=1e-3)
    assert 0 < found["y"].relative < BOUND


# --- what is not compared ------------------------------------------------------------------------------------


def _list_of(x):
    """The list holds x + 2048, rounded; what is read from it is off as it is."""
    made = mb.make_list(init_length=2, elem_shape=(4,), dtype="fp16", name="made")
    written = mb.list_write(ls=made, index=0, value=mb.add(x=x, y=np.float16(2048), name="raised"), name="written")
    return mb.sub(x=mb.list_read(ls=written, index=0, name="read"), y=np.float16(2048), name="y")


def test_lists_are_not_compared(deviations):
    found = deviations(_list_of, X)
    assert [name for name, each in found.items() if not each.is_compared] == ["written"]
    assert math.isnan(found["written"].relative)
    assert 0 < found["written"].inputs_relative < 0.001
    assert math.isnan(found["read"].inputs_relative)
    assert found["read"].relative == found["raised"].relative > 0
    assert found["y"].relative > BOUND


def test_what_is_not_compared_is_counted(mil, save, tmp_path):
    np.savez(tmp_path / "x.npz", x=X)
    package = save("list", {"x": X}, _list_of)
    text = mil("bisect", package, "--input", tmp_path / "x.npz").out
    assert "operation 'y' (sub): 0.3132 (10.1 dB), its inputs by at most 0.000244\n" in text
    assert "the worst of 3 operations\n" in text
    assert "read       list_read  0.000244  72.3    unknown   0.7002\n" in text
    assert "\nnot compared: 1, which return lists, labels or dictionaries\nwritten (list_write)\n\n" in text
    calm = mil("bisect", package, "--input", tmp_path / "x.npz", "--bound", "9").out
    assert "none of 3 operations has a relative error above 9\n" in calm


def test_labels_are_not_compared():
    program = mb.program(input_specs=[mb.TensorSpec((1, 3), dtype=types.fp16)], opset_version=ct.target.iOS16)(
        lambda x: mb.softmax(x=x, axis=1, name="probabilities")
    )
    model = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS16,
        classifier_config=ct.ClassifierConfig(["cat", "dog", "cow"]),
        skip_model_load=True,
    )
    found = bisect(MLModel(model), MLModel(model, mode="oracle"), {"x": np.array([[1, 2, 3]], np.float16)})
    (classified,) = [each for each in found if each.op_type == "classify"]
    assert not classified.is_compared
    assert classified.inputs_relative > 0


def _select(x):
    """2048.9 rounds to 2048, so one value fewer is above the threshold than the oracle finds."""
    lowered = mb.sub(x=mb.add(x=x, y=np.float16(2048), name="raised"), y=np.float16(2048), name="lowered")
    above = mb.cast(x=mb.greater(x=lowered, y=np.float16(0.8)), dtype="fp16", name="above")
    return mb.cast(x=mb.non_zero(x=above, name="found"), dtype="fp16", name="y")


FEWER = np.array([0.9, 2.25, 4.75, 0.25], np.float16)


def test_different_shape_is_a_deviation(deviations):
    found = deviations(_select, FEWER)
    assert (found["above"].relative > 0, found["above"].shapes) == (True, None)
    assert (found["found"].relative, found["found"].shapes) == (math.inf, "[2, 1], the oracle [3, 1]")
    assert math.isnan(found["found"].max_abs_err)
    assert found["y"].inputs_relative == math.inf


def test_other_shapes_are_listed(mil, save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=FEWER)
    save("select", {"x": FEWER}, _select)
    text = mil("bisect", "select.mlpackage", "--input", "x.npz").out
    assert (
        "operations whose shape differs from the oracle's\n"
        "found (non_zero): [2, 1], the oracle [3, 1]\n"
        "y (cast): [2, 1], the oracle [3, 1]\n"
    ) in text
    assert re.search(r"^found +non_zero +inf +-inf +[0-9.]+ +unknown$", text, re.MULTILINE)
    first = mil("bisect", "select.mlpackage", "--input", "x.npz", "--bound", "9").out
    assert "operation 'found' (non_zero): shape [2, 1], the oracle [3, 1], its inputs by at" in first
    assert max(map(len, text.splitlines())) <= 80


def test_many_other_shapes_are_cut_short(mil, save, tmp_path):
    def body(x):
        y = _select(x)
        for _ in range(9):
            y = mb.relu(x=y)
        return y

    np.savez(tmp_path / "x.npz", x=FEWER)
    text = mil("bisect", save("deep", {"x": FEWER}, body), "--input", tmp_path / "x.npz").out
    assert text.count("the oracle [3, 1]\n") == 10
    assert "the oracle [3, 1]\n… and 1 more\n" in text


# --- programs of every kind -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cache", "control_flow", "indexing", "int4"])
def test_states_blocks_and_compressed_weights(mil, bundle, name):
    ended = mil("bisect", bundle / f"{name}.mlpackage")
    assert ended.code == 0
    assert "none of " in ended.out


def test_both_runs_draw_the_same_random_numbers(deviations):
    """Or every value behind them would differ; torch's own generator goes on as if nothing had been drawn."""

    def body(x):
        noise = mb.random_normal(shape=[50], mean=np.float16(0), stddev=np.float16(1), name="noise")
        return mb.sin(
            x=mb.add(x=noise, y=mb.random_uniform(shape=[50], low=np.float16(0), high=np.float16(1))), name="y"
        )

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    found = deviations(lambda x: mb.add(x=body(x), y=mb.reduce_sum(x=x, axes=[0]), name="z"), X)
    assert 0 < found["noise"].relative < 0.001
    assert 0 < found["y"].relative < 0.001
    assert torch.equal(torch.rand(4), expected)


def test_every_operation_of_the_plan_is_seen_once(build):
    model = build({"x": X}, _cancel)
    declared = MLModel(model)
    seen = []
    declared.predict({"x": X}, observe=lambda step, values: seen.append(step.node.name))
    assert seen == [each.name for each in bisect(declared, MLModel(model, mode="oracle"), {"x": X})]


def test_inputs_that_do_not_fit_end_both_runs(build):
    """Neither waits for the other: an input that is refused, and one that an operation refuses half way."""
    table = np.zeros((4, 2), np.float16)

    def body(x):
        return mb.sin(x=mb.gather(x=table, indices=mb.cast(x=mb.exp(x=mb.sqrt(x=x)), dtype="int32"), axis=0))

    model = build({"x": X}, body)
    before = threading.active_count()
    for x in (np.ones(3, np.float16), np.full(4, 60, np.float16)):
        with pytest.raises(PredictionInputError):
            bisect(MLModel(model), MLModel(model, mode="oracle"), {"x": x})
    assert threading.active_count() == before


def test_failure_of_the_oracle_alone_is_named_as_such(build):
    """2050.9 is rounded to 2050, so that the declared run reads row 20 and the oracle row 29."""

    def body(x):
        lowered = mb.sub(x=mb.add(x=x, y=np.float16(2048)), y=np.float16(2048))
        row = mb.cast(x=mb.mul(x=lowered, y=np.float16(10)), dtype="int32")
        return mb.gather(x=np.zeros((21, 2), np.float16), indices=row, axis=0, name="y")

    x = np.full(4, 2.9, np.float16)
    model = build({"x": x}, body)
    assert MLModel(model).predict({"x": x})["y"].shape == (4, 2)
    with pytest.raises(PredictionInputError) as caught:
        bisect(MLModel(model), MLModel(model, mode="oracle"), {"x": x})
    assert str(caught.value) == (
        "only the oracle's run fails: operation 'y' (gather): index 29 is out of bounds: axis 0 has 21 elements, "
        "indices are 0 to 20\n"
        "  expected: inputs for which rounding changes no index or shape that an operation rejects"
    )


def test_invalid_bound_is_rejected(mil, save):
    ended = mil("bisect", save("sin", {"x": X}, lambda x: mb.sin(x=x)), "--bound", "0")
    assert (ended.code, ended.err) == (10, "configuration error: --bound 0.0\n  expected: a positive number\n")


def test_relative_errors_as_decibels():
    assert sqnr_db(0.01) == pytest.approx(40)
    assert (sqnr_db(0), sqnr_db(math.inf)) == (300, -math.inf)
