"""Build stages of a run: each as soon as those that it needs are done, side by side where memory allows."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from coremill.core.config import RunConfig
from coremill.core.errors import ConversionError, CoremillError, MachineError
from coremill.core.layout import MANIFEST, RunLayout, checkpoint_file
from coremill.core.machine import available_memory_bytes, whole_megabytes
from coremill.core.manifest import read_manifest
from coremill.core.processes import held_bytes
from coremill.core.publish import recover
from coremill.pipeline.environments import PRIMARY_LANE, Environment, Toolset, installed
from coremill.pipeline.freshness import freshness
from coremill.pipeline.lock import TOKEN_VARIABLE, RunLock
from coremill.pipeline.stages import Stage, find_stage, stage_folder, stages_of
from coremill.pipeline.status import run_status

_BASE_BYTES = 1_500_000_000
_BYTES_PER_CHECKPOINT_BYTE = 3
"""No stage needs more than 1.5 GB and 6 bytes for each parameter, which has at least 2 in the checkpoint."""


class Task(NamedTuple):
    """A stage to build; in a lane, if it runs once per lane."""

    stage: Stage
    lane: str | None

    @property
    def environment(self) -> Environment:
        return self.stage.environment(self.lane)

    def __str__(self) -> str:
        return self.stage.name if self.lane is None else f"{self.stage.name}-{self.lane}"


def tasks_for(names: Collection[str] | None, stages: Sequence[Stage], lanes: Sequence[str]) -> tuple[Task, ...]:
    """Return the named stages (None: all) and those that they need, in the order of `stages`, for each lane."""
    wanted = {stage.name for stage in stages} if names is None else set(names)
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted |= set(stage.needs)
    chosen = [stage for stage in stages if stage.name in wanted]
    # Each once: the lanes share some.
    return tuple(dict.fromkeys(Task(stage, lane if stage.per_lane else None) for lane in lanes for stage in chosen))


class Build:
    """A build of a run, which holds the run's lock.

    Args:
        root: the checkout.
        config: the path of the run's configuration.
        env: environment variables of the stages, added to those of this process; None removes one.
        force: `all`, or the stage that runs even if it is fresh; None for no stage.
        dry_run: show what would run, and why, without running it; the run is not locked.
        show: receives a task and a line about it, from several threads but one at a time.

    Raises:
        RunLockedError: another process is building the run.
    """

    def __init__(
        self,
        root: Path,
        config: Path,
        run: RunConfig,
        layout: RunLayout,
        *,
        env: Mapping[str, str | None],
        force: str | None,
        dry_run: bool,
        show: Callable[[Task, str], None],
    ) -> None:
        self.stages = stages_of(run)
        self.failed: list[Task] = []
        """The tasks that failed, without those that need them."""
        self._root, self._config, self._run, self._layout, self._force = root, config, run, layout, force
        self._show, self._showing = show, threading.Lock()
        self._lock = None if dry_run else RunLock(layout)
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for name, value in {**env, TOKEN_VARIABLE: self._lock.token if self._lock else None}.items():
            if value is None:
                self._env.pop(name, None)
            else:
                self._env[name] = value
        self._processes: dict[Task, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Build:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def run(self, tasks: Sequence[Task]) -> None:
        """Run the tasks that are not fresh. After a failure, run all that do not need the failed one."""
        if self._lock is None:
            return self._show_state(tasks)
        waiting = list(tasks)
        running: dict[Future[bool], Task] = {}
        succeeded: dict[Task, bool] = {}
        jobs = os.cpu_count() or 1
        with ThreadPoolExecutor(jobs) as threads:
            try:
                while waiting or running:
                    self._skip_blocked(waiting, succeeded)
                    for task in list(waiting):
                        ready = all(need in succeeded for need in self._needs(task))
                        if ready and len(running) < jobs and self._fits(len(running)):
                            waiting.remove(task)
                            running[threads.submit(self._built, task)] = task
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        task = running.pop(future)
                        succeeded[task] = future.result()
                        if not succeeded[task]:
                            self.failed.append(task)
            except BaseException:
                for process in list(self._processes.values()):
                    process.terminate()
                raise

    @property
    def unrecorded_failures(self) -> list[Task]:
        """The tasks that failed without a manifest for the report, such as one with an altered input."""
        return [task for task in self.failed if not (self._failed(task) / MANIFEST).is_file()]

    def conversion_failed(self, lane: str) -> bool:
        """Return whether the conversion itself failed, rather than because of a full disk or a changed input."""
        return any(
            task.stage.name == "convert"
            and task.lane == lane
            and task not in self.unrecorded_failures
            and read_manifest(self._failed(task)).error_kind == ConversionError.kind
            for task in self.failed
        )

    def _failed(self, task: Task) -> Path:
        return self._layout.failed_stage(task.stage.name, task.lane)

    def _show_state(self, tasks: Sequence[Task]) -> None:
        lanes = list(dict.fromkeys(task.lane for task in tasks if task.lane)) or [PRIMARY_LANE]
        states = {
            (state.stage, state.lane): state for state in run_status(self._root, self._run, self._layout, lanes)
        }
        for task in tasks:
            reasons = [*states[task.stage.name, task.lane].reasons, *(["forced"] if self._is_forced(task) else [])]
            self._tell(task, f"would run: {'; '.join(reasons)}" if reasons else "fresh")

    def _is_forced(self, task: Task) -> bool:
        return self._force in ("all", task.stage.name)

    def _skip_blocked(self, waiting: list[Task], succeeded: dict[Task, bool]) -> None:
        """Remove the tasks that need one that did not succeed; `waiting` has each after those that it needs."""
        for task in list(waiting):
            if missing := [need for need in self._needs(task) if succeeded.get(need) is False]:
                self._tell(task, f"not run: it needs {missing[0]}")
                waiting.remove(task)
                succeeded[task] = False

    def _needs(self, task: Task) -> list[Task]:
        stages = [find_stage(need, self.stages) for need in task.stage.needs]
        return [Task(stage, task.lane if stage.per_lane else None) for stage in stages]

    def _fits(self, running: int) -> bool:
        """Return whether another stage's memory fits beside the stages that run. What runs alone always starts."""
        if not running:
            return True
        held = sum(held_bytes(process.pid) for process in list(self._processes.values()))
        return (running + 1) * self._stage_bytes() <= available_memory_bytes() + held

    def _stage_bytes(self) -> int:
        """Return the most memory that a stage of this run needs."""
        checkpoint = checkpoint_file(self._layout.stage(self._run.model_stage), self._run.name)
        size_bytes = checkpoint.stat().st_size if checkpoint.is_file() else 0
        return _BASE_BYTES + _BYTES_PER_CHECKPOINT_BYTE * size_bytes

    def _built(self, task: Task) -> bool:
        """Run the task in its interpreter, unless it is fresh; return whether it succeeded."""
        try:
            recover(stage_folder(self._layout, task.stage, task.lane))
            toolset = self._toolset(task)
            state = freshness(task.stage, self._run, self._layout, toolset, task.lane, self.stages)
        except CoremillError as error:
            self._tell(task, f"{error.kind} error: {error}")
            return False
        if state.fresh and not self._is_forced(task):
            self._tell(task, "fresh")
            return True
        self._tell(task, f"runs: {'; '.join(state.reasons) or 'forced'}")
        start = time.monotonic()
        if code := self._ran(task, toolset):
            self._tell(task, f"failed with exit code {code}")
            return False
        manifest = read_manifest(stage_folder(self._layout, task.stage, task.lane))
        peak = manifest.peak_anonymous_bytes
        held = "" if peak is None else f", {whole_megabytes(peak)} of memory"
        self._tell(task, f"done in {time.monotonic() - start:.1f} s{held}")
        return True

    def _toolset(self, task: Task) -> Toolset:
        toolset = installed(self._root).get(task.environment.name)
        if toolset is None:
            raise MachineError(
                f"the environment {task.environment.name!r} is not installed",
                run=f"nox -s {task.environment.session}",
            )
        return toolset

    def _ran(self, task: Task, toolset: Toolset) -> int:
        """Run the command of the task's stage and show its output; return its exit code."""
        command = [str(toolset.python), "-m", "coremill", "stage", task.stage.name, "--config", str(self._config)]
        command += ["--build-dir", str(self._layout.build)]
        command += ["--torch", task.lane] if task.lane else []
        command += ["--force"] if self._is_forced(task) else []
        with subprocess.Popen(
            command, env=self._env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            self._processes[task] = process
            assert process.stdout is not None
            for line in process.stdout:
                # Of a progress bar, the last state.
                self._tell(task, line.decode(errors="replace").rstrip().rpartition("\r")[2])
        del self._processes[task]
        return process.returncode

    def _tell(self, task: Task, text: str) -> None:
        with self._showing:
            for line in text.splitlines() or [""]:
                self._show(task, line)
