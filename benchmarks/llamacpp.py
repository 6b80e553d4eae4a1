"""Compare the GGUF files of a run with its checkpoint, at full length.

    python benchmarks/llamacpp.py --run magic-8-ball
    python benchmarks/llamacpp.py --run smollm2-135m --types f32 q8_0

A build compares a few prompts. This compares 20 prompts with 256 greedy tokens each in f32 (or as many as fit in
the model's context), 1,000 texts tokenized both ways, and every held-out question of a toy. Each figure is printed
with its bound; if one misses it, the exit code is an error. Run it in the train environment.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from artifacts import Artifacts

from coremill.core import layout
from coremill.core.command import exit_on_error
from coremill.core.config import GgufType
from coremill.core.digest import file_digest
from coremill.core.errors import StageError
from coremill.core.parity import FileParity, ParityFigure
from coremill.formats.gguf.parity import measure_gguf, require_parity
from coremill.model.checkpoint import load_checkpoint

QUESTIONS = 1024


def gguf_files(run: layout.RunLayout, types: Sequence[GgufType]) -> dict[GgufType, Path]:
    """The files of the run that are of `types`.

    Raises:
        StageError: there are none.
    """
    found = {kind: layout.gguf_file(run.stage("gguf"), run.run, kind) for kind in types}
    if existing := {kind: path for kind, path in found.items() if path.is_file()}:
        return existing
    raise StageError(
        f"{run.stage('gguf')} has no GGUF file of {', '.join(types)}",
        expected="the files of the stage gguf",
        run="nox -s gguf -- --help",
    )


def show(kind: str, file: FileParity) -> None:
    print(
        f"\n{kind}: {file.size_bytes / 1e6:.1f} MB, {file.positions} positions, {file.greedy_prompts} prompts with "
        f"{file.greedy_tokens} greedy tokens, {file.heldout_questions} questions"
    )
    for figure in file.figures:
        print(f"  {figure.name:<22}{figure.measured:<12.4g}{bound(figure):<14}{figure.outcome}")
    for difference in file.differences:
        print(
            f"  prompt {difference.prompt}, token {difference.place}: {difference.token}, torch has "
            f"{difference.expected}, by {difference.gap:.2g}{' (a tie)' if difference.is_tie else ''}"
        )
    for setting in file.settings:
        print(f"  {setting.name} is {setting.found}, not {setting.expected}")
    for mismatch in file.mismatches:
        print(f"  {mismatch.text!r}: {list(mismatch.ids)}, llama.cpp {list(mismatch.llamacpp_ids)}")


def bound(figure: ParityFigure) -> str:
    if figure.bound is None:
        return ""
    return f"{'≥' if figure.at_least else '≤'} {figure.bound:g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="magic-8-ball", help="a finished build (default: %(default)s)")
    parser.add_argument("--build", type=Path, default=Path("build"), help="the directory of builds")
    parser.add_argument("--types", nargs="+", choices=get_args(GgufType), default=get_args(GgufType))
    args = parser.parse_args(argv)
    run = layout.RunLayout(args.build, args.run)
    files = gguf_files(run, args.types)
    artifacts = Artifacts(run)
    print(f"torch {torch.__version__}, {platform.machine()}, load {os.getloadavg()[0]:.1f}")
    start = time.monotonic()
    report = measure_gguf(
        files,
        load_checkpoint(artifacts.checkpoint),
        artifacts.prompts(rows=QUESTIONS),
        checkpoint_digest=file_digest(artifacts.checkpoint),
        quick=False,
    )
    for kind, file in report.files.items():
        show(kind, file)
    print(f"\n{time.monotonic() - start:.0f} s in total")
    require_parity(report)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
