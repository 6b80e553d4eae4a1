"""The table of the commands: where each is implemented, and the environments that can run it."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    module: str
    """Its `main(argv)` runs the command and returns the exit code. It is imported when the command is called."""
    purpose: str
    needs: tuple[str, ...] = ()
    """Packages that it imports, beyond those that coremill itself depends on."""
    extra: str = ""
    """The extra of coremill that installs them. In a checkout, `coremill.cli.restart` names the environments."""
    quiet: tuple[str, ...] = ()
    """Loggers of which only errors are shown."""


def _light(module: str, purpose: str) -> Command:
    return Command(f"coremill.{module}", purpose)


def _train(module: str, purpose: str, *needs: str) -> Command:
    return Command(f"coremill.{module}", purpose, needs, "train")


def _convert(module: str, purpose: str, *needs: str) -> Command:
    return Command(f"coremill.{module}", purpose, needs, "convert")


def _mil(name: str, purpose: str) -> Command:
    needs = ("torch", "coremltools", "numpy")
    # On import, coremltools warns of versions that it has not converted with; here nothing is converted.
    return Command(f"coremill.mil.commands.{name}", purpose, needs, "mil", quiet=("coremltools",))


COMMANDS = {
    "dataset": _train("data.make_toy_kd", "write a toy dataset, its held-out rows and its tokenizer", "tokenizers"),
    "import": _train(
        "training.import_model",
        "import the weights and the tokenizer of an existing model",
        *("torch", "safetensors", "gguf", "tokenizers", "jinja2"),
    ),
    "train": _train("training.run_toy_distill", "train a student from a dataset", "torch", "numpy", "tokenizers"),
    "check-checkpoint": _train("training.check_checkpoint", "validate a checkpoint", "torch", "tokenizers"),
    "export": _convert(
        "conversion.export_pytorch",
        "write a checkpoint's graph and its contract",
        *("torch", "numpy", "tokenizers"),
    ),
    "convert": _convert(
        "conversion.convert_coreml",
        "convert a graph to a Core ML package",
        *("torch", "coremltools", "numpy"),
    ),
    "verify": _convert(
        "conversion.verify_contract",
        "run a package and compare it with its contract and its checkpoint",
        *("torch", "coremltools", "numpy", "tokenizers"),
    ),
    "gguf": _train(
        "conversion.export_gguf",
        "write GGUF files and run them with llama.cpp",
        *("torch", "numpy", "tokenizers", "safetensors", "gguf", "xllamacpp"),
    ),
    "hf": _train(
        "conversion.export_hf",
        "write a Hugging Face directory and run it with transformers",
        *("torch", "numpy", "tokenizers", "safetensors", "transformers"),
    ),
    "ollama": _light("formats.ollama.server", "run a GGUF export with Ollama"),
    "agree": _convert(
        "verification.agree",
        "compare every format of a run's model with its checkpoint, in one table",
        *("torch", "coremltools", "numpy", "tokenizers", "transformers", "xllamacpp"),
    ),
    "mil inspect": _mil("inspect", "list functions, inputs, outputs, states, operations and weights"),
    "mil run": _mil("run", "predict with the arrays of an .npz file"),
    "mil compare": _mil("compare", "compare two packages, or a package and a TorchScript file, on the same inputs"),
    "mil bisect": _mil("bisect", "find the first operation at which fp16 leaves the oracle, and overflows"),
    "mil lint": _mil("lint", "list what keeps a graph off the Neural Engine or slow there, with sources"),
    "mil selftest": _mil("selftest", "run small packages with expected outputs; on a Mac with Core ML as well"),
    "status": _light("pipeline.status", "print which stages of a run are stale, and why"),
    "doctor": _light("cli.doctor", "print what this machine has and lacks for each stage"),
    "report": _light("report.summary", "print the stages, shapes, gates and answers of a finished run"),
    "stage": _light("pipeline.runner", "run one stage of a run in this interpreter"),
}
GROUPS = {"mil": "run, compare and examine Core ML packages: inspect, run, compare, bisect, lint, selftest"}
"""Commands of two words, by their first one."""
