"""`coremill import`: light, so that it starts among the tools; the work is done where torch is."""

from __future__ import annotations

import importlib
import sys

from coremill.cli.elsewhere import run_where_installed
from coremill.core.command import exit_on_error
from coremill.pipeline.environments import TRAIN

NEEDS = ("torch", "safetensors", "gguf", "tokenizers", "jinja2")


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"} & set(arguments):
        run_where_installed(["import", *arguments], needs=NEEDS, environments=[TRAIN])
    return int(importlib.import_module("coremill.training.import_model").main(arguments))


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
