"""The only place that spells paths under build/."""

from __future__ import annotations

from pathlib import Path

import msgspec

MANIFEST = "manifest.json"
REPORT = "report"
"""The folder of a run that its summary is written into."""


class RunLayout(msgspec.Struct, frozen=True):
    """Where the artifacts of one run lie: `build/<run>/`."""

    build: Path
    run: str

    @property
    def root(self) -> Path:
        return self.build / self.run

    @property
    def lock(self) -> Path:
        """Held by a build for its whole time. Outside the run's folder, which may be removed."""
        return self.build / f".{self.run}.lock"

    @property
    def writer_lock(self) -> Path:
        """Held by a stage while it writes."""
        return self.build / f".{self.run}.writer.lock"

    def stage(self, name: str, lane: str | None = None) -> Path:
        """The folder of a stage; `lane` is a torch version for the stages that run once a lane."""
        return self.root / name if lane is None else self.root / f"torch-{lane}" / name

    def failed_stage(self, name: str, lane: str | None = None) -> Path:
        """What the stage left when it last failed, to be looked at; gone once it succeeds."""
        folder = self.stage(name, lane)
        return folder.with_name(f"{folder.name}.failed")


def dataset_file(stage: Path) -> Path:
    return stage / "train.jsonl"


def heldout_file(stage: Path) -> Path:
    return stage / "heldout.jsonl"


def texts_file(stage: Path) -> Path:
    """The real texts that an imported model is run on."""
    return stage / "texts.jsonl"


def chat_prompts_file(stage: Path) -> Path:
    return stage / "chat_prompts.jsonl"


def tokenizer_file(stage: Path) -> Path:
    return stage / "tokenizer.json"


def checkpoint_file(stage: Path, run: str) -> Path:
    return stage / f"{_stem(run)}.ckpt"


def metrics_file(stage: Path) -> Path:
    return stage / "metrics.jsonl"


def program_file(stage: Path, run: str, frontend: str) -> Path:
    """The exported program: TorchScript, or what `torch.export.save` writes."""
    return stage / f"{_stem(run)}.{'pt' if frontend == 'torchscript' else 'pt2'}"


def contract_file(stage: Path, run: str) -> Path:
    return stage / f"{_stem(run)}_contract.json"


def package_dir(stage: Path, run: str) -> Path:
    return stage / f"{_stem(run)}.mlpackage"


def placeholder_file(stage: Path) -> Path:
    """The labelled record of a failed conversion; its name looks like no package."""
    return stage / "conversion_failed.json"


def diagnostics_file(stage: Path) -> Path:
    return stage / "diagnostics.json"


def conversion_log(stage: Path) -> Path:
    return stage / "conversion.log"


def gguf_file(stage: Path, run: str, kind: str) -> Path:
    """The model as GGUF, its matrices stored as `kind`, such as `q8_0`."""
    return stage / f"{_stem(run)}-{kind}.gguf"


def modelfile(stage: Path) -> Path:
    """Ollama's, beside the GGUF file that it names."""
    return stage / "Modelfile"


def halt_head_file(stage: Path, run: str) -> Path:
    """What GGUF and Hugging Face's Llama have no place for: the halt head's weight, as safetensors.

    Whatever the run is called, the name is not `model*.safetensors`: mlx-lm, Ollama and llama.cpp's converter take
    all of those for parts of the model.
    """
    return stage / f"halt_head-{_stem(run)}.safetensors"


def parity_report(stage: Path) -> Path:
    """How a written form of the model was found to compute what the checkpoint computes."""
    return stage / "parity.json"


def verification_report(stage: Path) -> Path:
    return stage / "verification_report.json"


def summary_file(stage: Path) -> Path:
    return stage / "summary.json"


def status_file(stage: Path) -> Path:
    return stage / "STATUS.md"


def _stem(run: str) -> str:
    return run.replace("-", "_")
