"""The page of a conformance run: a table by operation, and a list of the failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
from tests.conformance.records import Record


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The row of one operation."""

    operation: str
    tests: int
    """Tests that ran a program with the operation."""
    passed: int
    outputs_compared: int


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """The totals of a run; every test is counted in one of the first four fields."""

    passed: int
    """Tests that compared at least one output and passed."""
    failed: int
    """All other tests that ran a program or failed before: exceptions count as failures."""
    not_about_numbers: int
    """Tests that passed without running a program, such as tests of shape inference or error messages."""
    skipped: int
    """Tests that the suite skips."""
    nothing_compared: int
    """The tests in `failed` that ran a program, passed and compared nothing."""
    outputs_compared: int

    @property
    def passed_share(self) -> float:
        ran = self.passed + self.failed
        return self.passed / ran if ran else 0.0

    @property
    def comparisons_per_pass(self) -> float:
        return self.outputs_compared / self.passed if self.passed else 0.0


def compared_nothing(record: Record) -> bool:
    return record.outcome == "passed" and record.predictions > 0 and record.compared == 0


def is_failure(record: Record) -> bool:
    return record.outcome == "failed" or compared_nothing(record)


def is_about_numbers(record: Record) -> bool:
    """Return whether a test ran a program, or failed before."""
    return record.outcome != "skipped" and (record.predictions > 0 or is_failure(record))


def totals(records: Sequence[Record]) -> Totals:
    counted = [record for record in records if is_about_numbers(record)]
    failed = [record for record in counted if is_failure(record)]
    skipped = [record for record in records if record.outcome == "skipped"]
    return Totals(
        passed=len(counted) - len(failed),
        failed=len(failed),
        not_about_numbers=len(records) - len(counted) - len(skipped),
        skipped=len(skipped),
        nothing_compared=sum(map(compared_nothing, failed)),
        outputs_compared=sum(record.compared for record in counted if not is_failure(record)),
    )


def rows(records: Iterable[Record], operations: Iterable[str]) -> list[Row]:
    """Return a row for each operation, including operations that no test runs."""
    tests: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    compared: Counter[str] = Counter()
    for record in records:
        if not is_about_numbers(record):
            continue
        for operation in record.operations:
            tests[operation] += 1
            if not is_failure(record):
                passed[operation] += 1
                compared[operation] += record.compared
    return [
        Row(operation=name, tests=tests[name], passed=passed[name], outputs_compared=compared[name])
        for name in sorted(set(operations) | set(tests))
    ]


def smallest_slice(records: Iterable[Record]) -> list[str]:
    """Choose a few passing tests that run every covered operation in each covered precision; greedily."""
    covers = {
        record.test: {(operation, record.precision) for operation in record.operations}
        for record in records
        if is_about_numbers(record) and not is_failure(record) and "\n" not in record.test  # one a line
    }
    missing = set().union(*covers.values()) if covers else set()
    chosen = []
    while missing:
        best = max(sorted(covers), key=lambda test: len(covers[test] & missing))
        missing -= covers[best]
        chosen.append(best)
    return sorted(chosen)


REASONS = (
    ("TestPReLU::", "coremltools' converter rejects the program that the test builds"),
    ("test_type_inference_dynamic_x_with_groups", "the test converts to a neural network, not to an ML Program"),
    ("TestSliceByIndex::test_slice_by_index", "the test converts to a neural network, not to an ML Program"),
    ("TestUpsampleBilinear::", "an undocumented combination of options, which coremill.mil implements differently"),
    ("TestNormalizationLocalResponseNorm::", "the expected numbers contradict the operation's documented formula"),
    ("iOS15/test_image_resizing.py::TestResample::", "the test counts casts that its own pipeline removes"),
    ("TestResample::", "float16 coordinates in a float32 program, compared with float32 tolerances"),
    ("TestCropResize::", "7.899 instead of 7.9: bilinear weights are rounded to float32 in a different order"),
    (
        "TestConv::test_builder_to_backend_stress",
        "float16 weights in a float32 program, compared with float32 tolerances",
    ),
    ("TestConvTranspose::", "float16 weights in a float32 program, compared with float32 tolerances"),
    (
        "TestNormalizationInstanceNorm::",
        "float16 parameters in a float32 program, compared with float32 tolerances",
    ),
    (
        "TestScatter::test_ios17_invalid_indices",
        "indices out of bounds, which are undefined: coremill.mil raises an error",
    ),
    ("test_builder_eval_scalar_corner_cases", "coremltools rejects the program that the test builds"),
)
"""Why tests with this text in their name fail; the first match applies. Other failures are "not explained"."""


def exceptions(records: Iterable[Record]) -> dict[str, list[tuple[str, str]]]:
    """Return the failed tests and their messages by reason: first the unexplained, then the most frequent."""
    by_reason: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        if is_failure(record):
            message = "compared nothing" if compared_nothing(record) else record.reason
            by_reason.setdefault(_why(record.test), []).append((record.test, message))
    return dict(sorted(by_reason.items(), key=lambda entry: (entry[0] != UNEXPLAINED, -len(entry[1]))))


UNEXPLAINED = "not explained"


def _why(test: str) -> str:
    return next((why for name, why in REASONS if name in test), UNEXPLAINED)


def skips(records: Iterable[Record]) -> Counter[str]:
    return Counter(record.reason for record in records if record.outcome == "skipped")


def markdown(records: Sequence[Record], operations: Iterable[str], *, heading: Sequence[str]) -> str:
    """Return the page. The lines of `heading` describe the run: date, versions, machine."""
    sums = totals(records)
    lines = [
        "# Conformance of coremill.mil",
        "",
        "coremltools' operation tests, run with coremill.mil instead of Core ML. It computes in reference",
        "numerics, close to those of a device. Programs in fp32 are compared with the tests' tolerances,",
        "programs in fp16 with 5e-3, absolute and relative, where the suite allows Core ML 0.5 and 0.05; integers",
        "must be equal.",
        "",
        *(f"- {line}" for line in heading),
        "",
        "| | |",
        "|---|---|",
        f"| passed | {sums.passed:,} |",
        f"| failed, including exceptions | {sums.failed:,} |",
        f"| passed share | {sums.passed_share:.2%} |",
        f"| outputs compared in passed tests | {sums.outputs_compared:,} |",
        f"| comparisons per passed test | {sums.comparisons_per_pass:.2f} |",
        f"| failed because they compared nothing | {sums.nothing_compared:,} |",
        f"| run no program | {sums.not_about_numbers:,} |",
        f"| skipped by the suite | {sums.skipped:,} |",
        "",
        "## By operation",
        "",
        "| operation | tests | passed | outputs compared |",
        "|---|---:|---:|---:|",
    ]
    for row in rows(records, operations):
        lines.append(f"| {row.operation} | {row.tests:,} | {row.passed:,} | {row.outputs_compared:,} |")
    lines += ["", "## Failures", ""]
    for reason, tests in exceptions(records).items():
        lines += [f"### {len(tests):,} × {_escaped(reason)}", ""]
        lines += [*(f"- `{test}`: {_escaped(message)}" for test, message in tests), ""]
    lines += ["## Skipped by the suite", ""]
    lines += [f"- {count:,} × {_escaped(reason)}" for reason, count in skips(records).most_common()]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|")
