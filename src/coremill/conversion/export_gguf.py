"""Export to GGUF: a file for each type of weights, for llama.cpp and what is built on it, such as Ollama.

    python -m coremill.conversion.export_gguf --checkpoint ball.ckpt --out ball-gguf --types f16,q8_0

Matrices are stored as the type says, norms and biases in float32, the tokenizer and the chat template as metadata.
A halt head, which llama.cpp has no place for, goes into a file of its own.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import coremill
from coremill.core import layout
from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import GgufConfig, GgufType
from coremill.core.digest import file_digest
from coremill.core.documents import write_json
from coremill.core.errors import ConfigError, TokenizerError
from coremill.core.machine import check_disk, check_memory
from coremill.core.publish import check_apart, check_replaceable
from coremill.core.stage import Figures, StageContext
from coremill.infra.version_gate import check_installed

if TYPE_CHECKING:
    from coremill.conversion.prompts import Prompts
    from coremill.data.text_tokenizer import TextTokenizer
    from coremill.model.checkpoint import Checkpoint

# This module imports nothing heavy, so that a wrong option is told at once.

log = logging.getLogger(__name__)

NEEDS = ("torch", "numpy", "tokenizers", "safetensors", "gguf", "xllamacpp")

_PROMPT_ROWS = 128
_FIGURES = ("max_abs_err", "kl_nats", "tokenizer_mismatches", "heldout_exact")
"""What the manifest has of a file's parity; the rest is in its report."""
_MARGIN_BYTES = 300_000_000
"""Memory for what is not weights: the libraries, and one tensor while it is written."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, with what it was made of."""

    checkpoint: Checkpoint
    tokenizer: TextTokenizer
    files: Mapping[GgufType, Path]
    """By type, in the order in which they were asked for."""
    halt_head: Path | None

    @property
    def figures(self) -> Figures:
        return {f"{kind}_bytes": path.stat().st_size for kind, path in self.files.items()}


def run_stage(context: StageContext) -> Figures:
    """Write and prove the run's GGUF files in `context.out`."""
    tokenizer = layout.tokenizer_file(context.tokenizer_dir)
    exported = export_gguf(
        layout.checkpoint_file(context.model_dir, context.config.name),
        tokenizer,
        context.out,
        name=context.config.name,
        types=context.config.gguf.types,
    )
    figures = exported.figures | write_ollama_model(exported, context.out)
    return figures | prove(exported, tokenizer, context.prompts_dir, context.out)


def prove(exported: Exported, tokenizer: Path, prompts: Path, out: Path) -> Figures:
    """Run the files with llama.cpp, compare them with the checkpoint, and write what was found into `out`.

    Raises:
        GgufError: llama.cpp does not load a file.
        ParityError: a file does not compute what the checkpoint computes; the report says by how much.
        TokenizerError, DatasetError: what the model is run on does not read.
    """
    from coremill.conversion.gguf_parity import measure_gguf, require_parity
    from coremill.conversion.prompts import load_prompts

    loaded = load_prompts(tokenizer, prompts, rows=_PROMPT_ROWS)
    report = measure_gguf(exported.files, exported.checkpoint, loaded, quick=True)
    write_json(layout.parity_report(out), report)
    require_parity(report, run=f"less {layout.parity_report(out)}")
    figures: Figures = {
        f"{kind}_{figure.name}": figure.measured
        for kind, file in report.files.items()
        for figure in file.figures
        if figure.name in _FIGURES
    }
    return figures | _ask_ollama(exported, loaded, out)


def _ask_ollama(exported: Exported, prompts: Prompts, out: Path) -> Figures:
    """A question put to the model in Ollama itself, where it is; else why not."""
    from coremill.conversion.ollama import OllamaAnswered, run_with_ollama
    from coremill.conversion.prompts import RowPrompts, TextPrompts

    if not layout.modelfile(out).is_file():
        return {"ollama": "not_run: there is no Modelfile"}
    assert isinstance(prompts, (RowPrompts, TextPrompts))
    question = prompts.rows[0].prompt if isinstance(prompts, RowPrompts) else prompts.chat_prompts[0].text
    found = run_with_ollama(out, next(iter(exported.files.values())).stem, question)
    if isinstance(found, OllamaAnswered):
        log.info("Ollama %s answers %r: %r", found.version, found.question, found.answer)
        return {"ollama": f"answered: {found.answer}"}
    log.info("Ollama was not run: %s", found.reason)
    return {"ollama": f"not_run: {found.reason}"}


def write_ollama_model(exported: Exported, out: Path) -> Figures:
    """Write the Modelfile of the first file beside it, and check it; none where its chat format is not known."""
    from coremill.conversion.ollama import check_modelfile, write_modelfile

    first = next(iter(exported.files.values()))
    context = exported.checkpoint.config.max_seq_len
    try:
        write_modelfile(out, first.name, exported.tokenizer, context=context)
    except TokenizerError as failure:
        log.warning("no Modelfile: %s", failure.found)
        return {"modelfile": "none: an unknown chat format"}
    check_modelfile(layout.modelfile(out))
    return {"modelfile": f"FROM {first.name}"}


