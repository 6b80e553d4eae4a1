"""`coremill <command>`: a command's module is imported when it is called, and not before."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import NamedTuple

from coremill import __version__
from coremill.core.command import exit_on_error
from coremill.core.errors import USAGE, exit_code_table


class Command(NamedTuple):
    module: str
    """Its `main(argv)` runs the command and returns the exit code."""
    purpose: str


COMMANDS = {
    "status": Command("coremill.pipeline.status", "which stages of a run are stale, and why"),
    "doctor": Command("coremill.cli.doctor", "what this machine has and lacks for each stage"),
    "report": Command("coremill.report.summary", "stages, shapes, gates and answers of a finished run"),
    "stage": Command("coremill.pipeline.runner", "run one stage of a run in this interpreter"),
    "dataset": Command("coremill.data.make_toy_kd", "write a dataset, its held-out set and its tokenizer"),
    "import": Command("coremill.cli.importer", "bring the weights and the tokenizer of a model that exists in"),
    "train": Command("coremill.training.run_toy_distill", "distil a student from a dataset"),
    "check-checkpoint": Command("coremill.training.check_checkpoint", "validate a checkpoint"),
    "export": Command("coremill.conversion.export_pytorch", "write TorchScript and its contract"),
    "convert": Command("coremill.conversion.convert_coreml", "write the Core ML package"),
    "verify": Command("coremill.conversion.verify_contract", "run the package and check it against its contract"),
    "agree": Command(
        "coremill.cli.agree", "compare every format of a run's model with its checkpoint, in one table"
    ),
    "mil": Command("coremill.cli.mil", "run, compare and examine any Core ML package: inspect, run, compare, …"),
}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0 if arguments else USAGE
    if arguments[0] == "--version":
        print(f"coremill {__version__}")
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "run `coremill --help`"
        print(f"coremill: there is no command {arguments[0]!r}; {hint}", file=sys.stderr)
        return USAGE
    return exit_on_error(lambda: int(importlib.import_module(command.module).main(arguments[1:])))


def help_text() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.purpose}" for name, command in COMMANDS.items())
    return (
        "usage: coremill <command> [options]      (coremill <command> --help tells more)\n\n"
        f"commands:\n{commands}\n\nexit codes:\n{exit_code_table()}"
    )


if __name__ == "__main__":
    sys.exit(main())
