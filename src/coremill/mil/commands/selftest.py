"""`coremill mil selftest`: small packages with inputs and expected outputs that torch and numpy computed.

Each package runs in reference numerics and is compared with its expected outputs; the exit code is 3 if they
differ. On macOS it also runs through Core ML, and the table shows the difference of device and reference, which is
an error only with --strict.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from coremill.core.command import command_parser
from coremill.core.errors import (
    GATES_FAILED,
    OK,
    CoremillError,
    DocumentError,
    MachineError,
    OutputError,
    PackageError,
)
from coremill.measures import Array
from coremill.mil.commands.arrays import as_arrays, read_npz
from coremill.mil.commands.compare import Difference, compare
from coremill.mil.commands.output import console, decibels, number, table
from coremill.mil.coremltools_quietly import CoreMLToolsModel
from coremill.mil.model import MLModel

BUNDLE = Path(__file__).parents[1] / "selftest"
"""The bundle in coremill; tests/mil/commands/make_selftest.py makes it."""

INDEX = "bundle.json"

FAR_DB = 40.0
"""Core ML is far from the reference below this SQNR, which verification requires of a converted model's outputs."""

_KEYS = "arrays called `0.input.x`, `0.output.y`, `1.input.x`, …, of calls counted from 0, each with outputs"

_KEY = re.compile(r"(?P<position>0|[1-9][0-9]*)\.(?P<kind>input|output)\.(?P<name>.+)", re.DOTALL)

_WRITTEN = "a directory that `coremill mil selftest --write` wrote"


@dataclass(frozen=True)
class Call:
    """One prediction and its expected outputs."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Case:
    """A package of the bundle, and successive calls of it, which share a state."""

    name: str
    package: Path
    min_sqnr_db: float
    """The bound of float outputs; integer outputs must be equal."""
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Result:
    """One output of a case, in its worst call."""

    output: str
    max_abs_err: float
    sqnr_db: float
    passed: bool
    device: Difference | None
    """The difference of Core ML and the reference; None if Core ML was not run, or failed."""
    is_far: bool
    """Whether Core ML is far from the reference."""


@dataclass(frozen=True)
class Outcome:
    """The result of one case."""

    case: str
    results: tuple[Result, ...]
    """Empty if the reference did not run."""
    problem: str | None
    """Why the reference did not run."""
    device_problem: str | None
    """Why Core ML has no outputs to compare, if it was run."""

    @property
    def passed(self) -> bool:
        return self.problem is None and all(each.passed for each in self.results)

    @property
    def ran_on_device(self) -> bool:
        return any(each.device is not None for each in self.results)

    @property
    def is_far(self) -> bool:
        return any(each.is_far for each in self.results)


def read_bundle(folder: Path) -> list[Case]:
    """Return the cases of a bundle.

    Raises:
        PackageError: the directory is not a bundle.
        DocumentError: its index or its calls are malformed, or have nothing to compare.
        PredictionInputError: its arrays are unreadable.
    """
    path = folder / INDEX
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PackageError(f"cannot read {path}: {error.strerror}", expected=_WRITTEN) from error
    except (RecursionError, ValueError) as error:
        raise DocumentError(f"{path} is not JSON: {error}", expected=_WRITTEN) from error
    try:
        listed = [(str(case["name"]), float(case["min_sqnr_db"])) for case in document["cases"]]
        if not all(math.isfinite(min_sqnr_db) for _, min_sqnr_db in listed):
            raise ValueError("min_sqnr_db is not finite")
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise DocumentError(
            f"{path} does not list cases ({type(error).__name__}: {error})", expected=_WRITTEN
        ) from error
    if not listed:
        raise DocumentError(f"{path} lists no cases", expected=_WRITTEN)
    return [
        Case(name, folder / f"{name}.mlpackage", min_sqnr_db, _calls(folder / f"{name}.npz"))
        for name, min_sqnr_db in listed
    ]


def _calls(path: Path) -> tuple[Call, ...]:
    """Arrays called `0.input.x`, `0.output.y`, `1.input.x`, … as calls."""
    calls: dict[int, tuple[dict[str, Array], dict[str, Array]]] = {}
    for key, array in read_npz(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise DocumentError(f"{path} contains an array named {key!r}", expected=_KEYS)
        calls.setdefault(int(match["position"]), ({}, {}))[match["kind"] == "output"][match["name"]] = array
    if not calls:
        raise DocumentError(f"{path} contains no calls", expected=_KEYS)
    if sorted(calls) != list(range(len(calls))):
        raise DocumentError(f"{path} contains the calls {sorted(calls)}", expected=_KEYS)
    for position, (_, outputs) in calls.items():
        if not outputs:
            raise DocumentError(f"{path} expects no outputs of call {position}", expected=_KEYS)
        for name, array in outputs.items():
            if not array.size:
                raise DocumentError(
                    f"{path} expects nothing of output {name!r} of call {position}, of shape {list(array.shape)}",
                    expected="an array with elements",
                )
    return tuple(Call(*calls[position]) for position in sorted(calls))


def run_case(case: Case, *, on_device: bool) -> Outcome:
    """Run a case, and with `on_device` also through Core ML."""
    try:
        model = MLModel(case.package)
        state = model.make_state() if model.states else None
        found = [model.predict(call.inputs, state) for call in case.calls]
        differences = _worst([call.outputs for call in case.calls], found)
    except CoremillError as error:
        return Outcome(case.name, (), f"{error.kind} error: {error}", None)
    device, device_problem = _on_device(case, found) if on_device else ({}, None)
    results = []
    for name, each in differences.items():
        is_exact = case.calls[0].outputs[name].dtype.kind in "iu"
        apart = device.get(name)
        is_far = apart is not None and not _within(apart, FAR_DB, is_exact=is_exact)
        passed = _within(each, case.min_sqnr_db, is_exact=is_exact)
        results.append(Result(name, each.max_abs_err, each.sqnr_db, passed, apart, is_far))
    return Outcome(case.name, tuple(results), None, device_problem)


def _within(difference: Difference, min_sqnr_db: float, *, is_exact: bool) -> bool:
    """Return whether the difference is within the bound; NaN is not, and integers must be equal."""
    return difference.max_abs_err == 0 if is_exact else difference.sqnr_db >= min_sqnr_db


def _worst(
    reference: Sequence[Mapping[str, Array]], measured: Sequence[Mapping[str, Array]]
) -> dict[str, Difference]:
    """Return the call with the lowest SQNR by output; NaN is the lowest."""
    worst: dict[str, Difference] = {}
    for own, other in zip(reference, measured, strict=True):
        for each in compare(own, other):
            known = worst.get(each.name)
            if known is None or not (math.isnan(known.sqnr_db) or each.sqnr_db >= known.sqnr_db):
                worst[each.name] = each
    return worst


def _on_device(case: Case, reference: Sequence[Mapping[str, Array]]) -> tuple[dict[str, Difference], str | None]:
    """Return the difference of Core ML and the reference by output, or an error text."""
    try:
        found = _device_outputs(case)
    except Exception as error:  # noqa: BLE001 - coremltools raises Exception itself, and the report contains it
        return {}, f"Core ML does not run it: {error}"
    try:
        return _worst(reference, found), None
    except CoremillError as error:
        return {}, f"Core ML's outputs cannot be compared: {error}"


def _device_outputs(case: Case) -> list[dict[str, Array]]:
    """Return Core ML's outputs of the calls, from a copy: opening a package rewrites its manifest."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / case.package.name
        shutil.copytree(case.package, copy)
        model: Any = CoreMLToolsModel(str(copy))
        state = (model.make_state(),) if model.get_spec().description.state else ()
        return [as_arrays(model.predict(dict(call.inputs), *state)) for call in case.calls]


