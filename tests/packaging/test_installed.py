"""coremill as users install it: `pip install coremill`, and with the evaluator `pip install 'coremill[mil]'`."""

from __future__ import annotations

import os

from coremill.pipeline.environments import CONVERT_PYTHON

PYTHON = os.environ.get("COREMILL_INSTALL_PYTHON", CONVERT_PYTHON)


def test_light_installation_has_no_torch(light):
    ended = light.run("python", "-c", "import coremill, torch")
    assert ended.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'torch'"


def test_light_installation_prints_the_help(light):
    ended = light.run("coremill", "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("usage: coremill <command>")


def test_doctor_of_a_light_installation_names_the_extras(light):
    ended = light.run("coremill", "doctor")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "pip install 'coremill[mil]'" in ended.stdout
    assert ended.stdout.endswith("\ncan be set up: coremill[train], coremill[convert], coremill[mil]\n")


def test_command_of_an_extra_that_is_not_installed_names_it(light):
    ended = light.run("coremill", "mil", "selftest")
    assert ended.returncode == 32
    assert "  run: pip install 'coremill[mil]', or " in ended.stderr


def test_python_api(mil):
    code = "import platform; from coremill.mil import MLModel; print(platform.python_version(), MLModel.__name__)"
    ended = mil.run("python", "-c", code)
    assert ended.stdout.startswith(f"{PYTHON}.")
    assert ended.stdout.endswith(" MLModel\n")


def test_console_scripts(mil):
    code = "from importlib.metadata import distribution; print(*distribution('coremill').entry_points.names)"
    names = mil.run("python", "-c", code).stdout.split()
    assert names == ["coremill"]
    for name in names:
        ended = mil.run(name, "--help")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.startswith(f"usage: {name} ")


def test_evaluator_computes_the_expected_outputs_of_the_bundle(mil):
    ended = mil.run("coremill", "mil", "selftest")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_doctor_finds_a_measured_cell(mil):
    ended = mil.run("coremill", "doctor")
    assert ended.returncode == 0
    assert "can be set up: coremill[train], coremill[convert]\n" in ended.stdout
