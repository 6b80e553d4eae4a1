"""The chat template of a GGUF file in llama.cpp's engine: prompts, and templates that it rejects."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.formats.toy_gguf import Toy, untrained_toy, write_toy

from coremill.core.errors import GgufError
from coremill.formats.llamacpp.template import render_with_llamacpp

QUESTION = [{"role": "user", "content": " caf\u00e9? "}]
REJECTS = "{% if 'never' in messages[0].content %}{{ raise_exception('not today') }}{% endif %}x"
CONVERSATION = [*QUESTION, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return untrained_toy(tmp_path_factory.mktemp("toy"))


def test_prompts_are_those_of_the_students_template(toy: Toy, tmp_path: Path) -> None:
    assert render_with_llamacpp(write_toy(tmp_path / "toy.gguf", toy), [QUESTION, CONVERSATION]) == [
        "<|bos|><|user|> caf\u00e9? <|assistant|>",
        "<|bos|><|user|> caf\u00e9? <|assistant|>Yes.<|end|><|user|>Why?<|assistant|>",
    ]


def test_a_conversation_that_the_template_rejects_is_an_error(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", toy, metadata={"chat_template": REJECTS})
    with pytest.raises(GgufError) as caught:
        render_with_llamacpp(path, [[{"role": "user", "content": "never"}]])
    assert caught.value.found.startswith(f"llama.cpp does not apply the chat template of {path}: ")
    assert "not today" in caught.value.found


def test_an_invalid_template_is_an_error(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", toy, metadata={"chat_template": "{% if %}"})
    with pytest.raises(GgufError, match=rf"^llama\.cpp does not apply the chat template of {path}: "):
        render_with_llamacpp(path, [QUESTION])


def test_a_file_that_does_not_load_is_an_error(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "bad.gguf", toy, without="output_norm.weight")
    with pytest.raises(GgufError, match=rf"^llama\.cpp does not apply the chat template of {path}: "):
        render_with_llamacpp(path, [QUESTION])