def render(outcomes: Sequence[Outcome], *, on_device: bool, to: Console) -> None:
    """Print a row per output, the reasons for cases that did not run, and the result."""
    columns = ["package", "output", ">max abs", ">SQNR dB", ""]
    if on_device:
        columns += [">apart", ">apart dB"]
    rows = [row[: len(columns)] for outcome in outcomes for row in _rows(outcome)]
    to.print(table(columns, rows))
    for outcome in outcomes:
        if problem := outcome.problem or outcome.device_problem:
            to.print()
            to.print(Text(f"{outcome.case}: {problem}"), soft_wrap=True)
    to.print()
    if on_device:
        ran, far = sum(each.ran_on_device for each in outcomes), [each.case for each in outcomes if each.is_far]
        to.print(Text("apart: difference between Core ML and the reference, in the same measures"))
        to.print(Text(f"Core ML: {ran} of {len(outcomes)} packages ran"))
        bound = f"below {FAR_DB:g} dB, or other integers"
        to.print(Text(f"Core ML is far off ({bound}) in {len(far)}{': ' if far else ''}{', '.join(far)}"))
    else:
        to.print(Text(f"Core ML: not_run, it needs macOS and this is {sys.platform}"))
    count = sum(each.passed for each in outcomes)
    result = f"{count} of {len(outcomes)} packages passed"
    to.print(Text(result, style="bold green" if count == len(outcomes) else "bold red"))


def _rows(outcome: Outcome) -> Iterator[list[str]]:
    """Yield a row per output: the reference's figures, then Core ML's difference from it."""
    if outcome.problem is not None:
        yield [outcome.case, "", "", "", "failed", "not_run", ""]
    for each in outcome.results:
        apart = ["failed" if outcome.device_problem else "not_run", ""]
        if each.device is not None:
            apart = [number(each.device.max_abs_err), decibels(each.device.sqnr_db)]
        measured = [number(each.max_abs_err), decibels(each.sqnr_db), "passed" if each.passed else "failed"]
        yield [outcome.case, each.output, *measured, *apart]


def write_bundle(folder: Path) -> None:
    """Copy the bundle to a new directory.

    Raises:
        OutputError: the directory exists, or cannot be written.
    """
    try:
        shutil.copytree(BUNDLE, folder)
    except FileExistsError as error:
        raise OutputError(f"{folder} exists", expected="a new directory") from error
    except OSError as error:
        raise OutputError(
            f"cannot write {folder}: {error}", expected="a writable path on a disk with free space"
        ) from error


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("mil selftest", __doc__, example="--write bundle")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "bundle", type=Path, nargs="?", default=BUNDLE, help="the bundle to run (default: the one in coremill)"
    )
    chosen.add_argument(
        "--write", type=Path, metavar="DIR", help="write coremill's own bundle there, and run nothing"
    )
    parser.add_argument("--strict", action="store_true", help="fail also if Core ML fails or is far off")
    options = parser.parse_args(argv)
    if options.write is not None:
        write_bundle(options.write)
        return OK
    on_device = sys.platform == "darwin"
    if options.strict and not on_device:
        raise MachineError(f"--strict requires Core ML, and this is {sys.platform}", expected="macOS")
    outcomes = [run_case(case, on_device=on_device) for case in read_bundle(options.bundle)]
    render(outcomes, on_device=on_device, to=console())
    passed = all(each.passed for each in outcomes)
    if options.strict:
        passed = passed and all(each.ran_on_device and not each.is_far for each in outcomes)
    return OK if passed else GATES_FAILED
