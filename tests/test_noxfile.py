"""The noxfile: its sessions, their interpreters, and the arguments of builds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coremill.pipeline.environments import CONVERT_PYTHON, LANES, TRAIN_PYTHON

ROOT = Path(__file__).parents[1]


def nox(*arguments, cwd=ROOT, **env):
    command = [sys.executable, "-m", "nox", "--noxfile", str(ROOT / "noxfile.py"), *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "NO_COLOR": "1", **env}, capture_output=True, text=True, check=False
    )


def listed(*posargs):
    ended = nox("--list-sessions", "--json", "-t", "environment", "build", "check", "upkeep", *posargs)
    assert ended.returncode == 0, ended.stderr
    return {session["session"]: session for session in json.loads(ended.stdout)}


@pytest.fixture(scope="module")
def sessions():
    return listed()


def test_sessions_of_the_default_run(sessions):
    """Renaming or removing a session changes a checked-in file."""
    golden = ROOT / "tests" / "golden" / "sessions.txt"
    assert "".join(f"{name}\n" for name in sessions) == golden.read_text()


def test_sessions_of_an_imported_run():
    golden = ROOT / "tests" / "golden" / "sessions-imported.txt"
    found = listed("--", "--config", "configs/smollm2-135m.toml")
    assert "".join(f"{name}\n" for name in found) == golden.read_text()
    assert [name for name, session in found.items() if not session["description"]] == []


def test_all_sessions_are_listed_without_a_configuration(sessions):
    found = listed("--", "--config", "configs/none.toml")
    assert found.keys() == {*sessions, "texts", "import"}


def test_every_session_has_a_description(sessions):
    assert [name for name, session in sessions.items() if not session["description"]] == []


def test_interpreters_are_pinned(sessions):
    pins = {name: session["python"] for name, session in sessions.items() if name.startswith("env-")}
    assert pins["env-train"] == pins["env-tests-train"] == TRAIN_PYTHON == "3.13"
    assert all(pin == CONVERT_PYTHON == "3.11" for name, pin in pins.items() if "train" not in name)


def test_missing_interpreter_fails_its_session_and_skips_dependent_ones(tmp_path):
    """By default nox skips such a session with exit code 0 and runs the next one."""
    noxfile = tmp_path / "noxfile.py"
    text = (ROOT / "noxfile.py").read_text()
    assert "nox.options.error_on_missing_interpreters = True" in text
    noxfile.write_text(
        "import nox\n"
        + next(line for line in text.splitlines() if line.startswith("nox.options.error_on_missing"))
        + "\n@nox.session(python='3.99')\ndef first(session): pass\n"
        "@nox.session(venv_backend='none', requires=['first'])\n"
        "def second(session): session.log('ran on stale inputs')\n"
    )
    command = [sys.executable, "-m", "nox", "-f", str(noxfile), "-s", "second", "--download-python", "never"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Python interpreter 3.99 not found" in ended.stderr
    assert "ran on stale inputs" not in ended.stderr


def test_pytest_flags_are_not_parsed_as_build_options(tmp_path):
    ended = nox("-s", "tests-light", "--", "--co", "--fa", "-q", "tests/cli/test_main.py")
    assert "unrecognized arguments: --fa" in ended.stderr + ended.stdout
    assert "would install" not in ended.stderr


def test_unknown_build_option_is_rejected(tmp_path):
    ended = nox("-s", "dataset", "--", "--build-dir", str(tmp_path), "--forced", "--dry-run")
    assert ended.returncode == 1
    assert "unrecognized arguments: --forced" in ended.stderr
    assert "invalid arguments after `--`" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_unknown_key_in_the_configuration_stops_the_build(tmp_path):
    config = tmp_path / "magic-8-ball.toml"
    config.write_text((ROOT / "configs/magic-8-ball.toml").read_text().replace("epochs =", "epoch ="))
    ended = nox("-s", "dataset", "--", "--build-dir", str(tmp_path / "build"), "--config", str(config), "--dry-run")
    assert ended.returncode == 1
    assert "unknown key `epoch` at `$.training`" in ended.stderr
    assert "expected: `epochs`?" in ended.stderr


@pytest.mark.parametrize("session", ["import", "pipeline"])
def test_missing_configuration_is_reported(tmp_path, session):
    ended = nox("-s", session, "--", "--build-dir", str(tmp_path), "--config", "configs/none.toml", "--dry-run")
    assert ended.returncode == 1
    assert "aborted: cannot read configs/none.toml: No such file or directory" in ended.stderr


def test_stage_of_another_kind_of_run_cannot_be_forced(tmp_path):
    ended = nox("-s", "dataset", "--", "--build-dir", str(tmp_path), "--force", "import", "--dry-run")
    assert ended.returncode == 1
    assert (
        "--force import: configs/magic-8-ball.toml has no such stage; expected one of all, dataset, training, "
        "export, convert, verify, hf, gguf" in ended.stderr
    )


FIRST_STAGES = {"magic-8-ball": ["dataset", "training"], "smollm2-135m": ["texts", "import"]}


@pytest.mark.parametrize("run", FIRST_STAGES)
def test_dry_run_lists_stages_and_runs_none(tmp_path, run):
    options = ("--config", f"configs/{run}.toml", "--build-dir", str(tmp_path / "build"), "--dry-run")
    ended = nox("-s", "pipeline", "--", *options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("| would run: never ran") == 7
    lines = [line.split("|")[0].strip() for line in ended.stdout.splitlines()]
    assert lines == [*FIRST_STAGES[run], "export-2.9.1", "convert-2.9.1", "verify-2.9.1", "hf", "gguf"]
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("run", FIRST_STAGES)
def test_matrix_runs_shared_stages_once(tmp_path, run):
    options = ("--config", f"configs/{run}.toml", "--build-dir", str(tmp_path / "build"), "--dry-run")
    ended = nox("-s", "matrix", "--", *options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("| would run: never ran") == 4 + 3 * len(LANES)
    for stage in FIRST_STAGES[run]:
        assert len(re.findall(rf"^{stage} +\| would run", ended.stdout, re.MULTILINE)) == 1


def test_lane_determines_the_sessions(tmp_path):
    ended = nox("-s", "pipeline", "--", "--build-dir", str(tmp_path / "build"), "--dry-run", "--torch", LANES[1])
    assert ended.returncode == 0, ended.stderr
    assert f"verify-{LANES[1]}  | would run: never ran" in ended.stdout
    assert f"verify-{LANES[0]}" not in ended.stdout


def switched_off(tmp_path, formats):
    config = tmp_path / "off.toml"
    text = (ROOT / "configs/smollm2-135m.toml").read_text()
    config.write_text(text.replace('model_type = "llama"', f'model_type = "llama"\nformats = {formats}'))
    return ("--config", str(config), "--build-dir", str(tmp_path / "build"), "--dry-run")


def test_format_that_is_switched_off_is_not_built(tmp_path):
    ended = nox("-s", "pipeline", "--", *switched_off(tmp_path, '["hf"]'))
    assert ended.returncode == 0, ended.stderr
    stages = [line.split("|")[0].strip() for line in ended.stdout.splitlines()]
    assert stages == ["texts", "import", "export-2.9.1", "convert-2.9.1", "verify-2.9.1", "hf"]


def test_session_of_a_format_that_is_switched_off_fails(tmp_path):
    ended = nox("-s", "gguf", "--", *switched_off(tmp_path, "[]"))
    assert ended.returncode == 1
    assert (
        "aborted: the configuration switches stage 'gguf' off\n"
        "  expected: `formats` with 'gguf'\n"
        "  run: coremill status" in ended.stderr
    )
