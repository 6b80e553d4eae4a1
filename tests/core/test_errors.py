"""Every kind of error has its exit code."""

from __future__ import annotations

from coremill.core.errors import GATES_FAILED, OK, USAGE, error_kinds, exit_code_table


def test_exit_codes_are_unique():
    codes = [kind.exit_code for kind in error_kinds()]
    assert len(codes) == len({*codes, OK, USAGE, GATES_FAILED}) - 3
    assert all(code < 126 for code in codes), "shells reserve exit codes from 126"
    assert len({kind.kind for kind in error_kinds()}) == len(codes)


def test_table_lists_every_exit_code():
    codes = [int(line.split()[0]) for line in exit_code_table().splitlines()]
    assert codes == sorted({OK, USAGE, GATES_FAILED, *(kind.exit_code for kind in error_kinds())})
    assert "  0  all must-gates passed" in exit_code_table().splitlines()[0]
