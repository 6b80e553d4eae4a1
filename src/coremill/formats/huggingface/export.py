"""Export to Hugging Face: the model's directory, compared with the checkpoint under transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch

import coremill
from coremill.core import layout
from coremill.core.config import HuggingFaceConfig
from coremill.core.digest import file_digest
from coremill.core.documents import write_json
from coremill.core.errors import ParityError
from coremill.core.gates import Outcome, must_gates_ok
from coremill.core.machine import check_disk
from coremill.core.parity import HuggingFaceParity
from coremill.core.publish import write_atomic
from coremill.core.stage import Figures
from coremill.core.toolchain import current_toolchain
from coremill.data.prompts import Prompts, load_prompts
from coremill.formats.halt_head import HALT_HEAD, save_halt_head
from coremill.formats.huggingface.model_card import CARD, CardFacts, model_card
from coremill.formats.huggingface.parity import Expected, Findings, compare
from coremill.formats.huggingface.reader import CONFIG
from coremill.formats.huggingface.writer import TokenIds, architecture_of, config_json, write_huggingface
from coremill.formats.parity import LENGTH
from coremill.model.checkpoint import IMPORTED_FROM, Checkpoint, check_vocabulary, load_checkpoint
from coremill.model.memory import check_model_memory
from coremill.model.reference import Reference

log = logging.getLogger(__name__)

_PROMPT_ROWS = 1000
"""The most rows of a held-out set that are read: the tokenizers are compared on their texts."""
_BYTES_PER_PARAMETER = 4.25
"""transformers' model in float32; from a file in float32, it is mapped."""
_BASE_BYTES = 600_000_000
_LOGITS = 2
"""Sets of logits of a sequence: transformers', and the reference's."""


class _Source(NamedTuple):
    """The inputs of an export."""

    name: str
    checkpoint: Checkpoint
    checkpoint_digest: str
    prompts: Prompts
    """Of the model's own tokenizer."""
    settings: HuggingFaceConfig


def export_hf(
    checkpoint: Path, tokenizer: Path, prompts: Path, out: Path, *, name: str, settings: HuggingFaceConfig
) -> Figures:
    """Write the directory into `out`, an empty directory, and compare it with the checkpoint under transformers.

    Args:
        tokenizer: the model's tokenizer.json; for an imported model, with the files next to it.
        prompts: a held-out set, or a directory that has one or texts.jsonl.
        name: the model's name on the model card, and in the name of the halt head's file.

    Returns:
        The number of parameters, the size in bytes, and the figures of the comparison.

    Raises:
        CheckpointUnreadableError, UnsafeCheckpointError: a broken checkpoint.
        CheckpointContentError: a broken checkpoint, or a value that exceeds the range of `settings.dtype`.
        TokenizerError: a broken tokenizer.
        DatasetError: the prompts cannot be read, or are too short.
        VocabularyMismatchError: the tokenizer is not the one that the model was trained with.
        UnsupportedModelError: no class of transformers computes the model.
        ParityError: the directory differs from the checkpoint; `out` keeps what was written, with parity.json.
        MachineError, OutputError: memory or disk space is missing, or `out` cannot be written.
    """
    size_bytes = checkpoint.stat().st_size if checkpoint.is_file() else 0  # loading reports a missing file
    check_disk(out, size_bytes, why="for model.safetensors")
    ckpt = load_checkpoint(checkpoint)
    loaded = load_prompts(tokenizer, prompts, rows=_PROMPT_ROWS)
    check_vocabulary(ckpt, loaded.tokenizer)
    widened = 0 if settings.dtype == "float32" else _BYTES_PER_PARAMETER
    check_model_memory(
        ckpt,
        bytes_per_parameter=widened,
        base_bytes=_BASE_BYTES,
        seq_len=min(LENGTH, ckpt.config.max_seq_len),
        logits=_LOGITS,
        work="export",
    )
    source = _Source(name, ckpt, file_digest(checkpoint), loaded, settings)
    expected = _write(source, out)
    parameters = _parameters(ckpt)
    log.info("comparing %s, %s parameters, with its checkpoint", name, f"{parameters:,}")
    findings = compare(out, expected)
    write_json(layout.parity_report(out), _report(source, out, findings))
    _require_parity(findings)
    return _figures(out, parameters, findings)


