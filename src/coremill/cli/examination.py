"""What a machine has and lacks for each stage of a build, and the commands that set it up.

Only interpreters are started, to see that they run, and nothing is downloaded. Packages are read from the
environments' metadata. Whether a package index can be reached is not tried.
"""

from __future__ import annotations

import enum
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from coremill.cli.commands import COMMANDS
from coremill.core.digest import file_digest
from coremill.core.documents import Record
from coremill.core.errors import MachineError
from coremill.infra.compatibility import (
    CellOutcome,
    Versions,
    installed_versions,
    read_compatibility,
    running_versions,
)
from coremill.infra.devices import cuda_device_count
from coremill.infra.interpreters import candidates, find_interpreter, probe_version
from coremill.infra.version_gate import EXPORT_PYTHON
from coremill.pipeline.environments import (
    BUILD_ENVIRONMENTS,
    CONVERT,
    LANES,
    PRIMARY_LANE,
    TRAIN,
    Environment,
    Toolset,
    installed,
)
from coremill.pipeline.stages import EVERY_STAGE

GB = 10**9
SET_UP = "make e2e"
SET_UP_ALL_LANES = "make matrix"

_FIRST_ENVIRONMENT_BYTES = int(6.8 * GB)
_NEXT_ENVIRONMENT_BYTES = int(2.6 * GB)
# Measured on x86-64 Linux, where torch includes CUDA: 6.5 to 6.8 GB for one, 12 GB for three, which share files
# with uv's cache. Elsewhere torch is smaller, and was not measured.


class Standing(str, enum.Enum):
    READY = "ready"
    NOTE = "note"
    """Worth knowing; nothing to do."""
    TO_DO = "to do"
    """Missing; a command sets it up."""
    BLOCKED = "blocked"
    """Missing; it cannot be set up on this machine."""


_WORST_LAST = (Standing.READY, Standing.NOTE, Standing.TO_DO, Standing.BLOCKED)


class Finding(Record):
    """The result of one check.

    Raises:
        ValueError: something is missing, and `run` is None.
    """

    subject: str
    standing: Standing
    found: str
    run: str | None = None

    def __post_init__(self) -> None:
        if self.standing in (Standing.TO_DO, Standing.BLOCKED) and not self.run:
            raise ValueError(f"{self.subject!r} is {self.standing.value} without a command to run")


class StageReadiness(Record):
    """Whether a stage can run here."""

    stage: str
    lane: str | None
    environment: str
    standing: Standing


class Machine(Record):
    """The properties of a machine that a build depends on."""

    system: str
    """`platform.system()`: Linux, Darwin, …"""
    architecture: str
    cores: int
    memory_bytes: int
    free_bytes: int
    """Free disk space in the checkout."""
    cuda_devices: int


class DoctorReport(Record):
    machine: tuple[Finding, ...]
    interpreters: tuple[Finding, ...]
    environments: tuple[Finding, ...]
    lanes: tuple[Finding, ...]
    stages: tuple[StageReadiness, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        return (*self.machine, *self.interpreters, *self.environments, *self.lanes)

    @property
    def blockers(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.standing is Standing.BLOCKED)


def this_machine(root: Path) -> Machine:
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        cores=_usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        free_bytes=shutil.disk_usage(root).free,
        cuda_devices=cuda_device_count(),
    )


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))  # fewer than the machine has in a container or under `taskset`
    return os.cpu_count() or 1


