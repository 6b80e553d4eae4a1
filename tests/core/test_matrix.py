"""The document of the agreement matrix cannot contradict itself."""

from __future__ import annotations

import math
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.core.documents import encode, read_json
from coremill.core.gates import PlatformReason
from coremill.core.matrix import (
    AT_LEAST,
    AgreementMatrix,
    FormatFailed,
    FormatMeasured,
    FormatNotRun,
    Measure,
    Tolerance,
    all_within,
    outside,
)
from coremill.core.reports import Perplexity

ROW = FormatMeasured(
    format="mil-reference",
    reference="the checkpoint in float32",
    max_abs_err=0.02,
    sqnr_db=60.0,
    kl_nats=1e-6,
    top1_agreement=1.0,
    positions=100,
    judged=50,
    excluded=1,
    perplexity=Perplexity(reference=20.0, measured=19.9, tokens=99),
    outside=(),
)
VALUES = {
    Measure.MAX_ABS_ERR: 0.02,
    Measure.SQNR_DB: 60.0,
    Measure.KL_NATS: 1e-6,
    Measure.TOP1_AGREEMENT: 1.0,
    Measure.EXCLUDED_SHARE: 0.02,
    Measure.PERPLEXITY_CHANGE: pytest.approx(0.005),
}


def tolerance(measure: Measure, bound: float, *rows: str) -> Tolerance:
    return Tolerance(measure=measure, bound=bound, rows=rows or ("mil-reference",), source="a test")


def matrix(*rows, tolerances=(), within=True) -> AgreementMatrix:
    return AgreementMatrix(
        run="tiny",
        lane="2.9.1",
        shape="T24",
        sequences=1,
        checkpoint_digest="sha256:1",
        contract_digest="sha256:2",
        package_digest=None,
        argmax_margin=0.05,
        tolerances=tuple(tolerances),
        rows=rows,
        within=within,
    )


@pytest.mark.parametrize("measure", Measure)
def test_every_measure_has_a_figure(measure):
    assert ROW.value(measure) == VALUES[measure]


def test_where_nothing_was_predicted_there_is_no_perplexity_and_where_nothing_was_judged_no_share():
    row = msgspec.structs.replace(ROW, perplexity=None, judged=0, excluded=0)
    assert row.value(Measure.PERPLEXITY_CHANGE) is None
    assert row.value(Measure.EXCLUDED_SHARE) == 0.0
    assert outside(row, (tolerance(Measure.PERPLEXITY_CHANGE, 0.0),)) == ()


@given(
    st.sampled_from(Measure),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_infinity=True, allow_nan=True),
)
def test_a_bound_admits_its_own_side_and_itself_and_never_nan(measure, bound, value):
    admitted = tolerance(measure, bound).admits(value)
    if math.isnan(value):
        assert not admitted
    else:
        better = value > bound if measure in AT_LEAST else value < bound
        assert admitted == (better or value == bound)


def test_a_tolerance_is_for_its_rows_alone():
    too_strict = [
        tolerance(Measure.SQNR_DB, 90.0, "mil-float32"),
        tolerance(Measure.KL_NATS, 1e-7, "mil-reference"),
    ]
    assert outside(ROW, tuple(too_strict)) == (Measure.KL_NATS,)


def test_what_did_not_run_is_no_failure_and_what_failed_is_one():
    not_run = FormatNotRun(format="coreml", reason="needs a Mac", platform_reason=PlatformReason.NEEDS_MACOS)
    failed = FormatFailed(format="torchscript", error="RuntimeError: no")
    assert all_within((ROW, not_run))
    assert not all_within((ROW, failed))
    assert not all_within((msgspec.structs.replace(ROW, outside=(Measure.KL_NATS,)),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: matrix(ROW, within=False), "`within` is False, which the rows contradict"),
        (
            lambda: matrix(ROW, tolerances=[tolerance(Measure.SQNR_DB, 61.0)]),
            "mil-reference: [] contradicts the tolerances",
        ),
        (
            lambda: matrix(msgspec.structs.replace(ROW, outside=(Measure.SQNR_DB,)), within=False),
            "mil-reference: ['sqnr_db'] contradicts the tolerances",
        ),
        (lambda: tolerance(Measure.SQNR_DB, math.inf), "`sqnr_db` has the bound inf for ['mil-reference']"),
        (lambda: msgspec.structs.replace(ROW, kl_nats=math.nan), "`kl_nats` is nan"),
        (lambda: msgspec.structs.replace(ROW, excluded=51), "51 of 50 of 100 positions were excluded"),
    ],
)
def test_no_document_contradicts_itself(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_it_reads_as_it_was_written(tmp_path):
    written = matrix(
        ROW,
        FormatNotRun(format="coreml", reason="needs a Mac", platform_reason=PlatformReason.NEEDS_MACOS),
        FormatFailed(format="torchscript", error="RuntimeError: no"),
        tolerances=[tolerance(Measure.SQNR_DB, 40.0)],
        within=False,
    )
    path = tmp_path / "agreement.json"
    path.write_bytes(encode(written))
    assert read_json(path, AgreementMatrix) == written
