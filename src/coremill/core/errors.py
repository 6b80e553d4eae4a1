"""The exceptions of coremill: what was found, what was expected, what to run next.

Every failure that a user can cause or fix is a :class:`CoremillError`. Each kind has its own exit code, and
`coremill.core.command.exit_on_error` is the only function that turns one into a process exit.
"""

from __future__ import annotations

from typing import ClassVar

OK = 0
USAGE = 2
GATES_FAILED = 3
"""Exit code of a command that succeeded with a must-gate that did not pass."""


class CoremillError(Exception):
    """Base of all errors.

    Args:
        found: what is wrong, with the path and the value.
        expected: what is valid.
        run: a command that fixes the error, or shows more.
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


class DefectError(CoremillError):
    """A failure that coremill does not expect; its traceback is printed before it."""

    exit_code, kind = 1, "defect"


class ConfigError(CoremillError):
    """An invalid configuration file or option."""

    exit_code, kind = 10, "configuration"


class DocumentError(CoremillError):
    """A JSON document that is unreadable or has the wrong structure; names the JSON path."""

    exit_code, kind = 11, "document"


class SchemaVersionError(CoremillError):
    """A file whose major format version is unknown."""

    exit_code, kind = 12, "format version"


class DigestError(CoremillError):
    """An artifact whose digest differs from the recorded one."""

    exit_code, kind = 13, "digest"


class DatasetError(CoremillError):
    """A malformed dataset; names the file and the line."""

    exit_code, kind = 20, "dataset"


class TokenizerError(CoremillError):
    """A tokenizer that is unreadable, lacks a special token, or does not fit the model."""

    exit_code, kind = 21, "tokenizer"


class CheckpointUnreadableError(CoremillError):
    """A truncated checkpoint, or a file that is not a checkpoint."""

    exit_code, kind = 22, "unreadable checkpoint"


class UnsafeCheckpointError(CoremillError):
    """A checkpoint that would execute code when unpickled; it was not executed."""

    exit_code, kind = 23, "unsafe checkpoint"


class CheckpointContentError(CoremillError):
    """A readable checkpoint with a missing or contradictory entry."""

    exit_code, kind = 24, "checkpoint content"


class VocabularyMismatchError(CoremillError):
    """A model and a tokenizer with different vocabularies."""

    exit_code, kind = 25, "vocabulary mismatch"


class TrainingError(CoremillError):
    """Training that cannot start or has diverged."""

    exit_code, kind = 26, "training"


class UnsupportedModelError(CoremillError):
    """An unsupported architecture, or an unsupported option of it; names it and what is supported."""

    exit_code, kind = 27, "unsupported model"


class VersionGateError(CoremillError):
    """An interpreter or package version that this stage does not support."""

    exit_code, kind = 30, "version gate"


class ToyRefusedError(CoremillError):
    """`--toy` with a checkpoint that is not a toy."""

    exit_code, kind = 31, "toy refused"


class MachineError(CoremillError):
    """A machine or environment without something that the stage needs."""

    exit_code, kind = 32, "machine"


class OutOfMemoryError(CoremillError):
    """A process that ran out of memory, or that the kernel killed because memory ran out."""

    exit_code, kind = 33, "memory"


class ExportError(CoremillError):
    """An export whose outputs differ from the checkpoint's at the primary shape."""

    exit_code, kind = 40, "export"


class TorchScriptError(CoremillError):
    """A file that is not a TorchScript program."""

    exit_code, kind = 41, "TorchScript"


class ContractMismatchError(CoremillError):
    """A contract that does not match the graph it describes."""

    exit_code, kind = 42, "contract mismatch"


class ConversionError(CoremillError):
    """A failed conversion, or the record of one."""

    exit_code, kind = 43, "conversion"


class PackageError(CoremillError):
    """An .mlpackage that is unreadable or incomplete."""

    exit_code, kind = 44, "package"


class UnsupportedOperationError(CoremillError):
    """An operation that `coremill.mil` does not support; names it and those that it supports."""

    exit_code, kind = 45, "unsupported operation"


class PredictionInputError(CoremillError):
    """Inputs whose names, dtypes or shapes the package's description does not allow."""

    exit_code, kind = 46, "prediction input"


class CacheFullError(CoremillError):
    """A key/value cache that is full."""

    exit_code, kind = 47, "full cache"


class ParityError(CoremillError):
    """An exported format whose outputs differ from the checkpoint's."""

    exit_code, kind = 48, "parity"


class GgufError(CoremillError):
    """A model that a GGUF type cannot store, or a GGUF file that llama.cpp does not load."""

    exit_code, kind = 49, "GGUF"


class RunLockedError(CoremillError):
    """Another process is building the same run."""

    exit_code, kind = 50, "run locked"


class StageError(CoremillError):
    """A stage that cannot run: an input is missing, or comes from a failed run."""

    exit_code, kind = 51, "stage"


class ModelfileError(CoremillError):
    """A Modelfile that is missing, that cannot be written, or that Ollama rejects."""

    exit_code, kind = 53, "Modelfile"


class OutputError(CoremillError):
    """An output path that is not writable or already exists as something else, or a full disk."""

    exit_code, kind = 52, "output"


class CrashError(CoremillError):
    """A process that a signal ended, such as a segmentation fault in native code; names the signal."""

    exit_code, kind = 54, "crash"


def error_kinds() -> list[type[CoremillError]]:
    """Return every kind of error, by ascending exit code."""
    return sorted(CoremillError.__subclasses__(), key=lambda kind: kind.exit_code)


def exit_code_table() -> str:
    """Return the exit codes as text."""
    rows = [(OK, "all must-gates passed"), (USAGE, "usage"), (GATES_FAILED, "a must-gate did not pass")]
    rows += [(kind.exit_code, kind.kind) for kind in error_kinds()]
    return "\n".join(f"  {code:>3}  {text}" for code, text in sorted(rows))