def examine(root: Path, machine: Machine, environ: Mapping[str, str]) -> DoctorReport:
    """Examine everything that a build in the checkout `root` needs.

    Raises:
        MachineError: `root` is not a checkout, or an environment's stamp or a lock is unreadable.
    """
    for environment in BUILD_ENVIRONMENTS:
        if not environment.lock(root).is_file():
            raise MachineError(
                f"{root} has no requirements/{environment.name}.txt",
                expected="a lock for each environment",
                run="nox -s lock",
            )
    toolsets = installed(root)
    missing = [environment for environment in BUILD_ENVIRONMENTS if environment.name not in toolsets]
    interpreters = {
        version: _interpreter(version, environ, needed=any(each.python == version for each in missing))
        for version in dict.fromkeys(environment.python for environment in BUILD_ENVIRONMENTS)
    }
    environments = {each.name: _environment(root, each, toolsets) for each in BUILD_ENVIRONMENTS}
    lanes = {CONVERT[lane].name: _lane(root, lane, toolsets) for lane in LANES}
    system, coremltools, disk = _system(machine), _coremltools(machine), _disk(machine, len(missing))
    relevant: dict[str, list[Finding]] = {}
    for environment in BUILD_ENVIRONMENTS:
        name = environment.name
        relevant[name] = [system, environments[name]]
        if environment in missing:
            relevant[name] += [disk, interpreters[environment.python]]
        if name in lanes:
            relevant[name] += [coremltools, lanes[name]]
    return DoctorReport(
        machine=(system, _size(machine), disk, coremltools, _prediction(machine), _cuda(machine)),
        interpreters=tuple(interpreters.values()),
        environments=tuple(environments.values()),
        lanes=tuple(lanes.values()),
        stages=tuple(_stages({name: _worst(findings) for name, findings in relevant.items()})),
    )


def examine_installation(machine: Machine) -> DoctorReport:
    """Examine the environment that this coremill is installed in, outside any checkout: no stage is built there."""
    versions = running_versions()
    interpreter = Finding(
        subject=f"python {versions.python}",
        standing=Standing.READY if versions.python in EXPORT_PYTHON else Standing.NOTE,
        found=sys.executable
        + ("" if versions.python in EXPORT_PYTHON else "; export and convert need 3.10 or 3.11"),
    )
    installed_cell = versions.torch and versions.coremltools and versions.numpy
    return DoctorReport(
        machine=(_system(machine), _size(machine), _coremltools(machine), _prediction(machine), _cuda(machine)),
        interpreters=(interpreter,),
        environments=tuple(map(_extra, dict.fromkeys(each.extra for each in COMMANDS.values() if each.needs))),
        lanes=(_cell("versions", versions),) if installed_cell else (),
        stages=(),
    )


def _extra(extra: str) -> Finding:
    """Whether what `pip install coremill[extra]` adds is installed here."""
    commands = {name: each for name, each in COMMANDS.items() if each.extra == extra}
    needs = dict.fromkeys(package for each in commands.values() for package in each.needs)
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    subject, found = f"coremill[{extra}]", f"for {', '.join(commands)}"
    if not missing:
        return Finding(subject=subject, standing=Standing.READY, found=found)
    return Finding(
        subject=subject,
        standing=Standing.TO_DO,
        found=f"{found}; not installed: {', '.join(missing)}",
        run=f"pip install 'coremill[{extra}]'",
    )


def _worst(findings: Sequence[Finding]) -> Standing:
    worst = max((finding.standing for finding in findings), key=_WORST_LAST.index)
    return Standing.READY if worst is Standing.NOTE else worst


def _stages(standing: Mapping[str, Standing]) -> list[StageReadiness]:
    rows = []
    for stage in EVERY_STAGE:
        for lane in LANES if stage.per_lane else (None,):
            name = stage.environment(lane).name
            rows.append(StageReadiness(stage=stage.name, lane=lane, environment=name, standing=standing[name]))
    return rows


def _system(machine: Machine) -> Finding:
    found = f"{machine.system} {machine.architecture}"
    if machine.system in ("Linux", "Darwin"):
        return Finding(subject="system", standing=Standing.READY, found=found)
    return Finding(
        subject="system",
        standing=Standing.BLOCKED,
        found=f"{found}: coremill builds on Linux and macOS",
        run=f"{SET_UP}, on Linux or macOS",
    )


def _size(machine: Machine) -> Finding:
    found = f"{machine.cores} cores, {machine.memory_bytes / GB:.1f} GB of memory"
    return Finding(subject="size", standing=Standing.READY, found=found)


