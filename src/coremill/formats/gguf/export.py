"""Export to GGUF: a file for each type of weights, the halt head and the Modelfile, verified with llama.cpp."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

import coremill
from coremill.core import layout
from coremill.core.config import GgufType
from coremill.core.digest import file_digest
from coremill.core.documents import write_json
from coremill.core.machine import check_disk
from coremill.core.parity import GgufParity
from coremill.core.stage import Figures
from coremill.data.prompts import Prompts, check_kind, load_prompts
from coremill.formats.gguf.parity import files_at_once, measure_gguf, require_parity
from coremill.formats.gguf.tokenizer import gguf_metadata, unheld_ends
from coremill.formats.gguf.writer import check_writable, size_bytes, write_gguf
from coremill.formats.halt_head import save_halt_head
from coremill.formats.ollama.modelfile import write_modelfile
from coremill.formats.ollama.server import OllamaAnswered, run_with_ollama
from coremill.formats.parity import LENGTH
from coremill.model.checkpoint import Checkpoint, check_vocabulary, load_checkpoint
from coremill.model.memory import check_model_memory

log = logging.getLogger(__name__)

_PROMPT_ROWS = 128
_FIGURES = ("max_abs_err", "kl_nats", "tokenizer_mismatches", "heldout_exact")
"""The figures of a file that go into the manifest; its report has all of them."""
_BYTES_PER_PARAMETER, _LOGITS = 0.92, 6.8
"""For each file that is measured at a time: llama.cpp's own layout of the weights, and its buffers and ours for the
logits of a sequence."""
_BASE_BYTES = 430_000_000


class _Source(NamedTuple):
    """The inputs of an export."""

    checkpoint: Checkpoint
    checkpoint_digest: str
    prompts: Prompts
    """Of the model's own tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The files of an export."""

    source: _Source
    out: Path
    files: Mapping[GgufType, Path]
    """By type, in the order requested."""
    has_modelfile: bool
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
        first = next(iter(self.files.values()))
        modelfile = f"FROM {first.name}" if self.has_modelfile else "none: an unknown chat format"
        return {**sizes, **measured, "modelfile": modelfile}


def export_gguf(
    checkpoint: Path, tokenizer: Path, prompts: Path, out: Path, *, name: str, types: Sequence[GgufType]
) -> Exported:
    """Write a GGUF file of each type, the halt head and the Modelfile into `out`, an empty directory; verify them.

    Args:
        tokenizer: the model's tokenizer.json; for an imported model, with the files next to it.
        prompts: a held-out set, or a directory that has one or texts.jsonl.
        name: `general.name`, and the beginning of the file names.

    Raises:
        CheckpointUnreadableError, CheckpointContentError, UnsafeCheckpointError: a broken checkpoint.
        TokenizerError: a broken tokenizer, or one that llama.cpp cannot represent.
        DatasetError: the prompts cannot be read, or are too short.
        VocabularyMismatchError: the tokenizer is not the one that the model was trained with.
        GgufError: a type cannot store the model.
        UnsupportedModelError: no architecture of llama.cpp computes the model.
        ModelfileError: a Modelfile cannot contain the default system prompt of the chat template.
        ParityError: the outputs or the metadata of a file differ from the checkpoint; `out` keeps what was written.
        MachineError, OutputError: memory or disk space is missing, or `out` cannot be written.
    """
    ckpt = load_checkpoint(checkpoint)
    loaded = load_prompts(tokenizer, prompts, rows=_PROMPT_ROWS)
    check_kind(loaded, imported=ckpt.imported)
    check_vocabulary(ckpt, loaded.tokenizer)
    at_once = files_at_once(len(types), ckpt)
    check_model_memory(
        ckpt,
        bytes_per_parameter=at_once * _BYTES_PER_PARAMETER,
        base_bytes=_BASE_BYTES,
        seq_len=min(LENGTH, ckpt.config.max_seq_len),
        logits=at_once * _LOGITS,
        work="export",
    )
    check_writable(ckpt, types)
    check_disk(out, sum(size_bytes(ckpt.config, kind) for kind in types), why="for the files")
    source = _Source(ckpt, file_digest(checkpoint), loaded)
    halt_head = _write_halt_head(ckpt, out, name)
    files = _write_files(source, out, name, types, halt_head)
    modelfile = write_modelfile(out, files[types[0]].name, loaded.text_tokenizer, context=ckpt.config.max_seq_len)
    return Exported(
        source=source, out=out, files=files, has_modelfile=modelfile is not None, report=_verify(source, files, out)
    )


def _write_halt_head(checkpoint: Checkpoint, out: Path, name: str) -> Path | None:
    if not checkpoint.model_arch.use_halt_head:
        return None
    path = layout.halt_head_file(out, name)
    save_halt_head(path, checkpoint)
    return path


def _write_files(
    source: _Source, out: Path, name: str, types: Sequence[GgufType], halt_head: Path | None
) -> dict[GgufType, Path]:
    ckpt, tokenizer = source.checkpoint, source.prompts.text_tokenizer
    metadata = gguf_metadata(tokenizer, vocab_size=ckpt.config.vocab_size)
    if unheld := unheld_ends(tokenizer):
        texts = ", ".join(f"{tokenizer.decode([token])} ({token})" for token in unheld)
        log.warning("a GGUF file has keys for three end tokens; llama.cpp does not stop at %s", texts)
    files = {kind: layout.gguf_file(out, name, kind) for kind in types}
    for kind, path in files.items():
        write_gguf(path, ckpt, metadata, kind=kind, name=name, provenance=_provenance(source, halt_head))
        log.info("wrote %s, %.1f MB", path.name, path.stat().st_size / 1e6)
    return files


def _provenance(source: _Source, halt_head: Path | None) -> dict[str, str]:
    """The keys `coremill.*`: names without directories, so that equal models give equal bytes."""
    found = {
        "version": coremill.__version__,
        "model_type": source.checkpoint.model_type,
        "checkpoint_digest": source.checkpoint_digest,
        "tokenizer_digest": source.prompts.text_tokenizer.digest,
    }
    if halt_head is not None:
        found |= {"halt_head_file": halt_head.name, "halt_head_digest": file_digest(halt_head)}
    return found


def _verify(source: _Source, files: Mapping[GgufType, Path], out: Path) -> GgufParity:
    """Compare the files under llama.cpp with the checkpoint, and write the report into `out`.

    Raises:
        GgufError: llama.cpp does not load a file.
        ParityError: a file differs from the checkpoint.
        DatasetError: the texts are too short.
    """
    report = measure_gguf(
        files, source.checkpoint, source.prompts, checkpoint_digest=source.checkpoint_digest, quick=True
    )
    written = {path.name for path in files.values()}
    others = {path.name: file_digest(path) for path in sorted(out.iterdir()) if path.name not in written}
    report = msgspec.structs.replace(report, others=others)
    write_json(layout.parity_report(out), report)
    require_parity(report)
    return report


def query_ollama(exported: Exported) -> Figures:
    """Ollama's answer to a question, or the reason why it was not run; raises as `run_with_ollama` does."""
    if not exported.has_modelfile:
        return {"ollama": "not_run: there is no Modelfile"}
    question, _ = exported.source.prompts.exchanges[0]
    found = run_with_ollama(exported.out, question)
    if isinstance(found, OllamaAnswered):
        log.info("Ollama %s answers %r: %r", found.version, found.question, found.answer)
        return {"ollama": f"answered: {found.answer}"}
    log.info("Ollama was not run: %s", found.reason)
    return {"ollama": f"not_run: {found.reason}"}
