"""Measure conversion on a finished build.

    python benchmarks/conversion.py answers --run magic-8-ball --answers 1000
    python benchmarks/conversion.py convert --run smollm2-135m
    python benchmarks/conversion.py shapes --run smollm2-135m

`answers`: the package answers held-out questions. `convert`: times the conversion of `main`, alternating with a
bare ct.convert of the same model as a tutorial would write it (`tutorial_decoder.py`), and compares both packages
with the checkpoint. `shapes`: compares one package for all shapes with one package per shape. The figures are
printed, not checked; verification has the gates of a build. Run it in a convert environment.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from artifacts import Artifacts
from tutorial_decoder import TutorialDecoder

from coremill.core import layout
from coremill.core.command import exit_on_error
from coremill.core.config import ConvertConfig
from coremill.core.contract import Contract, ShapeSet, read_contract, shape_key
from coremill.core.digest import size_bytes
from coremill.core.errors import VocabularyMismatchError
from coremill.coreml.converter import convert_function, ct, prepared
from coremill.coreml.diagnostics import Recorder, recording
from coremill.coreml.graph import Program, as_input, load_program
from coremill.coreml.package import check_package, write_package
from coremill.data.judge import read_answer_key
from coremill.data.prompts import read_some
from coremill.measures import sqnr_db
from coremill.mil import MLModel
from coremill.model.checkpoint import build_student, load_checkpoint
from coremill.model.student import Student
from coremill.text.student_tokenizer import Tokenizer
from coremill.verification.backends import reference_runner
from coremill.verification.main_checks import ask_heldout
from coremill.verification.scoring import Scorer

SETTINGS = ConvertConfig()
COMPARED_LENGTH = 512


class Build(Artifacts, frozen=True):
    """The artifacts of one lane of a run."""

    torch: str

    @property
    def contract(self) -> Contract:
        return read_contract(layout.contract_file(self.run.stage("export", self.torch), self.run.run))

    @property
    def program(self) -> Path:
        return self.run.stage("export", self.torch) / self.contract.graph

    @property
    def package(self) -> Path:
        return layout.package_dir(self.run.stage("convert", self.torch), self.run.run)


def answers(build: Build, options: argparse.Namespace) -> None:
    dataset = build.run.stage("dataset")
    package, contract = build.package, build.contract
    tokenizer = Tokenizer.load(layout.tokenizer_file(dataset))
    rows = read_some(layout.heldout_file(dataset), options.answers)
    check_package(package)

    start = time.perf_counter()
    runner = reference_runner(package, contract)
    load_s = time.perf_counter() - start
    scorer = Scorer(runner, contract.shapes.all, tokenizer.pad_id)
    start = time.perf_counter()
    result = ask_heldout(scorer, rows, tokenizer, read_answer_key(layout.answer_key_file(dataset)))
    answer_s = time.perf_counter() - start
    if result is None:
        raise VocabularyMismatchError(f"every question of {dataset} has tokens outside the package's vocabulary")

    answers = result.answers
    print(f"package              {package} ({size_bytes(package):,} bytes), {runner.backend.value}")
    print(f"load the package     {load_s:.2f} s")
    print(f"answers              {answers.asked} in {answer_s:.1f} s, {answer_s / answers.asked * 1e3:.0f} ms each")
    print(f"exact                {_share(answers.exact, answers.asked)}")
    print(f"right mood           {_share(answers.right_mood, answers.with_mood)}")
    print(f"right tool call      {_share(answers.right_tool_call, answers.with_tool_call)}")
    print(f"clamped tokens       {answers.out_of_vocabulary}")
    print(f"teacher KL           {answers.teacher_kl_nats:.4f} nats per answer token")
    print(
        f"cross entropy        {answers.cross_entropy_nats:.4f} nats, at least {answers.teacher_entropy_nats:.4f}"
    )
    if result.halt_decisions:
        print(f"halt decisions       {_share(result.right_halts, result.halt_decisions)} as labelled")


def convert(build: Build, options: argparse.Namespace) -> None:
    """Time the conversions only: both programs are in memory, and both packages are saved."""
    student = build_student(load_checkpoint(build.checkpoint))
    lengths = build.contract.shapes.all
    example = as_input([0] * min(lengths))
    with torch.no_grad():
        tutorial = torch.jit.trace(TutorialDecoder(student, max(lengths)).eval(), example, check_trace=False)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours.mlpackage"), Path(folder, "theirs.mlpackage")
        times: dict[str, list[float]] = {"coremill": [], "bare ct.convert": []}
        for _ in range(options.runs):
            program = load_program(build.program)
            times["coremill"].append(_timed(functools.partial(_convert_main, build.contract, program, ours)))
            times["bare ct.convert"].append(_timed(functools.partial(_convert_bare, tutorial, lengths, theirs)))
        found = {name: statistics.median(each) for name, each in times.items()}
        for name, seconds in found.items():
            print(
                f"{name:20} {seconds:.1f} s, of {options.runs}: {', '.join(f'{each:.1f}' for each in times[name])}"
            )
        ratio = found["coremill"] / found["bare ct.convert"]
        print(f"ratio                {ratio:.2f} (at most 0.7; the goal is 0.5)")
        for name, package in (("coremill", ours), ("bare ct.convert", theirs)):
            length = min(COMPARED_LENGTH, max(lengths))
            print(f"{name:20} SQNR {_sqnr(package, student, build, length):.1f} dB at T = {length}")


def shapes(build: Build, options: argparse.Namespace) -> None:
    """Compare one package of `main` for all shapes with one package per shape."""
    contract = build.contract
    with tempfile.TemporaryDirectory() as folder:
        packages: dict[str, Path] = {}
        seconds: dict[str, float] = {}
        sets = {"one package": contract.shapes}
        sets |= {shape_key(each): ShapeSet(primary=each, all=(each,)) for each in contract.shapes.all}
        for name, chosen in sets.items():
            packages[name] = Path(folder, f"{name.replace(' ', '-')}.mlpackage")
            validation = {shape_key(each): contract.shape_validation[shape_key(each)] for each in chosen.all}
            part = msgspec.structs.replace(contract, shapes=chosen, shape_validation=validation)
            program = load_program(build.program)
            seconds[name] = _timed(functools.partial(_convert_main, part, program, packages[name]))
            print(f"{name:20} {seconds[name]:.1f} s, {size_bytes(packages[name]):,} bytes")
        alone = [name for name in sets if name != "one package"]
        size = sum(size_bytes(packages[name]) for name in alone) / size_bytes(packages["one package"])
        wall = sum(seconds[name] for name in alone) / seconds["one package"]
        print(f"smaller              {size:.2f} times (at least 3.5)")
        print(f"less wall time       {wall:.2f} times (at least 2)")


def _convert_main(contract: Contract, program: Program, out: Path) -> None:
    """Convert `main` as the convert stage does."""
    main = contract.package_functions[0]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    ready = prepared(program, SETTINGS)
    write_package([(main.name, convert_function(ready, main, SETTINGS))], out, contract_digest="sha256:0")


def _convert_bare(program: torch.jit.ScriptModule, lengths: tuple[int, ...], out: Path) -> None:
    listed = [(1, length) for length in lengths]
    ct.convert(
        program,
        inputs=[ct.TensorType("input_ids", shape=ct.EnumeratedShapes(listed, default=listed[0]), dtype=np.int32)],
        outputs=[ct.TensorType("logits", dtype=np.float32)],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    ).save(str(out))


def _timed(work: Callable[[], None]) -> float:
    with recording(Recorder()):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


def _sqnr(package: Path, student: Student, build: Build, length: int) -> float:
    """The SQNR of a package's logits on `length` tokens of real text, in dB."""
    (ids,) = build.prompts(rows=64).packed(length, 1)
    with torch.no_grad():
        expected = student(as_input(ids))[0][0].numpy()
    found = MLModel(package).predict({"input_ids": np.array([ids], np.int32)})["logits"][0]
    return sqnr_db(expected, found) if np.isfinite(found).all() else float("nan")


def _share(count: int, of: int) -> str:
    return f"{count} of {of}" + (f" ({count / of:.2%})" if of else "")


PARTS = {"answers": answers, "convert": convert, "shapes": shapes}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--run", default="magic-8-ball", help="the run's name")
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--torch", default="2.9.1", help="the lane")
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=2, help="conversions of each kind")
    options = parser.parse_args(argv)
    print(f"machine              {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    PARTS[options.part](Build(layout.RunLayout(options.build, options.run), options.torch), options)
    print(f"load at the end      {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
