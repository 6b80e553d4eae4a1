"""The error family: one exit code for each kind."""

from __future__ import annotations

from coremill.core.errors import GATES_FAILED, OK, USAGE, error_kinds, exit_code_table


def test_every_kind_has_an_exit_code_of_its_own():
    codes = [kind.exit_code for kind in error_kinds()]
    assert len(codes) == len({*codes, OK, 1, USAGE, GATES_FAILED}) - 4
    assert all(code < 126 for code in codes), "from 126 on a shell gives codes its own meaning"
    assert len({kind.kind for kind in error_kinds()}) == len(codes)


def test_the_table_lists_them_all():
    lines = exit_code_table().splitlines()
    assert lines[:3] == ["    0  all must-gates passed", "    2  usage", "    3  a must-gate did not pass"]
    assert [int(line.split()[0]) for line in lines[3:]] == [kind.exit_code for kind in error_kinds()]
