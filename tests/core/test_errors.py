"""The error family: one exit code a kind, and one place that turns an error into an exit."""

from __future__ import annotations

import pytest

from coremill.core.command import exit_on_error
from coremill.core.errors import GATES_FAILED, OK, USAGE, ConfigError, error_kinds, exit_code_table


def test_every_kind_has_an_exit_code_of_its_own():
    codes = [kind.exit_code for kind in error_kinds()]
    assert len(codes) == len({*codes, OK, 1, USAGE, GATES_FAILED}) - 4
    assert all(code < 126 for code in codes), "from 126 on a shell gives codes its own meaning"
    assert len({kind.kind for kind in error_kinds()}) == len(codes)


def test_the_table_lists_them_all():
    lines = exit_code_table().splitlines()
    assert lines[:3] == ["    0  all must-gates passed", "    2  usage", "    3  a must-gate did not pass"]
    assert [int(line.split()[0]) for line in lines[3:]] == [kind.exit_code for kind in error_kinds()]


def test_an_error_becomes_text_and_a_code(capsys):
    def fail() -> int:
        raise ConfigError("x is 3", expected="4", run="coremill status")

    assert exit_on_error(fail) == 10
    assert capsys.readouterr().err == "configuration error: x is 3\n  expected: 4\n  run: coremill status\n"


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_on_error(lambda: 1 // 0)


def test_an_interrupt_is_no_traceback(capsys):
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert exit_on_error(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"