def _write(source: _Source, out: Path) -> Expected:
    """Write every file of the directory except parity.json, and return what reading it must give."""
    checkpoint, tokenizer, dtype = source.checkpoint, source.prompts.text_tokenizer, source.settings.dtype
    architecture = architecture_of(checkpoint.config, checkpoint.model_type)
    tokens = TokenIds(bos=tokenizer.bos_id, eos=tokenizer.eos_ids, pad=tokenizer.pad_id)
    stored = write_huggingface(out, checkpoint, dtype=dtype, tokens=tokens)
    tokenizer.save(out)
    halt_head = None
    if checkpoint.model_arch.use_halt_head:
        halt_head = layout.halt_head_file(out, source.name)
        save_halt_head(halt_head, checkpoint)
    card = model_card(_card(source, out, architecture, halt_head)).encode("utf-8")
    write_atomic(out / CARD, card)
    config = config_json(checkpoint, dtype=dtype, tokens=tokens)
    return Expected(
        config=checkpoint.config,
        reference=Reference(checkpoint.config, stored),
        architecture=architecture,
        stored=stored,
        dtype=getattr(torch, dtype),
        tokenizer=tokenizer,
        prompts=source.prompts,
        files={CONFIG: config, CARD: card, **tokenizer.files()},
        halt_head=halt_head,
    )


def _card(source: _Source, out: Path, architecture: str, halt_head: Path | None) -> CardFacts:
    checkpoint, tokenizer = source.checkpoint, source.prompts.text_tokenizer
    return CardFacts(
        name=source.name,
        architecture=architecture,
        model_type=checkpoint.model_type,
        parameters=_parameters(checkpoint),
        max_seq_len=checkpoint.config.max_seq_len,
        dtype=source.settings.dtype,
        license=source.settings.license,
        checkpoint_digest=source.checkpoint_digest,
        tokenizer_digest=tokenizer.digest,
        training=dict(checkpoint.training),
        imported_from=checkpoint.training.get(IMPORTED_FROM),
        has_chat_template=tokenizer.chat_template is not None,
        halt_head=None if halt_head is None else halt_head.name,
        parity=layout.parity_report(out).name,
        coremill=coremill.__version__,
    )


def _parameters(checkpoint: Checkpoint) -> int:
    """Return the number of parameters of model.safetensors, which has no halt head."""
    return sum(tensor.numel() for name, tensor in checkpoint.state_dict.items() if name != HALT_HEAD)


def _report(source: _Source, out: Path, findings: Findings) -> HuggingFaceParity:
    return HuggingFaceParity(
        checkpoint_digest=source.checkpoint_digest,
        dtype=source.settings.dtype,
        files={path.name: file_digest(path) for path in sorted(out.iterdir())},
        gates=findings.gates,
        logits_max_abs=findings.logits_max_abs,
        differences=findings.differences,
        toolchain=current_toolchain("transformers"),
    )


def _require_parity(findings: Findings) -> None:
    """Check that every figure is within its bound.

    Raises:
        ParityError: names each figure that is not.
    """
    if must_gates_ok(findings.gates):
        return
    failed = [gate for gate in findings.gates if gate.outcome is Outcome.FAILED]
    raise ParityError(
        "the directory differs from the checkpoint: " + "; ".join(f"{gate.name}: {gate.reason}" for gate in failed),
        expected="every figure within its bound",
        run="python -m coremill.training.check_checkpoint CHECKPOINT --tokenizer TOKENIZER",
    )


def _figures(out: Path, parameters: int, findings: Findings) -> Figures:
    measured = {gate.name.replace(" ", "_"): gate.measured for gate in findings.gates}
    return {
        "parameters": parameters,
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
        **{name: value for name, value in measured.items() if value is not None},
        "logits_max_abs": findings.logits_max_abs,
        "greedy_ties": sum(difference.is_tie for difference in findings.differences),
    }
