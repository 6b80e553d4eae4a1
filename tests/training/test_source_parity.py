"""An import is compared with its source in transformers or llama.cpp, and a wrong one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from coremill.core.config import GgufType, WeightsConfig
from coremill.core.documents import read_json
from coremill.core.errors import ParityError
from coremill.core.gates import Outcome
from coremill.core.layout import source_parity
from coremill.core.parity import SourceParity
from coremill.data.corpora import FOLDER
from coremill.formats.gguf import reader as gguf_reader
from coremill.formats.gguf.tokenizer import gguf_metadata
from coremill.formats.gguf.writer import write_gguf
from coremill.formats.huggingface import reader
from coremill.model import checkpoint as checkpoints
from coremill.text.model_tokenizer import TextTokenizer
from coremill.training.import_model import import_model, prove_import

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer, trained on a text of this package."""
    folder = tmp_path_factory.mktemp("source") / "model"
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    text = next(FOLDER.glob("*.txt")).read_text()
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        initializer_range=0.3,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.set_seed(3)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


def imported(source: Path, folder: Path) -> tuple[WeightsConfig, Path]:
    weights = WeightsConfig(source=str(source))
    import_model(weights, folder / "model.ckpt")
    return weights, folder / "model.ckpt"


def outcomes(checkpoint: Path) -> dict[str, Outcome]:
    parity = read_json(source_parity(checkpoint.parent), SourceParity)
    return {gate.name: gate.outcome for gate in parity.gates}


LOGITS, IDS, CHATS = (
    "relative error of logits",
    "texts that are tokenized differently",
    "conversations that are rendered differently",
)


def test_a_right_import_passes(source: Path, tmp_path: Path) -> None:
    figures = prove_import(*imported(source, tmp_path))
    assert figures["source_program"] == f"transformers {transformers.__version__}"
    # 4 sequences of text, one of unusual text, 3 added tokens between others, and every fourth of 401 tokens.
    assert figures["source_positions"] == 4 * 128 + 128 + 6 + 101
    assert outcomes(tmp_path / "model.ckpt") == dict.fromkeys((LOGITS, IDS, CHATS), Outcome.PASSED)


def scaled_row(checkpoint: Path) -> None:
    """A row of the embedding that no text needs: that of the added token."""
    ckpt = checkpoints.load_checkpoint(checkpoint)
    embedding = ckpt.state_dict["embed_tokens.weight"].clone()
    embedding[-1] *= 1.1
    state = {**ckpt.state_dict, "embed_tokens.weight": embedding}
    checkpoints.save_checkpoint(
        checkpoint,
        checkpoints.Checkpoint(
            model_type=ckpt.model_type,
            model_arch=ckpt.model_arch,
            config=ckpt.config,
            step=0,
            tokenizer=ckpt.tokenizer,
            state_dict=state,
            training=ckpt.training,
        ),
    )


def unknown_token(checkpoint: Path) -> None:
    path = checkpoint.with_name("tokenizer.json")
    value = json.loads(path.read_text())
    value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] != "<tool>"]
    path.write_text(json.dumps(value))


def other_template(checkpoint: Path) -> None:
    (checkpoint.parent / "chat_template.jinja").write_text(TEMPLATE.replace("</s>", " </s>"))


@pytest.mark.parametrize(
    ("change", "failed", "reason"),
    [
        (scaled_row, {LOGITS}, "relative error of logits: 0."),
        (unknown_token, {IDS}, "texts that are tokenized differently: "),
        (
            other_template,
            {CHATS},
            "conversations that are rendered differently: ",
        ),
    ],
)
def test_a_wrong_import_fails_and_its_report_says_so(
    source: Path, tmp_path: Path, change: Callable[[Path], None], failed: set[str], reason: str
) -> None:
    weights, checkpoint = imported(source, tmp_path)
    change(checkpoint)
    with pytest.raises(ParityError) as caught:
        prove_import(weights, checkpoint)
    program = f"transformers {transformers.__version__}"
    assert caught.value.found.startswith(f"the imported model differs from {source} in {program}: {reason}")
    assert {name for name, outcome in outcomes(checkpoint).items() if outcome is Outcome.FAILED} == failed


def test_an_option_that_the_reader_gets_wrong_is_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_rope_theta", lambda _: 20_000.0)
    with pytest.raises(ParityError, match=r"relative error of logits: \d\.\d+ is above 1e-05"):
        prove_import(*imported(source, tmp_path))


def test_a_source_that_transformers_does_not_load_is_an_error(source: Path, tmp_path: Path) -> None:
    _, checkpoint = imported(source, tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in source.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ParityError) as caught:
        prove_import(WeightsConfig(source=str(broken)), checkpoint)
    assert caught.value.found.startswith(f"transformers does not load {broken}: KeyError: 'added_tokens'")


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_a_gguf_file_is_compared_in_llama_cpp(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: GgufType
) -> None:
    _, checkpoint = imported(source, tmp_path)
    tokenizer = TextTokenizer.load(checkpoint.with_name("tokenizer.json"))
    ckpt = checkpoints.load_checkpoint(checkpoint)
    metadata = gguf_metadata(tokenizer, vocab_size=ckpt.config.vocab_size)
    path = tmp_path / "model.gguf"
    write_gguf(path, ckpt, metadata, kind=kind, name="model", provenance={})
    figures = prove_import(*imported(path, tmp_path / "right"))
    assert str(figures["source_program"]).startswith("llama.cpp of xllamacpp ")
    monkeypatch.setattr(gguf_reader, "from_interleaved", lambda value, _: value)
    figure = "relative error of logits: " if kind == "f32" else "KL divergence of logits: "
    with pytest.raises(ParityError) as caught:
        prove_import(*imported(path, tmp_path / "wrong"))
    assert f"xllamacpp {figures['source_program'].split()[-1]}: {figure}" in caught.value.found