def _disk(machine: Machine, missing: int) -> Finding:
    found = f"{machine.free_bytes / GB:.1f} GB free"
    if missing == 0:
        return Finding(subject="disk", standing=Standing.READY, found=found)
    if (machine.system, machine.architecture) != ("Linux", "x86_64"):
        found += f"; the size of the {missing} missing environments was not measured on this platform"
        return Finding(subject="disk", standing=Standing.NOTE, found=found)
    needed = _FIRST_ENVIRONMENT_BYTES + (missing - 1) * _NEXT_ENVIRONMENT_BYTES
    found += f"; {_count(missing, 'missing environment')}: up to {needed / GB:.1f} GB, less with a warm uv cache"
    if machine.free_bytes >= needed:
        return Finding(subject="disk", standing=Standing.READY, found=found)
    return Finding(
        subject="disk", standing=Standing.BLOCKED, found=found, run="uv cache prune, or free space, then make e2e"
    )


def _coremltools(machine: Machine) -> Finding:
    if machine.system == "Linux" and machine.architecture != "x86_64":
        return Finding(
            subject="coremltools",
            standing=Standing.BLOCKED,
            found=f"no wheel for Linux {machine.architecture}: no export, conversion or verification",
            run=f"{SET_UP}, on Linux x86-64 or a Mac; here: nox -s training",
        )
    return Finding(subject="coremltools", standing=Standing.READY, found="has a wheel for this platform")


def _prediction(machine: Machine) -> Finding:
    if machine.system == "Darwin":
        return Finding(subject="Core ML", standing=Standing.READY, found="can predict here")
    found = "not_run here (needs macOS); coremill.mil runs the package and checks its numbers"
    return Finding(subject="Core ML", standing=Standing.NOTE, found=found)


def _cuda(machine: Machine) -> Finding:
    if machine.cuda_devices:
        return Finding(subject="CUDA", standing=Standing.READY, found=_count(machine.cuda_devices, "device"))
    return Finding(subject="CUDA", standing=Standing.NOTE, found="no device; no stage needs one")


def _interpreter(version: str, environ: Mapping[str, str], *, needed: bool) -> Finding:
    """Args: needed: a missing environment is made with it."""
    subject = f"python {version}"
    path = find_interpreter(version, environ)
    if path is not None:
        return Finding(subject=subject, standing=Standing.READY, found=f"{probe_version(path)} at {path}")
    broken = [str(candidate) for candidate in candidates(version, environ)]
    found = "not found on PATH, in pyenv, Homebrew or uv"
    if broken:
        found += f"; ignored, because they do not run as Python {version}: {', '.join(broken)}"
    if not needed:
        found += "; its environments exist"
        return Finding(subject=subject, standing=Standing.NOTE, found=found)
    install = f"pyenv install {version}, or brew install python@{version}"
    if forbidden := _download_forbidden(environ):
        found += f"; {forbidden} prevents uv from downloading it"
        return Finding(subject=subject, standing=Standing.BLOCKED, found=found, run=install)
    return Finding(
        subject=subject, standing=Standing.TO_DO, found=found, run=f"{SET_UP} (uv downloads it), or {install}"
    )


def _download_forbidden(environ: Mapping[str, str]) -> str | None:
    """Return the setting that prevents uv from downloading a Python, as `NAME=value`, or None."""
    forbidding = {
        "UV_OFFLINE": ("1", "true"),
        "UV_PYTHON_DOWNLOADS": ("never", "manual"),
        "NOX_DOWNLOAD_PYTHON": ("never",),
    }
    for name, values in forbidding.items():
        if environ.get(name, "").lower() in values:
            return f"{name}={environ[name]}"
    return None


def _environment(root: Path, environment: Environment, toolsets: Mapping[str, Toolset]) -> Finding:
    def finding(standing: Standing, found: str, run: str | None = None) -> Finding:
        return Finding(subject=environment.name, standing=standing, found=found, run=run)

    set_up = _set_up(environment)
    toolset = toolsets.get(environment.name)
    if toolset is None:
        return finding(Standing.TO_DO, f"missing (Python {environment.python})", set_up)
    versions = _toolset_versions(toolset)
    contents = f"Python {toolset.interpreter}, {_packages(versions)}"
    lock = environment.lock(root)
    if toolset.lock_digest != file_digest(lock):
        return finding(Standing.TO_DO, f"{contents}; installed from an older {lock.name}", set_up)
    if Version(toolset.interpreter).release[:2] != Version(environment.python).release[:2]:
        return finding(Standing.TO_DO, f"{contents}; its Python is not {environment.python}", set_up)
    locked = locked_versions(lock, environment.python)
    if _packages(locked) != _packages(versions):
        found = f"{contents}; its lock has {_packages(locked)}: it was changed by hand"
        return finding(Standing.TO_DO, found, f"rm -r {toolset.folder}, then {set_up}")
    return finding(Standing.READY, contents)


