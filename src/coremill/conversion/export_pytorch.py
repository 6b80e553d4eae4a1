"""Export: a checkpoint's `main` graph as a TorchScript program, and the contract that describes it.

The graph is traced once, at the primary shape. What was saved is then loaded again and run at every listed
shape against the checkpoint's own model, on real token ids.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from coremill.core import layout
from coremill.core.command import command_parser, exit_on_error
from coremill.core.contract import ShapeSet
from coremill.core.errors import ConfigError
from coremill.core.publish import check_apart
from coremill.core.stage import Figures, StageContext
from coremill.infra.version_gate import check_installed, check_python

# This module imports nothing heavy: in the wrong Python the version gate speaks before an import fails.

log = logging.getLogger(__name__)

TOY_SHAPES = ShapeSet(primary=128, all=(64, 128, 256))
NEEDS = ("torch", "numpy", "tokenizers")


def run_stage(context: StageContext) -> Figures:
    """Export the run's checkpoint for one lane."""
    config, dataset = context.config, context.inputs["dataset"]
    _check_environment(toy=config.is_toy)
    from coremill.conversion import export

    contract = export.export_to(
        layout.checkpoint_file(context.inputs["training"], config.name),
        layout.tokenizer_file(dataset),
        layout.heldout_file(dataset),
        config.shapes,
        toy=config.is_toy,
        program=layout.torchscript_file(context.out, config.name),
        contract=layout.contract_file(context.out, config.name),
    )
    return export.figures(contract)


def parse_shapes(text: str, primary: int | None) -> ShapeSet:
    """`64,128,256` and the primary among them, which is the only one where there is one.

    Raises:
        ConfigError: not a list of distinct positive lengths, or the primary is not among them.
    """
    expected = "lengths such as 64,128,256, and --primary one of them"
    if primary is None and "," in text:
        raise ConfigError(f"--shapes {text} without --primary", expected=expected)
    try:
        lengths = tuple(int(part) for part in text.split(","))
        return ShapeSet(primary=lengths[0] if primary is None and len(lengths) == 1 else primary or 0, all=lengths)
    except ValueError as failure:
        raise ConfigError(f"--shapes {text} --primary {primary}: {failure}", expected=expected) from failure


def _check_environment(*, toy: bool) -> None:
    check_python(toy=toy)
    check_installed(*NEEDS)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python -m coremill.conversion.export_pytorch", __doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the program and its contract")
    parser.add_argument("--tokenizer", type=Path, help="default: tokenizer.json beside the checkpoint")
    parser.add_argument("--heldout", type=Path, help="default: the held-out set beside the tokenizer")
    parser.add_argument("--shapes", help="sequence lengths; the default is the toy's, 64,128,256")
    parser.add_argument("--primary", type=int, help="the length that must work; the toy's is 128")
    parser.add_argument("--toy", action="store_true", help="admit Python 3.13, for a toy's checkpoint only")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    checkpoint: Path = options.checkpoint
    tokenizer: Path = options.tokenizer or layout.tokenizer_file(checkpoint.parent)
    shapes = TOY_SHAPES if options.shapes is None else parse_shapes(options.shapes, options.primary)
    if options.shapes is None and options.primary is not None:
        shapes = parse_shapes(",".join(map(str, TOY_SHAPES.all)), options.primary)
    program = layout.torchscript_file(options.out, checkpoint.stem)
    contract = layout.contract_file(options.out, checkpoint.stem)
    check_apart([program, contract], [checkpoint, tokenizer, options.heldout])
    _check_environment(toy=options.toy)
    from coremill.conversion import export
    from coremill.conversion.sequences import find_heldout

    heldout: Path = options.heldout or find_heldout(tokenizer.parent)
    export.export_to(checkpoint, tokenizer, heldout, shapes, toy=options.toy, program=program, contract=contract)
    log.info("wrote %s and %s", program, contract)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
