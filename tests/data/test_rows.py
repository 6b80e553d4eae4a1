"""The dataset format: round trips, errors with line numbers, and atomic writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.core.digest import file_digest
from coremill.core.errors import DatasetError, OutputError
from coremill.core.plain import Plain
from coremill.data.lines import write_lines
from coremill.data.rows import Row, read_rows

GOOD: dict[str, Plain] = {
    "id": "train-0",
    "prompt": "Will it?",
    "teacher_text": "Yes.",
    "mood": "hopeful",
    "answers": {"Yes.": 0.75, "No.": 0.25},
    "metadata": {"kind": "magic-8-ball", "seed": 8},
}


def row(**changes: Plain) -> Row:
    return Row(**{**GOOD, **changes})


@given(
    st.lists(
        st.builds(
            row,
            id=st.text(),
            prompt=st.text(),
            mood=st.sampled_from(["hopeful", "doubtful", "unclear", None]),
            metadata=st.dictionaries(st.text(), st.one_of(st.text(), st.integers(-(2**60), 2**60)), max_size=3),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_rows_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    assert write_lines(path, rows) == file_digest(path)
    assert list(read_rows(path)) == rows
    assert [json.loads(line)["prompt"] for line in path.read_bytes().split(b"\n")[:-1]] == [
        item.prompt for item in rows
    ]


def _without(field: str) -> str:
    return json.dumps({key: value for key, value in GOOD.items() if key != field})


def _with(**changes: Plain) -> str:
    return json.dumps({**GOOD, **changes})


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "not JSON: Input data was truncated"),
        ("", "not JSON: Input data was truncated"),
        ("Will it? Yes.", "not JSON: JSON is malformed: invalid character (byte 0)"),
        ("[1]", "Expected `object`, got `array`"),
        *[(_without(field), f"Object missing required field `{field}`") for field in GOOD],
        (_with(colour="red"), "Object contains unknown field `colour`"),
        (_with(prompt=7), "Expected `str`, got `int` - at `$.prompt`"),
        (_with(mood=True), "Expected `str | null`, got `bool` - at `$.mood`"),
        (_with(answers={"Yes.": "0.75"}), "Expected `float`, got `str` - at `$.answers[...]`"),
        (_with(metadata={"seed": None}), "Expected `int | float | str`, got `null` - at `$.metadata[...]`"),
        (_with(answers={"Yes.": 0.75, "No.": 0.2}), "the probabilities of `answers` sum to 0.95, not to 1"),
        (_with(answers={}), "the probabilities of `answers` sum to 0, not to 1"),
        (_with(answers={"Yes.": 1.5, "No.": -0.5}), "the probability of 'Yes.' in `answers` is 1.5"),
        (_with(answers={"No.": 0, "Yes.": 1}), "the probability of 'No.' in `answers` is 0"),
        (_with(teacher_text="Maybe."), "`teacher_text` 'Maybe.' is not one of `answers`"),
        (_with(mood="happy"), "`mood` is 'happy', not one of hopeful, doubtful, unclear or null"),
    ],
)
def test_an_invalid_line_is_named_by_file_and_number(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}\n")
    rows = read_rows(path)
    assert [next(rows).id, next(rows).id] == ["train-0", "train-0"]
    with pytest.raises(DatasetError) as caught:
        next(rows)
    assert str(caught.value).splitlines()[0] == f"{path}:3: {found}"
    assert caught.value.run == "python -m coremill.data.make_toy_kd --help"


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode().replace(b"Will", b"W\xffll"))
    with pytest.raises(DatasetError, match=rf"^{path}:1: not JSON: "):
        list(read_rows(path))


def test_an_empty_and_a_missing_file_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DatasetError, match=rf"^{tmp_path}/empty.jsonl has no rows\n"):
        list(read_rows(tmp_path / "empty.jsonl"))
    with pytest.raises(DatasetError, match=rf"^cannot read {tmp_path}/absent.jsonl: No such file or directory\n"):
        list(read_rows(tmp_path / "absent.jsonl"))
    with pytest.raises(DatasetError, match=rf"^cannot read {tmp_path}: Is a directory\n"):
        list(read_rows(tmp_path))


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, [row(id="old")])

    def failing() -> Iterator[Row]:
        yield row(id="new")
        raise RuntimeError("the machine stopped")

    with pytest.raises(RuntimeError, match="the machine stopped"):
        write_lines(path, failing())
    assert [item.id for item in read_rows(path)] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("n", ["2000", "40000"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, n: str) -> None:
    # A limit on the size of files makes a write fail halfway, as a full disk does.
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from coremill.core.command import exit_on_error\n"
        "from coremill.data.make_toy_kd import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(exit_on_error(lambda: main(['--out', sys.argv[1], '--n', sys.argv[2], '--magic-8-ball'])))"
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")
    run = subprocess.run([sys.executable, "-c", program, str(path), n], capture_output=True, text=True, timeout=60)
    assert run.returncode == OutputError.exit_code == 52
    assert run.stderr == (
        f"output error: cannot write {path}: File too large\n"
        f"  expected: a writable directory with free space\n  run: ls -ld {tmp_path}\n"
    )
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"folder is not a regular file\n"):
        write_lines(tmp_path / "folder", [row()])
    with pytest.raises(OutputError, match=r"^/dev/null is not a regular file\n"):
        write_lines(Path("/dev/null"), [row()])
    assert Path("/dev/null").is_char_device()


def test_parent_directories_are_created(tmp_path: Path) -> None:
    write_lines(tmp_path / "a" / "b" / "rows.jsonl", [row()])
    assert (tmp_path / "a" / "b" / "rows.jsonl").stat().st_mode & 0o777 == 0o644
