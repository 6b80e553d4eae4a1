"""The texts stage: the contents of the texts in the package, and the checks of a user's texts."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import gguf
import msgspec
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from coremill.core.config import ImportedRun, TextsConfig, read_config
from coremill.core.documents import read_toml
from coremill.core.errors import DatasetError
from coremill.core.layout import chat_prompts_file, texts_file
from coremill.core.stage import StageContext
from coremill.data.corpora import FOLDER, Sources, chat_prompts
from coremill.data.texts import Text, read_chat_prompts, read_texts
from coremill.data.write_texts import run_stage

CONFIG = read_config(Path(__file__).parents[2] / "configs" / "smollm2-135m.toml")
assert isinstance(CONFIG, ImportedRun)
DIGESTS = {
    "devils-dictionary.txt": "109ad3b8cbdc",
    "jargon-file.txt": "50622eb5b261",
    "king-james-bible.txt": "9ea014c6f999",
}


def run_texts(out: Path, config: TextsConfig) -> list[Text]:
    """Run the stage and return the texts that it writes."""
    out.mkdir(exist_ok=True)
    figures = run_stage(
        StageContext(config=msgspec.structs.replace(CONFIG, texts=config), lane=None, inputs={}, out=out)
    )
    texts, prompts = read_texts(texts_file(out)), read_chat_prompts(chat_prompts_file(out))
    assert prompts == chat_prompts()
    assert figures == {
        "texts": len(texts),
        "characters": sum(len(text.text) for text in texts),
        "chat_prompts": len(prompts),
    }
    assert sorted(path.name for path in out.iterdir()) == ["chat_prompts.jsonl", "texts.jsonl"]
    return texts


def test_the_bundled_texts(tmp_path: Path) -> None:
    texts = run_texts(tmp_path, CONFIG.texts)
    assert [text.id for text in texts] == ["king-james-bible", "jargon-file", "devils-dictionary"]
    assert all(text.licence is not None and text.licence.startswith("public domain: ") for text in texts)
    assert [text.source.rpartition(" (")[2] for text in texts] == [
        "Debian package bible-kjv-text 4.38)",
        "Debian package jargon-text 4.4.7-4.1)",
        "Debian package dict-devil 1.0-13.1)",
    ]
    bible, jargon, bierce = (text.text for text in texts)
    assert bible.startswith(
        "The Book of Ruth\n\nChapter 1\n\nNow it came to pass in the days when the judges ruled,"
    )
    assert "Chapter 5. Hacker Writing Style" in jargon
    assert "EXPERIENCE, n.  The wisdom that enables us to recognize as an undesirable old acquaintance" in bierce
    assert all(text.strip() and "\x00" not in text and "\ufffd" not in text for text in (bible, jargon, bierce))
    assert 110_000 < sum(map(len, (bible, jargon, bierce))) < 130_000


def test_sources_toml_lists_the_texts_in_the_package() -> None:
    listed = {text.path for text in read_toml(FOLDER / "sources.toml", Sources).texts}
    assert listed == set(FOLDER.glob("*.txt"))


def test_the_bundled_texts_are_unchanged() -> None:
    """Documented perplexities are of these bytes; an edited text would change all of them."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in FOLDER.glob("*.txt")}
    assert digests == DIGESTS


def test_each_text_fills_the_longest_shape(tmp_path: Path) -> None:
    """Count SmolLM2's tokens, with its vocabulary and merges read by gguf and used by tokenizers."""
    packaged = CONFIG.weights.packaged
    assert packaged is not None
    files = importlib.metadata.files(packaged.distribution) or []
    fields = gguf.GGUFReader(next(file for file in files if file.name == packaged.file).locate()).fields
    vocab = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    lengths = {text.id: len(tokenizer.encode(text.text).ids) for text in run_texts(tmp_path, CONFIG.texts)}
    assert lengths == {"king-james-bible": 10515, "jargon-file": 10509, "devils-dictionary": 7922}
    assert min(lengths.values()) > max(CONFIG.shapes.all)


def test_chat_prompts_are_short_and_different() -> None:
    prompts = chat_prompts()
    assert len(prompts) == len({prompt.text for prompt in prompts}) == len({prompt.id for prompt in prompts}) == 24
    assert (prompts[0].id, prompts[0].text) == ("chat-01", "What is the capital of Australia?")
    assert all(10 < len(prompt.text) < 80 for prompt in prompts)


def test_a_users_texts_replace_the_bundled_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_bytes(("\ufeffÄrger\r\nmit Zeilen, " + "und mehr. " * 4).encode())
    second.write_text("x" * 60)
    config = TextsConfig(files=(str(first), str(second)), min_characters=50, max_characters=55)
    assert run_texts(tmp_path / "out", config) == [
        Text(id=str(first), source=str(first), licence=None, text="Ärger\nmit Zeilen, " + ("und mehr. " * 4)[:37]),
        Text(id=str(second), source=str(second), licence=None, text="x" * 55),
    ]


@pytest.mark.parametrize(
    ("content", "found", "expected"),
    [
        (None, "cannot read F: No such file or directory", "a text in UTF-8"),
        (b"", "F is empty", "a text in UTF-8"),
        (b" \n" * 100, "F is empty", "a text in UTF-8"),
        (
            b"caf\xe9 " * 100,
            "F is not UTF-8: 'utf-8' codec can't decode byte 0xe9 in position 3",
            "a text in UTF-8",
        ),
        ("ä".encode() * 99, "F has 99 characters", "at least 100 (texts.min_characters)"),
    ],
)
def test_an_invalid_text_is_rejected(tmp_path: Path, content: bytes | None, found: str, expected: str) -> None:
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        run_texts(tmp_path / "out", TextsConfig(files=(str(path),), min_characters=100))
    assert caught.value.found.replace(str(path), "F").startswith(found)
    assert caught.value.expected == expected
    assert list((tmp_path / "out").iterdir()) == []


def test_a_directory_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"^cannot read {tmp_path}: Is a directory"):
        run_texts(tmp_path / "out", TextsConfig(files=(str(tmp_path),)))


def test_a_bundled_text_that_is_too_short_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"devils-dictionary\.txt has 33021 characters"):
        run_texts(tmp_path, TextsConfig(min_characters=40_000))
