"""A stage's process: its memory is measured, and a kill, a crash and a failed allocation are told apart."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tests.pipeline.conftest import CONFIG

from coremill.core import machine
from coremill.core.errors import ConfigError, CoremillError, CrashError, DefectError, OutOfMemoryError
from coremill.core.manifest import read_manifest
from coremill.pipeline.runner import run_stage

MEMORY = r"held \d+ MB, and the least that was available meanwhile was [\d,]+ MB of [\d,]+ MB"


@pytest.fixture
def run(stages, config, layout, toolset, tmp_path):
    """Run a stage with this body."""

    def run(body: str):
        text = f"import os\n\ndef run_stage(context):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        (tmp_path / "modules" / "tiny_dataset.py").write_text(text)
        return run_stage(stages[0], config, layout, toolset, None, stages=stages)

    return run


def failure(run, body: str) -> CoremillError:
    with pytest.raises(CoremillError) as caught:
        run(body)
    return caught.value


def test_killed_stage_most_likely_ran_out_of_memory(run, layout):
    body = "(context.out / 'half').write_text('x'); import time; time.sleep(0.2); os.kill(os.getpid(), 9)"
    error = failure(run, body)
    assert type(error) is OutOfMemoryError
    assert re.fullmatch(
        rf"stage dataset was killed \(SIGKILL\), most likely because memory ran out; it {MEMORY}", error.found
    )
    assert error.expected == "a machine with more memory, or shorter `[shapes]`"
    assert (error.run, error.exit_code) == ("coremill doctor", 33)
    left = read_manifest(layout.failed_stage("dataset"))
    assert (left.outcome, left.error, left.error_kind) == ("failed", str(error), "memory")
    assert (list(left.outputs), list(left.figures)) == (["half"], ["peak_anonymous_bytes"])


@pytest.mark.parametrize(
    ("own", "file"),
    [("0::/", "memory.events"), ("4:memory:/box", "memory/box/memory.oom_control")],
    ids=["version 2", "version 1"],
)
def test_kill_that_the_control_group_counted_is_certain(run, tmp_path, monkeypatch, own, file):
    """A control group is imitated, because making one needs root."""
    (tmp_path / "own").write_text(own + "\n")
    counter = tmp_path / file
    counter.parent.mkdir(parents=True, exist_ok=True)
    counter.write_text("oom 7\noom_kill 2\n")
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    body = f"open({str(counter)!r}, 'w').write('oom 9\\noom_kill {{}}\\n'); os.kill(os.getpid(), 9)"
    sure = failure(run, body.format(3)).found
    assert sure.startswith("stage dataset was killed (SIGKILL), because memory ran out; ")
    # Not more than before: something else killed it.
    unsure = failure(run, body.format(3)).found
    assert unsure.startswith("stage dataset was killed (SIGKILL), most likely because memory ran out; ")


ENDS = "a process that ends by itself; its log is above"
TRUNCATED = (
    "a process that ends by itself; SIGBUS most likely means that a file became shorter while it was read, or that "
    "the disk became full; its log is above"
)
EXPECTED = {"SIGSEGV": ENDS, "SIGABRT": ENDS, "SIGBUS": TRUNCATED}


@pytest.mark.parametrize(
    ("name", "text"), [("SIGSEGV", "Segmentation fault"), ("SIGABRT", "Aborted"), ("SIGBUS", "Bus error")]
)
def test_crash_names_its_signal(run, capfd, layout, name, text):
    error = failure(run, f"import time; time.sleep(0.2); os.kill(os.getpid(), {getattr(signal, name).value})")
    assert type(error) is CrashError
    assert re.fullmatch(rf"stage dataset crashed: {name}, {text}; it {MEMORY}", error.found)
    assert error.exit_code == 54
    assert error.expected == EXPECTED[name]
    assert read_manifest(layout.failed_stage("dataset")).error_kind == "crash"
    assert "tiny_dataset.py" in capfd.readouterr().err  # the traceback of the crash


def test_file_that_is_truncated_while_it_is_read_is_suspected(run, tmp_path):
    """Reading a mapped file beyond its end ends the process."""
    (tmp_path / "weights").write_bytes(b"x" * 100_000)
    body = f"""
        import mmap
        with open({str(tmp_path / "weights")!r}, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            os.truncate(file.fileno(), 10)
            bytes(mapped)
    """
    error = failure(run, body)
    assert (type(error), error.exit_code) == (CrashError, 54)
    assert error.found.startswith("stage dataset crashed: SIGBUS, Bus error; ")
    assert error.expected == TRUNCATED


def test_failed_allocation_is_an_error_of_memory(run, layout):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (200_000_000, 200_000_000))\n"
    error = failure(run, limited + "bytearray(400_000_000)")
    assert type(error) is OutOfMemoryError
    assert re.fullmatch(rf"stage dataset ran out of memory: MemoryError; it {MEMORY}", error.found)
    assert read_manifest(layout.failed_stage("dataset")).error_kind == "memory"


def test_error_raised_from_a_failed_allocation_is_one_of_memory(run):
    body = """
        from coremill.core.errors import ConversionError
        try:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes.")
        except RuntimeError as failure:
            raise ConversionError("coremltools could not convert the graph") from failure
    """
    error = failure(run, body)
    assert type(error) is OutOfMemoryError
    assert error.found.startswith(
        "stage dataset ran out of memory: DefaultCPUAllocator: can't allocate memory: 8 bytes.; "
    )


def test_error_of_the_stage_keeps_its_class_and_its_advice(run, capfd):
    body = """
        from coremill.core.errors import ConfigError
        class Own(ConfigError): pass
        raise Own("a bad file", expected="a good one", run="ls")
    """
    error = failure(run, body)
    assert type(error) is ConfigError
    assert str(error) == "a bad file\n  expected: a good one\n  run: ls"
    assert "Traceback" not in capfd.readouterr().err


def test_other_exception_is_a_defect_with_its_traceback(run, capfd):
    error = failure(run, "{}['shapes']")
    assert (type(error), str(error), error.exit_code) == (DefectError, "KeyError: 'shapes'", 1)
    assert "tiny_dataset.py" in capfd.readouterr().err


def test_stage_that_exits_is_a_defect(run):
    error = failure(run, "os._exit(7)")
    assert (type(error), str(error)) == (DefectError, "stage dataset ended with exit code 7 and no result")


def test_peak_includes_children_and_excludes_what_was_freed(run):
    hold = "b = b'x' * {}; import time; time.sleep(1.2)"
    body = f"""
        import subprocess, sys
        freed = b"x" * 70_000_000; del freed
        child = subprocess.Popen([sys.executable, "-c", {hold.format(120_000_000)!r}])
        {hold.format(80_000_000)}
        child.wait()
        return {{"rows": 1}}
    """
    figures = run(body).figures
    assert figures["rows"] == 1
    assert 200e6 < figures["peak_anonymous_bytes"] < 260e6


def test_mapped_file_is_not_counted(run, tmp_path):
    (tmp_path / "weights").write_bytes(b"x" * 150_000_000)
    body = f"""
        import mmap, time
        with open({str(tmp_path / "weights")!r}) as file:
            sum(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[::4096]); time.sleep(0.2)
        return {{}}
    """
    assert run(body).figures["peak_anonymous_bytes"] < 60e6


PARENT = """
    import sys
    from pathlib import Path
    from coremill.core.config import read_config
    from coremill.core.stage import StageContext
    from coremill.pipeline.stages import Stage
    from coremill.pipeline.worker import work

    if __name__ == "__main__":
        sys.path.insert(0, sys.argv[2])
        stage = Stage(name="dataset", module="tiny_dataset", reads=(), needs=(), per_lane=False, purpose="")
        out = Path(sys.argv[1])
        work(stage, StageContext(config=read_config(Path(sys.argv[3])), lane=None, inputs={}, out=out))
"""


def test_stage_ends_with_the_process_that_waits_for_it(tmp_path):
    (tmp_path / "tiny_dataset.py").write_text(
        "import os, time\ndef run_stage(context):\n"
        "    (context.out / 'pid.new').write_text(str(os.getpid()))\n"
        "    (context.out / 'pid.new').rename(context.out / 'pid')\n    time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(textwrap.dedent(PARENT))
    with subprocess.Popen([sys.executable, tmp_path / "parent.py", tmp_path, tmp_path, CONFIG]) as parent:
        _until((tmp_path / "pid").exists)
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, 0)
        parent.kill()
    _until(lambda: _ended(pid))


def _until(reached) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # nothing waited for it
    except FileNotFoundError:
        return True
