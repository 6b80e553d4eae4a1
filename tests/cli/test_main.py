"""`coremill`: every command is listed, found, and imported only when it is called."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from coremill.cli.commands import COMMANDS, GROUPS
from coremill.cli.main import main
from coremill.core.command import exit_on_error
from coremill.core.errors import exit_code_table


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: coremill <command>")
    assert all(f"  {name} " in text for name in [*COMMANDS, *GROUPS] if " " not in name)
    assert main(["help"]) == 0
    assert capsys.readouterr().out == text


def test_group_help_lists_its_commands(capsys):
    assert main(["mil", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: coremill mil <command>")
    assert all(f"  {name.removeprefix('mil ')} " in text for name in COMMANDS if name.startswith("mil "))
    assert main(["help", "mil"]) == 0
    assert capsys.readouterr().out == text


def test_help_prints_the_exit_codes(capsys):
    assert main(["help", "exit-codes"]) == 0
    assert capsys.readouterr().out == f"{exit_code_table()}\n"


def test_help_of_a_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["help", "status"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: coremill status ")


@pytest.mark.parametrize("words", [[], ["mil"]])
def test_no_command_is_a_usage_error(capsys, words):
    assert main(words) == 2
    assert capsys.readouterr().out.startswith(f"usage: {' '.join(['coremill', *words])} <command>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["statsu"], "coremill: there is no command 'statsu'; did you mean 'status'?"),
        (["zzz"], "coremill: there is no command 'zzz'; run `coremill --help`"),
        (["help", "exports"], "coremill: there is no command 'exports'; did you mean 'export'?"),
        (["mil", "inspct"], "coremill mil: there is no command 'inspct'; did you mean 'inspect'?"),
        (["mil", "zzz"], "coremill mil: there is no command 'zzz'; run `coremill mil --help`"),
    ],
)
def test_unknown_command_suggests_the_nearest(capsys, words, message):
    assert main(words) == 2
    assert capsys.readouterr().err == f"{message}\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "coremill 0.1.0\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_module_of_a_command_exists(command):
    """Its package is found without an import of the module, which may need torch."""
    path = Path(*COMMANDS[command].module.split(".")).with_suffix(".py")
    assert (Path(__file__).parents[2] / "src" / path).is_file()


def test_help_imports_no_dependency():
    """It starts in a fraction of the time that they take."""
    code = (
        "import sys\nfrom coremill.cli.main import main\nmain(['--help'])\n"
        "sys.exit(' '.join({'msgspec', 'packaging', 'rich'} & sys.modules.keys()) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_importing_a_light_module_imports_nothing_heavy():
    """Where none of the heavy packages is installed, an import of one would be an error in itself."""
    modules = [
        "coremill.cli.main",
        "coremill.core.schemas",
        "coremill.infra.version_gate",
        *(each.module for each in COMMANDS.values() if not each.needs),
        *(COMMANDS[name].module for name in ("import", "export", "convert", "verify", "gguf", "hf", "agree")),
    ]
    code = (
        f"import sys, {', '.join(modules)}\n"
        "heavy = sorted({'torch', 'coremltools', 'numpy', 'tokenizers'} & sys.modules.keys())\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_error_of_a_command_becomes_its_exit_code(tmp_path, capsys):
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
def test_command_names_the_packages_that_are_not_installed(command, arguments, needs):
    """Run by an interpreter that has the dependencies of the light packages, and nothing more."""
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
        found = f"export and conversion do not support {python} ({sys.executable})"
        expected = "Python 3.10 or 3.11"
    assert ended.returncode == code
    assert ended.stderr.startswith(f"{kind} error: {found}\n  expected: {expected}")
    assert ended.stderr.endswith(
        "\n  run: nox -s pipeline, which uses Python 3.11; coremill doctor shows where it searches for it\n"
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
def test_command_does_not_overwrite_its_input(tmp_path, capsys, arguments):
    command, *options = [each.format(d=tmp_path) for each in arguments]
    module = importlib.import_module(COMMANDS[command].module)
    assert exit_on_error(lambda: module.main(options)) == 52
    assert "is read and would be overwritten" in capsys.readouterr().err


def test_build_directory_that_is_a_file_is_rejected(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    (tmp_path / "f").write_text("")
    assert main(["status", "--build-dir", str(tmp_path / "f")]) == 52
    assert f"--build-dir {tmp_path / 'f'} is a file" in capsys.readouterr().err
