"""The one error family of coremill: what was found, what was expected, what to run next.

Every failure that a user can cause or mend is a :class:`CoremillError`. Each kind has an exit code of
its own, and `coremill.core.command.exit_on_error` is the only place that turns one into a process exit.
"""

from __future__ import annotations

from typing import ClassVar

OK = 0
USAGE = 2
GATES_FAILED = 3
"""Exit code of a run that worked and whose must-gates did not all pass."""


class CoremillError(Exception):
    """Base of the family.

    Args:
        found: what is wrong, with the path or the place in it.
        expected: what would have been right.
        run: a command that mends it, or that shows more.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"

    def __init__(self, found: str, *, expected: str | None = None, run: str | None = None) -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected
        self.run = run

    def __str__(self) -> str:
        lines = [self.found]
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.run is not None:
            lines.append(f"  run: {self.run}")
        return "\n".join(lines)


class ConfigError(CoremillError):
    """A configuration file or option that does not say something possible."""

    exit_code, kind = 10, "configuration"


class DocumentError(CoremillError):
    """A JSON document that is unreadable or not of its type; names the JSON path."""

    exit_code, kind = 11, "document"


class SchemaVersionError(CoremillError):
    """A file of an unknown major format version."""

    exit_code, kind = 12, "format version"


class DigestError(CoremillError):
    """An artifact whose bytes are not those that were recorded."""

    exit_code, kind = 13, "digest"


class DatasetError(CoremillError):
    """A dataset that is malformed; names the file and the line."""

    exit_code, kind = 20, "dataset"


class TokenizerError(CoremillError):
    """A tokenizer that is unreadable, lacks a special token, or does not fit the model."""

    exit_code, kind = 21, "tokenizer"


class CheckpointUnreadableError(CoremillError):
    """A checkpoint that is truncated or is not one."""

    exit_code, kind = 22, "unreadable checkpoint"


class UnsafeCheckpointError(CoremillError):
    """A checkpoint that would execute code when unpickled; nothing of it was executed."""

    exit_code, kind = 23, "unsafe checkpoint"


class CheckpointContentError(CoremillError):
    """A checkpoint that reads, and lacks or contradicts something that it must say."""

    exit_code, kind = 24, "checkpoint content"


class VocabularyMismatchError(CoremillError):
    """A model and a tokenizer of different vocabularies."""

    exit_code, kind = 25, "vocabulary mismatch"


class TrainingError(CoremillError):
    """Training that cannot start or has diverged."""

    exit_code, kind = 26, "training"


class UnsupportedModelError(CoremillError):
    """A model whose architecture, or an option of it, coremill does not compute; names it and what is supported."""

    exit_code, kind = 27, "unsupported model"


class VersionGateError(CoremillError):
    """An interpreter or package version in which this stage must not run."""

    exit_code, kind = 30, "version gate"


class ToyRefusedError(CoremillError):
    """`--toy` asked for a checkpoint that is not a toy."""

    exit_code, kind = 31, "toy refused"


class MachineError(CoremillError):
    """A machine or environment that lacks what the stage needs."""

    exit_code, kind = 32, "machine"


class ExportError(CoremillError):
    """An export whose primary shape does not compute what the checkpoint computes."""

    exit_code, kind = 40, "export"


class TorchScriptError(CoremillError):
    """A file that is not a TorchScript program."""

    exit_code, kind = 41, "TorchScript"


class ContractMismatchError(CoremillError):
    """A contract that disagrees with the graph it describes."""

    exit_code, kind = 42, "contract mismatch"


class ConversionError(CoremillError):
    """A conversion that failed, or a stand-in record of one that failed."""

    exit_code, kind = 43, "conversion"


class PackageError(CoremillError):
    """An .mlpackage that is broken: unreadable, or with a part missing."""

    exit_code, kind = 44, "package"


class UnsupportedOperationError(CoremillError):
    """An operation that `coremill.mil` does not run; names it and what is supported."""

    exit_code, kind = 45, "unsupported operation"


class PredictionInputError(CoremillError):
    """Inputs that the package's description does not admit (name, dtype or shape)."""

    exit_code, kind = 46, "prediction input"


class CacheFullError(CoremillError):
    """A key/value cache that has no room for another token."""

    exit_code, kind = 47, "full cache"


class ParityError(CoremillError):
    """A written form of a model that does not compute what its checkpoint computes."""

    exit_code, kind = 48, "parity"


class GgufError(CoremillError):
    """A model that a type of GGUF cannot store, or a GGUF file that llama.cpp does not load."""

    exit_code, kind = 49, "GGUF"


class RunLockedError(CoremillError):
    """Another process is building the same run."""

    exit_code, kind = 50, "run locked"


class StageError(CoremillError):
    """A stage that cannot run: an input is missing, or was made by a run that failed."""

    exit_code, kind = 51, "stage"


class ModelfileError(CoremillError):
    """A Modelfile that is missing, that cannot be written, or that Ollama rejects."""

    exit_code, kind = 53, "Modelfile"


class OutputError(CoremillError):
    """An output location that is not writable, is in the way, or lacks disk space."""

    exit_code, kind = 52, "output"


def error_kinds() -> list[type[CoremillError]]:
    """Every kind of error, by ascending exit code."""
    return sorted(CoremillError.__subclasses__(), key=lambda kind: kind.exit_code)


def exit_code_table() -> str:
    """The exit codes as text, for `--help`."""
    rows = [(OK, "all must-gates passed"), (USAGE, "usage"), (GATES_FAILED, "a must-gate did not pass")]
    rows += [(kind.exit_code, kind.kind) for kind in error_kinds()]
    return "\n".join(f"  {code:>3}  {text}" for code, text in rows)
