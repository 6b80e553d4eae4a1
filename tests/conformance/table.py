"""The table of a conformance run: by operation, and the exceptions one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
from tests.conformance.records import Record


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One operation."""

    operation: str
    tests: int
    """Tests that ran a program with the operation."""
    passed: int
    outputs_compared: int


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """The run in numbers; every test is in one of the first four."""

    passed: int
    """Compared at least one output, and all agreed."""
    failed: int
    """Everything else that ran a program or broke before it could: exceptions count as failures."""
    not_about_numbers: int
    """Passed without running a program: checks of shape inference, of error messages, of constant folding."""
    skipped: int
    """Left out by the suite itself."""
    nothing_compared: int
    """Of `failed`: ran a program, passed, and compared nothing."""
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
    """Whether it counts: it ran a program, or should have and broke."""
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
    """A row for each operation, those among them that no test runs included."""
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
    """Few passing tests that together run every operation that any of them runs, in both precisions; greedily."""
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
    ("TestPReLU::", "coremltools' converter refuses the program that the test builds"),
    ("test_type_inference_dynamic_x_with_groups", "the test makes a neural network, which is no ML Program"),
    ("TestSliceByIndex::test_slice_by_index", "the test makes a neural network, which is no ML Program"),
    ("TestUpsampleBilinear::", "a combination of options that no document describes; coremill.mil's is another"),
    ("TestNormalizationLocalResponseNorm::", "the expected numbers contradict the operation's documented formula"),
    ("iOS15/test_image_resizing.py::TestResample::", "the test counts casts that its own pipeline removes"),
    ("TestResample::", "coordinates in float16 in a float32 program, compared as if they were float32"),
    ("TestCropResize::", "7.899 where 7.9 is expected: bilinear weights are rounded to float32 in another order"),
    (
        "TestConv::test_builder_to_backend_stress",
        "float16 weights in a float32 program, compared as if they were float32",
    ),
    ("TestConvTranspose::", "float16 weights in a float32 program, compared as if they were float32"),
    (
        "TestNormalizationInstanceNorm::",
        "float16 parameters in a float32 program, compared as if they were float32",
    ),
    (
        "TestScatter::test_ios17_invalid_indices",
        "indices out of bounds, which no document defines: coremill.mil raises",
    ),
    ("test_builder_eval_scalar_corner_cases", "coremltools itself refuses the program that the test builds"),
)
"""Why tests of this name fail; the first that fits counts. A failure that none fits is shown as not explained."""


def exceptions(records: Iterable[Record]) -> dict[str, list[tuple[str, str]]]:
    """Failing tests, each with what it said, by why they fail: the unexplained, then the most frequent."""
    by_reason: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        if is_failure(record):
            said = "it compares nothing" if compared_nothing(record) else record.reason
            by_reason.setdefault(_why(record.test), []).append((record.test, said))
    return dict(sorted(by_reason.items(), key=lambda entry: (entry[0] != UNEXPLAINED, -len(entry[1]))))


UNEXPLAINED = "not explained"


def _why(test: str) -> str:
    return next((why for name, why in REASONS if name in test), UNEXPLAINED)


def skips(records: Iterable[Record]) -> Counter[str]:
    return Counter(record.reason for record in records if record.outcome == "skipped")


def markdown(records: Sequence[Record], operations: Iterable[str], *, heading: Sequence[str]) -> str:
    """The page. `heading` says when, with what, and how it was run, a line each."""
    sums = totals(records)
    lines = [
        "# Conformance of coremill.mil",
        "",
        "coremltools' own operation tests, run with coremill.mil in Core ML's place. Reference numerics: no device",
        "computes exactly so. What a program computes in fp32 is compared at the tests' own tolerances, in fp16 at",
        "5e-3, absolute and relative, where the suite allows Core ML 0.5 and 0.05; integers must be equal.",
        "",
        *(f"- {line}" for line in heading),
        "",
        "| | |",
        "|---|---|",
        f"| passed | {sums.passed:,} |",
        f"| failed, exceptions included | {sums.failed:,} |",
        f"| passed share | {sums.passed_share:.2%} |",
        f"| outputs compared in what passed | {sums.outputs_compared:,} |",
        f"| comparisons ÷ passes | {sums.comparisons_per_pass:.2f} |",
        f"| of the failed: ran a program and compared nothing | {sums.nothing_compared:,} |",
        f"| not about numbers (nothing to run) | {sums.not_about_numbers:,} |",
        f"| left out by the suite itself | {sums.skipped:,} |",
        "",
        "## By operation",
        "",
        "| operation | tests | passed | outputs compared |",
        "|---|---:|---:|---:|",
    ]
    for row in rows(records, operations):
        lines.append(f"| {row.operation} | {row.tests:,} | {row.passed:,} | {row.outputs_compared:,} |")
    lines += ["", "## Exceptions", ""]
    for reason, tests in exceptions(records).items():
        lines += [f"### {len(tests):,} × {_escaped(reason)}", ""]
        lines += [*(f"- `{test}`: {_escaped(said)}" for test, said in tests), ""]
    lines += ["## Left out by the suite", ""]
    lines += [f"- {count:,} × {_escaped(reason)}" for reason, count in skips(records).most_common()]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|")
