"""Conversion: a TorchScript program and its contract to one .mlpackage, and what the converter said of it."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec

from coremill.core import layout
from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import ConvertConfig, RunConfig, read_config
from coremill.core.contract import read_contract
from coremill.core.digest import size_bytes
from coremill.core.errors import GATES_FAILED
from coremill.core.publish import check_apart
from coremill.core.stage import Figures, StageContext
from coremill.infra.version_gate import check_installed, check_python

# This module imports nothing heavy: in the wrong Python the version gate speaks before an import fails.

log = logging.getLogger(__name__)

NEEDS = ("torch", "coremltools", "numpy")


def run_stage(context: StageContext[RunConfig]) -> Figures:
    """Convert the run's exported graph for one lane; of a conversion that fails, `context.out` holds the record."""
    config, exported = context.config, context.inputs["export"]
    _check_environment(toy=config.is_toy)
    from coremill.coreml.convert import FailedConversionError, convert, record_failure

    contract = layout.contract_file(exported, config.name)
    graph = exported / read_contract(contract).graph
    package = layout.package_dir(context.out, config.name)
    try:
        diagnostics = convert(graph, contract, package, config.convert, toy=config.is_toy)
    except FailedConversionError as failure:
        record_failure(failure, graph, contract, package)
        raise
    notices = {f"notices.{kind}": count for kind, count in diagnostics.counts.items()}
    return {"package_size_bytes": size_bytes(package), **notices}


def _check_environment(*, toy: bool) -> None:
    check_python(toy=toy)
    check_installed(*NEEDS)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "convert",
        __doc__,
        example="--graph export/magic_8_ball.pt --contract export/magic_8_ball_contract.json "
        "--out convert/magic_8_ball.mlpackage",
    )
    parser.add_argument("--graph", type=Path, required=True, help="the TorchScript program, *.pt")
    parser.add_argument("--contract", type=Path, required=True, help="its *_contract.json")
    parser.add_argument("--out", type=Path, required=True, help="the package to make, DIR/NAME.mlpackage")
    parser.add_argument("--config", type=Path, help="a run's configuration; its [convert] is used")
    defaults = ConvertConfig()
    for name, purpose in (
        ("deployment_target", "the oldest system that runs the package"),
        ("compute_precision", "the type that the package computes in"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            choices=get_args(get_type_hints(ConvertConfig)[name]),
            help=f"{purpose} (default: that of --config, else {getattr(defaults, name)})",
        )
    parser.add_argument("--toy", action="store_true", help="admit Python 3.13, for a toy's contract only")
    parser.add_argument(
        "--allow-placeholder",
        action="store_true",
        help="after a failed conversion, write the labelled record conversion_failed.json, on which every gate "
        f"fails, and exit with {GATES_FAILED}: there is no package",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    settings = read_config(options.config).convert if options.config else ConvertConfig()
    asked = {name: getattr(options, name) for name in ("deployment_target", "compute_precision")}
    settings = msgspec.structs.replace(settings, **{name: value for name, value in asked.items() if value})
    beside = [layout.diagnostics_file(options.out.parent), layout.conversion_log(options.out.parent)]
    check_apart([options.out, *beside], [options.graph, options.contract, options.config])
    _check_environment(toy=options.toy)
    from coremill.coreml.convert import FailedConversionError, convert, record_failure

    try:
        convert(options.graph, options.contract, options.out, settings, toy=options.toy)
    except FailedConversionError as failure:
        if not options.allow_placeholder:
            raise
        record = record_failure(failure, options.graph, options.contract, options.out)
        log.error("%s\nno package was made; the failure is recorded in %s", failure.found, record)
        return GATES_FAILED
    log.info("wrote %s", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
