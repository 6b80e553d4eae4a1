"""The chat template of a GGUF file in llama.cpp's own engine: its text, and templates that it does not read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.formats.toy_gguf import Toy, untrained_toy, write_toy

from coremill.core.errors import GgufError
from coremill.formats.llamacpp.template import render_with_llamacpp

ASKED = [{"role": "user", "content": " caf\u00e9? "}]
REFUSES = "{% if 'never' in messages[0].content %}{{ raise_exception('not today') }}{% endif %}x"
TALK = [*ASKED, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return untrained_toy(tmp_path_factory.mktemp("toy"))


def test_conversations_as_the_students_template_writes_them(toy: Toy, tmp_path: Path) -> None:
    assert render_with_llamacpp(write_toy(tmp_path / "toy.gguf", toy), [ASKED, TALK]) == [
        "<|bos|><|user|> caf\u00e9? <|assistant|>",
        "<|bos|><|user|> caf\u00e9? <|assistant|>Yes.<|end|><|user|>Why?<|assistant|>",
    ]


def test_a_conversation_that_the_template_refuses(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", toy, says={"chat_template": REFUSES})
    with pytest.raises(GgufError) as caught:
        render_with_llamacpp(path, [[{"role": "user", "content": "never"}]])
    assert caught.value.found.startswith(f"llama.cpp does not apply the chat template of {path}: ")
    assert "not today" in caught.value.found


def test_a_template_that_is_none(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", toy, says={"chat_template": "{% if %}"})
    with pytest.raises(GgufError, match=rf"^llama\.cpp does not apply the chat template of {path}: "):
        render_with_llamacpp(path, [ASKED])


def test_a_file_that_does_not_load(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "bad.gguf", toy, without="output_norm.weight")
    with pytest.raises(GgufError, match=rf"^llama\.cpp does not apply the chat template of {path}: "):
        render_with_llamacpp(path, [ASKED])
