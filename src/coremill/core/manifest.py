"""The manifest of a stage: its inputs, toolchain, outputs and outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from coremill.core.contract import Toolchain
from coremill.core.digest import digest, size_bytes
from coremill.core.documents import Document, Record, read_json
from coremill.core.errors import DigestError, StageError
from coremill.core.layout import MANIFEST

PEAK, ESTIMATE = "peak_anonymous_bytes", "estimated_bytes"
"""The figures that the pipeline adds to a stage's own: the memory that it held, and what it was checked for."""


class Output(Record):
    """One file or directory that a stage wrote."""

    digest: str
    size_bytes: int


class Fingerprint(Record):
    """Everything that decides whether a stage is stale."""

    definition: str
    config: str
    sources: str
    lock: str
    interpreter: str
    inputs: dict[str, str]
    """Digests of the producers' outputs, by `<stage>/<file>`."""
    files: dict[str, str] = msgspec.field(default_factory=dict)
    """Digests of the files outside the build that the configuration names, by path."""


class StageManifest(Document):
    """`manifest.json`, in the directory of every stage that succeeded and in `<stage>.failed/` of one that failed.

    Raises:
        ValueError: a failure without an error, or an error without a failure.
    """

    outcome: Literal["succeeded", "failed"]
    error: str | None = None
    """The error message of a failed stage."""
    error_kind: str | None = None
    """The kind of the error, such as `memory`."""
    stage: str
    run: str
    lane: str | None
    fingerprint: Fingerprint
    config: dict[str, Any]
    """The part of the configuration that the stage reads."""
    toolchain: Toolchain
    outputs: dict[str, Output]
    figures: dict[str, float | int | str]
    """The stage's own measurements, for the report, and PEAK."""
    started_at: str
    """UTC, ISO 8601."""
    duration_s: float

    @property
    def peak_anonymous_bytes(self) -> int | None:
        """The peak of the memory of its processes that no file backs; None where it cannot be measured."""
        peak = self.figures.get(PEAK)
        return None if peak is None else int(peak)

    def __post_init__(self) -> None:
        if (self.outcome == "failed") != (self.error is not None):
            raise ValueError(f"the outcome is {self.outcome!r} and the error is {self.error!r}")


def read_manifest(folder: Path) -> StageManifest:
    """Return the manifest of the stage in `folder`.

    Raises:
        StageError: it is missing or unreadable.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise StageError(f"{folder} has no {MANIFEST}", expected="a finished stage", run="nox -s pipeline")
    return read_json(path, StageManifest, error=StageError, run="nox -s pipeline")


def measure_outputs(folder: Path) -> dict[str, Output]:
    """Return the digest and size of each entry of `folder` except the manifest."""
    return {
        entry.name: Output(digest=digest(entry), size_bytes=size_bytes(entry))
        for entry in sorted(Path(folder).iterdir())
        if entry.name != MANIFEST
    }


def check_outputs(folder: Path, manifest: StageManifest) -> None:
    """Check the outputs of a stage against the digests in its manifest.

    Raises:
        DigestError: an output is missing, or its digest differs.
    """
    for name, recorded in manifest.outputs.items():
        path = Path(folder) / name
        found = digest(path) if path.exists() else "nothing"
        if found != recorded.digest:
            raise DigestError(
                f"{path}: found {found}",
                expected=f"{recorded.digest}, as {MANIFEST} recorded when stage {manifest.stage!r} wrote it",
                run=f"nox -s pipeline -- --force {manifest.stage}",
            )
