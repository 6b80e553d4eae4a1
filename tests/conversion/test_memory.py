"""Too little memory or disk space is an error before the work, with both figures."""

from __future__ import annotations

import resource
import subprocess
import sys

from coremill.conversion import convert_coreml, export_pytorch
from coremill.core.command import exit_on_error
from coremill.core.errors import MachineError, OutputError


def export_here(build) -> int:
    argv = ["--checkpoint", str(build.checkpoint), "--tokenizer", str(build.tokenizer), "--toy"]
    argv += ["--out", str(build.root / "new"), "--shapes", "80,128", "--primary", "80"]
    return exit_on_error(lambda: export_pytorch.main(argv))


def convert_here(build) -> int:
    argv = ["--graph", str(build.graph), "--contract", str(build.contract), "--toy"]
    return exit_on_error(lambda: convert_coreml.main([*argv, "--out", str(build.root / "new" / "x.mlpackage")]))


def test_an_export_error_names_the_longest_length(build, monkeypatch, capsys):
    monkeypatch.setattr("coremill.core.machine.available_memory_bytes", lambda: 1_000_000)
    assert export_here(build) == MachineError.exit_code
    # The libraries, the weights and the logits in float32: 880 MB + 4.15 · 106,944 + 4.2 · 128 · 512 bytes.
    assert capsys.readouterr().err == (
        "machine error: 1 MB of memory is available\n"
        "  expected: 881 MB, to export 106,944 parameters at T128\n"
        "  run: coremill doctor\n"
    )
    assert not (build.root / "new").exists()


def test_a_conversion_checks_memory_and_disk(build, monkeypatch, capsys):
    monkeypatch.setattr("coremill.core.machine.available_memory_bytes", lambda: 1_000_000)
    assert convert_here(build) == MachineError.exit_code
    assert f"to convert a program of {build.graph.stat().st_size / 1e6:,.0f} MB" in capsys.readouterr().err
    monkeypatch.undo()

    class Full:
        free = 5_000_000

    monkeypatch.setattr("coremill.core.machine.shutil.disk_usage", lambda _: Full)
    assert convert_here(build) == OutputError.exit_code
    assert "expected: 69 MB, for the package and the temporary copies of a conversion" in capsys.readouterr().err
    assert not list((build.root / "new").glob("*.mlpackage"))


def test_an_export_with_enough_memory_runs(build, monkeypatch):
    monkeypatch.setattr("coremill.core.machine.available_memory_bytes", lambda: 881_000_000)
    assert export_here(build) == 0


ALLOCATE = """
import torch
from coremill.core.command import exit_on_error
raise SystemExit(exit_on_error(lambda: torch.ones(8_000_000_000)))
"""


def test_failed_allocation_of_torch_is_an_error_of_memory():
    limit = 3_000_000_000
    ended = subprocess.run(
        [sys.executable, "-c", ALLOCATE],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 33
    assert ended.stderr.startswith("memory error: memory ran out: ")
    assert "you tried to allocate 32000000000 bytes" in ended.stderr
    assert "`ulimit` allows a process 3,000 MB\n  expected: a machine with more memory" in ended.stderr
