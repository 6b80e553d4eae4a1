"""Files of texts and of chat prompts: round trips, and errors with line numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.core.errors import DatasetError
from coremill.data.lines import write_lines
from coremill.data.texts import (
    ChatPrompt,
    Text,
    read_chat_prompts,
    read_texts,
)

words = st.text(st.characters(codec="utf-8"))
texts = st.builds(Text, id=words, source=words, licence=words | st.none(), text=words.filter(str.strip))


@given(st.lists(texts, min_size=1, max_size=3), st.lists(st.builds(ChatPrompt, id=words, text=words), min_size=1))
def test_texts_and_chat_prompts_round_trip(
    tmp_path_factory: pytest.TempPathFactory, written: list[Text], prompts: list[ChatPrompt]
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    write_lines(folder / "texts.jsonl", written)
    write_lines(folder / "chat_prompts.jsonl", prompts)
    assert read_texts(folder / "texts.jsonl") == written
    assert read_chat_prompts(folder / "chat_prompts.jsonl") == prompts
    lines = (folder / "texts.jsonl").read_bytes().split(b"\n")[:-1]
    assert [json.loads(line)["text"] for line in lines] == [text.text for text in written]


GOOD = '{"id": "a", "source": "here", "licence": null, "text": "words"}\n'


@pytest.mark.parametrize(
    ("content", "found", "expected"),
    [
        ("", "F has no texts", "one JSON object a line"),
        (GOOD + "{", "F:2: not JSON: ", "one JSON object a line"),
        (GOOD.replace("words", " "), "F:1: text 'a' is empty", "a text with id, source, licence, text"),
        (GOOD.replace("null", "3"), "F:1: Expected `str | null`, got `int` - at `$.licence`", "a text with id, "),
        (GOOD.replace('"id": "a", ', ""), "F:1: Object missing required field `id`", "a text with id, "),
        (GOOD.replace('"id"', '"x": 1, "id"'), "F:1: Object contains unknown field `x`", "a text with id, "),
    ],
)
def test_an_invalid_line_is_named_by_file_and_number(
    tmp_path: Path, content: str, found: str, expected: str
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(DatasetError) as caught:
        read_texts(path)
    assert caught.value.found.replace(str(path), "F").startswith(found)
    assert str(caught.value.expected).startswith(expected)
    assert caught.value.run == "nox -s texts -- --config configs/smollm2-135m.toml"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    with pytest.raises(DatasetError) as caught:
        read_chat_prompts(path)
    assert str(caught.value) == (
        f"cannot read {path}: No such file or directory\n"
        "  expected: a file of chat prompts, one JSON object a line\n"
        "  run: nox -s texts -- --config configs/smollm2-135m.toml"
    )
    assert caught.value.exit_code == 20
