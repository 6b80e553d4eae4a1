"""coremltools' operation tests with coremill.mil instead of Core ML: a slice of them, and the totals.

`nox -s conformance` runs the whole suite, and writes the table by operation.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conformance.__main__ import HERE, PAGE, ROOT, SLICE, run_suite, suite_folder
from tests.conformance.records import Record, append_record, drop_unfinished_line, read_records
from tests.conformance.table import exceptions, markdown, rows, smallest_slice, totals

from coremill.mil.ops.registry import supported_operations


def record(test: str, **changes: object) -> Record:
    values = {
        "test": test,
        "outcome": "passed",
        "reason": "",
        "predictions": 1,
        "compared": 1,
        "operations": ("relu",),
        "precision": "fp32",
    }
    return Record(**{**values, **changes})


RECORDS = [
    record("a"),
    record("b", compared=3, operations=("add", "relu"), precision="fp16"),
    record("differs", outcome="failed", reason="AssertionError: Not equal"),
    record(
        "breaks before it runs",
        outcome="failed",
        reason="no such operation",
        predictions=0,
        compared=0,
        operations=(),
    ),
    record("runs and compares nothing", compared=0),
    record("runs nothing", predictions=0, compared=0, operations=()),
    record("left out", outcome="skipped", reason="needs TensorFlow", predictions=0, compared=0, operations=()),
]


def test_exceptions_and_empty_comparisons_count_as_failures():
    sums = totals(RECORDS)
    assert (sums.passed, sums.failed, sums.not_about_numbers, sums.skipped) == (2, 3, 1, 1)
    assert sums.nothing_compared == 1
    assert sums.passed_share == pytest.approx(2 / 5)
    assert sums.comparisons_per_pass == 2.0
    assert exceptions(RECORDS) == {
        "not explained": [
            ("differs", "AssertionError: Not equal"),
            ("breaks before it runs", "no such operation"),
            ("runs and compares nothing", "compared nothing"),
        ],
    }
    known = record("iOS14/test_activation.py::TestPReLU::a", outcome="failed", reason="ValueError: rank")
    (why,) = exceptions([known])
    assert why == "coremltools' converter rejects the program that the test builds"


def test_page_lists_every_operation():
    """It names each operation, its sums are those of the last whole run, and every exception has a reason."""
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"^\| (\w+) \| [\d,]+ \| [\d,]+ \| [\d,]+ \|$", page, re.MULTILINE))
    assert named - {"cond", "while_loop"} == set(supported_operations())  # which are no kernels
    figures = {
        name: int(re.search(rf"^\| {name} \| ([\d,]+) \|$", page, re.M)[1].replace(",", "")) for name in SUMS
    }
    passed, failed, nothing, other, left_out = figures.values()
    assert f"- {sum((passed, failed, other, left_out)):,} tests; " in page
    assert nothing == 0
    assert passed / (passed + failed) >= 0.99
    assert f"| passed share | {passed / (passed + failed):.2%} |" in page
    counted = [int(count.replace(",", "")) for count in re.findall(r"^### ([\d,]+) ×", page, re.MULTILINE)]
    assert sum(counted) == failed
    assert "not explained" not in page
    assert f"{passed:,} of {passed + failed:,}" in (ROOT / "docs" / "mil.md").read_text(encoding="utf-8")


SUMS = (
    "passed",
    "failed, including exceptions",
    "failed because they compared nothing",
    "run no program",
    "skipped by the suite",
)


def test_the_table_names_operations_that_no_test_runs():
    found = {row.operation: (row.tests, row.passed, row.outputs_compared) for row in rows(RECORDS, ["abs"])}
    assert found == {"abs": (0, 0, 0), "add": (1, 1, 3), "relu": (4, 2, 4)}
    page = markdown(RECORDS, ["abs"], heading=["run on a day"])
    assert "| passed share | 40.00% |" in page
    assert "| relu | 4 | 2 | 4 |" in page
    assert "### 3 × not explained\n\n- `differs`: AssertionError: Not equal\n" in page


def test_the_slice_covers_each_operation_in_each_precision():
    assert smallest_slice(RECORDS) == ["a", "b"]


def test_truncated_line_is_run_again(tmp_path):
    path = tmp_path / "results.jsonl"
    append_record(path, RECORDS[0])
    append_record(path, RECORDS[1])
    path.write_bytes(path.read_bytes()[:-9])
    assert read_records(path) == RECORDS[:1]
    drop_unfinished_line(path)
    append_record(path, RECORDS[2])
    assert read_records(path) == [RECORDS[0], RECORDS[2]]
    drop_unfinished_line(tmp_path / "none.jsonl")
    assert read_records(tmp_path / "none.jsonl") == []


def node_ids(tests: list[str], path: Path) -> str:
    """Write the tests' node ids as a file of arguments for pytest: they are too long for a command line."""
    path.write_text("".join(f"{suite_folder() / test}\n" for test in tests), encoding="utf-8")
    return f"@{path}"


def test_a_slice_that_covers_every_operation_passes(tmp_path):
    tests = SLICE.read_text(encoding="utf-8").splitlines()
    results = tmp_path / "results.jsonl"
    assert run_suite(results, 2, [node_ids(tests, tmp_path / "tests.txt")]) == 0
    records = read_records(results)
    assert sorted(each.test for each in records) == sorted(tests)
    sums = totals(records)
    assert (sums.passed, sums.failed, sums.skipped, sums.not_about_numbers) == (len(tests), 0, 0, 0)
    assert sums.outputs_compared >= len(tests)
    covered = {operation for each in records for operation in each.operations}
    assert set(supported_operations()) - covered == UNTESTED


UNTESTED = {
    "ceil",
    "classify",
    "conv_quantized",
    "logical_and",
    "logical_not",
    "logical_or",
    "logical_xor",
    "non_maximum_suppression",  # its tests compute the expected values with TensorFlow
}
"""Operations that no test of the suite compares in an ML Program here; tests/mil/ops tests each of them."""


BROKEN = """
import torch
from coremill.mil.ops import activation, registry

(definition,) = registry._REGISTRY.definitions["relu6"]
object.__setattr__(definition, "kernel", lambda x: torch.relu(x) + 0.1)
"""


def test_wrong_kernel_fails(tmp_path):
    (tmp_path / "broken_relu6.py").write_text(BROKEN)
    results = tmp_path / "results.jsonl"
    test = "iOS14/test_activation.py::TestReLU6::test_builder_to_backend_smoke"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import broken_relu6"]
    command[-1] += f"; import pytest; sys.exit(pytest.main({arguments(results, test)!r}))"
    environment = {"PYMIL_TEST_TARGETS": "mlprogram", "INCLUDE_MIL_FP32_UNIT_TESTS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    records = read_records(results)
    assert [each.outcome for each in records] == ["failed", "failed"]
    assert all("Not equal to tolerance" in each.reason for each in records)


def arguments(results: Path, test: str) -> list[str]:
    return [
        *("-c", str(HERE / "pytest.ini"), "--rootdir", str(suite_folder())),
        *("-p", "tests.conformance.plugin", "--conformance-results", str(results)),
        str(suite_folder() / test),
    ]
