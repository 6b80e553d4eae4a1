"""`coremill`: every command is listed, found, and imported only when it is called."""

from __future__ import annotations

import subprocess
import sys

import pytest

from coremill.cli import COMMANDS, main


def test_help_lists_every_command_and_exit_code(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "   23  unsafe checkpoint" in text


def test_no_command_is_a_usage_error(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: coremill <command>")


@pytest.mark.parametrize(("name", "hint"), [("statsu", "did you mean 'status'?"), ("zzz", "run `coremill --help`")])
def test_an_unknown_command_is_told_the_nearest(capsys, name, hint):
    assert main([name]) == 2
    assert capsys.readouterr().err == f"coremill: there is no command {name!r}; {hint}\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "coremill 0.1.0\n"


HEAVY = """
import sys, importlib
for name in {modules!r}:
    importlib.import_module(name)
heavy = sorted({{"torch", "coremltools", "numpy", "tokenizers"}} & sys.modules.keys())
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""


@pytest.mark.parametrize(
    "module",
    [
        "coremill.cli",
        "coremill.core.schemas",
        "coremill.pipeline.runner",
        "coremill.pipeline.status",
        "coremill.infra.doctor",
        "coremill.infra.version_gate",
        "coremill.report.summary",
    ],
)
def test_light_rooms_stay_light(module):
    """Run where none of the heavy packages is installed, an import of one would be an error in itself."""
    ended = subprocess.run(
        [sys.executable, "-c", HEAVY.format(modules=[module])], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_an_error_of_a_command_becomes_its_exit_code(tmp_path, capsys):
    config = tmp_path / "none.toml"
    assert main(["status", "--config", str(config)]) == 10
    assert capsys.readouterr().err == (
        f"configuration error: cannot read {config}: No such file or directory\n  expected: a readable file\n"
    )
