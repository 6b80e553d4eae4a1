"""`coremill agree` starts among the tools, and runs in the environment of its lane."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from coremill.cli import elsewhere
from coremill.cli.main import main
from coremill.pipeline.environments import Toolset


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What would be started instead of this process, which has neither torch nor coremltools."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("torch", "coremltools") else find_spec(name)
    )
    toolsets = {f"convert-torch-{lane}": Toolset(tmp_path / lane, "3.11.7", "d") for lane in ("2.9.1", "2.8.0")}
    monkeypatch.setattr(elsewhere, "installed", lambda root: toolsets)
    found: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda python, arguments: found.append(arguments) or sys.exit(7))
    return found


@pytest.mark.parametrize(
    ("options", "lane"),
    [([], "2.9.1"), (["--torch", "2.8.0"], "2.8.0"), (["--torch=2.8.0"], "2.8.0"), (["--torch"], "2.9.1")],
)
def test_it_goes_to_the_environment_of_its_lane(started, tmp_path, options, lane):
    with pytest.raises(SystemExit, match="7"):
        main(["agree", "--run", "tiny", *options])
    python = str(tmp_path / lane / "bin" / "python")
    assert started == [[python, "-m", "coremill", "agree", "--run", "tiny", *options]]


def test_its_help_needs_nothing(started, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["agree", "--help"])
    assert stopped.value.code == 0
    assert "  mil-reference  the package under coremill.mil\n" in capsys.readouterr().out
    assert started == []


def test_where_no_environment_is_in_place_it_says_how_to_make_one(started, monkeypatch, capsys):
    monkeypatch.setattr(elsewhere, "installed", lambda root: {})
    assert main(["agree", "--run", "tiny"]) == 32
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  expected: an environment with torch, coremltools, numpy, tokenizers, transformers, xllamacpp",
        "  run: nox -s env-convert-torch-2.9.1 in a checkout, or pip install torch coremltools numpy tokenizers "
        "transformers xllamacpp",
    ]


@pytest.mark.parametrize("module", ["coremill.cli.agree", "coremill.verification.agree", "coremill.core.matrix"])
def test_it_is_light(module):
    code = (
        f"import sys, {module}\n"
        "heavy = sorted({'torch', 'coremltools', 'numpy', 'tokenizers', 'rich'} & sys.modules.keys())\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