def export_gguf(checkpoint: Path, tokenizer: Path, out: Path, *, name: str, types: Sequence[GgufType]) -> Exported:
    """Write a GGUF file of each type into `out`, and the halt head where there is one.

    All that can be refused is refused before anything is written. Each file is written whole or not at all.

    Args:
        tokenizer: the model's tokenizer.json; an imported model's with the files beside it.
        name: `general.name`, and what the files are called after.

    Raises:
        CheckpointUnreadableError, CheckpointContentError, UnsafeCheckpointError: a broken checkpoint.
        TokenizerError: a broken tokenizer, or one that llama.cpp cannot represent.
        VocabularyMismatchError: the tokenizer is not the one that the model was trained with.
        GgufError: a type cannot store the model.
        UnsupportedModelError: no architecture of llama.cpp computes the model.
        MachineError, OutputError: a package, memory or disk is missing, or a file is in the way.
    """
    check_installed(*NEEDS)
    from coremill.data.gguf_tokenizer import gguf_metadata
    from coremill.model.checkpoint import check_vocabulary, load_checkpoint
    from coremill.model.gguf_writer import check_writable, size_bytes, write_gguf

    files = {kind: layout.gguf_file(out, name, kind) for kind in types}
    check_apart(files.values(), (checkpoint, tokenizer))
    for path in (*files.values(), layout.halt_head_file(out, name), layout.modelfile(out)):
        check_replaceable(path)
    check_memory(_size(checkpoint) + _MARGIN_BYTES, why="for the weights as they are read")
    ckpt = load_checkpoint(checkpoint)
    text_tokenizer = load_tokenizer(tokenizer, ckpt)
    check_vocabulary(ckpt, text_tokenizer)
    metadata = gguf_metadata(text_tokenizer, vocab_size=ckpt.config.vocab_size)
    check_writable(ckpt, types)
    check_disk(out, sum(size_bytes(ckpt.config, kind) for kind in types), why="for the files")
    halt_head = _write_halt_head(ckpt, out, name)
    provenance = _provenance(checkpoint, text_tokenizer, ckpt, halt_head)
    for kind, path in files.items():
        write_gguf(path, ckpt, metadata, kind=kind, name=name, provenance=provenance)
        log.info("wrote %s, %.1f MB", path.name, path.stat().st_size / 1e6)
    return Exported(checkpoint=ckpt, tokenizer=text_tokenizer, files=files, halt_head=halt_head)


def load_tokenizer(path: Path, checkpoint: Checkpoint) -> TextTokenizer:
    """The tokenizer of `checkpoint` with what other programs need to know of it.

    Raises:
        TokenizerError: it does not read.
    """
    from coremill.data.text_tokenizer import TextTokenizer
    from coremill.data.tokenizer import Tokenizer

    return TextTokenizer.load(path) if checkpoint.imported else TextTokenizer.of_student(Tokenizer.load(path))


def _size(path: Path) -> int:
    """0 where there is no such file, which reading it says better."""
    return path.stat().st_size if path.is_file() else 0


def _write_halt_head(checkpoint: Checkpoint, out: Path, name: str) -> Path | None:
    from coremill.model.halt_head import save_halt_head

    if not checkpoint.model_arch.use_halt_head:
        return None
    path = layout.halt_head_file(out, name)
    save_halt_head(path, checkpoint)
    return path


def _provenance(
    path: Path, tokenizer: TextTokenizer, checkpoint: Checkpoint, halt_head: Path | None
) -> dict[str, str]:
    """The keys `coremill.*`: names without folders, so that equal models give equal bytes."""
    found: dict[str, Any] = {
        "version": coremill.__version__,
        "model_type": checkpoint.model_type,
        "checkpoint_digest": file_digest(path),
        "tokenizer_digest": tokenizer.digest,
    }
    if halt_head is not None:
        found |= {"halt_head_file": halt_head.name, "halt_head_digest": file_digest(halt_head)}
    return found


def parse_types(text: str) -> tuple[GgufType, ...]:
    """`f32,f16`: types, each once.

    Raises:
        ConfigError: not such a list.
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
    parser = command_parser("python -m coremill.conversion.export_gguf", __doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="default: tokenizer.json beside the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the folder; files that it has are replaced")
    parser.add_argument(
        "--prompts", type=Path, help="a held-out set, or a folder that has one or texts.jsonl: run the files on it"
    )
    parser.add_argument("--name", help="of the model; default: the checkpoint's")
    parser.add_argument(
        "--types",
        default=",".join(GgufConfig().types),
        help=f"of {','.join(get_args(GgufType))}; default: %(default)s",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command: writes the files, runs them where prompts are given, and prints the digest of each."""
    options = _parser().parse_args(argv)
    checkpoint: Path = options.checkpoint
    tokenizer: Path = options.tokenizer or layout.tokenizer_file(checkpoint.parent)
    exported = export_gguf(
        checkpoint,
        tokenizer,
        options.out,
        name=options.name or checkpoint.stem.replace("_", "-"),
        types=parse_types(options.types),
    )
    write_ollama_model(exported, options.out)
    if options.prompts is not None:
        prove(exported, tokenizer, options.prompts, options.out)
    for path in [*exported.files.values(), *([exported.halt_head] if exported.halt_head else [])]:
        sys.stdout.write(f"{file_digest(path).removeprefix('sha256:')}  {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
