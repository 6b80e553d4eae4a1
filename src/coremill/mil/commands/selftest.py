"""`coremill mil selftest`: small packages with inputs and expected outputs that torch and numpy computed.

Each package runs in reference numerics and is compared with what is expected of it. On a Mac it runs through Core
ML as well, and the table says how far device and reference are apart: a finding, which nothing fails by.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from coremill.core.command import command_parser
from coremill.core.errors import GATES_FAILED, OK, CoremillError, DocumentError, OutputError, PackageError
from coremill.mil.commands.arrays import Array, read_npz
from coremill.mil.commands.compare import Difference, compare
from coremill.mil.commands.output import console, decibels, number, table
from coremill.mil.coremltools_quietly import CoreMLToolsModel
from coremill.mil.model import MLModel

BUNDLE = Path(__file__).parents[1] / "selftest"
"""The bundle that comes with coremill; tests/mil/commands/make_selftest.py makes it."""

INDEX = "bundle.json"

_WRITTEN = "a folder that `coremill mil selftest --write` wrote"


@dataclass(frozen=True)
class Call:
    """One prediction and what it must give."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Case:
    """A package of the bundle, and calls of it one after the other, which share one state."""

    name: str
    package: Path
    min_sqnr_db: float
    """Asked of every output in floats; one in integers must be equal."""
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Result:
    """One output of a case: the worst of its calls."""

    case: str
    output: str
    max_abs_err: float
    sqnr_db: float
    passed: bool
    device: Difference | None
    """How far Core ML is from the reference; None where it does not run."""


@dataclass(frozen=True)
class Failure:
    """A case that gave nothing to compare."""

    case: str
    reason: str


def read_bundle(folder: Path) -> list[Case]:
    """The cases of a bundle.

    Raises:
        PackageError: the folder is no bundle.
        DocumentError: its index is malformed.
        PredictionInputError: its arrays are unreadable.
    """
    path = folder / INDEX
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PackageError(f"cannot read {path}: {error.strerror}", expected=_WRITTEN) from error
    except ValueError as error:
        raise DocumentError(f"{path} is not JSON: {error}", expected=_WRITTEN) from error
    try:
        listed = [(str(case["name"]), float(case["min_sqnr_db"])) for case in document["cases"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DocumentError(
            f"{path} does not list cases ({type(error).__name__}: {error})", expected=_WRITTEN
        ) from error
    return [
        Case(name, folder / f"{name}.mlpackage", min_sqnr_db, _calls(folder / f"{name}.npz"))
        for name, min_sqnr_db in listed
    ]


def _calls(path: Path) -> tuple[Call, ...]:
    """Arrays called `0.input.x`, `0.output.y`, `1.input.x`, … as calls."""
    calls: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}
    for key, array in read_npz(path).items():
        position, kind, name = key.split(".", 2)
        calls.setdefault(position, ({}, {}))[kind == "output"][name] = array
    return tuple(Call(*calls[position]) for position in sorted(calls, key=int))


def run_case(case: Case, *, on_device: bool) -> list[Result] | Failure:
    """Run a case, and through Core ML as well if asked to."""
    try:
        model = MLModel(case.package)
        state = model.make_state() if model.states else None
        found = [model.predict(call.inputs, state) for call in case.calls]
        expected = [call.outputs for call in case.calls]
        differences = _worst(expected, found)
        device = _worst(found, _device_outputs(case)) if on_device else {}
    except CoremillError as error:
        return Failure(case.name, f"{error.kind} error: {error}")
    return [
        Result(
            case.name,
            name,
            each.max_abs_err,
            each.sqnr_db,
            each.max_abs_err == 0 if expected[0][name].dtype.kind in "iu" else each.sqnr_db >= case.min_sqnr_db,
            device.get(name),
        )
        for name, each in differences.items()
    ]


def _worst(
    reference: Sequence[Mapping[str, Array]], measured: Sequence[Mapping[str, Array]]
) -> dict[str, Difference]:
    """By output, the call with the least SQNR; NaN is the least of all."""
    worst: dict[str, Difference] = {}
    for own, other in zip(reference, measured, strict=True):
        for each in compare(own, other):
            known = worst.get(each.name)
            if known is None or not each.sqnr_db >= known.sqnr_db:
                worst[each.name] = each
    return worst


def _device_outputs(case: Case) -> list[dict[str, Array]]:
    """What Core ML gives for the calls. It opens a copy: opening a package writes its manifest anew."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / case.package.name
        shutil.copytree(case.package, copy)
        model: Any = CoreMLToolsModel(str(copy))
        state = (model.make_state(),) if model.get_spec().description.state else ()
        try:
            return [model.predict(dict(call.inputs), *state) for call in case.calls]
        except RuntimeError as error:
            raise PackageError(f"Core ML does not run {case.name}: {error}") from error


def render(results: Sequence[list[Result] | Failure], *, on_device: bool, to: Console) -> None:
    """Print a row an output, the reasons of what did not run, and the verdict."""
    columns = ["package", "output", ">max abs", ">SQNR dB", ""]
    rows = []
    for group in results:
        if isinstance(group, Failure):
            rows.append([group.case, "", "", "", "failed", *(["", ""] if on_device else [])])
            continue
        for each in group:
            row = [
                each.case,
                each.output,
                number(each.max_abs_err),
                decibels(each.sqnr_db),
                "passed" if each.passed else "failed",
            ]
            if on_device and each.device is not None:
                row += [number(each.device.max_abs_err), decibels(each.device.sqnr_db)]
            rows.append(row)
    if on_device:
        columns += [">apart", ">apart dB"]
    to.print(table(columns, rows))
    for group in results:
        if isinstance(group, Failure):
            to.print()
            to.print(Text(f"{group.case}: {group.reason}"), soft_wrap=True)
    to.print()
    if on_device:
        to.print(Text("apart: Core ML from the reference, by the same measures; nothing fails by it"))
    else:
        to.print(Text(f"Core ML: not_run, it needs macOS and this is {sys.platform}"))
    count = sum(map(_passed, results))
    verdict = f"{count} of {len(results)} packages passed"
    to.print(Text(verdict, style="bold green" if count == len(results) else "bold red"))


def _passed(group: list[Result] | Failure) -> bool:
    return not isinstance(group, Failure) and all(each.passed for each in group)


def write_bundle(folder: Path) -> None:
    """Copy the bundle to a new folder.

    Raises:
        OutputError: the folder exists, or cannot be written.
    """
    try:
        shutil.copytree(BUNDLE, folder)
    except FileExistsError as error:
        raise OutputError(f"{folder} exists", expected="a new folder") from error
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error}", expected="a writable place with room") from error


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("coremill mil selftest", __doc__)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("bundle", type=Path, nargs="?", default=BUNDLE, help="run this one instead of the own")
    chosen.add_argument("--write", type=Path, metavar="DIR", help="write the own bundle there, and run nothing")
    options = parser.parse_args(argv)
    if options.write is not None:
        write_bundle(options.write)
        return OK
    on_device = sys.platform == "darwin"
    results = [run_case(case, on_device=on_device) for case in read_bundle(options.bundle)]
    render(results, on_device=on_device, to=console())
    return OK if all(map(_passed, results)) else GATES_FAILED
