"""Run coremltools' operation tests against coremill.mil, and write the table.

    python -m tests.conformance                       run the whole suite; a stopped run is resumed
    python -m tests.conformance --write               also write docs/CONFORMANCE.md and the slice
    python -m tests.conformance -- -k TestLinear      pass the arguments after -- to pytest

The name of the results' file contains a digest of the evaluator, the plugin and the package versions.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from coremill.core.digest import digest, value_digest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "CONFORMANCE.md"
SLICE = HERE / "slice.txt"
"""Node ids of a few tests that cover every operation; the repository's tests run them."""
RESULTS = ROOT / "build" / "conformance"
PACKAGES = ("coremltools", "torch", "numpy")
SUITE = "coremltools.converters.mil.mil.ops.tests"


def results_path() -> Path:
    """Return the path of the results for the current sources and versions."""
    evaluator = ROOT / "src" / "coremill" / "mil"
    sources = sorted([*evaluator.glob("*.py"), *(evaluator / "ops").glob("*.py"), HERE / "plugin.py"])
    key = value_digest(
        {
            "sources": {path.relative_to(ROOT).as_posix(): digest(path) for path in sources},
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
    )
    return RESULTS / f"{key.removeprefix('sha256:')[:16]}.jsonl"


def suite_folder() -> Path:
    import coremltools

    return Path(coremltools.__file__).parent.joinpath(*SUITE.split(".")[1:])


def run_suite(results: Path, workers: int, options: list[str]) -> int:
    """Run the suite and return pytest's exit code."""
    environment = {
        **os.environ,
        "PYMIL_TEST_TARGETS": "mlprogram",
        "INCLUDE_MIL_FP32_UNIT_TESTS": "1",
        # The programs are tiny: one process for each core, with one thread, is the fastest.
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    folder = suite_folder()
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(folder)]
    command += ["-p", "tests.conformance.plugin", "--conformance-results", str(results)]
    command += ["-p", "tests.conformance.heap"]
    command += ["-n", str(workers), "-q", "--tb=no", "--no-header", *options]
    if not any(option.startswith((str(folder), "@")) for option in options):
        command.append(str(folder))
    return subprocess.run(command, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, help="default: a file under build/conformance")
    parser.add_argument(
        "--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)} and {SLICE.relative_to(ROOT)}"
    )
    parser.add_argument("options", nargs="*", help="arguments for pytest, after --")
    arguments = parser.parse_args()
    if arguments.write and arguments.options:
        parser.error("--write needs the whole suite: remove the arguments after --")
    results = arguments.results or results_path()
    results.parent.mkdir(parents=True, exist_ok=True)
    start = datetime.datetime.now(datetime.timezone.utc)
    code = run_suite(results, arguments.workers, arguments.options)
    took = datetime.datetime.now(datetime.timezone.utc) - start
    if code not in (0, 1, 5):  # passed, failed, or nothing left to run
        return code
    return summarize(results, start, took, write=arguments.write)


def summarize(results: Path, start: datetime.datetime, took: datetime.timedelta, *, write: bool) -> int:
    from tests.conformance.records import read_records
    from tests.conformance.table import exceptions, markdown, smallest_slice, totals

    from coremill.mil.ops.registry import supported_operations

    records = read_records(results)
    sums = totals(records)
    sys.stdout.write(
        f"{sums.passed:,} passed, {sums.failed:,} failed ({sums.passed_share:.2%}); "
        f"{sums.comparisons_per_pass:.2f} comparisons per passed test, {sums.nothing_compared} compared nothing; "
        f"{sums.not_about_numbers:,} run no program, {sums.skipped:,} skipped by the suite\n"
    )
    for reason, tests in exceptions(records).items():
        sys.stdout.write(f"{len(tests):6,} × {reason[:160]}\n         {tests[0]}\n")
    if write:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
        heading = [
            f"run on {start.date().isoformat()} with {versions}, Python {platform.python_version()}",
            f"{len(records):,} tests; `nox -s conformance`, {took.total_seconds() / 60:.0f} minutes (last start), "
            f"{os.cpu_count()} cores, {platform.machine()}",
        ]
        PAGE.write_text(markdown(records, supported_operations(), heading=heading), encoding="utf-8")
        SLICE.write_text("".join(f"{test}\n" for test in smallest_slice(records)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
