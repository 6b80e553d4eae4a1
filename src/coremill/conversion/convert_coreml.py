"""Convert an exported program and its contract to one .mlpackage, and record the converter's messages."""

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
from coremill.core.digest import size_bytes
from coremill.core.errors import GATES_FAILED
from coremill.core.publish import check_apart
from coremill.core.stage import Figures, StageContext
from coremill.infra.version_gate import check_installed, check_python

# Heavy modules are imported in functions, so that in the wrong Python the version gate reports before an import
# fails.

log = logging.getLogger(__name__)

NEEDS = ("torch", "coremltools", "numpy")


def run_stage(context: StageContext[RunConfig]) -> Figures:
    """Convert the run's exported graph for one lane; if that fails, leave a record of it in `context.out`."""
    config, exported = context.config, context.inputs["export"]
    _check_environment(toy=config.is_toy)
    from coremill.coreml.convert import FailedConversionError, convert, record_failure

    contract = layout.contract_file(exported, config.name)
    graph = layout.program_file(exported, config.name, config.export.frontend)
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
    parser.add_argument("--graph", type=Path, required=True, help="the exported program, *.pt or *.pt2")
    parser.add_argument("--contract", type=Path, required=True, help="its *_contract.json")
    parser.add_argument("--out", type=Path, required=True, help="the package to write, DIR/NAME.mlpackage")
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
    parser.add_argument("--toy", action="store_true", help="accept Python 3.13, for a toy's contract only")
    parser.add_argument(
        "--allow-placeholder",
        action="store_true",
        help="if the conversion fails, write the record conversion_failed.json, with which every gate fails, "
        f"instead of a package, and exit with {GATES_FAILED}",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    settings = read_config(options.config).convert if options.config else ConvertConfig()
    given = {name: getattr(options, name) for name in ("deployment_target", "compute_precision")}
    settings = msgspec.structs.replace(settings, **{name: value for name, value in given.items() if value})
    records = [layout.diagnostics_file(options.out.parent), layout.conversion_log(options.out.parent)]
    check_apart([options.out, *records], [options.graph, options.contract, options.config])
    _check_environment(toy=options.toy)
    from coremill.coreml.convert import FailedConversionError, convert, record_failure

    try:
        convert(options.graph, options.contract, options.out, settings, toy=options.toy)
    except FailedConversionError as failure:
        if not options.allow_placeholder:
            raise
        record = record_failure(failure, options.graph, options.contract, options.out)
        log.error("%s\nno package was written; the failure is recorded in %s", failure.found, record)
        return GATES_FAILED
    log.info("wrote %s", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
