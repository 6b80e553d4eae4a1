"""Whether a stage is fresh, and the reasons if it is not. Digests decide, not modification times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from coremill.core.config import RunConfig
from coremill.core.digest import digest, value_digest
from coremill.core.errors import CoremillError
from coremill.core.layout import MANIFEST, RunLayout
from coremill.core.manifest import Fingerprint, StageManifest, read_manifest
from coremill.core.plain import Plain
from coremill.pipeline.environments import Toolset
from coremill.pipeline.sources import source_digest
from coremill.pipeline.stages import Stage, find_stage, stage_folder


class Freshness(msgspec.Struct, frozen=True):
    """The state of one stage; it is fresh if there is no reason to run it."""

    stage: str
    lane: str | None
    reasons: tuple[str, ...]
    peak_anonymous_bytes: int | None = None
    """Of its last run that succeeded."""

    @property
    def fresh(self) -> bool:
        return not self.reasons


def input_digests(layout: RunLayout, stage: Stage, lane: str | None, stages: Sequence[Stage]) -> dict[str, str]:
    """Return the digests of the producers' outputs from their manifests, by `<stage>/<file>`.

    Raises:
        StageError: a producer has not run.
    """
    inputs: dict[str, str] = {}
    for need in stage.needs:
        producer = find_stage(need, stages)
        manifest = read_manifest(stage_folder(layout, producer, lane))
        inputs |= {
            f"{need}/{name}": output.digest
            for name, output in manifest.outputs.items()
            if name not in producer.records
        }
    return inputs


def fingerprint(stage: Stage, config: RunConfig, toolset: Toolset, inputs: dict[str, str]) -> Fingerprint:
    """Return the fingerprint that the stage would record if it ran now."""
    return Fingerprint(
        definition=value_digest([stage.name, stage.module, stage.reads, stage.needs, stage.per_lane]),
        config=value_digest(stage.config_slice(config)),
        sources=source_digest(stage.module),
        lock=toolset.lock_digest,
        interpreter=toolset.interpreter,
        inputs=inputs,
        # The stage itself reports a missing file: it knows what is expected.
        files={str(path): digest(path) if path.exists() else "missing" for path in stage.files(config)},
    )


def freshness(
    stage: Stage,
    config: RunConfig,
    layout: RunLayout,
    toolset: Toolset | None,
    lane: str | None,
    stages: Sequence[Stage],
) -> Freshness:
    """Compare the stage's manifest with the current fingerprint and outputs.

    Args:
        toolset: None if the environment is not installed.
        stages: those of the run, including the producers.
    """
    lane = lane if stage.per_lane else None
    folder = stage_folder(layout, stage, lane)
    if not (folder / MANIFEST).is_file():
        return Freshness(stage.name, lane, ("never ran",))
    if toolset is None:
        return Freshness(stage.name, lane, (f"no environment {stage.environment(lane).name!r}",))
    try:
        manifest = read_manifest(folder)
    except CoremillError as error:
        return Freshness(stage.name, lane, (f"unreadable manifest: {error.found}",))
    try:
        inputs = input_digests(layout, stage, lane, stages)
    except CoremillError as error:
        return Freshness(stage.name, lane, (f"an input is missing: {error.found}",))
    now = fingerprint(stage, config, toolset, inputs)
    reasons = [*_differences(manifest, now, stage.config_slice(config)), *_damage(folder, manifest)]
    return Freshness(stage.name, lane, tuple(reasons), manifest.peak_anonymous_bytes)


def _differences(manifest: StageManifest, now: Fingerprint, config: dict[str, Plain]) -> list[str]:
    then = manifest.fingerprint
    reasons = []
    if then.definition != now.definition:
        reasons.append("the stage's definition changed")
    if then.config != now.config:
        reasons += [f"configuration: {change}" for change in _config_changes(manifest.config, config)]
    if then.sources != now.sources:
        reasons.append("its source files changed")
    if then.lock != now.lock:
        reasons.append("its environment's lock changed")
    if then.interpreter != now.interpreter:
        reasons.append(f"interpreter: {then.interpreter} → {now.interpreter}")
    for kind, before, after in (("input", then.inputs, now.inputs), ("file", then.files, now.files)):
        changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
        reasons += [f"{kind} {name} changed" for name in changed]
    return reasons


def _config_changes(then: Plain, now: Plain, path: str = "") -> list[str]:
    """Return each setting that differs, as `training.epochs 3 → 4`."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            change
            for key in sorted(then.keys() | now.keys())
            for change in _config_changes(then.get(key), now.get(key), f"{path}.{key}".lstrip("."))
        ]
    # The manifest was read from JSON, where tuples become lists.
    return [] if msgspec.json.encode(then) == msgspec.json.encode(now) else [f"{path} {then} → {now}"]


def _damage(folder: Path, manifest: StageManifest) -> list[str]:
    reasons = []
    for name, output in manifest.outputs.items():
        path = folder / name
        if not path.exists():
            reasons.append(f"output {name} is missing")
        elif digest(path) != output.digest:
            reasons.append(f"output {name} was altered")
    return reasons
