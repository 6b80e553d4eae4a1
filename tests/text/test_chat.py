"""Chat templates: the text matches that of transformers' apply_chat_template; the limits of the sandbox."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from coremill.core.errors import TokenizerError
from coremill.text import chat
from coremill.text.chat import ChatTemplate, Message

CHAT = [
    {"role": "system", "content": "Be “brief”."},
    {"role": "user", "content": " <b>2 + 2</b>? & 'so on'\n"},
    {"role": "assistant", "content": "4", "tool_calls": [{"name": "add", "arguments": {"ü": [1, 2.5, None]}}]},
    {"role": "user", "content": "Sure?"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "blocks": (
        "{{ bos_token }}\n"
        "  {% for message in messages %}\n"
        "    {%- if message.role == 'user' %}\n"
        "[INST] {{ message.content | trim }} [/INST]\n"
        "    {% elif message.role == 'assistant' %}\n"
        " {{ message.content }}{{ eos_token }}\n"
        "    {% endif %}\n"
        "  {% endfor %}\n"
        "{# a comment #}\n"
        "end\n"
    ),
    "json": "{% for m in messages %}{{ m | tojson }};{{ m.get('tool_calls') | tojson(indent=2) }}{% endfor %}",
    "loop": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{%endfor%}",
    "namespace": (
        "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.last = m.role %}{% endfor %}{{ ns.n }}{{ ns.last }}"
    ),
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "nothing": "{{ tools }}{{ documents }}{{ unset is defined }}{{ unset }}{{ messages[-1]['content'][1:3] }}",
    "products": (
        "{{ '-' * 40 }}{{ 3 * 'ab' }}{{ [1, 2] * 2 }}{{ 7 * 6 }}{{ 2 ** 10 }}{{ 2 ** -1 }}{{ 1.5 * 2 }}"
        "{{ 'a' * -1 }}{{ 2 ** 0.5 }}{{ true * 3 }}"
    ),
    "date": "{{ strftime_now('%d %b %Y') }}",
    "macro": "{% macro turn(m) %}<{{ m.role }}>{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
}


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_matches_that_of_transformers(name: str, prompt: bool) -> None:
    expected, _ = render_jinja_template(
        [CHAT], chat_template=TEMPLATES[name], add_generation_prompt=prompt, **SPECIAL
    )
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(CHAT, add_generation_prompt=prompt) == expected[0]


def test_strftime_now_returns_the_current_date() -> None:
    today = datetime.datetime.now().strftime("%Y")
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render([], add_generation_prompt=False) == today


def refusal(template: str, messages: Sequence[Message] = ()) -> str:
    with pytest.raises(TokenizerError) as caught:
        ChatTemplate(template, {}).render(messages, add_generation_prompt=False)
    assert caught.value.expected
    return caught.value.found


def test_the_message_of_a_template_that_rejects_its_messages() -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('users begin') }}{% endif %}"
    assert refusal(template, [{"role": "system", "content": ""}]) == "the chat template: users begin"


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for %}", "the chat template: Expected an expression, got 'end of statement block'"),
        ("{{ messages[0].role }}", "the chat template: list object has no element 0"),
        ("{{ 1 / 0 }}", "the chat template: division by zero"),
        (
            "{{ ''.__class__.__mro__ }}",
            "the chat template: access to attribute '__class__' of 'str' object is unsafe.",
        ),
        ("{{ messages.append(1) }}", "the chat template: access to attribute 'append' of 'list' object is unsafe."),
        ("{{ namespace(__init__=1) }}", "the chat template: a namespace with the attribute '__init__'"),
        (
            "{% set n = namespace() %}{% set n._x = 1 %}",
            "the chat template: a namespace with the attribute '_x'",
        ),
        ("{{ 'a' * 10 ** 10 }}", "the chat template: the result of `*` is too large"),
        ("{{ 10 ** 10 * 'a' }}", "the chat template: the result of `*` is too large"),
        ("{% set n = 600000 %}{{ 'ab' * n }}", "the chat template: the result of `*` is too large"),
        ("{{ [1] * 2000000 }}", "the chat template: the result of `*` is too large"),
        ("{{ 10 ** 5000 }}", "the chat template: the result of `**` is too large"),
        ("{{ 9 ** (9 ** 9) }}", "the chat template: the result of `**` is too large"),
        ("{{ 2 ** 2000 * 2 ** 2000 * 2 ** 2000 }}", "the chat template: the result of `*` is too large"),
        (
            "{{ range(10 ** 9) | list }}",
            "the chat template: Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000).",
        ),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "the chat template: maximum recursion depth exceeded"),
        ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "the chat template: maximum recursion depth exceeded"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "the chat template: maximum recursion depth exceeded"),
        (
            "{% for a in 'a' %}" * 60 + "{% endfor %}" * 60,
            "the chat template: too many statically nested blocks (<template>, line 71)",
        ),
        ("{{ strftime_now(3) }}", "the chat template: strftime() argument 1 must be str, not int"),
        ("{% include '/etc/passwd' %}", "the chat template: no loader for this environment specified"),
    ],
)
def test_invalid_and_unsafe_templates_are_rejected(template: str, found: str) -> None:
    assert refusal(template) == found


def test_an_error_without_a_message_is_reported_by_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(date_format: str) -> str:
        raise MemoryError

    monkeypatch.setattr(chat, "_now", fails)
    assert refusal("{{ strftime_now('%Y') }}") == "the chat template: MemoryError"


def test_render_does_not_change_the_messages() -> None:
    before = [dict(message) for message in CHAT]
    ChatTemplate(TEMPLATES["json"], SPECIAL).render(CHAT, add_generation_prompt=True)
    assert before == CHAT
