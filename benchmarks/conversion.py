"""Held-out questions answered by the package of a finished build, and how long that takes.

    python benchmarks/conversion.py --run magic-8-ball --answers 1000

Run it in a convert environment. Nothing else is measured or asserted; the gates of a build are its verification's.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

from coremill.conversion.backends import reference_runner
from coremill.conversion.checks import ask_heldout
from coremill.conversion.package import check_package
from coremill.conversion.scoring import Scorer
from coremill.conversion.sequences import read_some
from coremill.core import layout
from coremill.core.command import exit_on_error
from coremill.core.contract import read_contract
from coremill.core.digest import size_bytes
from coremill.core.errors import VocabularyMismatchError
from coremill.data.tokenizer import Tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="magic-8-ball", help="the run's name")
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--torch", default="2.9.1", help="the lane")
    parser.add_argument("--answers", type=int, default=1000)
    options = parser.parse_args(argv)
    run = layout.RunLayout(options.build, options.run)
    dataset = run.stage("dataset")
    package = layout.package_dir(run.stage("convert", options.torch), options.run)
    contract = read_contract(layout.contract_file(run.stage("export", options.torch), options.run))
    tokenizer = Tokenizer.load(layout.tokenizer_file(dataset))
    rows = read_some(layout.heldout_file(dataset), options.answers)
    check_package(package)

    start = time.perf_counter()
    runner = reference_runner(package, contract)
    load_s = time.perf_counter() - start
    scorer = Scorer(runner, contract.shapes.all, tokenizer.pad_id)
    start = time.perf_counter()
    result = ask_heldout(scorer, rows, tokenizer)
    answer_s = time.perf_counter() - start
    if result is None:
        raise VocabularyMismatchError(f"no question of {dataset} is within the package's vocabulary")

    answers = result.answers
    print(f"package              {package} ({size_bytes(package):,} bytes), {runner.backend.value}")
    print(f"machine              {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"load the package     {load_s:.2f} s")
    print(f"answers              {answers.asked} in {answer_s:.1f} s, {answer_s / answers.asked * 1e3:.0f} ms each")
    print(f"exact                {_share(answers.exact, answers.asked)}")
    print(f"right mood           {_share(answers.right_mood, answers.with_mood)}")
    print(f"right tool call      {_share(answers.right_tool_call, answers.with_tool_call)}")
    print(f"clamped tokens       {answers.out_of_vocabulary}")
    print(f"teacher KL           {answers.teacher_kl_nats:.4f} nats an answer token")
    print(f"cross entropy        {answers.cross_entropy_nats:.4f} nats, floor {answers.teacher_entropy_nats:.4f}")
    if result.halt_agreement is not None:
        print(f"halt decisions       {result.halt_agreement:.2%} as labelled")
    return 0


def _share(count: int, of: int) -> str:
    return f"{count} of {of}" + (f" ({count / of:.2%})" if of else "")


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
