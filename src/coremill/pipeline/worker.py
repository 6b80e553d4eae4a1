"""The process that a stage's function runs in.

A process of its own, so that the one that started it can measure its memory, and can report a kill or a crash.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import threading
import traceback
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from coremill.core.command import INTERRUPTED, log_to_stderr
from coremill.core.config import RunConfig
from coremill.core.errors import CoremillError, DefectError
from coremill.core.machine import largest_check_bytes
from coremill.core.manifest import ESTIMATE, PEAK
from coremill.core.processes import SAMPLE_S, ProcessWatch, allocation_failure
from coremill.core.stage import Figures, StageContext
from coremill.pipeline.stages import Stage


class Worked(NamedTuple):
    """What a stage's function returned, or the error that ended it."""

    figures: Figures
    """With PEAK where it can be measured, even after an error."""
    error: CoremillError | None


class _Failure(NamedTuple):
    """An error of the worker, without objects of its packages, which the other process does not import."""

    kind: type[CoremillError] | None
    """None for a failed allocation."""
    found: str
    expected: str | None = None
    run: str | None = None


def work(stage: Stage, context: StageContext[RunConfig]) -> Worked:
    """Run the stage's function in a new process and wait for it."""
    # Not a fork: on macOS, a forked process must not use the system's frameworks.
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_work, args=(stage, context, sender), name=stage.name)
    process.start()
    sender.close()
    assert process.pid is not None
    watch = ProcessWatch(process.pid)
    try:
        while not receiver.poll(SAMPLE_S):
            watch.sample()
        result = _received(receiver)
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    figures, error = (result, None) if isinstance(result, dict) else ({}, _error(stage, result, process, watch))
    if watch.peak_anonymous_bytes is not None:
        figures[PEAK] = watch.peak_anonymous_bytes
    return Worked(figures, error)


def _received(receiver: Connection) -> Figures | _Failure | None:
    """Return what the worker sent; None if it ended without."""
    try:
        result: Figures | _Failure = receiver.recv()
    except EOFError:
        return None
    return result


def _error(
    stage: Stage, failure: _Failure | None, process: multiprocessing.process.BaseProcess, watch: ProcessWatch
) -> CoremillError:
    what = f"stage {stage.name}"
    if failure is None:
        code = process.exitcode or 0
        if code < 0:
            return watch.ended_by_signal(what, -code)
        return DefectError(f"{what} ended with exit code {code} and no result")
    if failure.kind is None:
        return watch.ran_out(what, failure.found)
    return failure.kind(failure.found, expected=failure.expected, run=failure.run)


def _work(stage: Stage, context: StageContext[RunConfig], sender: Connection) -> None:
    log_to_stderr()
    faulthandler.enable()  # a crash prints where it happened
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        figures = stage.function()(context)
        estimate = largest_check_bytes()
        sender.send(figures if estimate is None else {**figures, ESTIMATE: estimate})
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the other process raises it
        sender.send(_failure(error))


def _failure(error: Exception) -> _Failure:
    if (reason := allocation_failure(error)) is not None:
        return _Failure(None, reason)
    if isinstance(error, CoremillError):
        # The nearest of the classes that the other process has.
        kind = next(each for each in type(error).__mro__ if each.__module__ == CoremillError.__module__)
        return _Failure(kind, error.found, error.expected, error.run)
    traceback.print_exc()
    return _Failure(DefectError, f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """End this process if its parent is killed: nothing can publish its work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(INTERRUPTED)
