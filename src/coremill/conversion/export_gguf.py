"""Export to GGUF: a file for each type of weights, for llama.cpp and what is built on it, such as Ollama.

Matrices are stored as the type says, norms and biases in float32, the tokenizer and the chat template as metadata.
A halt head, which llama.cpp has no place for, goes into a file of its own. What was written is run with llama.cpp
and compared with the checkpoint, and read back; parity.json says how that came out.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

import msgspec

import coremill
from coremill.core import layout
from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import GgufConfig, GgufType, RunConfig
from coremill.core.digest import file_digest
from coremill.core.documents import read_json, write_json
from coremill.core.errors import ConfigError, TokenizerError
from coremill.core.machine import check_disk, check_memory
from coremill.core.outputs import check_name, check_own_folder
from coremill.core.parity import GgufParity
from coremill.core.publish import check_apart, publishing
from coremill.core.stage import Figures, StageContext
from coremill.infra.version_gate import check_installed

if TYPE_CHECKING:
    from coremill.data.prompts import Prompts
    from coremill.model.checkpoint import Checkpoint

# This module imports nothing heavy, so that a wrong option is told at once.

log = logging.getLogger(__name__)

NEEDS = ("torch", "numpy", "tokenizers", "safetensors", "gguf", "xllamacpp")

_PROMPT_ROWS = 128
_FIGURES = ("max_abs_err", "kl_nats", "tokenizer_mismatches", "heldout_exact")
"""What the manifest has of a file's parity; the rest is in its report."""
_COPIES = 5
"""How often the weights are in memory: as read, in the checkpoint's model, and three times for a file."""
_MARGIN_BYTES = 300_000_000
"""Memory for what is not weights: the libraries, and one tensor while it is written."""


class _Source(NamedTuple):
    """What the files are made of."""

    checkpoint: Checkpoint
    checkpoint_digest: str
    prompts: Prompts
    """Of the model's own tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written and proved, with what it was made of."""

    source: _Source
    files: Mapping[GgufType, Path]
    """By type, in the order in which they were asked for."""
    halt_head: Path | None
    modelfile: Path | None
    report: GgufParity

    @property
    def figures(self) -> Figures:
        sizes: Figures = {f"{kind}_bytes": path.stat().st_size for kind, path in self.files.items()}
        measured: Figures = {
            f"{kind}_{figure.name}": figure.measured
            for kind, file in self.report.files.items()
            for figure in file.figures
            if figure.name in _FIGURES
        }
        modelfile = (
            "none: an unknown chat format"
            if self.modelfile is None
            else f"FROM {next(iter(self.files.values())).name}"
        )
        return {**sizes, **measured, "modelfile": modelfile}


def run_stage(context: StageContext[RunConfig]) -> Figures:
    """Write and prove the run's GGUF files in `context.out`."""
    exported = export_gguf(
        layout.checkpoint_file(context.model_dir, context.config.name),
        layout.tokenizer_file(context.tokenizer_dir),
        context.prompts_dir,
        context.out,
        name=context.config.name,
        types=context.config.gguf.types,
    )
    return exported.figures | _ask_ollama(exported, context.out)


def export_gguf(
    checkpoint: Path, tokenizer: Path, prompts: Path, out: Path, *, name: str, types: Sequence[GgufType]
) -> Exported:
    """Write a GGUF file of each type into `out`, an empty folder, with all that belongs to them, and prove them.

    Args:
        tokenizer: the model's tokenizer.json; an imported model's with the files beside it.
        prompts: a held-out set, or a folder that has one or texts.jsonl.
        name: `general.name`, and what the files are called after.

    Raises:
        CheckpointUnreadableError, CheckpointContentError, UnsafeCheckpointError: a broken checkpoint.
        TokenizerError: a broken tokenizer, or one that llama.cpp cannot represent.
        DatasetError: what the model is run on does not read, or is too short.
        VocabularyMismatchError: the tokenizer is not the one that the model was trained with.
        GgufError: a type cannot store the model.
        UnsupportedModelError: no architecture of llama.cpp computes the model.
        ParityError: a file does not compute what the checkpoint computes, or says something else; `out` keeps what
            was written.
        MachineError, OutputError: a package, memory or disk is missing, or `out` cannot be written.
    """
    check_installed(*NEEDS)
    from coremill.data.prompts import check_kind, load_prompts
    from coremill.formats.gguf.writer import check_writable, size_bytes
    from coremill.model.checkpoint import check_vocabulary, load_checkpoint

    check_memory(
        _COPIES * _size(checkpoint) + _MARGIN_BYTES, why="for the weights, and for a file compared with them"
    )
    ckpt = load_checkpoint(checkpoint)
    loaded = load_prompts(tokenizer, prompts, rows=_PROMPT_ROWS)
    check_kind(loaded, imported=ckpt.imported)
    check_vocabulary(ckpt, loaded.tokenizer)
    check_writable(ckpt, types)
    check_disk(out, sum(size_bytes(ckpt.config, kind) for kind in types), why="for the files")
    source = _Source(ckpt, file_digest(checkpoint), loaded)
    halt_head = _write_halt_head(ckpt, out, name)
    files = _write_files(source, out, name, types, halt_head)
    modelfile = _write_ollama_model(source, files[types[0]], out)
    report = _prove(source, files, out)
    return Exported(source=source, files=files, halt_head=halt_head, modelfile=modelfile, report=report)


