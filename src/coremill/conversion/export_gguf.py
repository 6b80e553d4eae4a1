"""Export to GGUF: a file for each type of weights, for llama.cpp and programs based on it, such as Ollama.

Matrices are stored as the type specifies, norms and biases in float32, the tokenizer and the chat template as
metadata. llama.cpp has no halt head, so that one is written to a file of its own. The files are run with llama.cpp,
compared with the checkpoint, and read back; parity.json has the results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import cast, get_args

from coremill.core import layout
from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import GgufConfig, GgufType, RunConfig
from coremill.core.documents import read_json
from coremill.core.errors import ConfigError
from coremill.core.outputs import check_name, check_own_folder
from coremill.core.parity import GgufParity
from coremill.core.publish import check_apart, publishing
from coremill.core.stage import Figures, StageContext
from coremill.infra.version_gate import check_installed

# This module imports nothing heavy, so that an invalid option is reported at once.

NEEDS = ("torch", "numpy", "tokenizers", "safetensors", "gguf", "xllamacpp")


def run_stage(context: StageContext[RunConfig]) -> Figures:
    """Write and verify the run's GGUF files in `context.out`."""
    check_installed(*NEEDS)
    from coremill.formats.gguf.export import export_gguf, query_ollama

    exported = export_gguf(
        layout.checkpoint_file(context.model_dir, context.config.name),
        layout.tokenizer_file(context.tokenizer_dir),
        context.prompts_dir,
        context.out,
        name=context.config.name,
        types=context.config.gguf.types,
    )
    return exported.figures | query_ollama(exported)


def parse_types(text: str) -> tuple[GgufType, ...]:
    """The types in a list such as `f32,f16`, each once.

    Raises:
        ConfigError: an unknown type, or one given twice.
    """
    known = get_args(GgufType)
    named = tuple(part.strip() for part in text.split(","))
    if unknown := [part for part in named if part not in known]:
        raise ConfigError(f"--types names {unknown[0]!r}", expected=f"some of {','.join(known)}")
    try:
        return GgufConfig(types=cast("tuple[GgufType, ...]", named)).types
    except ValueError as failure:
        raise ConfigError(f"--types {text}: {failure}", expected=f"some of {','.join(known)}") from failure


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("gguf", __doc__, example="--checkpoint magic_8_ball.ckpt --out gguf --types f16,q8_0")
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
        "--types",
        default=",".join(GgufConfig().types),
        help=f"some of {','.join(get_args(GgufType))} (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command: writes the directory atomically, and prints the digest of each file."""
    options = _parser().parse_args(argv)
    checkpoint, out = options.checkpoint, options.out
    tokenizer: Path = options.tokenizer or layout.tokenizer_file(checkpoint.parent)
    prompts: Path = options.prompts or tokenizer.parent
    name = check_name(options.name or checkpoint.stem.replace("_", "-"))
    types = parse_types(options.types)
    check_apart([out], [checkpoint.parent, tokenizer.parent, prompts])
    check_own_folder(out, _digests, what="GGUF files")
    check_installed(*NEEDS)
    from coremill.formats.gguf.export import export_gguf

    with publishing(out) as fresh:
        export_gguf(checkpoint, tokenizer, prompts, fresh, name=name, types=types)
    for file, digest in sorted(_digests(layout.parity_report(out)).items()):
        sys.stdout.write(f"{digest.removeprefix('sha256:')}  {out / file}\n")
    return 0


def _digests(report: Path) -> dict[str, str]:
    return read_json(report, GgufParity).digests


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
