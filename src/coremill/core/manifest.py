"""StageManifest: what went into a stage, with what it ran, what came out and how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from coremill.core.contract import Toolchain
from coremill.core.digest import digest, size_bytes
from coremill.core.documents import Document, Record, read_json
from coremill.core.errors import DigestError, StageError
from coremill.core.layout import MANIFEST


class Output(Record):
    """One file or directory that a stage made."""

    digest: str
    size_bytes: int


class Fingerprint(Record):
    """Everything that decides whether a stage is stale, by what changed.

    `inputs` maps the path of each producer's output, relative to the run's folder, to its digest.
    """

    definition: str
    config: str
    sources: str
    lock: str
    interpreter: str
    inputs: dict[str, str]
    files: dict[str, str] = msgspec.field(default_factory=dict)
    """Digests of the files outside the build that the configuration names, by their path there."""


class StageManifest(Document):
    """`manifest.json` in the folder of every stage that ended, and in `<stage>.failed/` of one that failed.

    Raises:
        ValueError: a failure without an error, or an error without a failure.
    """

    outcome: Literal["succeeded", "failed"]
    error: str | None = None
    """What a failed stage said."""
    error_kind: str | None = None
    """Its kind of error, as `coremill --help` lists them; None for a defect."""
    stage: str
    run: str
    lane: str | None
    fingerprint: Fingerprint
    config: dict[str, Any]
    """The slice of the configuration that the stage reads."""
    toolchain: Toolchain
    outputs: dict[str, Output]
    figures: dict[str, float | int | str]
    """What the stage measured of its own work, for the report."""
    started_at: str
    """UTC, ISO 8601."""
    duration_s: float

    def __post_init__(self) -> None:
        if (self.outcome == "failed") != (self.error is not None):
            raise ValueError(f"the outcome is {self.outcome!r} and the error is {self.error!r}")


def read_manifest(folder: Path) -> StageManifest:
    """The manifest of the stage in `folder`; a StageError if there is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise StageError(f"{folder} has no {MANIFEST}", expected="a finished stage", run="nox -s pipeline")
    return read_json(path, StageManifest, error=StageError, run="nox -s pipeline")


def measure_outputs(folder: Path) -> dict[str, Output]:
    """Digest and size of each entry of `folder` but the manifest."""
    return {
        entry.name: Output(digest=digest(entry), size_bytes=size_bytes(entry))
        for entry in sorted(Path(folder).iterdir())
        if entry.name != MANIFEST
    }


def check_outputs(folder: Path, manifest: StageManifest) -> None:
    """Hash again what a stage made, before it is used.

    Raises:
        DigestError: an output is missing or is not what the manifest recorded.
    """
    for name, recorded in manifest.outputs.items():
        path = Path(folder) / name
        found = digest(path) if path.exists() else "nothing"
        if found != recorded.digest:
            raise DigestError(
                f"{path}: found {found}",
                expected=f"{recorded.digest}, as {MANIFEST} recorded when stage {manifest.stage!r} made it",
                run=f"nox -s pipeline -- --force {manifest.stage}",
            )
