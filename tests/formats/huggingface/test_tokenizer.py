"""Reading a model's own tokenizer: as AutoTokenizer reads the directory, or an error that names the cause."""

from __future__ import annotations

import functools
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from coremill.core.errors import TokenizerError
from coremill.core.plain import Plain
from coremill.formats.gguf.tokenizer import gguf_metadata
from coremill.formats.huggingface.tokenizer import read_tokenizer
from coremill.formats.parity import ODD_TEXTS, random_texts
from coremill.text.model_tokenizer import _LLAMA3_WORDS, _QWEN2_WORDS, TextTokenizer

BASE = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIZE = 330
ROLES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


@functools.cache
def trained() -> str:
    """A byte-level BPE of 330 tokens, the first three of which are special."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=list(BASE),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text(), *ODD_TEXTS], trainer)
    return backend.to_str()


def put(folder: Path, name: str, value: Plain) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def a_directory(
    folder: Path, *, model_type: str = "llama", tokenizer: str | None = None, **settings: Plain
) -> Path:
    """The files of a model of `model_type` that a tokenizer is read from; a setting of None is left out."""
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **ROLES, **settings}
    put(folder, "config.json", {"model_type": model_type})
    put(folder, "tokenizer_config.json", {key: value for key, value in values.items() if value is not None})
    (folder / "tokenizer.json").write_text(trained() if tokenizer is None else tokenizer)
    return folder


def auto(folder: Path) -> transformers.PreTrainedTokenizerFast:
    found = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(found, transformers.PreTrainedTokenizerFast)
    return found


def check_ids(ours: TextTokenizer, theirs: transformers.PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
    """Compare the ids with special tokens parsed, as plain text and with the beginning token; and the tokens."""
    for text in texts:
        special = ours.encode(text, allow_special=True)
        assert special == theirs.encode(text, add_special_tokens=False), (theirs.name_or_path, text)
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert [ours.bos_id] * ours.add_bos + special == theirs.encode(text), text
        assert ours.decode(special) == theirs.decode(special), text
    added = {token_id: repr(token) for token_id, token in theirs.added_tokens_decoder.items()}
    assert {token_id: repr(token) for token_id, token in ours.added_tokens.items()} == added
    assert ours.special_tokens == theirs.special_tokens_map


def check_both(folder: Path, texts: Sequence[str]) -> TextTokenizer:
    """Read `folder`; compare it, and what is written from it, with AutoTokenizer; return the tokenizer."""
    ours = read_tokenizer(folder)
    check_ids(ours, auto(folder), texts)
    written = folder / "written"
    ours.save(written)
    put(written, "config.json", json.loads((folder / "config.json").read_text()))
    check_ids(ours, auto(written), texts)
    assert TextTokenizer.load(written / "tokenizer.json").files() == ours.files()
    return ours


def token(content: str, **flags: bool) -> dict[str, Plain]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    return {"content": content, **plain, **flags}


# --- tokens outside tokenizer.json ------------------------------------------------------------------


BASE_DECODER = {str(index): token(name, special=True) for index, name in enumerate(BASE)}
CALL = "call <tool>sum</tool> now"


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("name", "value", "special"),
    [
        (
            "tokenizer_config.json",
            {
                "added_tokens_decoder": {
                    **BASE_DECODER,
                    "330": token("<tool>"),
                    "331": token("</tool>", special=True),
                }
            },
            [331],
        ),
        ("added_tokens.json", {"<tool>": 330, "</tool>": 331}, []),
        ("tokenizer_config.json", {"extra_special_tokens": ["<tool>", "</tool>"]}, [330, 331]),
        ("tokenizer_config.json", {"additional_special_tokens": ["<tool>", "</tool>"]}, [330, 331]),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": {"a_token": "<tool>", "b_token": "</tool>"}},
            [330, 331],
        ),
        ("special_tokens_map.json", {"sep_token": "<tool>", "mask_token": token("</tool>")}, [330, 331]),
    ],
)
def test_a_token_that_tokenizer_json_lacks_gets_its_id(
    tmp_path: Path, model_type: str, name: str, value: dict[str, Plain], special: list[int]
) -> None:
    folder = a_directory(tmp_path, model_type=model_type)
    if (folder / name).exists():
        value = {**json.loads((folder / name).read_text()), **value}
    put(folder, name, value)
    ours = check_both(folder, [CALL, "<tool>", " <tool> x"])
    ids = ours.encode(CALL, allow_special=True)
    assert [each for each in ids if each >= SIZE] == [330, 331]
    assert [each for each in ours.encode(CALL) if each >= SIZE] == [
        each for each in (330, 331) if each not in special
    ]
    read_back = TextTokenizer.from_gguf(gguf_metadata(ours, vocab_size=340), where="g.gguf")
    assert read_back.encode(CALL, allow_special=True) == ids
    assert read_back.encode(CALL) == ours.encode(CALL)


# --- the class that transformers chooses ------------------------------------------------------------


def test_a_class_that_replaces_the_rules_of_tokenizer_json_is_taken_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = check_both(a_directory(tmp_path, model_type="qwen2"), ODD_TEXTS)
    assert ours.normalize("cafe\u0301") == "caf\u00e9"
    assert gguf_metadata(ours, vocab_size=SIZE)["tokenizer.ggml.pre"] == "qwen2"
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/tokenizer.json: transformers reads it as Qwen2Tokenizer, which replaces its normalizer "
        "and its pre-tokenizer"
    ]


def test_a_tokenizer_that_its_class_represents_logs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = json.loads(trained())
    parts["normalizer"] = json.loads(normalizers.NFC().__getstate__())
    parts["pre_tokenizer"] = json.loads(words(_QWEN2_WORDS).__getstate__())
    assert check_both(a_directory(tmp_path, model_type="qwen2", tokenizer=json.dumps(parts)), ODD_TEXTS)
    assert caplog.records == []


def test_a_class_without_a_tokenizer_json_is_rejected(tmp_path: Path) -> None:
    folder = a_directory(tmp_path, model_type="llama", tokenizer_class="ByT5Tokenizer")
    error = refusal(folder)
    assert (
        error.found
        == f"transformers reads the tokenizer of {folder} as ByT5Tokenizer, which ignores tokenizer.json"
    )
    assert error.expected == "a tokenizer that transformers reads from its tokenizer.json"


def refusal(folder: Path) -> TokenizerError:
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(folder)
    return caught.value


# --- the beginning token ----------------------------------------------------------------------------


def processed(single: str) -> str:
    backend = tokenizers.Tokenizer.from_str(trained())
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return backend.to_str()


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("setting", [None, True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_the_post_processor_decides_about_the_beginning_token(
    tmp_path: Path, model_type: str, setting: bool | None, adds: bool
) -> None:
    tokenizer = processed("<|im_start|> $A" if adds else "$A")
    ours = check_both(
        a_directory(tmp_path, model_type=model_type, tokenizer=tokenizer, add_bos_token=setting), ["hi"]
    )
    assert ours.add_bos is adds
    assert json.loads((tmp_path / "written" / "tokenizer_config.json").read_text())["add_bos_token"] is adds
    assert gguf_metadata(ours, vocab_size=SIZE)["tokenizer.ggml.add_bos_token"] is adds


def test_a_post_processor_that_ends_a_text_is_rejected(tmp_path: Path) -> None:
    folder = a_directory(tmp_path, tokenizer=processed("<|im_start|> $A <|im_end|>"))
    assert refusal(folder).found == (
        f"{folder}/tokenizer.json: its post-processor makes `<|im_start|> TEXT <|im_end|>` of a text, "
        "and the bos_token is <|im_start|>"
    )


# --- end tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, (2,)),
        (0, None, (2, 0)),
        (0, [2, 1], (2, 1)),
        ([0, 1, 2, 5, 6], None, (2, 0, 1, 5, 6)),
        (None, [9, 8, 7, 6, 2], (2, 9, 8, 7, 6)),
    ],
)
def test_end_tokens_are_read_and_written(
    tmp_path: Path, config: Plain, generation: Plain, expected: tuple[int, ...]
) -> None:
    folder = a_directory(tmp_path)
    put(folder, "config.json", {"model_type": "llama", "eos_token_id": config})
    if generation is not None:
        put(folder, "generation_config.json", {"eos_token_id": generation})
    ours = read_tokenizer(folder)
    assert ours.eos_ids == expected
    ours.save(tmp_path / "written")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "written").eos_token_id == list(expected)
    assert TextTokenizer.load(tmp_path / "written" / "tokenizer.json").eos_ids == expected


# --- chat templates ---------------------------------------------------------------------------------


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "rag", "template": "sources"}]
DEFAULT = {"name": "default", "template": "plain"}


@pytest.mark.parametrize(
    ("setting", "files", "expected", "logged"),
    [
        (None, {}, None, None),
        ("from the settings", {}, "from the settings", None),
        ("x", {"chat_template.jinja": "a\r\nb\n"}, "a\nb\n", None),
        ([DEFAULT], {}, "plain", None),
        ([*NAMED, DEFAULT], {}, "plain", "F: of its chat templates, the default one is kept, not rag, tool_use"),
        (NAMED, {}, None, "F: its chat templates, rag, tool_use, are not taken: none is the default"),
        (
            None,
            {"additional_chat_templates/rag.jinja": "sources"},
            None,
            "F: its chat templates, rag, are not taken: none is the default",
        ),
        ("unread", {"additional_chat_templates/default.jinja": "the default"}, "the default", None),
        (
            None,
            {"chat_template.jinja": "plain", "additional_chat_templates/rag.jinja": "sources"},
            "plain",
            "F: of its chat templates, the default one is kept, not rag",
        ),
        (
            None,
            {"chat_template.json": '{"chat_template": "x"}'},
            None,
            "F/chat_template.json is not taken: transformers reads a tokenizer's chat template from "
            "chat_template.jinja or tokenizer_config.json",
        ),
        ("plain", {"chat_template.json": '{"chat_template": "x"}'}, "plain", None),
    ],
)
def test_the_template_is_the_one_that_transformers_takes(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    setting: Plain,
    files: dict[str, str],
    expected: str | None,
    logged: str | None,
) -> None:
    folder = a_directory(tmp_path, chat_template=setting)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    ours = read_tokenizer(folder)
    assert (None if ours.chat_template is None else ours.chat_template.source) == expected
    chat = [{"role": "user", "content": "Hello"}]
    if expected is None:
        with pytest.raises(ValueError, match=r"chat_template|chat templates"):
            auto(folder).apply_chat_template(chat, tokenize=False)
    else:
        assert auto(folder).apply_chat_template(chat, tokenize=False) == ours.chat_template.render(
            chat, add_generation_prompt=False
        )
    assert [record.getMessage() for record in caplog.records] == (
        [] if logged is None else [logged.replace("F", str(folder), 1)]
    )


def test_a_template_may_name_every_special_token(tmp_path: Path) -> None:
    folder = a_directory(tmp_path, sep_token="<tool>", chat_template="{{ sep_token }}{{ bos_token }}")
    ours = read_tokenizer(folder)
    chat = [{"role": "user", "content": "Hello"}]
    rendered = auto(folder).apply_chat_template(chat, tokenize=False)
    assert ours.chat_template.render(chat, add_generation_prompt=False) == rendered == "<tool><|im_start|>"


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json"])
def test_a_vocabulary_without_tokenizer_json_is_named_with_its_conversion(tmp_path: Path, name: str) -> None:
    folder = a_directory(tmp_path)
    (folder / "tokenizer.json").rename(folder / name)
    assert str(refusal(folder)) == (
        f"{folder} has {name} and no tokenizer.json\n"
        f"  expected: a tokenizer.json; transformers makes it of {name}, with the packages that it asks for\n"
        f'  run: python -c "from transformers import AutoTokenizer; '
        f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("tokenizer.json", None, "cannot read F/tokenizer.json: No such file or directory"),
        ("tokenizer.json", "{}", "F/tokenizer.json is not a tokenizer: "),
        ("tokenizer_config.json", "{", "cannot read F/tokenizer_config.json: Input data was truncated"),
        ("special_tokens_map.json", "[]", "F/special_tokens_map.json: found list at `$`"),
        ("added_tokens.json", "[", "cannot read F/added_tokens.json: Input data was truncated"),
        ("generation_config.json", '{"eos_token_id": true}', "F/generation_config.json: `eos_token_id` is true"),
        ("config.json", '{"model_type": "llama", "eos_token_id": "2"}', 'F/config.json: `eos_token_id` is "2"'),
        (
            "generation_config.json",
            '{"eos_token_id": 330}',
            "F/tokenizer.json: the end token 330 is not in its vocabulary of 330",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"330": 5}}',
            "transformers cannot read the tokenizer of F: TypeError: Found a <class 'int'> in the saved ",
        ),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "the chat template: Expected an expression"),
    ],
)
def test_invalid_directories_are_rejected(tmp_path: Path, name: str, text: str | None, found: str) -> None:
    folder = a_directory(tmp_path)
    (folder / name).unlink(missing_ok=True)
    if text is not None:
        (folder / name).write_text(text)
    error = refusal(folder)
    assert error.found.startswith(found.replace("F", str(folder), 1))
    assert error.expected


# --- random directories -----------------------------------------------------------------------------


def words(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


PRE_TOKENIZERS: tuple[Callable[[], pre_tokenizers.PreTokenizer], ...] = (
    lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    lambda: words(_QWEN2_WORDS),
    lambda: words(_LLAMA3_WORDS),
)
NAMES = ("<tool>", "</tool>", "<a b>", "<|x|>", "caf\u00e9", "e\u0301", "  ", "[PAD]", "yes", "<too", "Yes")
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
CLASSES = (
    *("PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizerFast"),
    None,
)


def a_random_directory(folder: Path, rng: random.Random) -> Path:
    """Added tokens with random flags in any of the files, special tokens, and a post-processor."""
    backend = tokenizers.Tokenizer.from_str(trained())
    backend.normalizer = rng.choice((None, None, normalizers.NFC(), normalizers.NFKC()))
    backend.pre_tokenizer = rng.choice(PRE_TOKENIZERS)()
    single = rng.choice((None, "$A", "$A", *["<|im_start|> $A"] * 4, "$A <|im_end|>"))
    if single is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
        )
    names = rng.sample(NAMES, 6)
    backend.add_tokens([AddedToken(name, **some_flags(rng)) for name in names[: rng.randrange(3)]])
    settings: dict[str, Plain] = {role: name for role, name in ROLES.items() if rng.random() < 0.9}
    settings["tokenizer_class"] = rng.choice(CLASSES)
    if rng.random() < 0.5:
        settings["add_bos_token"] = rng.random() < 0.5
    if rng.random() < 0.4:
        listed = {str(SIZE + index): token(name, **some_flags(rng)) for index, name in enumerate(names[2:4])}
        settings["added_tokens_decoder"] = {**(BASE_DECODER if rng.random() < 0.7 else {}), **listed}
    if rng.random() < 0.3:
        settings[rng.choice(("extra_special_tokens", "additional_special_tokens"))] = names[4:5]
    if rng.random() < 0.3:
        settings["mask_token"] = rng.choice((names[5], {"__type": "AddedToken", **token(names[5], lstrip=True)}))
    a_directory(folder, model_type=rng.choice(MODEL_TYPES), tokenizer=backend.to_str(), **dict.fromkeys(ROLES))
    put(folder, "tokenizer_config.json", {key: value for key, value in settings.items() if value is not None})
    if rng.random() < 0.3:
        put(folder, "added_tokens.json", {name: SIZE + index for index, name in enumerate(names[3:5])})
    if rng.random() < 0.3:
        put(folder, "special_tokens_map.json", {"unk_token": rng.choice((BASE[0], token(names[0], rstrip=True)))})
    return folder


def some_flags(rng: random.Random) -> dict[str, bool]:
    share = rng.choice((0.0, 0.0, 0.0, 0.4))
    return {flag: rng.random() < (share if flag in FLAGS[2:] else 0.5) for flag in FLAGS}


def test_random_directories_give_the_ids_of_transformers_or_are_rejected_by_name(tmp_path: Path) -> None:
    texts = [
        *ODD_TEXTS,
        *(f"{before}{name}{after}" for name in NAMES for before, after in ((" ", "x"), ("y", " "))),
    ]
    texts += random_texts(12, NAMES)
    outcomes = Counter(outcome(tmp_path / str(seed), random.Random(seed), texts) for seed in range(60))
    assert outcomes == {"rejected": 12, "held by GGUF": 23, "not held by GGUF": 25}


def outcome(folder: Path, rng: random.Random, texts: Sequence[str]) -> str:
    """Check a random directory in `folder`; where it is rejected, transformers does what the error says."""
    folder.mkdir()
    theirs = auto(a_random_directory(folder, rng))
    plain, found = theirs.encode("x", add_special_tokens=False), theirs.encode("x")
    if found not in (plain, [theirs.bos_token_id, *plain]):
        assert refusal(folder).found.startswith(f"{folder}/tokenizer.json: its post-processor makes `")
        return "rejected"
    ours = check_both(folder, texts)
    try:
        metadata = gguf_metadata(ours, vocab_size=350)
    except TokenizerError:  # tests/formats/gguf/test_tokenizer.py asserts what each names
        return "not held by GGUF"
    read_back = TextTokenizer.from_gguf(metadata, where="g.gguf")
    for text in map(ours.normalize, texts):
        assert read_back.encode(text) == ours.encode(text), (folder, text)
        assert read_back.encode(text, allow_special=True) == ours.encode(text, allow_special=True), (folder, text)
    return "held by GGUF"
