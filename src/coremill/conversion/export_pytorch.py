"""Export a checkpoint's graphs as one program, with a contract that describes it.

The graph `main` scores whole sequences. With [export] stateful, there are also `prefill` and `decode`, which share
a key/value cache. The saved program is loaded again, and compared with the checkpoint's model on real token ids at
every listed shape.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import msgspec

from coremill.core import layout
from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import ExportConfig, RunConfig, read_config
from coremill.core.contract import ShapeSet
from coremill.core.errors import ConfigError
from coremill.core.publish import check_apart
from coremill.core.stage import Figures, StageContext
from coremill.infra.version_gate import check_installed, check_python

# Heavy modules are imported in functions, so that in the wrong Python the version gate reports before an import
# fails.

log = logging.getLogger(__name__)

TOY_SHAPES = ShapeSet(primary=128, all=(64, 128, 256))
NEEDS = ("torch", "numpy", "tokenizers")


def run_stage(context: StageContext[RunConfig]) -> Figures:
    """Export the run's checkpoint for one lane."""
    config = context.config
    _check_environment(toy=config.is_toy)
    from coremill.coreml import export

    source = export.Source(
        checkpoint=layout.checkpoint_file(context.model_dir, config.name),
        tokenizer=layout.tokenizer_file(context.tokenizer_dir),
        prompts=context.prompts_dir,
        toy=config.is_toy,
    )
    contract = export.export(
        source,
        config.shapes,
        config.export,
        program=layout.program_file(context.out, config.name, config.export.frontend),
        contract=layout.contract_file(context.out, config.name),
    )
    return export.figures(contract)


def parse_shapes(text: str, primary: int | None) -> ShapeSet:
    """Parse `64,128,256`; a single length is the primary one unless `primary` is given.

    Raises:
        ConfigError: the text is not a list of distinct positive lengths, or `primary` is not one of them.
    """
    expected = "lengths such as 64,128,256, and --primary one of them"
    if primary is None and "," in text:
        raise ConfigError(f"--shapes {text} without --primary", expected=expected)
    try:
        lengths = tuple(int(part) for part in text.split(","))
        return ShapeSet(primary=lengths[0] if primary is None else primary, all=lengths)
    except ValueError as failure:
        raise ConfigError(f"--shapes {text} --primary {primary}: {failure}", expected=expected) from failure


def _check_environment(*, toy: bool) -> None:
    check_python(toy=toy)
    check_installed(*NEEDS)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("export", __doc__, example="--checkpoint magic_8_ball.ckpt --out export")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the checkpoint, *.ckpt")
    parser.add_argument("--out", type=Path, required=True, help="directory for the program and its contract")
    parser.add_argument(
        "--tokenizer", type=Path, help="the tokenizer (default: tokenizer.json next to the checkpoint)"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help="a held-out set, or a directory with one or with texts.jsonl (default: the tokenizer's directory)",
    )
    parser.add_argument("--config", type=Path, help="a run's configuration; its [shapes] and [export] are used")
    parser.add_argument(
        "--shapes", help="sequence lengths (default: those of --config, else the toy's: 64,128,256)"
    )
    parser.add_argument("--primary", type=int, help="the length that must work (default: as for --shapes; 128)")
    parser.add_argument("--stateful", action="store_true", help="add prefill and decode with a key/value cache")
    parser.add_argument("--toy", action="store_true", help="accept Python 3.13, for a toy's checkpoint only")
    return parser


def _chosen(options: argparse.Namespace) -> tuple[ShapeSet, ExportConfig]:
    """The shapes and settings given by the options and the configuration."""
    config = read_config(options.config) if options.config else None
    shapes = config.shapes if config else TOY_SHAPES
    if options.shapes is not None:
        shapes = parse_shapes(options.shapes, options.primary)
    elif options.primary is not None:
        shapes = parse_shapes(",".join(map(str, shapes.all)), options.primary)
    settings = config.export if config else ExportConfig()
    if options.stateful:
        settings = msgspec.structs.replace(settings, stateful=True)
    return shapes, settings


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    checkpoint: Path = options.checkpoint
    tokenizer: Path = options.tokenizer or layout.tokenizer_file(checkpoint.parent)
    shapes, settings = _chosen(options)
    program = layout.program_file(options.out, checkpoint.stem, settings.frontend)
    contract = layout.contract_file(options.out, checkpoint.stem)
    check_apart([program, contract], [checkpoint, tokenizer, options.prompts])
    _check_environment(toy=options.toy)
    from coremill.coreml import export

    source = export.Source(
        checkpoint=checkpoint, tokenizer=tokenizer, prompts=options.prompts or tokenizer.parent, toy=options.toy
    )
    export.export(source, shapes, settings, program=program, contract=contract)
    log.info("wrote %s and %s", program, contract)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
