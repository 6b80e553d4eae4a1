"""The command and the stage that write a dataset: the files, their digests, and the errors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from coremill.core.config import DatasetConfig, read_config
from coremill.core.digest import file_digest
from coremill.core.layout import dataset_file, heldout_file, tokenizer_file
from coremill.core.stage import StageContext
from coremill.data.grammar import side_of
from coremill.data.make_toy_kd import DatasetFiles, main, make_dataset, run_stage
from coremill.data.rows import Row, read_rows
from coremill.text.student_tokenizer import Tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
COMMAND = [sys.executable, "-m", "coremill.data.make_toy_kd"]


def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=check)


def test_the_command_in_the_readme(tmp_path: Path) -> None:
    out = tmp_path / "magic_8_ball.jsonl"
    done = run("--out", str(out), "--n", "128", "--magic-8-ball")
    files = [out, tmp_path / "magic_8_ball.heldout.jsonl", tmp_path / "tokenizer.json"]
    assert done.stdout.splitlines() == [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}" for file in files
    ]
    assert done.stderr == ""
    assert sorted(tmp_path.iterdir()) == sorted([*files, tmp_path / "answers.json"])
    assert [len(list(read_rows(file))) for file in files[:2]] == [128, 64]
    assert Tokenizer.load(files[2]).vocab_size == 512
    # The bytes for seed 8. A change of the grammar changes every published digest.
    assert file_digest(out) == "sha256:976a6c7703bce67d6ac5556639ee2157403e37f752e81253230d057633b921a8"


def test_a_line_has_the_documented_fields(dataset: Path) -> None:
    with dataset.open() as file:
        first = json.loads(file.readline())
    assert list(first) == ["id", "prompt", "teacher_text", "mood", "answers", "metadata"]
    assert first["id"] == "train-0000000"
    assert first["metadata"]["kind"] == "magic-8-ball"
    assert first["metadata"]["seed"] == 8
    assert len(first["answers"]) in (1, 20)


def test_the_same_seed_gives_the_same_bytes_in_any_process(dataset: Path, tmp_path: Path) -> None:
    run("--out", str(tmp_path / "b.jsonl"), "--n", "2048", "--heldout-n", "512", "--magic-8-ball")
    for mine, theirs in (("b.jsonl", dataset), ("b.heldout.jsonl", dataset.with_name("ball.heldout.jsonl"))):
        assert (tmp_path / mine).read_bytes() == theirs.read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == dataset.with_name("tokenizer.json").read_bytes()


def test_another_seed_gives_another_dataset(dataset: Path, tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "s.jsonl"), "--n", "100", "--magic-8-ball", "--seed", "9"]) == 0
    prompts = [row.prompt for row in read_rows(tmp_path / "s.jsonl")]
    assert prompts != [row.prompt for row in read_rows(dataset)][:100]


def test_no_question_is_on_both_sides_or_twice(train_rows: list[Row], heldout_rows: list[Row]) -> None:
    train, heldout = ([row.prompt for row in rows] for rows in (train_rows, heldout_rows))
    assert len(set(train) | set(heldout)) == 2048 + 512
    assert {side_of(prompt) for prompt in train} == {"train"}
    assert {side_of(prompt) for prompt in heldout} == {"heldout"}


def test_the_plain_toy(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "toy.jsonl"), "--n", "300", "--heldout-n", "20"]) == 0
    rows = list(read_rows(tmp_path / "toy.jsonl"))
    assert {row.metadata["kind"] for row in rows} == {"toy"}
    assert {row.metadata["topic"] for row in rows} > {"lamp", "timer", "play", "heat"}
    assert Tokenizer.load(tmp_path / "tokenizer.json").vocab_size == 512


@pytest.mark.parametrize("kind", ["magic-8-ball", "toy"])
def test_the_smallest_dataset_has_a_vocabulary(tmp_path: Path, kind: str) -> None:
    flags = ["--magic-8-ball"] if kind == "magic-8-ball" else []
    assert main(["--out", str(tmp_path / "one.jsonl"), "--n", "1", "--heldout-n", "1", *flags]) == 0
    assert [row.id for row in read_rows(tmp_path / "one.jsonl")] == ["train-0000000"]
    assert Tokenizer.load(tmp_path / "tokenizer.json").vocab_size == 512


def test_options_set_the_paths_of_the_files(tmp_path: Path) -> None:
    names = ["a/rows.jsonl", "b/held.jsonl", "c/tok.json"]
    paths = [str(tmp_path / name) for name in names]
    options = ["--out", paths[0], "--heldout-out", paths[1], "--tokenizer-out", paths[2]]
    assert main([*options, "--n", "3", "--vocab-size", "400", "--magic-8-ball"]) == 0
    found = (path for path in tmp_path.rglob("*") if path.is_file())
    written = sorted(path.relative_to(tmp_path).as_posix() for path in found)
    assert written == ["a/rows.jsonl", "b/answers.json", "b/held.jsonl", "c/tok.json"]
    assert Tokenizer.load(Path(paths[2])).vocab_size == 400


def test_the_stage_writes_the_dataset_of_the_configuration(tmp_path: Path) -> None:
    config = read_config(CONFIGS / "magic-8-ball.toml")
    small = msgspec.structs.replace(config, dataset=msgspec.structs.replace(config.dataset, n=300, heldout_n=70))
    figures = run_stage(StageContext(config=small, lane=None, inputs={}, out=tmp_path))
    rows = list(read_rows(dataset_file(tmp_path)))
    tokenizer = Tokenizer.load(tokenizer_file(tmp_path))
    lengths = [len(tokenizer.encode_prompt(row.prompt) + tokenizer.encode_answer(row.teacher_text)) for row in rows]
    assert figures == {
        "rows": 300,
        "heldout_rows": 70,
        "vocab_size": config.model.vocab_size,
        "sampled_rows": 300,
        "tool_call_share": sum(row.mood is None for row in rows) / 300,
        "longest_row_tokens": max(lengths),
        "mean_row_tokens": sum(lengths) / 300,
        "train_sha256": file_digest(dataset_file(tmp_path)).removeprefix("sha256:"),
        "heldout_sha256": file_digest(heldout_file(tmp_path)).removeprefix("sha256:"),
        "tokenizer_sha256": file_digest(tokenizer_file(tmp_path)).removeprefix("sha256:"),
    }
    assert len(list(read_rows(heldout_file(tmp_path)))) == 70


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    program = (
        "import resource, sys\n"
        "from coremill.data.make_toy_kd import main\n"
        "main(['--out', sys.argv[1], '--n', sys.argv[2], '--heldout-n', '1', '--magic-8-ball'])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks_kib = [
        int(
            subprocess.run(
                [sys.executable, "-c", program, str(tmp_path / "rows.jsonl"), str(n)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()[-1]
        )
        for n in (20_000, 60_000)
    ]
    # 40,000 more rows are 28 MB of lines; the bound leaves a margin for the allocator.
    assert peaks_kib[1] - peaks_kib[0] < 4_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "5"], "the following arguments are required: --out"),
        (["--out", "x.jsonl"], "the following arguments are required: --n"),
        (["--out", "x.jsonl", "--n", "0"], "`n` must be positive, found 0"),
        (["--out", "x.jsonl", "--n", "-3"], "`n` must be positive, found -3"),
        (["--out", "x.jsonl", "--n", "many"], "argument --n: invalid int value: 'many'"),
        (["--out", "x.jsonl", "--n", "5", "--heldout-n", "0"], "`heldout_n` must be positive, found 0"),
        (["--out", "x.jsonl", "--n", "5", "--vocab-size", "266"], "`vocab_size` must be at least 300, found 266"),
        (
            ["--out", "x.jsonl", "--n", "5", "--heldout-out", "./x.jsonl"],
            "--out, --heldout-out, --tokenizer-out and answers.json must be different files",
        ),
        (
            ["--out", "tokenizer.json", "--n", "5"],
            "--out, --heldout-out, --tokenizer-out and answers.json must be different files",
        ),
    ],
)
def test_invalid_usage_exits_with_2_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"coremill dataset: error: {message}"
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_exits_with_52(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    failed = run("--out", str(tmp_path / "file" / "rows.jsonl"), "--n", "5", "--magic-8-ball", check=False)
    assert failed.returncode == 52
    assert failed.stdout == ""
    assert failed.stderr.startswith(f"output error: cannot write {tmp_path}/file/rows.jsonl: ")


def test_an_impossible_vocabulary_exits_with_21_and_leaves_the_old_files(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("old\n")
    failed = run("--out", str(out), "--n", "5", "--vocab-size", "9000", "--magic-8-ball", check=False)
    assert failed.returncode == 21
    assert failed.stderr.startswith("tokenizer error: the texts yield ")
    assert failed.stderr.splitlines()[1:] == [
        "  expected: more text, or a smaller vocabulary",
        "  run: python -m coremill.data.make_toy_kd --help",
    ]
    assert out.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [out]


def test_a_long_run_shows_progress_only_on_a_terminal(tmp_path: Path) -> None:
    arguments = [*COMMAND, "--out", str(tmp_path / "rows.jsonl"), "--n", "20000", "--magic-8-ball"]
    ours, theirs = pty.openpty()
    terminal = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    # Reading from a terminal whose other end is closed fails with EIO.
    with contextlib.suppress(OSError):
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    stdout, _ = terminal.communicate(timeout=60)
    assert terminal.returncode == 0
    assert b"train rows" in shown
    assert len(stdout.splitlines()) == 3
    assert run(*arguments[3:]).stderr == ""


def test_watch_receives_the_rows(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def watch(rows: Iterable[Row], what: str, n: int) -> list[Row]:
        rows = list(rows)
        seen.append((what, n, len(rows)))
        return rows

    config = DatasetConfig(kind="toy", n=7, heldout_n=3, seed=1)
    files = DatasetFiles(train=tmp_path / "a", heldout=tmp_path / "b", tokenizer=tmp_path / "c")
    make_dataset(config, files, watch=watch)
    assert seen == [("train rows", 7, 7), ("heldout rows", 3, 3)]


def test_the_stage_imports_nothing_heavy() -> None:
    program = (
        "import sys, coremill.data.make_toy_kd, coremill.data.teacher, coremill.data.judge\n"
        "print([name for name in ('torch', 'coremltools', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
