"""Summaries that cannot contradict themselves."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from coremill.core.contract import Toolchain
from coremill.core.documents import encode, from_builtins
from coremill.core.errors import DocumentError
from coremill.core.gates import Outcome, Severity, failed, passed
from coremill.core.reports import (
    Answer,
    Backend,
    LaneFailed,
    LaneVerified,
    Perplexity,
    RunSummary,
    ShapeError,
    StageSummary,
    StatefulMeasured,
    lane_failed,
)

TOOLCHAIN = Toolchain(python="3.11.7", platform="Linux", packages={})
FAILED = lane_failed("2.8.0", "convert", "no room", TOOLCHAIN)


def verified(**changes: Any) -> LaneVerified:
    parts: dict[str, Any] = {
        "lane": "2.9.1",
        "toolchain": TOOLCHAIN,
        "primary": "T64",
        "gates_ok": True,
        "gates": (passed().gate("It loads", Severity.MUST),),
        "shapes": {"T64": ShapeError(backend=Backend.COREML, error="no")},
        "heldout": None,
        "package_size_bytes": 1,
        "convert_duration_s": 1.0,
        "converter_notices": {},
    }
    return LaneVerified(**{**parts, **changes})


def run(*lanes: LaneVerified | LaneFailed, **changes: Any) -> RunSummary:
    parts: dict[str, Any] = {
        "run": "toy",
        "model_type": "toy",
        "created_at": "2026-05-04T09:13:20+00:00",
        "stages": (),
        "lanes": lanes,
        "figures": {},
        "sampled_seed": None,
        "sampled": (),
        "gates_ok": False,
    }
    return RunSummary(**{**parts, **changes})


def test_a_failed_lane_has_one_failed_must_gate() -> None:
    assert FAILED.gates == (failed("no room").gate("Stage convert completes", Severity.MUST),)
    assert not FAILED.gates_ok


@pytest.mark.parametrize(
    "changes",
    [
        {"gates_ok": True},
        {"gates": ()},
        {"gates": (passed().gate("Stage convert completes", Severity.MUST),)},
        {"gates": (failed("no").gate("Stage export completes", Severity.MUST),)},
        {"gates": (failed("no").gate("Stage convert completes", Severity.NICE),)},
        {"gates": FAILED.gates * 2},
    ],
)
def test_a_failed_lane_holds_nothing_else(changes: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"^lane 2\.8\.0 failed, but its gates are not exactly 'Stage convert completes'"
    ):
        msgspec.structs.replace(FAILED, **changes)


def test_a_verified_lane_agrees_with_its_gates_and_has_its_primary_shape() -> None:
    assert verified().gates_ok
    with pytest.raises(ValueError, match="`gates_ok` is False, but the gates give True"):
        verified(gates_ok=False)
    with pytest.raises(ValueError, match="the primary shape T128 has no report"):
        verified(primary="T128")


def test_a_lane_of_half_a_verification_is_no_document() -> None:
    document = msgspec.json.decode(encode(run(FAILED)))
    assert from_builtins(document, RunSummary, where="summary.json") == run(FAILED)
    document["lanes"][0]["package_size_bytes"] = 3
    with pytest.raises(DocumentError, match=r"unknown key `package_size_bytes` at `\$\.lanes\[0\]`"):
        from_builtins(document, RunSummary, where="summary.json")


def test_only_verified_lanes_answer() -> None:
    answer = Answer(prompt="?", answer="!", mood=None, right=True)
    summary = run(FAILED, verified(), sampled_seed=8, sampled=(answer,))
    assert [lane.lane for lane in summary.verified] == ["2.9.1"]
    assert run(verified(), sampled=(answer,), gates_ok=True).sampled_seed is None  # greedy
    with pytest.raises(ValueError, match=r"^no lane was verified, but there are 0 answers, of seed 8$"):
        run(FAILED, sampled_seed=8)
    with pytest.raises(ValueError, match=r"^no lane was verified, but there are 1 answers, of seed None$"):
        run(FAILED, sampled=(answer,))
    with pytest.raises(ValueError, match="`gates_ok` is True, which the lanes or their shared stages contradict"):
        run(FAILED, verified(), sampled_seed=8, gates_ok=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": math.inf}, "the perplexity `reference` is inf"),
        ({"measured": math.nan}, "the perplexity `measured` is nan"),
        ({"measured": 0.0}, "the perplexity `measured` is 0.0"),
        ({"tokens": 0}, "a perplexity of 0 tokens"),
    ],
)
def test_a_perplexity_is_a_number_of_some_tokens(changes: dict[str, float], message: str) -> None:
    good = Perplexity(reference=20.0, measured=19.9, tokens=7)
    assert good.change == pytest.approx(0.005)
    with pytest.raises(ValueError, match=f"^{message}$"):
        msgspec.structs.replace(good, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefills": 0}, "`prefills` is 0"),
        ({"continued": 0}, "`continued` is 0"),
        ({"padding_err": math.nan}, "`padding_err` is nan"),
        ({"emptied_sqnr_db": -math.inf}, "`emptied_sqnr_db` is -inf"),
    ],
)
def test_functions_with_a_cache_were_measured_or_are_an_error(changes: dict[str, float], message: str) -> None:
    good = StatefulMeasured(
        backend=Backend.MIL_REFERENCE,
        cache_positions=40,
        prefills=6,
        prefill_sqnr_db=58.0,
        decoded=20,
        decode_sqnr_db=57.0,
        continued=11,
        continued_sqnr_db=56.0,
        padding_err=0.0,
        emptied_sqnr_db=9.0,
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        msgspec.structs.replace(good, **changes)


RAN = {"python": "3.11.7", "duration_s": 1.0, "started_at": "2026-05-04T09:13:20+00:00"}


@pytest.mark.parametrize(
    ("outcome", "parts", "message"),
    [
        (Outcome.FAILED, RAN, "stage 'convert' is failed without a reason"),
        (Outcome.PASSED, {}, "stage 'convert' is passed, which its interpreter and times contradict"),
        (Outcome.FAILED, {"reason": "no"}, "stage 'convert' is failed, which its interpreter and times contradict"),
        (
            Outcome.PASSED,
            {**RAN, "python": None},
            "stage 'convert' is passed, which its interpreter and times contradict",
        ),
        (
            Outcome.NOT_RUN,
            {**RAN, "reason": "no"},
            "stage 'convert' is not_run, which its interpreter and times contradict",
        ),
        (
            Outcome.NOT_RUN,
            {"torch": "2.9.1", "reason": "no"},
            "stage 'convert' is not_run, which its interpreter and times contradict",
        ),
    ],
)
def test_a_stage_ran_or_did_not(outcome: Outcome, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        StageSummary(stage="convert", lane="2.9.1", outcome=outcome, **parts)


def test_a_perplexity_beyond_a_float_is_refused():
    found = Perplexity.of(reference_nats=0.0, measured_nats=math.log(2), tokens=3)
    assert (found.reference, found.measured, found.tokens) == (1.0, pytest.approx(2), 3)
    with pytest.raises(ValueError, match=r"^the perplexity `reference` is inf$"):
        Perplexity.of(reference_nats=1e4, measured_nats=1.0, tokens=1)
