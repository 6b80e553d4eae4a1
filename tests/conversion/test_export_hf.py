"""The export to Hugging Face: it is verified with transformers, which finds every planted defect."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.sharp import sharpened

from coremill.conversion import export_hf
from coremill.conversion.export_hf import main, run_stage
from coremill.core import layout, machine
from coremill.core.config import (
    ConvertConfig,
    DatasetConfig,
    HuggingFaceConfig,
    ImportedRun,
    ImportedVerify,
    ModelConfig,
    TextsConfig,
    WeightsConfig,
)
from coremill.core.contract import ModelArch, ShapeSet, TokenizerRef
from coremill.core.digest import digest
from coremill.core.documents import read_json
from coremill.core.errors import (
    CheckpointContentError,
    ConfigError,
    DatasetError,
    MachineError,
    OutputError,
    ParityError,
    TokenizerError,
    VocabularyMismatchError,
)
from coremill.core.gates import Outcome
from coremill.core.parity import HuggingFaceParity
from coremill.core.stage import StageContext
from coremill.data.corpora import bundled_texts
from coremill.data.lines import write_lines
from coremill.data.make_toy_kd import DatasetFiles, make_dataset
from coremill.data.prompts import load_prompts
from coremill.data.texts import ChatPrompt
from coremill.formats import parity
from coremill.formats.huggingface import writer as huggingface_writer
from coremill.formats.huggingface.parity import Expected, Findings, _Difference, compare, load_model
from coremill.formats.huggingface.settings import ExpectedSettings, settings
from coremill.formats.huggingface.writer import architecture_of, stored_tensors
from coremill.model.checkpoint import IMPORTED_FROM, checkpoint_of, load_checkpoint, save_checkpoint
from coremill.model.reference import Reference
from coremill.model.student import new_student
from coremill.text.model_tokenizer import _QWEN2_WORDS, CHAT_TEMPLATE, TOKENIZER_CONFIG, TextTokenizer
from coremill.text.student_tokenizer import SPECIAL_TOKENS, Tokenizer

torch.set_num_threads(1)

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token if message.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def a_model(vocab_size: int, **options: Any) -> ModelConfig:
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "max_seq_len": 128}
    arch = ModelArch(use_halt_head=options.pop("halt_head", False), tie_embeddings=True)
    return ModelConfig(**{**sizes, "vocab_size": vocab_size, "arch": arch, **options})


def save_model(path: Path, model: ModelConfig, tokenizer: Tokenizer | TextTokenizer, model_type: str) -> None:
    """Save random weights, large enough for the answers to differ."""
    training = {IMPORTED_FROM: {"files": {"a.gguf": "sha256:0"}}} if model_type != "magic-8-ball" else {"seed": 6}
    save_checkpoint(
        path,
        checkpoint_of(
            new_student(model, seed=6),
            model_type=model_type,
            step=0,
            tokenizer=TokenizerRef(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest),
            training=training,
        ),
    )


@pytest.fixture(scope="module", autouse=True)
def fewer_texts() -> Iterator[None]:
    """Use a third of the texts, because each test compares a directory again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "TEXTS", 330)
        yield


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy's dataset, tokenizer and checkpoint; tests only read it."""
    folder = tmp_path_factory.mktemp("toy")
    make_dataset(
        DatasetConfig(kind="magic-8-ball", n=256, heldout_n=8, seed=4, vocab_size=400),
        DatasetFiles(
            train=layout.dataset_file(folder),
            heldout=layout.heldout_file(folder),
            tokenizer=layout.tokenizer_file(folder),
        ),
    )
    tokenizer = Tokenizer.load(layout.tokenizer_file(folder))
    save_model(folder / "tiny_ball.ckpt", a_model(400, halt_head=True), tokenizer, "magic-8-ball")
    return folder


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an imported model's texts, tokenizer files and checkpoint; tests only read it."""
    folder = tmp_path_factory.mktemp("imported")
    texts = bundled_texts(TextsConfig(min_characters=1000, max_characters=6000))
    write_lines(layout.texts_file(folder), texts)
    chats = [ChatPrompt(id=str(number), text=text) for number, text in enumerate(("Why?", " Who is it? ", "How?"))]
    write_lines(layout.chat_prompts_file(folder), chats)
    Tokenizer.train((text.text for text in texts), 340).save(layout.tokenizer_file(folder))
    settings = {"bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[2], "pad_token": SPECIAL_TOKENS[0]}
    (folder / TOKENIZER_CONFIG).write_bytes(msgspec.json.encode(settings))
    (folder / CHAT_TEMPLATE).write_text(TEMPLATE)
    tokenizer = TextTokenizer.load(layout.tokenizer_file(folder))
    model = a_model(352, qk_norm=True)  # rows of the embedding that no token has
    save_model(folder / "tiny_qwen.ckpt", model, tokenizer, "qwen3")
    return folder


def export(source: Path, out: Path, *options: str) -> dict[str, str]:
    """Run the command, and return the figures that it prints."""
    (checkpoint,) = source.glob("*.ckpt")
    printed = StringIO()
    with redirect_stdout(printed):
        assert main(["--checkpoint", str(checkpoint), "--out", str(out), *options]) == 0
    return dict(line.split("  ") for line in printed.getvalue().splitlines())


@pytest.fixture(scope="session")
def exported_toy(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "toy"
    export(toy, out, "--license", "apache-2.0")
    return out


@pytest.fixture(scope="session")
def exported(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "imported"
    export(imported, out)
    return out


@pytest.fixture(scope="session")
def toy_expected(toy: Path, exported_toy: Path) -> Expected:
    return expectation(toy, exported_toy)


@pytest.fixture
def directory(exported_toy: Path, tmp_path: Path) -> Path:
    """A toy's directory that a test may break."""
    return shutil.copytree(exported_toy, tmp_path / "directory")


def expectation(source: Path, folder: Path) -> Expected:
    """What `folder` is compared with, if its files are correct."""
    (checkpoint,) = source.glob("*.ckpt")
    ckpt = load_checkpoint(checkpoint)
    prompts = load_prompts(layout.tokenizer_file(source), source, rows=40)
    halt_head = next(folder.glob("halt_head-*.safetensors"), None)
    stored = stored_tensors(ckpt, "float32")
    return Expected(
        config=ckpt.config,
        reference=Reference(ckpt.config, stored),
        dtype=torch.float32,
        architecture=architecture_of(ckpt.config, ckpt.model_type),
        stored=stored,
        tokenizer=prompts.text_tokenizer,
        prompts=prompts,
        files={name: (folder / name).read_bytes() for name in FILES - {"model.safetensors"}},
        halt_head=halt_head,
    )


BY_HAND = {"logits under mlx-lm", "llama.cpp's converter"}


def failures(findings: Findings) -> dict[str, str | None]:
    """The reasons of the gates that did not pass, without those that are run by hand."""
    left = {gate.name: gate for gate in findings.gates if gate.outcome is not Outcome.PASSED}
    assert {left.pop(name).outcome for name in BY_HAND} == {Outcome.NOT_RUN}
    return {name: gate.reason for name, gate in left.items()}


# --- the directory --------------------------------------------------------------------------------


def test_directory_of_a_toy(toy: Path, exported_toy: Path) -> None:
    assert {path.name for path in exported_toy.iterdir()} == {
        *FILES,
        "parity.json",
        "halt_head-tiny_ball.safetensors",
    }
    report = read_json(exported_toy / "parity.json", HuggingFaceParity)
    assert [(gate.name, gate.outcome.value) for gate in report.gates] == [
        ("files that differ", "passed"),
        ("settings that differ", "passed"),
        ("tensors that differ", "passed"),
        ("relative error of logits", "passed"),
        ("relative error of halt logits", "passed"),
        ("greedy tokens that differ", "passed"),
        ("texts that are tokenized differently", "passed"),
        ("conversations that are rendered differently", "passed"),
        ("logits under mlx-lm", "not_run"),
        ("llama.cpp's converter", "not_run"),
    ]
    assert [gate.threshold for gate in report.gates] == [0, 0, 0, 1e-5, 1e-5, 0, 0, 0, None, None]
    assert 0 < report.logits_max_abs < 1e-5
    assert report.differences == ()
    assert report.checkpoint_digest == digest(toy / "tiny_ball.ckpt")
    assert report.files == {
        path.name: digest(path) for path in sorted(exported_toy.iterdir()) if path.name != "parity.json"
    }
    (halt,) = load_file(exported_toy / "halt_head-tiny_ball.safetensors").items()
    assert halt[0] == "halt_head.weight"
    assert torch.equal(halt[1], load_checkpoint(toy / "tiny_ball.ckpt").state_dict["halt_head.weight"])
    assert json.loads((exported_toy / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_directory_of_an_imported_model(imported: Path, exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {*FILES, "parity.json"}
    gates = read_json(exported / "parity.json", HuggingFaceParity).gates
    assert "relative error of halt logits" not in {gate.name for gate in gates}
    config = json.loads((exported / "config.json").read_text())
    assert (config["architectures"], config["vocab_size"]) == (["Qwen3ForCausalLM"], 352)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert (exported / "tokenizer.json").read_bytes() == (imported / "tokenizer.json").read_bytes()
    card = (exported / "README.md").read_text()
    assert "| Imported from | `a.gguf`, `sha256:0` |" in card
    assert "license" not in card


def test_program_on_the_model_card_runs(
    exported_toy: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, count in ((exported_toy, 2), (exported, 1)):
        programs = (folder / "README.md").read_text().split("```python\n")[1:]
        assert len(programs) == count
        source = "".join(program.split("```")[0] for program in programs)
        exec(source.replace('folder = "."', f"folder = {str(folder)!r}"), {})
    assert "tensor([[[" in capsys.readouterr().out


def test_equal_checkpoints_give_equal_bytes(toy: Path, exported_toy: Path, tmp_path: Path) -> None:
    figures = export(toy, tmp_path / "again", "--license", "apache-2.0")
    assert digest(tmp_path / "again") == digest(exported_toy)
    assert figures.keys() == {
        "parameters",
        "bytes",
        "files_that_differ",
        "settings_that_differ",
        "tensors_that_differ",
        "relative_error_of_logits",
        "relative_error_of_halt_logits",
        "greedy_tokens_that_differ",
        "texts_that_are_tokenized_differently",
        "conversations_that_are_rendered_differently",
        "logits_max_abs",
        "greedy_ties",
    }
    assert figures["parameters"] == str(
        sum(tensor.numel() for tensor in load_file(exported_toy / "model.safetensors").values())
    )


def test_half_precision_is_compared_with_the_rounded_checkpoint(imported: Path, tmp_path: Path) -> None:
    figures = export(imported, tmp_path / "hf", "--dtype", "float16")
    assert float(figures["relative_error_of_logits"]) <= 1e-5
    # A comparison with the unrounded checkpoint fails.
    findings = compare(tmp_path / "hf", expectation(imported, tmp_path / "hf"))
    assert failures(findings).keys() >= {"tensors that differ", "relative error of logits"}


def test_stage_writes_into_its_directory(imported: Path, tmp_path: Path) -> None:
    config = ImportedRun(
        name="tiny-qwen",
        model_type="qwen3",
        weights=WeightsConfig(source="models/tiny-qwen"),
        shapes=ShapeSet(primary=16, all=(16,)),
        convert=ConvertConfig(),
        hf=HuggingFaceConfig(dtype="bfloat16", license="mit"),
        verify=ImportedVerify(min_sqnr_db=40.0, max_kl_nats=1e-3, argmax_margin=0.05, max_excluded_share=0.1),
    )
    out = tmp_path / "out"
    out.mkdir()
    inputs = {"import": imported, "texts": imported}
    figures = run_stage(StageContext(config=config, lane=None, inputs=inputs, out=out))
    assert figures["tensors_that_differ"] == 0
    assert {path.name for path in out.iterdir()} == {*FILES, "parity.json"}
    assert 'license: "mit"' in (out / "README.md").read_text()
    assert read_json(layout.parity_report(out), HuggingFaceParity).dtype == "bfloat16"


def test_a_tokenizer_that_transformers_replaces_is_rejected(imported: Path, tmp_path: Path) -> None:
    """AutoTokenizer splits the texts of every Qwen2 with Qwen's pattern, whatever the files contain."""
    source = shutil.copytree(imported, tmp_path / "source")
    tokenizer = TextTokenizer.load(source / "tokenizer.json")
    save_model(source / "tiny_qwen.ckpt", a_model(340, attention_bias="qkv"), tokenizer, "qwen2")
    with pytest.raises(TokenizerError) as caught:
        export(source, tmp_path / "hf")
    assert str(caught.value) == (
        f"a Hugging Face directory cannot hold the tokenizer of {source}/tokenizer.json: transformers reads every "
        "qwen2 model's as Qwen2Tokenizer, which replaces its normalizer and its pre-tokenizer, and adds "
        "<|endoftext|>\n"
        '  expected: a tokenizer that Qwen2Tokenizer represents; or `formats = ["gguf"]` in the configuration'
    )


def test_qwen2_with_the_tokenizer_of_qwen_passes(imported: Path, tmp_path: Path) -> None:
    """It declares no padding or unknown token; the class of transformers has defaults."""
    source = shutil.copytree(imported, tmp_path / "source")
    values = json.loads((source / "tokenizer.json").read_text())
    words = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [words, bytes_]}
    values["normalizer"] = {"type": "NFC"}
    values["added_tokens"].append({**values["added_tokens"][0], "id": 340, "content": "<|endoftext|>"})
    (source / "tokenizer.json").write_text(json.dumps(values))
    (source / TOKENIZER_CONFIG).write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    tokenizer = TextTokenizer.load(source / "tokenizer.json")
    save_model(source / "tiny_qwen.ckpt", a_model(352, attention_bias="qkv"), tokenizer, "qwen2")
    figures = export(source, tmp_path / "hf")
    assert (figures["settings_that_differ"], figures["texts_that_are_tokenized_differently"]) == ("0", "0")


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_other_families_keep_the_tokenizer(imported: Path, tmp_path: Path, model_type: str) -> None:
    source = shutil.copytree(imported, tmp_path / "source")
    tokenizer = TextTokenizer.load(source / "tokenizer.json")
    save_model(source / "tiny_qwen.ckpt", a_model(340), tokenizer, model_type)
    assert export(source, tmp_path / "hf")["texts_that_are_tokenized_differently"] == "0"


def test_model_without_template_and_end_token(imported: Path, tmp_path: Path) -> None:
    source = shutil.copytree(imported, tmp_path / "source")
    (source / CHAT_TEMPLATE).unlink()
    (source / TOKENIZER_CONFIG).unlink()
    export(source, tmp_path / "hf")
    gates = {gate.name: gate for gate in read_json(tmp_path / "hf" / "parity.json", HuggingFaceParity).gates}
    chats = gates["conversations that are rendered differently"]
    assert (chats.outcome, chats.reason) == (Outcome.NOT_RUN, "the model has no chat template")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] is None


# --- planted defects ----------------------------------------------------------------------------------


def edit_json(folder: Path, name: str, **changes: Any) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **changes}))


def edit_tensor(folder: Path, file: str, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    (path,) = folder.glob(file)
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def scale_norm(folder: Path) -> None:
    edit_tensor(folder, "model.safetensors", "model.norm.weight", lambda tensor: tensor.mul_(1.001))


def change_a_little(folder: Path) -> None:
    """Too small a change for the logits."""
    edit_tensor(
        folder, "model.safetensors", "model.layers.0.mlp.down_proj.weight", lambda tensor: tensor.add_(1e-9)
    )


def halve_halt_head(folder: Path) -> None:
    edit_tensor(folder, "halt_head-*.safetensors", "halt_head.weight", lambda tensor: tensor.mul_(0.5))


def swap_theta(folder: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 9000.0}
    edit_json(folder, "config.json", rope_parameters=rope, rope_theta=9000.0)


def end_early(folder: Path) -> None:
    ids = list(range(0, 400, 2))
    edit_json(folder, "generation_config.json", eos_token_id=ids)


def prefix_space(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def ordinary_token(folder: Path) -> None:
    """Make `<|user|>` ordinary text, so that it is split differently."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [each for each in tokenizer["added_tokens"] if each["content"] != "<|user|>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def other_template(folder: Path) -> None:
    path = folder / CHAT_TEMPLATE
    path.write_text(path.read_text().replace("'<|assistant|>' + message", "'<|assistant|> ' + message"))


def welcoming_template(folder: Path) -> None:
    path = folder / CHAT_TEMPLATE
    path.write_text(path.read_text().replace("raise_exception('no system')", "''"))


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    """Return a function that changes values of a JSON file, or removes the keys whose value is None."""

    def plant(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return plant


def tokenizer_edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        values = json.loads((folder / "tokenizer.json").read_text())
        change(values)
        (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False))

    return plant


def token(index: int, **changes: Any) -> Callable[[Path], None]:
    """Return a function that changes an added token."""
    return tokenizer_edited(lambda values: values["added_tokens"][index].update(changes))


def swap_merges(values: dict[str, Any]) -> None:
    merges = values["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]


TRUNCATION = {"direction": "Right", "max_length": 400, "strategy": "LongestFirst", "stride": 0}


def begin_with_bos(values: dict[str, Any]) -> None:
    bos = {"id": SPECIAL_TOKENS[1], "type_id": 0}
    single = [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {SPECIAL_TOKENS[1]: {"id": SPECIAL_TOKENS[1], "ids": [1], "tokens": [SPECIAL_TOKENS[1]]}}
    values["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens
    }  # fmt: skip


def decode_otherwise(values: dict[str, Any]) -> None:
    strip = {"type": "Strip", "content": "a", "start": 1, "stop": 0}
    values["decoder"] = {"type": "Sequence", "decoders": [values["decoder"], strip]}


def not_a_number(folder: Path) -> None:
    edit_tensor(folder, "model.safetensors", "model.norm.weight", lambda tensor: tensor.fill_(torch.nan))


def other_dtype(folder: Path) -> None:
    """Change the type but no value: the norms are 1."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, path, metadata={"format": "pt"})


def other_halt_head(folder: Path) -> None:
    edit_tensor(folder, "halt_head-*.safetensors", "halt_head.weight", lambda tensor: tensor.mul_(1 + 2e-7))


def no_tool_results(folder: Path) -> None:
    path = folder / CHAT_TEMPLATE
    path.write_text(path.read_text().replace(", 'tool_result'", ""))


def stray_file(folder: Path) -> None:
    (folder / "added_tokens.json").write_text("{}")


FILE, SETTING, TENSOR = "files that differ", "settings that differ", "tensors that differ"
LOGITS, HALT, GREEDY = "relative error of logits", "relative error of halt logits", "greedy tokens that differ"
TEXTS, CHATS = "texts that are tokenized differently", "conversations that are rendered differently"
CONFIG, GENERATION = "config.json", "generation_config.json"


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (scale_norm, {TENSOR, LOGITS, HALT}),
        (change_a_little, {TENSOR}),
        (not_a_number, {TENSOR, LOGITS, HALT}),
        (other_dtype, {TENSOR}),
        (halve_halt_head, {TENSOR, HALT}),
        (other_halt_head, {TENSOR}),
        (swap_theta, {FILE, SETTING, LOGITS, HALT}),
        (end_early, {FILE, SETTING, GREEDY}),
        (prefix_space, {FILE, TEXTS, CHATS}),
        (ordinary_token, {FILE, SETTING, TEXTS, CHATS}),
        (other_template, {FILE, CHATS}),
        (no_tool_results, {FILE}),
        (stray_file, {FILE}),
        (edited(CONFIG, eos_token_id=5), {FILE, SETTING}),
        (edited(CONFIG, eos_token_id=None), {FILE}),  # the default of Llama is equal
        (edited(CONFIG, bos_token_id=5), {FILE, SETTING}),
        (edited(CONFIG, pad_token_id=7), {FILE, SETTING}),
        (edited(CONFIG, max_position_embeddings=64), {FILE, SETTING}),
        (edited(CONFIG, max_position_embeddings=10**6), {FILE, SETTING}),
        (edited(CONFIG, dtype="float16"), {FILE, SETTING}),
        (edited(CONFIG, architectures=["Foo"]), {FILE, SETTING}),
        (edited(CONFIG, model_type="mistral"), {FILE, SETTING}),
        (edited(CONFIG, attention_dropout=0.5), {FILE, SETTING}),
        (edited(CONFIG, rope_theta=77.0), {FILE}),  # the key of version 4
        (edited(CONFIG, rope_parameters=None), {FILE}),
        (lambda folder: (folder / GENERATION).unlink(), {FILE, SETTING}),
        (edited(GENERATION, eos_token_id=[2, 50]), {FILE, SETTING}),
        (edited(GENERATION, do_sample=True, temperature=1.5), {FILE, SETTING}),
        (edited(GENERATION, max_new_tokens=3), {FILE, SETTING}),
        (edited(GENERATION, repetition_penalty=1.01), {FILE, SETTING}),
        (token(3, special=False), {FILE, SETTING, TEXTS}),
        (token(9, lstrip=True), {FILE, SETTING, TEXTS}),
        (token(9, rstrip=True), {FILE, SETTING, TEXTS}),
        (token(9, single_word=True), {FILE, SETTING, TEXTS}),
        (token(9, normalized=True), {FILE, SETTING}),
        (tokenizer_edited(swap_merges), {FILE}),
        (tokenizer_edited(lambda values: values.update(truncation=TRUNCATION)), {FILE}),
        (tokenizer_edited(begin_with_bos), {FILE, TEXTS}),
        (tokenizer_edited(decode_otherwise), {FILE, TEXTS}),
        (edited(TOKENIZER_CONFIG, model_max_length=8), {FILE, SETTING}),
        (edited(TOKENIZER_CONFIG, add_bos_token=True), {FILE}),
        (edited(TOKENIZER_CONFIG, pad_token="<eot>"), {FILE, SETTING}),
        (edited(TOKENIZER_CONFIG, bos_token="<eot>"), {FILE, SETTING, CHATS}),
        (edited(TOKENIZER_CONFIG, eos_token="<eot>"), {FILE, SETTING, CHATS}),
    ],
)
def test_planted_defect_fails_its_gates(
    toy_expected: Expected, directory: Path, plant: Callable[[Path], None], found: set[str]
) -> None:
    expected = replace(toy_expected, halt_head=directory / "halt_head-tiny_ball.safetensors")
    plant(directory)
    seen = failures(compare(directory, expected)).keys()
    assert seen - {GREEDY} == found - {GREEDY}  # other changes may change greedy tokens too
    assert seen >= found


def test_settings_that_are_compared(toy_expected: Expected, exported_toy: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported_toy)
    expected = ExpectedSettings(
        config=toy_expected.config,
        architecture="LlamaForCausalLM",
        dtype=torch.float32,
        tokenizer=toy_expected.tokenizer,
    )
    found = settings(exported_toy, load_model(exported_toy), tokenizer, expected)
    tokens = ["bos_token_id", "eos_token_id", "pad_token_id"]
    assert [each.name for each in found] == [
        *("class", "architectures", "dtype", "max_position_embeddings", "rope_parameters", "rms_norm_eps"),
        *("tie_word_embeddings", "attention_dropout", "sliding_window"),
        *tokens,
        *(f"generation's {name}" for name in tokens),
        *("tokenizer's bos_token", "tokenizer's eos_token", "tokenizer's pad_token"),
        "tokenizer's model_max_length",
        *(f"token {token_id}" for token_id in range(len(SPECIAL_TOKENS))),
    ]


def test_reasons_name_the_first_difference(toy_expected: Expected, directory: Path) -> None:
    edited(CONFIG, max_position_embeddings=64, bos_token_id=5)(directory)
    change_a_little(directory)
    stray_file(directory)
    assert failures(compare(directory, toy_expected)) == {
        FILE: "2 of 6, such as 'added_tokens.json'",
        SETTING: "2 of 29, such as max_position_embeddings: 64 instead of 128",
        TENSOR: "1 of 21, such as 'model.layers.0.mlp.down_proj.weight'",
    }


def test_edit_between_writing_and_reading_fails(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The expected contents do not come from the directory."""
    save = TextTokenizer.save

    def save_and_edit(self: TextTokenizer, folder: Path) -> None:
        save(self, folder)
        no_tool_results(folder)

    monkeypatch.setattr(TextTokenizer, "save", save_and_edit)
    with pytest.raises(ParityError) as caught:
        export(toy, tmp_path / "hf")
    assert caught.value.found == (
        "the directory differs from the checkpoint: files that differ: 1 of 6, such as 'chat_template.jinja'"
    )
    assert list(tmp_path.iterdir()) == []


def test_relative_error_of_zeros_and_nan() -> None:
    zero, zeros = torch.zeros(2, 3), np.zeros((2, 3), np.float32)
    difference = _Difference()
    difference.add(zero, zeros)
    assert difference.relative == 0
    difference.add(zero + 1e-9, zeros)
    assert difference.relative == math.inf
    difference.add(zero, zeros * np.nan)
    difference.add(zero, zeros)
    assert math.isnan(difference.max_abs)
    assert not difference.relative <= 1e-5


def test_conversation_that_only_one_template_rejects_fails(imported: Path, exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "directory")
    expected = expectation(imported, folder)
    welcoming_template(folder)
    assert failures(compare(folder, expected)).keys() == {FILE, CHATS}


def test_error_names_figures_outside_their_bounds(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = huggingface_writer.huggingface_config

    def wrong(*args: Any, **options: Any) -> dict[str, Any]:
        return {**original(*args, **options), "rms_norm_eps": 0.5}

    monkeypatch.setattr(huggingface_writer, "huggingface_config", wrong)
    with pytest.raises(ParityError) as caught:
        export(toy, tmp_path / "hf")
    assert caught.value.found.startswith(
        "the directory differs from the checkpoint: settings that differ: 1 of 29, such as "
        "rms_norm_eps: 0.5 instead of 1e-05; relative error of logits: 0."
    )
    assert " is above 1e-05; relative error of halt logits: " in caught.value.found
    assert caught.value.expected == "every figure within its bound"
    assert caught.value.run == "python -m coremill.training.check_checkpoint CHECKPOINT --tokenizer TOKENIZER"
    assert list(tmp_path.iterdir()) == []


# --- bad inputs -------------------------------------------------------------------------------------


def test_another_tokenizer_is_rejected_and_an_earlier_export_stays(
    toy: Path, imported: Path, directory: Path
) -> None:
    before = digest(directory)
    with pytest.raises(VocabularyMismatchError, match=r"^the tokenizer has 340 tokens, the model 400"):
        export(toy, directory, "--tokenizer", str(imported / "tokenizer.json"))
    changed = json.loads((toy / "tokenizer.json").read_text())
    folder = directory.parent / "changed"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(changed))
    options = ("--tokenizer", str(folder / "tokenizer.json"), "--prompts", str(toy))
    with pytest.raises(VocabularyMismatchError, match=r"^the tokenizer is sha256:\w+, the model was trained with"):
        export(toy, directory, *options)
    assert digest(directory) == before
    assert sorted(path.name for path in directory.parent.iterdir()) == ["changed", "directory"]


def test_value_beyond_float16_leaves_no_files(toy: Path, tmp_path: Path) -> None:
    source = shutil.copytree(toy, tmp_path / "source")
    ckpt = load_checkpoint(source / "tiny_ball.ckpt")
    ckpt.state_dict["norm.weight"][0] = 1e5
    save_checkpoint(source / "tiny_ball.ckpt", ckpt)
    with pytest.raises(
        CheckpointContentError, match=r"^norm\.weight: 1 values exceed the range of float16, the largest is"
    ):
        export(source, tmp_path / "hf", "--dtype", "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_earlier_export_is_replaced(imported: Path, directory: Path) -> None:
    export(imported, directory)
    assert {path.name for path in directory.iterdir()} == {*FILES, "parity.json"}


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda out: out.write_text(""), "OUT is not a directory"),
        (
            lambda out: (out.mkdir(), (out / "config.json").write_text("{}")),
            "OUT does not contain coremill's Hugging Face files: cannot read OUT/parity.json: "
            "No such file or directory",
        ),
        (
            lambda out: (out.mkdir(), (out / "parity.json").write_text("{}")),
            "OUT does not contain coremill's Hugging Face files: OUT/parity.json: no `schema_version` at `$`",
        ),
    ],
)
def test_other_files_are_not_replaced(toy: Path, tmp_path: Path, make: Callable[[Path], Any], found: str) -> None:
    out = tmp_path / "out"
    make(out)
    before = digest(out)
    with pytest.raises(OutputError) as caught:
        export(toy, out)
    assert caught.value.found == found.replace("OUT", str(out))
    assert (
        caught.value.expected
        == "an empty or missing directory, or one with Hugging Face files that this command wrote"
    )
    assert digest(out) == before


def test_added_file_is_not_replaced(toy: Path, directory: Path) -> None:
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(OutputError) as caught:
        export(toy, directory)
    assert caught.value.found == f"{directory} contains notes.txt, which coremill did not write"
    assert (directory / "notes.txt").read_text() == "mine"


def edit_card(folder: Path) -> None:
    with (folder / "README.md").open("a") as file:
        file.write("Mine.")


def folder_for_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    (folder / "model.safetensors" / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("edit", "name"),
    [(edit_card, "README.md"), (folder_for_weights, "model.safetensors"), (no_tool_results, CHAT_TEMPLATE)],
)
def test_edited_file_is_not_replaced(toy: Path, directory: Path, edit: Callable[[Path], None], name: str) -> None:
    edit(directory)
    before = digest(directory)
    with pytest.raises(OutputError) as caught:
        export(toy, directory)
    assert str(caught.value) == (
        f"{directory} contains {name}, which has changed since\n"
        "  expected: an empty or missing directory, or one with Hugging Face files that this command wrote\n"
        f"  run: ls -l {directory}"
    )
    assert digest(directory) == before


def test_link_to_a_directory_is_kept(toy: Path, imported: Path, directory: Path) -> None:
    link = directory.parent / "link"
    link.symlink_to("directory")
    (directory / "README.md").unlink()  # a missing file may be replaced
    for source in (imported, toy):
        export(source, link)
        assert link.readlink() == Path("directory")
        assert (directory / "halt_head-tiny_ball.safetensors").exists() == (source == toy)
    assert sorted(path.name for path in directory.parent.iterdir()) == ["directory", "link"]


def test_file_as_the_parent_directory_is_rejected(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError) as caught:
        export(toy, tmp_path / "file" / "hf")
    assert str(caught.value) == (
        f"cannot write next to {tmp_path}/file/hf: {tmp_path}/file is not a directory\n"
        f"  expected: a directory, or a new path\n  run: ls -ld {tmp_path}/file"
    )


@pytest.mark.parametrize("name", ["model", "model-of-mine"])
def test_name_of_the_halt_head_matches_no_pattern_of_weights(toy: Path, tmp_path: Path, name: str) -> None:
    """mlx-lm, Ollama and llama.cpp's converter read `model*.safetensors`."""
    export(toy, tmp_path / "hf", "--name", name)
    assert [path.name for path in (tmp_path / "hf").glob("model*.safetensors")] == ["model.safetensors"]
    halt_head = layout.halt_head_file(tmp_path / "hf", name)
    assert halt_head.name == f"halt_head-{name.replace('-', '_')}.safetensors"
    assert list(load_file(halt_head)) == ["halt_head.weight"]


def test_name_with_a_slash_is_rejected(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--name 'a/b'\n"):
        export(toy, tmp_path / "hf", "--name", "a/b")
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_rejected(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint,) = toy.glob("*.ckpt")
    loaded = load_checkpoint(checkpoint)
    parameters = sum(tensor.numel() for tensor in loaded.state_dict.values())
    length = min(256, loaded.config.max_seq_len)
    logits = 2 * 4 * length * loaded.config.vocab_size
    needed = 600_000_000 + logits  # transformers maps a directory in float32
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: needed - 1)
    with pytest.raises(MachineError) as caught:
        export(toy, tmp_path / "hf")
    assert caught.value.expected == f"{needed / 1e6:,.0f} MB, to export {parameters:,} parameters at T{length}"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: needed)
    export(toy, tmp_path / "hf")
    widened = 600_000_000 + int(4.25 * parameters + logits)
    with pytest.raises(MachineError) as caught:
        export(toy, tmp_path / "half", "--dtype", "float16")
    assert caught.value.expected == f"{widened / 1e6:,.0f} MB, to export {parameters:,} parameters at T{length}"


def test_inputs_are_not_replaced(toy: Path, directory: Path) -> None:
    """The directory contains the tokenizer that is read."""
    options = ("--tokenizer", str(directory / "tokenizer.json"), "--prompts", str(toy))
    with pytest.raises(OutputError, match=r"is read and would be overwritten"):
        export(toy, directory, *options)


def test_context_without_space_for_an_answer_is_rejected(toy: Path, tmp_path: Path) -> None:
    source = shutil.copytree(toy, tmp_path / "source")
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    save_model(source / "tiny_ball.ckpt", a_model(400, max_seq_len=3), tokenizer, "magic-8-ball")
    with pytest.raises(DatasetError) as caught:
        export(source, tmp_path / "hf")
    assert caught.value.found == "every question fills the context of 3 tokens"


def test_missing_package_is_named(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_hf, "NEEDS", ("torch", "no_such_package"))
    with pytest.raises(Exception, match=r"^no_such_package is not installed in "):
        export(toy, tmp_path / "hf")


def test_a_model_that_float32_computes_less_exactly(imported: Path, tmp_path: Path) -> None:
    """transformers differs by more than the usual bound, and the bound says why it is wider."""
    folder = tmp_path / "sharp"
    shutil.copytree(imported, folder)
    (path,) = folder.glob("*.ckpt")
    save_checkpoint(path, sharpened(load_checkpoint(path), 40))
    export(folder, tmp_path / "out")
    report = read_json(layout.parity_report(tmp_path / "out"), HuggingFaceParity)
    (gate,) = (gate for gate in report.gates if gate.name == "relative error of logits")
    assert gate.measured is not None
    assert gate.measured > 1e-5
    assert gate.reason is not None
    assert gate.reason.startswith("4 times float32's own error, ")
