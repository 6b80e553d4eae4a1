"""The paths under build/; no other module spells them."""

from __future__ import annotations

from pathlib import Path

import msgspec

MANIFEST = "manifest.json"
REPORT = "report"
"""The directory of a run's summary."""


class RunLayout(msgspec.Struct, frozen=True):
    """The paths of one run's artifacts, under `build/<run>/`."""

    build: Path
    run: str

    @property
    def root(self) -> Path:
        return self.build / self.run

    @property
    def lock(self) -> Path:
        """Held by a build from start to end. Outside the run's directory, which may be removed."""
        return self.build / f".{self.run}.lock"

    @property
    def writers(self) -> Path:
        """The directory of the locks that stages hold while they write."""
        return self.build / f".{self.run}.writers"

    def writer_lock(self, name: str, lane: str | None = None) -> Path:
        return self.writers / f"{name if lane is None else f'{name}-{lane}'}.lock"

    def stage(self, name: str, lane: str | None = None) -> Path:
        """Return the directory of a stage; `lane` is a torch version for stages that run once per lane."""
        return self.root / name if lane is None else self.root / f"torch-{lane}" / name

    def failed_stage(self, name: str, lane: str | None = None) -> Path:
        """Return the directory of the stage's files from its last failure; removed once it succeeds."""
        folder = self.stage(name, lane)
        return folder.with_name(f"{folder.name}.failed")


def dataset_file(stage: Path) -> Path:
    return stage / "train.jsonl"


def heldout_file(stage: Path) -> Path:
    return stage / "heldout.jsonl"


def texts_file(stage: Path) -> Path:
    """The real text that an imported model is run on."""
    return stage / "texts.jsonl"


def chat_prompts_file(stage: Path) -> Path:
    return stage / "chat_prompts.jsonl"


def answer_key_file(stage: Path) -> Path:
    return stage / "answers.json"


def tokenizer_file(stage: Path) -> Path:
    return stage / "tokenizer.json"


def checkpoint_file(stage: Path, run: str) -> Path:
    return stage / f"{_stem(run)}.ckpt"


def metrics_file(stage: Path) -> Path:
    return stage / "metrics.jsonl"


def program_file(stage: Path, run: str, frontend: str) -> Path:
    """The exported program: TorchScript, or an archive of `torch.export.save`."""
    return stage / f"{_stem(run)}.{'pt' if frontend == 'torchscript' else 'pt2'}"


def contract_file(stage: Path, run: str) -> Path:
    return stage / f"{_stem(run)}_contract.json"


def package_dir(stage: Path, run: str) -> Path:
    return stage / f"{_stem(run)}.mlpackage"


def placeholder_file(stage: Path) -> Path:
    """The record of a failed conversion; its name cannot be mistaken for a package."""
    return stage / "conversion_failed.json"


def diagnostics_file(stage: Path) -> Path:
    return stage / "diagnostics.json"


def conversion_log(stage: Path) -> Path:
    return stage / "conversion.log"


def gguf_file(stage: Path, run: str, kind: str) -> Path:
    """The GGUF file with matrices of type `kind`, such as `q8_0`."""
    return stage / f"{_stem(run)}-{kind}.gguf"


def modelfile(stage: Path) -> Path:
    """Ollama's Modelfile, in the directory of the GGUF file that it names."""
    return stage / "Modelfile"


def halt_head_file(stage: Path, run: str) -> Path:
    """The weight of the halt head, which GGUF and Hugging Face's Llama cannot contain, as safetensors.

    The name never matches `model*.safetensors`: mlx-lm, Ollama and llama.cpp's converter load such files as part of
    the model.
    """
    return stage / f"halt_head-{_stem(run)}.safetensors"


def source_parity(folder: Path) -> Path:
    """The comparison of an imported checkpoint in `folder` with its source."""
    return folder / "source_parity.json"


def parity_report(stage: Path) -> Path:
    """The comparison of an exported format with the checkpoint."""
    return stage / "parity.json"


def verification_report(stage: Path) -> Path:
    return stage / "verification_report.json"


def summary_file(stage: Path) -> Path:
    return stage / "summary.json"


def status_file(stage: Path) -> Path:
    return stage / "STATUS.md"


def _stem(run: str) -> str:
    return run.replace("-", "_")
