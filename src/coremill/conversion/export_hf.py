"""Export to Hugging Face: a directory that transformers loads, proved to compute what the checkpoint computes.

config.json, model.safetensors, the tokenizer's files, the model card, and a halt head in a file of its own.
What was written is read back, loaded with transformers and compared with the checkpoint's own model: files,
settings, logits, greedy answers, tokenizer and chat template. parity.json says how that came out.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import coremill
from coremill.core import layout
from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import HuggingFaceConfig, RunConfig
from coremill.core.digest import file_digest
from coremill.core.documents import read_json, write_json
from coremill.core.errors import ParityError
from coremill.core.gates import Outcome, must_gates_ok
from coremill.core.machine import check_disk, check_memory
from coremill.core.outputs import check_name, check_own_folder
from coremill.core.parity import HuggingFaceParity
from coremill.core.publish import check_apart, publishing, write_atomic
from coremill.core.stage import Figures, StageContext
from coremill.core.toolchain import current_toolchain
from coremill.formats.huggingface.model_card import CARD, CardFacts, model_card
from coremill.infra.version_gate import check_installed

if TYPE_CHECKING:
    from coremill.data.prompts import Prompts
    from coremill.formats.huggingface.parity import Findings
    from coremill.model.checkpoint import Checkpoint

# This module imports nothing heavy, so that a wrong option is told at once.

log = logging.getLogger(__name__)

NEEDS = ("torch", "numpy", "tokenizers", "safetensors", "transformers")

_ROWS = 1000
"""Of a held-out set, at most: a tokenizer is compared on their texts."""
_COPIES = 4
"""How often the weights are in memory: as read, as stored, in the checkpoint's model, in transformers'."""


def run_stage(context: StageContext[RunConfig]) -> Figures:
    """Write and prove the run's Hugging Face directory in `context.out`."""
    return export_hf(
        layout.checkpoint_file(context.model_dir, context.config.name),
        layout.tokenizer_file(context.tokenizer_dir),
        context.prompts_dir,
        context.out,
        name=context.config.name,
        settings=context.config.hf,
    )


def export_hf(
    checkpoint: Path, tokenizer: Path, prompts: Path, out: Path, *, name: str, settings: HuggingFaceConfig
) -> Figures:
    """Write the directory into `out`, an empty folder, and compare what transformers makes of it.

    Args:
        tokenizer: the model's tokenizer.json; an imported model's with the files beside it.
        prompts: a held-out set, or a folder that has one or texts.jsonl.
        name: what the model card calls the model.

    Returns:
        Bytes and parameters, and what the comparison measured.

    Raises:
        CheckpointUnreadableError, CheckpointContentError, UnsafeCheckpointError, TokenizerError, DatasetError: a
            broken input; a value beyond `settings.dtype` is one.
        VocabularyMismatchError: the tokenizer is not the one that the model was trained with.
        UnsupportedModelError: no class of transformers computes the model.
        ParityError: the directory is not what the checkpoint is; what was written, parity.json with it, is still in
            `out`, for a caller that wants to look.
        MachineError, OutputError: a package, memory or disk is missing, or `out` cannot be written.
    """
    check_installed(*NEEDS)
    from coremill.data.prompts import load_prompts
    from coremill.model.checkpoint import check_vocabulary, load_checkpoint

    size_bytes = checkpoint.stat().st_size if checkpoint.is_file() else 0
    check_memory(_COPIES * size_bytes, why="for the weights, as they are read, stored and computed with twice")
    check_disk(out, size_bytes, why="for model.safetensors")
    ckpt = load_checkpoint(checkpoint)
    loaded = load_prompts(tokenizer, prompts, rows=_ROWS)
    check_vocabulary(ckpt, loaded.tokenizer)
    written = _Directory(out, name, settings, ckpt, file_digest(checkpoint), loaded)
    findings = written.write()
    _judge(findings)
    return written.figures(findings)


