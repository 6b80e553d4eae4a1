"""Tokenizers as GGUF metadata: they give the same ids when read back; what llama.cpp lacks is named."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from coremill.core.config import ModelConfig, TextsConfig
from coremill.core.contract import ModelArch, TokenizerRef
from coremill.core.errors import TokenizerError, VocabularyMismatchError
from coremill.data.corpora import bundled_texts
from coremill.formats.gguf.tokenizer import _BY_NAME, gguf_metadata, unheld_ends
from coremill.formats.gguf.writer import write_gguf
from coremill.formats.llamacpp.process import LlamaCpp
from coremill.model.checkpoint import checkpoint_of
from coremill.model.student import new_student
from coremill.text.model_tokenizer import _LLAMA3_WORDS, _QWEN2_WORDS, TextTokenizer
from coremill.text.student_tokenizer import Tokenizer

RANGES = [(32, 127), (0, 0x300), (0x300, 0x3000), (0x4E00, 0x9FFF), (0xE000, 0xFFFF), (0x1F300, 0x1FAFF)]
EXPECTED = "byte-level BPE with one of llama.cpp's pre-tokenizations: gpt-2, smollm, qwen2, llama-bpe"


@pytest.fixture(scope="session")
def prose() -> list[str]:
    texts = bundled_texts(TextsConfig(min_characters=1000, max_characters=40_000))
    return [text.text[start : start + 80] for text in texts for start in range(0, 33_000, 80)]


@pytest.fixture(scope="session")
def texts(prose: list[str]) -> list[str]:
    """1,000 texts: half are real, half are random Unicode."""
    rng = random.Random(11)
    noise = [
        "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randrange(1, 60))) for _ in range(480)
    ]
    odd = ["", " ", "\n\n \t", "<|end|>", "<tool name> <|end|>x", "a  b   c", "1234567 8", "I'LL we'Ll", "e\u0301"]
    real = rng.sample(prose, 1000 - len(noise) - len(odd))
    assert len(real + noise + odd) == 1000
    return real + noise + odd


def trained(
    prose: list[str],
    pre: pre_tokenizers.PreTokenizer,
    *,
    normalizer: normalizers.Normalizer | None = None,
    ignore_merges: bool = False,
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|pad|>", "<|bos|>", "<|end|>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(prose, trainer)
    return backend


def saved(backend: tokenizers.Tokenizer, folder: Path, **settings: str | None) -> TextTokenizer:
    """The tokenizer of `backend`; a setting of None is left out."""
    roles = {"eos_token": "<|end|>", "bos_token": "<|bos|>", "pad_token": "<|pad|>", **settings}
    (folder / "tokenizer.json").write_text(backend.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({key: roles[key] for key in roles if roles[key]}))
    return TextTokenizer.load(folder / "tokenizer.json")


def bytes_(**options: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def words(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_(use_regex=False, trim_offsets=False)]
    )


KINDS: dict[str, Callable[[list[str]], tokenizers.Tokenizer]] = {
    "gpt-2": lambda prose: trained(prose, bytes_()),
    "smollm": lambda prose: trained(
        prose, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_()])
    ),
    "qwen2": lambda prose: trained(prose, words(_QWEN2_WORDS), normalizer=normalizers.NFC()),
    "llama-bpe": lambda prose: trained(prose, words(_LLAMA3_WORDS), ignore_merges=True),
}


@pytest.mark.parametrize("pre", KINDS)
def test_a_tokenizer_that_is_read_back_gives_the_same_ids(
    prose: list[str], texts: list[str], tmp_path: Path, pre: str
) -> None:
    backend = KINDS[pre](prose)
    backend.add_tokens([AddedToken("<tool name>", normalized=False), AddedToken("  ", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    ours = saved(backend, tmp_path)
    assert ours.add_bos
    metadata = gguf_metadata(ours, vocab_size=432)
    assert metadata["tokenizer.ggml.pre"] == pre
    theirs = TextTokenizer.from_gguf(metadata, where="model.gguf")
    for text in texts:
        assert theirs.encode(text) == ours.encode(text), text
        ids = ours.encode(text, allow_special=True)
        assert theirs.encode(text, allow_special=True) == ids, text
        assert theirs.decode(ids) == ours.decode(ids)
    for name in ("vocab_size", "bos_id", "eos_ids", "pad_id", "add_bos", "special_tokens"):
        assert getattr(theirs, name) == getattr(ours, name), name
    assert theirs.chat_template is not None
    assert theirs.chat_template.source == "{{ messages[0].content }}"


def written(tokenizer: TextTokenizer, folder: Path, *, vocab_size: int) -> Path:
    """A GGUF file with `tokenizer`, of a random model."""
    config = ModelConfig(
        vocab_size=vocab_size, d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32, max_seq_len=32,
        arch=ModelArch(use_halt_head=False, tie_embeddings=True),
    )  # fmt: skip
    ref = TokenizerRef(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest)
    checkpoint = checkpoint_of(new_student(config, seed=1), model_type="toy", step=0, tokenizer=ref)
    path, metadata = folder / "model.gguf", gguf_metadata(tokenizer, vocab_size=vocab_size)
    write_gguf(path, checkpoint, metadata, kind="f32", name="a", provenance={})
    return path


@pytest.mark.parametrize("pre", KINDS)
def test_llama_cpp_gives_the_same_ids(prose: list[str], texts: list[str], tmp_path: Path, pre: str) -> None:
    backend = KINDS[pre](prose)
    backend.add_tokens([AddedToken("<tool name>", normalized=pre == "qwen2"), AddedToken("  ", normalized=False)])
    ours = saved(backend, tmp_path)
    path = written(ours, tmp_path, vocab_size=432)
    with LlamaCpp(path, context=32) as llamacpp:
        for text in texts:
            if pre == "qwen2":  # as ours does, and llama.cpp does not
                text = unicodedata.normalize("NFC", text)
            for allow_special in (False, True):
                ids = ours.encode(text, allow_special=allow_special)
                assert llamacpp.tokenize(text, allow_special=allow_special) == ids, (text, allow_special)


def test_the_keys_of_a_student(prose: list[str]) -> None:
    tokenizer = Tokenizer.train(prose, 300)
    metadata = gguf_metadata(TextTokenizer.of_student(tokenizer), vocab_size=302)
    lists = {key: metadata.pop(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")}
    assert metadata.pop("tokenizer.chat_template").startswith("{{- bos_token -}}")
    assert metadata == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert lists["tokens"][:3] == ["<|pad|>", "<|bos|>", "<|end|>"]
    assert lists["tokens"][300:] == ["[PAD300]", "[PAD301]"]
    assert lists["token_type"] == [3] * 10 + [1] * 290 + [5] * 2
    assert len(lists["merges"]) == 300 - 266
    assert all(merge.count(" ") == 1 for merge in lists["merges"])


def test_several_end_tokens_are_written(prose: list[str], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3, 0]}')
    ours = saved(KINDS["gpt-2"](prose), tmp_path)
    metadata = gguf_metadata(ours, vocab_size=420)
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [2, 3, 0]
    assert TextTokenizer.from_gguf(metadata, where="").eos_ids == ours.eos_ids == (2, 3, 0)


def with_ends(prose: list[str], folder: Path, names: list[str]) -> TextTokenizer:
    """A tokenizer with the end tokens `names`, the first of which is its `eos_token`."""
    backend = KINDS["gpt-2"](prose)
    backend.add_special_tokens(names)
    ends = [backend.token_to_id(name) for name in names]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return saved(backend, folder, eos_token=names[0])


@pytest.mark.parametrize(
    ("names", "keyed", "unheld"),
    [
        (["<a>", "<b>", "<c>"], ["<a>", "<b>", "<c>"], []),
        (["<|im_end|>", "<|endoftext|>", "<c>"], ["<|im_end|>", "<|endoftext|>", "<c>"], []),
        (["<|im_end|>", "<|endoftext|>", "<c>", "<d>"], ["<|im_end|>", "<c>", "<d>"], []),
        (["<a>", "<b>", "<c>", "<d>", "<eos>", "<f>"], ["<a>", "<b>", "<c>"], ["<d>", "<f>"]),
    ],
)
def test_llama_cpp_stops_at_every_end_token_but_the_unheld(
    prose: list[str], tmp_path: Path, names: list[str], keyed: list[str], unheld: list[str]
) -> None:
    ours = with_ends(prose, tmp_path, names)
    metadata = gguf_metadata(ours, vocab_size=432)
    found = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert [ours.decode([token]) for token in found] == keyed
    assert [ours.decode([token]) for token in unheld_ends(ours)] == unheld
    with LlamaCpp(written(ours, tmp_path, vocab_size=432), context=32) as llamacpp:
        stops = llamacpp.vocabulary().end_ids - {2}  # <|end|>, which llama.cpp knows by its text
        assert stops == {*ours.eos_ids} - {*unheld_ends(ours)}


def test_llama_cpp_knows_end_tokens_by_their_text(prose: list[str], tmp_path: Path) -> None:
    ours = with_ends(prose, tmp_path, ["<a>", "<b>", "<c>", *sorted(_BY_NAME)])
    assert len(_BY_NAME) == 16
    assert unheld_ends(ours) == ()
    with LlamaCpp(written(ours, tmp_path, vocab_size=440), context=32) as llamacpp:
        assert llamacpp.vocabulary().end_ids == {*ours.eos_ids}


def test_an_unused_id_gets_a_distinct_token(prose: list[str], tmp_path: Path) -> None:
    backend = KINDS["gpt-2"](prose)
    backend.add_tokens([AddedToken("[PAD421]", normalized=False)])
    tokens = gguf_metadata(saved(backend, tmp_path), vocab_size=423)["tokenizer.ggml.tokens"]
    assert tokens[420:] == ["[PAD421]", "[[PAD421]]", "[PAD422]"]


def refusal(tokenizer: TextTokenizer) -> TokenizerError:
    with pytest.raises(TokenizerError) as caught:
        gguf_metadata(tokenizer, vocab_size=1000)
    return caught.value


Change = Callable[[dict[str, Any]], None]


def changed(change: Change, prose: list[str], folder: Path, **settings: Any) -> TextTokenizer:
    parts = json.loads(KINDS["gpt-2"](prose).to_str())
    change(parts)
    return saved(tokenizers.Tokenizer.from_str(json.dumps(parts)), folder, **settings)


def put(*keys: str | int, value: Any) -> Change:
    def change(parts) -> None:
        for key in keys[:-1]:
            parts = parts[key]
        parts[keys[-1]] = value

    return change


def prefixed(parts) -> None:
    """Without merges: the library panics for merges that have no prefix."""
    parts["model"] |= {"continuing_subword_prefix": "##", "merges": []}


def steps(part):
    return json.loads(part.__getstate__())


NONE = "llama.cpp has no name for the normalizer"
BYTES = '[{"type":"ByteLevel","add_prefix_space":false,"use_regex":true}]'

SPACED = BYTES.replace('prefix_space":false', 'prefix_space":true')


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (put("model", "byte_fallback", value=True), "BPE with byte_fallback True"),
        (put("model", "dropout", value=0.5), "BPE with dropout 0.5"),
        (prefixed, "BPE with continuing_subword_prefix '##'"),
        (put("model", "end_of_word_suffix", value="</w>"), "BPE with end_of_word_suffix '</w>'"),
        (put("model", "merges", value=[]), "BPE without merges"),
        (put("decoder", value=None), "the decoder none"),
        (put("added_tokens", 0, "lstrip", value=True), "the added token '<|pad|>' with lstrip"),
        (put("added_tokens", 0, "single_word", value=True), "the added token '<|pad|>' with single_word"),
        (
            put("model", "ignore_merges", value=True),
            f"{NONE} none, the pre-tokenizer {BYTES} and ignore_merges True",
        ),
        (
            put("normalizer", value=steps(normalizers.NFKC())),
            f'{NONE} [{{"type":"NFKC"}}], the pre-tokenizer {BYTES} and ignore_merges False',
        ),
        (
            put("pre_tokenizer", value=steps(pre_tokenizers.Whitespace())),
            f'{NONE} none, the pre-tokenizer [{{"type":"Whitespace"}}] and ignore_merges False',
        ),
        (
            put("pre_tokenizer", value=steps(bytes_(add_prefix_space=True))),
            f"{NONE} none, the pre-tokenizer {SPACED} and ignore_merges False",
        ),
        (
            put("pre_tokenizer", value=steps(words(r"\p{L}+"))),
            f'{NONE} none, the pre-tokenizer [{{"type":"Split","pattern":{{"Regex":"\\\\p{{L}}+"}},'
            '"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"use_regex":false}]'
            " and ignore_merges False",
        ),
    ],
)
def test_a_rule_that_llama_cpp_lacks_is_named(prose: list[str], tmp_path: Path, change: Change, found: str) -> None:
    error = refusal(changed(change, prose, tmp_path))
    assert (error.found, error.expected) == (f"{tmp_path}/tokenizer.json: {found}", EXPECTED)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (models.WordPiece({"[UNK]": 0, "<|end|>": 1, "a": 2}, unk_token="[UNK]"), "WordPiece"),
        (models.Unigram([("<|end|>", 0.0), ("a", -1.0)], 0, False), "Unigram"),
        (models.WordLevel({"[UNK]": 0, "<|end|>": 1}, unk_token="[UNK]"), "WordLevel"),
    ],
)
def test_another_tokenizer_model_is_rejected(tmp_path: Path, model: models.Model, kind: str) -> None:
    backend = tokenizers.Tokenizer(model)
    error = refusal(saved(backend, tmp_path, bos_token=None, pad_token=None))
    assert error.found == f"{tmp_path}/tokenizer.json: a tokenizer of model {kind}"


def test_a_token_that_its_normalizer_changes_is_rejected(prose: list[str], tmp_path: Path) -> None:
    backend = KINDS["qwen2"](prose)
    backend.add_tokens([AddedToken("<e\u0301>", normalized=True)])
    error = refusal(saved(backend, tmp_path))
    assert error.found == f"{tmp_path}/tokenizer.json: the added token '<e\u0301>' with normalized"


def test_an_unknown_token_for_a_byte_is_rejected(prose: list[str], tmp_path: Path) -> None:
    def without(parts) -> None:
        vocab = parts["model"]["vocab"]
        last = max(vocab, key=vocab.get)  # so that ids stay without a gap
        parts["model"]["merges"] = [pair for pair in parts["model"]["merges"] if "".join(pair) != last]
        vocab["<unk>"] = vocab.pop(last)
        vocab["lost"] = vocab.pop("ÿ")
        parts["model"]["unk_token"] = "<unk>"

    found = f"{tmp_path}/tokenizer.json: BPE with unk_token '<unk>', for bytes such as 'ÿ'"
    assert refusal(changed(without, prose, tmp_path)).found == found


def test_a_tokenizer_without_an_end_token_is_rejected(prose: list[str], tmp_path: Path) -> None:
    tokenizer = saved(KINDS["gpt-2"](prose), tmp_path, eos_token=None)
    error = refusal(tokenizer)
    assert error.found == f"{tmp_path}/tokenizer.json: no token ends an answer"
    assert error.expected == "an end token: llama.cpp would take token 11 for it"
    assert unheld_ends(tokenizer) == ()


def test_more_tokens_than_rows_of_the_embedding_are_rejected(prose: list[str]) -> None:
    with pytest.raises(VocabularyMismatchError) as caught:
        gguf_metadata(TextTokenizer.of_student(Tokenizer.train(prose, 300)), vocab_size=299)
    assert re.fullmatch(
        r"the student's tokenizer: 300 tokens, the embedding has 299 rows, without one for '.+' \(299\)",
        caught.value.found,
    )
