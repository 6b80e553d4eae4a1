"""Export to Hugging Face: a directory that transformers loads, compared with the checkpoint.

It contains config.json, model.safetensors, the tokenizer's files and the model card. The classes of transformers
have no halt head, so that one is written to a file of its own. The files are read back, the model is run with
transformers, and files, settings, logits, greedy answers, tokenizer and chat template are compared with the
checkpoint; parity.json has the results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from coremill.core import layout
from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import HuggingFaceConfig, RunConfig
from coremill.core.documents import read_json
from coremill.core.outputs import check_name, check_own_folder
from coremill.core.parity import HuggingFaceParity
from coremill.core.publish import check_apart, publishing
from coremill.core.stage import Figures, StageContext
from coremill.infra.version_gate import check_installed

# This module imports nothing heavy, so that an invalid option is reported at once.

NEEDS = ("torch", "numpy", "tokenizers", "safetensors", "transformers")


def run_stage(context: StageContext[RunConfig]) -> Figures:
    """Write and verify the run's Hugging Face directory in `context.out`."""
    check_installed(*NEEDS)
    from coremill.formats.huggingface.export import export_hf

    return export_hf(
        layout.checkpoint_file(context.model_dir, context.config.name),
        layout.tokenizer_file(context.tokenizer_dir),
        context.prompts_dir,
        context.out,
        name=context.config.name,
        settings=context.config.hf,
    )


def _own_files(report: Path) -> dict[str, str]:
    return read_json(report, HuggingFaceParity).files


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("hf", __doc__, example="--checkpoint magic_8_ball.ckpt --out hf")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the checkpoint, *.ckpt")
    parser.add_argument(
        "--tokenizer", type=Path, help="the tokenizer (default: tokenizer.json next to the checkpoint)"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help="a held-out set, or a directory with one or with texts.jsonl (default: the tokenizer's directory)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the directory; an earlier export there is replaced"
    )
    parser.add_argument("--name", help="name of the model (default: the checkpoint's)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="type of the weights (default: %(default)s)",
    )
    parser.add_argument("--license", help="SPDX identifier for the model card")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command: writes the directory atomically, and prints its figures, one per line."""
    options = _parser().parse_args(argv)
    checkpoint: Path = options.checkpoint
    tokenizer: Path = options.tokenizer or layout.tokenizer_file(checkpoint.parent)
    prompts: Path = options.prompts or tokenizer.parent
    name = check_name(options.name or checkpoint.stem.replace("_", "-"))
    check_own_folder(options.out, _own_files, what="Hugging Face files")
    check_apart([options.out], [checkpoint.parent, tokenizer.parent, prompts])
    check_installed(*NEEDS)
    from coremill.formats.huggingface.export import export_hf

    with publishing(options.out) as fresh:
        figures = export_hf(
            checkpoint,
            tokenizer,
            prompts,
            fresh,
            name=name,
            settings=HuggingFaceConfig(dtype=options.dtype, license=options.license),
        )
    for figure, value in figures.items():
        sys.stdout.write(f"{figure}  {value}\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
