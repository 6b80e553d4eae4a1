"""Verify a package: run it, and compare it with its contract and its checkpoint.

The package runs under `coremill.mil` everywhere, and also under Core ML on macOS. The exit code is 0 if every must
gate passed, and 3 otherwise; the report is written in both cases.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import msgspec

from coremill.core import layout
from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import DistilledVerify, ImportedVerify, RunConfig, VerifyConfig, read_config
from coremill.core.errors import GATES_FAILED, OK
from coremill.core.gates import must_gates_ok
from coremill.core.publish import check_apart
from coremill.core.stage import Figures, StageContext
from coremill.infra.version_gate import check_installed

# This module imports nothing heavy, so that a missing package is reported by name before an import fails.

log = logging.getLogger(__name__)

NEEDS = ("torch", "coremltools", "numpy", "tokenizers")


def run_stage(context: StageContext[RunConfig]) -> Figures:
    """Verify the run's package of one lane, and write the report whether or not the gates pass."""
    check_installed(*NEEDS)
    from coremill.verification.verify import Subject, figures, verify_to

    config, inputs = context.config, context.inputs
    subject = Subject(
        run=config.name,
        package=layout.package_dir(inputs["convert"], config.name),
        contract=layout.contract_file(inputs["export"], config.name),
        checkpoint=layout.checkpoint_file(context.model_dir, config.name),
        tokenizer=layout.tokenizer_file(context.tokenizer_dir),
        prompts=context.prompts_dir,
        stateful=config.export.stateful,
    )
    return figures(verify_to(layout.verification_report(context.out), subject, config.verify))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "verify",
        __doc__,
        example="--package convert/magic_8_ball.mlpackage --contract export/magic_8_ball_contract.json "
        "--checkpoint magic_8_ball.ckpt --dataset-dir . --out verification_report.json",
    )
    parser.add_argument("--package", type=Path, required=True, help="the package, *.mlpackage")
    parser.add_argument("--contract", type=Path, required=True, help="its *_contract.json")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the checkpoint, *.ckpt")
    parser.add_argument(
        "--dataset-dir",
        type=Path,
        required=True,
        help="contains the held-out set, or texts.jsonl and chat_prompts.jsonl",
    )
    parser.add_argument("--tokenizer", type=Path, help="the tokenizer (default: tokenizer.json in --dataset-dir)")
    parser.add_argument("--out", type=Path, required=True, help="the report to write, verification_report.json")
    parser.add_argument("--config", type=Path, help="a run's configuration; its [verify] and [export] are used")
    parser.add_argument("--heldout", type=int, metavar="N", help="answer N held-out questions")
    return parser


def _defaults(dataset_dir: Path) -> VerifyConfig:
    return ImportedVerify() if layout.texts_file(dataset_dir).is_file() else DistilledVerify()


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    run_config = read_config(options.config) if options.config else None
    config = run_config.verify if run_config else _defaults(options.dataset_dir)
    if options.heldout is not None:
        if options.heldout < 1:
            parser.error("--heldout must be at least 1")
        if not isinstance(config, DistilledVerify):
            parser.error("--heldout applies to trained models only; this model was imported")
        config = msgspec.structs.replace(config, heldout_answers=options.heldout)
    check_apart([options.out], [options.contract, options.checkpoint, options.config, options.tokenizer])
    check_installed(*NEEDS)
    from coremill.core.outputs import check_writable
    from coremill.verification.verify import Subject, verify_to

    check_writable(options.out.parent)
    subject = Subject(
        run=run_config.name if run_config else options.package.stem.replace("_", "-"),
        package=options.package,
        contract=options.contract,
        checkpoint=options.checkpoint,
        tokenizer=options.tokenizer or layout.tokenizer_file(options.dataset_dir),
        prompts=options.dataset_dir,
        stateful=run_config.export.stateful if run_config else None,
    )
    report = verify_to(options.out, subject, config)
    log.info("wrote %s: gates_ok is %s", options.out, str(report.gates_ok).lower())
    return OK if must_gates_ok(report.gates) else GATES_FAILED


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