class _Directory:
    """The directory of one checkpoint, in the making."""

    def __init__(
        self,
        out: Path,
        name: str,
        settings: HuggingFaceConfig,
        checkpoint: Checkpoint,
        checkpoint_digest: str,
        prompts: Prompts,
    ) -> None:
        from coremill.formats.huggingface.writer import architecture_of

        self.out = out
        self.name = name
        self.settings = settings
        self.checkpoint = checkpoint
        self.checkpoint_digest = checkpoint_digest
        self.prompts = prompts
        self.tokenizer = prompts.text_tokenizer
        has_halt_head = checkpoint.model_arch.use_halt_head
        self.halt_head = layout.halt_head_file(out, name) if has_halt_head else None
        self.architecture = architecture_of(checkpoint.config, checkpoint.model_type)
        self.parameters = 0

    def write(self) -> Findings:
        """Write all of it, compare, and write how that came out."""
        from coremill.formats.huggingface.parity import Reference, compare
        from coremill.formats.huggingface.reader import CONFIG
        from coremill.formats.huggingface.writer import TokenIds, config_json, write_huggingface
        from coremill.model.checkpoint import build_student

        tokens = TokenIds(bos=self.tokenizer.bos_id, eos=self.tokenizer.eos_ids, pad=self.tokenizer.pad_id)
        stored = write_huggingface(self.out, self.checkpoint, dtype=self.settings.dtype, tokens=tokens)
        self.parameters = sum(tensor.numel() for tensor in stored.values())
        self.tokenizer.save(self.out)
        self._write_halt_head()
        card = model_card(self._card()).encode("utf-8")
        write_atomic(self.out / CARD, card)
        config = config_json(self.checkpoint, dtype=self.settings.dtype, tokens=tokens)
        log.info("comparing %s, %s parameters, with its checkpoint", self.name, f"{self.parameters:,}")
        student = build_student(self.checkpoint)
        student.load_state_dict(stored, strict=False)  # rounded as the file's; the halt head, which stays, is not
        findings = compare(
            self.out,
            Reference(
                student=student,
                architecture=self.architecture,
                stored=stored,
                tokenizer=self.tokenizer,
                prompts=self.prompts,
                files={CONFIG: config, CARD: card, **self.tokenizer.files()},
                halt_head=self.halt_head,
            ),
        )
        write_json(layout.parity_report(self.out), self._parity(findings))
        return findings

    def _write_halt_head(self) -> None:
        if self.halt_head is not None:
            from coremill.formats.halt_head import save_halt_head

            save_halt_head(self.halt_head, self.checkpoint)

    def _card(self) -> CardFacts:
        from coremill.model.checkpoint import IMPORTED_FROM

        checkpoint = self.checkpoint
        return CardFacts(
            name=self.name,
            architecture=self.architecture,
            model_type=checkpoint.model_type,
            parameters=self.parameters,
            max_seq_len=checkpoint.config.max_seq_len,
            dtype=self.settings.dtype,
            license=self.settings.license,
            checkpoint_digest=self.checkpoint_digest,
            tokenizer_digest=self.tokenizer.digest,
            training=dict(checkpoint.training),
            imported_from=checkpoint.training.get(IMPORTED_FROM),
            has_chat_template=self.tokenizer.chat_template is not None,
            halt_head=None if self.halt_head is None else self.halt_head.name,
            parity=layout.parity_report(self.out).name,
            coremill=coremill.__version__,
        )

    def _parity(self, findings: Findings) -> HuggingFaceParity:
        return HuggingFaceParity(
            checkpoint_digest=self.checkpoint_digest,
            dtype=self.settings.dtype,
            files={path.name: file_digest(path) for path in sorted(self.out.iterdir())},
            gates=findings.gates,
            logits_max_abs=findings.logits_max_abs,
            differences=findings.differences,
            toolchain=current_toolchain("transformers"),
        )

    def figures(self, findings: Findings) -> Figures:
        measured = {gate.name.replace(" ", "_"): gate.measured for gate in findings.gates}
        return {
            "parameters": self.parameters,
            "bytes": sum(path.stat().st_size for path in self.out.iterdir()),
            **{name: value for name, value in measured.items() if value is not None},
            "logits_max_abs": findings.logits_max_abs,
            "greedy_ties": sum(difference.is_tie for difference in findings.differences),
        }


def _judge(findings: Findings) -> None:
    """Refuse a directory that is not what its checkpoint is.

    Raises:
        ParityError: names each figure outside its bound.
    """
    if must_gates_ok(findings.gates):
        return
    failed = [gate for gate in findings.gates if gate.outcome is Outcome.FAILED]
    raise ParityError(
        "transformers does not compute what the checkpoint computes: "
        + "; ".join(f"{gate.name}: {gate.reason}" for gate in failed),
        expected="every figure within its bound",
        run="python -m coremill.training.check_checkpoint CHECKPOINT --tokenizer TOKENIZER",
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
    """The command: writes the directory, whole or not at all, and prints its figures, one a line."""
    options = _parser().parse_args(argv)
    checkpoint: Path = options.checkpoint
    tokenizer: Path = options.tokenizer or layout.tokenizer_file(checkpoint.parent)
    prompts: Path = options.prompts or tokenizer.parent
    name = check_name(options.name or checkpoint.stem.replace("_", "-"))
    check_own_folder(options.out, _own_files, what="Hugging Face files")
    check_apart([options.out], [checkpoint.parent, tokenizer.parent, prompts])
    with publishing(options.out) as fresh:
        figures = export_hf(
            checkpoint,
            tokenizer,
            prompts,
            fresh,
            name=name,
            settings=HuggingFaceConfig(dtype=options.dtype, license=options.license),
        )
    for name, value in figures.items():
        sys.stdout.write(f"{name}  {value}\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