def _set_up(environment: Environment) -> str:
    """Return the command that creates or updates the environment."""
    return SET_UP if environment in (TRAIN, CONVERT[PRIMARY_LANE]) else SET_UP_ALL_LANES


def _lane(root: Path, lane: str, toolsets: Mapping[str, Toolset]) -> Finding:
    """The compatibility cell of the installed packages or, if there are none, of those in the lock."""
    environment = CONVERT[lane]
    locked = locked_versions(environment.lock(root), environment.python)
    toolset = toolsets.get(environment.name)
    if toolset is None:
        return _cell(f"lane torch-{lane}", locked, run=_correct_lock(environment))
    versions = _toolset_versions(toolset)
    if _packages(locked) == _packages(versions):
        return _cell(f"lane torch-{lane}", versions, run=_correct_lock(environment))
    run = f"rm -r {toolset.folder}, then {_set_up(environment)}"
    return _cell(f"lane torch-{lane}", versions, run=run, failed=Standing.TO_DO)  # the lock is another cell


def _correct_lock(environment: Environment) -> str:
    return f"nox -s lock, after correcting requirements/{environment.name}.in; then {_set_up(environment)}"


def _cell(
    subject: str,
    versions: Versions,
    *,
    run: str = "pip install 'coremill[mil]'",
    failed: Standing = Standing.BLOCKED,
) -> Finding:
    """Whether these versions are a measured cell of the compatibility matrix.

    Args:
        run: the command that installs other versions.
        failed: the standing of a cell that was measured to fail.
    """
    cell = read_compatibility().find(versions)
    if cell is None:
        found = f"not measured: {versions}; verification decides"
        return Finding(subject=subject, standing=Standing.NOTE, found=found)
    if cell.outcome is CellOutcome.PASSED:
        return Finding(subject=subject, standing=Standing.READY, found=f"works: cell {cell.name}, {cell.source}")
    found = f"{versions}: measured to fail as cell {cell}: {cell.reason}"
    return Finding(subject=subject, standing=failed, found=found, run=run)


def _toolset_versions(toolset: Toolset) -> Versions:
    """Return the versions in the environment, from its packages' metadata; its Python is not started."""
    folders = sorted(toolset.folder.glob("lib/python*/site-packages"))
    found = installed_versions([str(folder) for folder in folders])
    return Versions(python=toolset.interpreter, **found)


def locked_versions(lock: Path, python: str) -> Versions:
    """Return the versions in the lock for Python `python` on this platform.

    Raises:
        MachineError: a line of the lock is not a requirement.
    """
    pins: dict[str, str] = {}
    for number, line in enumerate(lock.read_text().splitlines(), start=1):
        if not line[:1].isalpha():
            continue  # hashes, comments, and blank lines
        try:
            requirement = Requirement(line.rstrip(" \\"))
        except InvalidRequirement as failure:
            raise MachineError(
                f"{lock}:{number}: {failure}", expected="a pinned requirement", run="nox -s lock"
            ) from failure
        target = {"python_version": python, "python_full_version": f"{python}.0"}
        if requirement.marker is None or requirement.marker.evaluate(target):
            for specifier in requirement.specifier:
                pins[requirement.name] = specifier.version
    found = {name: pins.get(name) for name in ("torch", "coremltools", "numpy")}
    return Versions(python=f"{python}.0", **found)


def _packages(versions: Versions) -> str:
    held = {"torch": versions.torch, "coremltools": versions.coremltools, "numpy": versions.numpy}
    return ", ".join(f"{name} {version}" for name, version in held.items() if version) or "no torch"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
