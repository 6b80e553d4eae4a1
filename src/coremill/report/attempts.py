"""How the stages that one lane rests on last ended, as their manifests say, and whether those fit together."""

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
    """The last time that a stage was run."""

    stage: str
    folder: Path
    """Where it left what it made, or what there was when it failed."""
    manifest: StageManifest | None
    """None for a stage that never ran."""

    @property
    def failure(self) -> str | None:
        """Why the stage did not complete, in a line; None where it did."""
        if self.manifest is None:
            return "it never ran"
        if self.manifest.error is None:
            return None
        said = next((line.strip() for line in self.manifest.error.splitlines() if line.strip()), "no message")
        log = conversion_log(self.folder)
        return f"{said}; see {_relative(log)}" if log.is_file() else said


class Completed(NamedTuple):
    """A stage that came to its end."""

    folder: Path
    manifest: StageManifest

    def output(self, name: str) -> Output:
        """What the manifest recorded of an output."""
        recorded = self.manifest.outputs.get(name)
        if recorded is None:
            raise StageError(
                f"{self.folder} has no {name}",
                expected=f"what stage {self.manifest.stage} writes",
                run=f"nox -s pipeline -- --force {self.manifest.stage}",
            )
        return recorded

    def checked(self, path: Path) -> Path:
        """`path`, an output, hashed again before it is read."""
        check_outputs(
            self.folder, msgspec.structs.replace(self.manifest, outputs={path.name: self.output(path.name)})
        )
        return path


def build_command(config: RunConfig, lane: str, *, force: str | None = None) -> str:
    """The command that builds the lane, with `force` as the stage to run even if it is fresh."""
    forced = f" --force {force}" if force else ""
    return f"nox -s pipeline -- --config configs/{config.name}.toml --torch {lane}{forced}"


def read_attempts(layout: RunLayout, config: RunConfig, lane: str) -> list[Attempt]:
    """The lane's stages and those that lanes share, in the order in which they run.

    Left out are those that need one that did not complete.

    Raises:
        StageError: nothing of the run was built; a manifest is unreadable, of another run, or not of how its folder
            says that the stage ended; or a stage was made from what is no longer there.
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
            f"{layout.root} holds no stage that ran", expected="a build", run=build_command(config, lane)
        )
    _check_inputs(attempts, build_command(config, lane))
    for each in completed(attempts).values():
        check_outputs(each.folder, each.manifest)
        _check_config(config, each.manifest, build_command(config, lane))
    return attempts


def first_failed(attempts: Sequence[Attempt]) -> Attempt | None:
    """The stage that the others wait for."""
    return next((each for each in attempts if each.failure is not None), None)


def completed(attempts: Sequence[Attempt]) -> dict[str, Completed]:
    """The stages that came to their end."""
    return {
        each.stage: Completed(each.folder, each.manifest)
        for each in attempts
        if each.manifest is not None and each.failure is None
    }


def _last(layout: RunLayout, config: RunConfig, stage: str, lane: str | None) -> Attempt:
    # First, because an older success stays beside a later failure.
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
            f"{folder} is of run {found[0]!r}, stage {found[1]}, lane {found[2]}, {found[3]}",
            expected=f"run {config.name!r}, stage {stage}, lane {lane}, {outcome}",
            run="nox -s pipeline",
        )
    return manifest


def _check_config(config: RunConfig, manifest: StageManifest, run: str) -> None:
    """The stage was run as the configuration says now: a report must not bless one bar with what met another."""
    stage = find_stage(manifest.stage, stages_of(config))
    if manifest.fingerprint.config != value_digest(stage.config_slice(config)):
        raise StageError(
            f"stage {manifest.stage} was run with another configuration",
            expected=f"one run with what configs/{config.name}.toml says now (`coremill status` says what differs)",
            run=run,
        )


def _check_inputs(attempts: Sequence[Attempt], run: str) -> None:
    """Each stage was made from what its producers hold now: nobody ran one of them again, and not this one."""
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
                    expected=f"{now.get(name, 'nothing')}, as stage {name.split('/')[0]} has it now",
                    run=run,
                )


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
