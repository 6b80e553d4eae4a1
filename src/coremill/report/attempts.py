"""The last run of each stage that a lane depends on, from the manifests, and whether those match each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from coremill.core.config import RunConfig
from coremill.core.digest import value_digest
from coremill.core.errors import StageError
from coremill.core.layout import RunLayout, conversion_log
from coremill.core.manifest import Output, StageManifest, check_outputs, read_manifest
from coremill.pipeline.stages import find_stage, stages_of


class Attempt(NamedTuple):
    """The last run of a stage."""

    stage: str
    folder: Path
    """The directory of its outputs; those of a failed stage are incomplete."""
    manifest: StageManifest | None
    """None if the stage was never run."""

    @property
    def failure(self) -> str | None:
        """The reason why the stage did not complete, in one line; None if it did."""
        if self.manifest is None:
            return "the stage was never run"
        if self.manifest.error is None:
            return None
        error = next((line.strip() for line in self.manifest.error.splitlines() if line.strip()), "no message")
        log = conversion_log(self.folder)
        return f"{error}; see {_relative(log)}" if log.is_file() else error


class Completed(NamedTuple):
    """A stage that completed."""

    folder: Path
    manifest: StageManifest

    def output(self, name: str) -> Output:
        """Return the manifest's record of an output; a StageError if there is none."""
        recorded = self.manifest.outputs.get(name)
        if recorded is None:
            raise StageError(
                f"{self.folder} has no {name}",
                expected=f"the outputs of stage {self.manifest.stage}",
                run=f"nox -s pipeline -- --force {self.manifest.stage}",
            )
        return recorded

    def checked(self, path: Path) -> Path:
        """Return `path`, an output, after checking its digest; a DigestError if the manifest has another."""
        check_outputs(
            self.folder, msgspec.structs.replace(self.manifest, outputs={path.name: self.output(path.name)})
        )
        return path


def build_command(config: RunConfig, lane: str, *, force: str | None = None) -> str:
    """Return the command that builds the lane; `force` is a stage that runs even if it is fresh."""
    forced = f" --force {force}" if force else ""
    return f"nox -s pipeline -- --config configs/{config.name}.toml --torch {lane}{forced}"


def read_attempts(layout: RunLayout, config: RunConfig, lane: str) -> list[Attempt]:
    """Return the lane's stages and those that lanes share, in the order in which they run.

    Stages that need one that did not complete are excluded.

    Raises:
        StageError: nothing of the run was built; a manifest is unreadable or belongs to another run, or
            contradicts its directory; or a stage was run with another configuration or other inputs.
        DigestError: an output differs from its manifest.
    """
    attempts: list[Attempt] = []
    stopped: set[str] = set()
    for stage in stages_of(config):
        if stopped.isdisjoint(stage.needs):
            attempts.append(_last(layout, config, stage.name, lane if stage.per_lane else None))
            if attempts[-1].failure is None:
                continue
        stopped.add(stage.name)
    if attempts[0].manifest is None:
        raise StageError(
            f"{layout.root} contains no stage that was run", expected="a build", run=build_command(config, lane)
        )
    _check_inputs(attempts, build_command(config, lane))
    for each in completed(attempts).values():
        check_outputs(each.folder, each.manifest)
        _check_config(config, each.manifest, build_command(config, lane))
    return attempts


def first_failed(attempts: Sequence[Attempt]) -> Attempt | None:
    """Return the first stage that did not complete, or None."""
    return next((each for each in attempts if each.failure is not None), None)


def completed(attempts: Sequence[Attempt]) -> dict[str, Completed]:
    """Return the stages that completed, by name."""
    return {
        each.stage: Completed(each.folder, each.manifest)
        for each in attempts
        if each.manifest is not None and each.failure is None
    }


def _last(layout: RunLayout, config: RunConfig, stage: str, lane: str | None) -> Attempt:
    # The failure first: an older success is kept next to a later failure.
    failed, good = layout.failed_stage(stage, lane), layout.stage(stage, lane)
    if failed.exists():
        return Attempt(stage, failed, _manifest(failed, config, stage, lane, "failed"))
    if good.exists():
        return Attempt(stage, good, _manifest(good, config, stage, lane, "succeeded"))
    return Attempt(stage, good, None)


def _manifest(
    folder: Path, config: RunConfig, stage: str, lane: str | None, outcome: Literal["succeeded", "failed"]
) -> StageManifest:
    manifest = read_manifest(folder)
    found = (manifest.run, manifest.stage, manifest.lane, manifest.outcome)
    if found != (config.name, stage, lane, outcome):
        raise StageError(
            f"{folder} belongs to run {found[0]!r}, stage {found[1]}, lane {found[2]}, {found[3]}",
            expected=f"run {config.name!r}, stage {stage}, lane {lane}, {outcome}",
            run="nox -s pipeline",
        )
    return manifest


def _check_config(config: RunConfig, manifest: StageManifest, run: str) -> None:
    """Check that the stage was run with the current configuration, whose bounds the report is about."""
    stage = find_stage(manifest.stage, stages_of(config))
    if manifest.fingerprint.config != value_digest(stage.config_slice(config)):
        raise StageError(
            f"stage {manifest.stage} was run with another configuration",
            expected=f"the current configs/{config.name}.toml (`coremill status` lists the differences)",
            run=run,
        )


def _check_inputs(attempts: Sequence[Attempt], run: str) -> None:
    """Check that no stage was run again without the stages that depend on it."""
    now = {
        f"{stage}/{name}": output.digest
        for stage, done in completed(attempts).items()
        for name, output in done.manifest.outputs.items()
    }
    for attempt in attempts:
        inputs = {} if attempt.manifest is None else attempt.manifest.fingerprint.inputs
        for name, recorded in inputs.items():
            if now.get(name) != recorded:
                raise StageError(
                    f"{attempt.folder} was made from {name} {recorded}",
                    expected=f"{now.get(name, 'no such output')}, the current one of stage {name.split('/')[0]}",
                    run=run,
                )


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