def _write_files(
    source: _Source, out: Path, name: str, types: Sequence[GgufType], halt_head: Path | None
) -> dict[GgufType, Path]:
    from coremill.formats.gguf.tokenizer import gguf_metadata
    from coremill.formats.gguf.writer import write_gguf

    ckpt = source.checkpoint
    metadata = gguf_metadata(source.prompts.text_tokenizer, vocab_size=ckpt.config.vocab_size)
    files = {kind: layout.gguf_file(out, name, kind) for kind in types}
    for kind, path in files.items():
        write_gguf(path, ckpt, metadata, kind=kind, name=name, provenance=_provenance(source, halt_head))
        log.info("wrote %s, %.1f MB", path.name, path.stat().st_size / 1e6)
    return files


def _prove(source: _Source, files: Mapping[GgufType, Path], out: Path) -> GgufParity:
    """Run the files with llama.cpp, compare them with the checkpoint, and write what was found into `out`.

    Raises:
        GgufError: llama.cpp does not load a file.
        ParityError: a file does not compute what the checkpoint computes.
        DatasetError: the texts are too short.
    """
    from coremill.formats.gguf.parity import measure_gguf, require_parity

    report = measure_gguf(
        files, source.checkpoint, source.prompts, checkpoint_digest=source.checkpoint_digest, quick=True
    )
    written = {path.name for path in files.values()}
    others = {path.name: file_digest(path) for path in sorted(out.iterdir()) if path.name not in written}
    report = msgspec.structs.replace(report, others=others)
    write_json(layout.parity_report(out), report)
    require_parity(report)
    return report


def _ask_ollama(exported: Exported, out: Path) -> Figures:
    """A question put to the model in Ollama itself, where it is; else why not."""
    from coremill.data.prompts import RowPrompts, TextPrompts
    from coremill.formats.ollama.server import OllamaAnswered, run_with_ollama

    if exported.modelfile is None:
        return {"ollama": "not_run: there is no Modelfile"}
    prompts = exported.source.prompts
    assert isinstance(prompts, (RowPrompts, TextPrompts))
    question = prompts.rows[0].prompt if isinstance(prompts, RowPrompts) else prompts.chat_prompts[0].text
    found = run_with_ollama(out, next(iter(exported.files.values())).stem, question)
    if isinstance(found, OllamaAnswered):
        log.info("Ollama %s answers %r: %r", found.version, found.question, found.answer)
        return {"ollama": f"answered: {found.answer}"}
    log.info("Ollama was not run: %s", found.reason)
    return {"ollama": f"not_run: {found.reason}"}


def _write_ollama_model(source: _Source, first: Path, out: Path) -> Path | None:
    """Write the Modelfile of `first` beside it; None where its chat format is not known."""
    from coremill.formats.ollama.server import write_modelfile

    tokenizer, path = source.prompts.text_tokenizer, layout.modelfile(out)
    try:
        write_modelfile(out, first.name, tokenizer, context=source.checkpoint.config.max_seq_len)
    except TokenizerError as failure:
        log.warning("no Modelfile: %s", failure.found)
        return None
    return path


def _size(path: Path) -> int:
    """0 where there is no such file, which reading it says better."""
    return path.stat().st_size if path.is_file() else 0


def _write_halt_head(checkpoint: Checkpoint, out: Path, name: str) -> Path | None:
    from coremill.formats.halt_head import save_halt_head

    if not checkpoint.model_arch.use_halt_head:
        return None
    path = layout.halt_head_file(out, name)
    save_halt_head(path, checkpoint)
    return path


def _provenance(source: _Source, halt_head: Path | None) -> dict[str, str]:
    """The keys `coremill.*`: names without folders, so that equal models give equal bytes."""
    found: dict[str, Any] = {
        "version": coremill.__version__,
        "model_type": source.checkpoint.model_type,
        "checkpoint_digest": source.checkpoint_digest,
        "tokenizer_digest": source.prompts.text_tokenizer.digest,
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
    parser = command_parser("gguf", __doc__, example="--checkpoint ball.ckpt --out ball-gguf --types f16,q8_0")
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
    """The command: writes the folder, whole or not at all, and prints the digest of each file."""
    options = _parser().parse_args(argv)
    checkpoint, out = options.checkpoint, options.out
    tokenizer: Path = options.tokenizer or layout.tokenizer_file(checkpoint.parent)
    prompts: Path = options.prompts or tokenizer.parent
    name = check_name(options.name or checkpoint.stem.replace("_", "-"))
    types = parse_types(options.types)
    check_apart([out], [checkpoint.parent, tokenizer.parent, prompts])
    check_own_folder(out, _digests, what="GGUF files")
    with publishing(out) as fresh:
        export_gguf(checkpoint, tokenizer, prompts, fresh, name=name, types=types)
    for file, digest in sorted(_digests(layout.parity_report(out)).items()):
        sys.stdout.write(f"{digest.removeprefix('sha256:')}  {out / file}\n")
    return 0


def _digests(report: Path) -> dict[str, str]:
    return read_json(report, GgufParity).digests


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
