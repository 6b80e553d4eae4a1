"""GGUF files compared with their checkpoint: correct files pass, and each planted defect fails a figure."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import msgspec
import pytest
import tokenizers
import torch
from tests.formats.toy_gguf import CONFIG, Kind, Toy, train_toy, write_toy
from tests.sharp import sharpened
from tokenizers import processors

from coremill.core.config import GgufType
from coremill.core.contract import TokenizerRef
from coremill.core.documents import encode, from_builtins
from coremill.core.errors import CheckpointUnreadableError, GgufError, ParityError
from coremill.core.parity import FileParity, GgufParity, ParityFigure
from coremill.data.prompts import TextPrompts
from coremill.data.texts import ChatPrompt, Text
from coremill.formats import parity
from coremill.formats.gguf import parity as gguf_parity
from coremill.formats.gguf.contents import MOST_WEIGHTS_ERR, prompt_differences, weights_err
from coremill.formats.gguf.parity import measure_gguf, require_parity
from coremill.formats.gguf.reader import GgufWeights
from coremill.formats.gguf.writer import write_gguf
from coremill.formats.gguf_file import Value
from coremill.formats.llamacpp.process import LlamaCpp
from coremill.model.checkpoint import checkpoint_of
from coremill.model.reference import Reference
from coremill.model.student import new_student
from coremill.text.model_tokenizer import PRE_TOKENIZATIONS, STUDENT_TEMPLATE, TextTokenizer

KINDS: dict[GgufType, gguf.GGMLQuantizationType] = {
    "f32": Kind.F32,
    "f16": Kind.F16,
    "q8_0": Kind.Q8_0,
    "q4_0": Kind.Q4_0,
}
DIGEST = "sha256:" + 64 * "0"
RUN = "\n  run: python -m coremill.conversion.export_gguf --help"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    torch.set_num_threads(1)
    return train_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def right(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> GgufParity:
    folder = tmp_path_factory.mktemp("gguf")
    files = {name: write_toy(folder / f"toy-{name}.gguf", toy, kind) for name, kind in KINDS.items()}
    return measure_gguf(files, toy.checkpoint, toy.prompts, checkpoint_digest=DIGEST, quick=True)


def test_a_model_that_float32_computes_less_exactly(toy: Toy, tmp_path: Path, fewer_texts: None) -> None:
    """llama.cpp differs by more than the usual bound, though it is right; a wrong row of a weight still fails."""
    sharp = replace(toy, checkpoint=sharpened(toy.checkpoint, 30))
    right = measure_gguf(
        {"f32": write_toy(tmp_path / "right.gguf", sharp)}, sharp.checkpoint, toy.prompts,
        checkpoint_digest=DIGEST, quick=True,
    )  # fmt: skip
    require_parity(right)
    (figure,) = (each for each in right.files["f32"].figures if each.name == "relative_err")
    assert figure.measured > 1e-5
    assert figure.bound is not None
    assert 4e-5 < figure.bound < 4e-4
    assert figure.source is not None
    assert figure.source.startswith("4 times float32's own error, ")
    weights = {name: value.clone() for name, value in sharp.checkpoint.state_dict.items()}
    weights["layers.1.mlp.up_proj.weight"][3] *= 1.05
    wrong = replace(sharp, checkpoint=replace(sharp.checkpoint, state_dict=weights))
    found = measure_gguf(
        {"f32": write_toy(tmp_path / "wrong.gguf", wrong)}, sharp.checkpoint, toy.prompts,
        checkpoint_digest=DIGEST, quick=True,
    )  # fmt: skip
    assert outcomes(found.files["f32"])["relative_err"] == "failed"


@pytest.fixture
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "TEXTS", 130)


def outcomes(file: FileParity) -> dict[str, str]:
    return {figure.name: figure.outcome for figure in file.figures}


def test_right_files_pass(right: GgufParity) -> None:
    require_parity(right)
    assert right.passed
    assert outcomes(right.files["f32"]) == {
        "max_abs_err": "reported",
        "relative_err": "passed",
        "kl_nats": "reported",
        "top1_agreement": "reported",
        "weights_err": "passed",
        "settings": "passed",
        "greedy_differences": "passed",
        "tokenizer_mismatches": "passed",
        "heldout_exact": "passed",
    }
    assert outcomes(right.files["q4_0"]) == {
        "max_abs_err": "reported",
        "relative_err": "reported",
        "kl_nats": "passed",
        "top1_agreement": "reported",
        "arithmetic_kl_nats": "passed",
        "weights_err": "passed",
        "settings": "passed",
        "tokenizer_mismatches": "passed",
        "heldout_exact": "reported",
    }


def test_the_figures_of_each_type_are_within_its_rounding(right: GgufParity) -> None:
    files = right.files
    assert files["f32"].figure("max_abs_err").measured < 4e-5
    assert 1e-3 < files["f16"].figure("max_abs_err").measured < 5e-2
    assert 1e-5 < files["q8_0"].figure("kl_nats").measured < 5e-3
    assert 5e-3 < files["q4_0"].figure("kl_nats").measured < 0.5
    assert files["q4_0"].figure("arithmetic_kl_nats").measured < files["q4_0"].figure("kl_nats").measured / 10
    assert files["f32"].figure("heldout_exact").measured == files["f16"].figure("heldout_exact").measured == 1
    assert (files["f32"].positions, files["f32"].greedy_prompts, files["f32"].greedy_tokens) == (748, 4, 256)
    assert (files["f16"].greedy_prompts, files["f16"].heldout_questions) == (0, 16)


def test_the_report_is_a_document(right: GgufParity) -> None:
    assert from_builtins(msgspec.json.decode(encode(right)), GgufParity, where="parity.json") == right


DEFECTS: dict[str, tuple[Callable[[Path, Toy, gguf.GGMLQuantizationType], Path], dict[GgufType, set[str]]]] = {
    "Q and K in rotate-half's order": (
        lambda path, toy, kind: write_toy(path, toy, kind, permute=False),
        {
            "f32": {"relative_err", "greedy_differences"},
            "q8_0": {"kl_nats", "weights_err"},
            "q4_0": {"weights_err"},
        },
    ),
    "another rope theta": (
        lambda path, toy, kind: write_toy(path, toy, kind, rope_theta=CONFIG.rope_theta / 2),
        {"f32": {"relative_err"}, "q8_0": {"kl_nats"}, "q4_0": {"arithmetic_kl_nats"}},
    ),
    "half of the merges": (
        lambda path, toy, kind: write_toy(path, toy, kind, merges=0.5),
        {kind: {"tokenizer_mismatches"} for kind in KINDS},
    ),
    "a matrix a tenth larger": (
        lambda path, toy, kind: write_toy(path, toy, kind, scaled="blk.1.ffn_up.weight"),
        {
            "f32": {"relative_err"},
            "q8_0": {"weights_err"},
            "q4_0": {"weights_err"},
        },
    ),
}


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.usefixtures("fewer_texts")
def test_a_planted_defect_fails_its_figure(toy: Toy, tmp_path: Path, defect: str, kind: GgufType) -> None:
    write, expected = DEFECTS[defect]
    path = write(tmp_path / "bad.gguf", toy, KINDS[kind])
    report = measure_gguf({kind: path}, toy.checkpoint, toy.prompts, checkpoint_digest=DIGEST, quick=True)
    failed = {name for name, outcome in outcomes(report.files[kind]).items() if outcome == "failed"}
    assert expected[kind] <= failed
    assert ("tokenizer_mismatches" in failed) == (defect == "half of the merges")
    with pytest.raises(ParityError, match=f"{kind}: {min(expected[kind])} is "):
        require_parity(report)


def _with(toy: Toy, name: str, change: Callable[[torch.Tensor], None]) -> Toy:
    """The toy with a parameter changed in place."""
    state = {each: value.clone() for each, value in toy.checkpoint.state_dict.items()}
    change(state[name])
    return replace(toy, checkpoint=replace(toy.checkpoint, state_dict=state, where="changed", run=None))


SEEDED = torch.Generator().manual_seed(1)
CHANGES: dict[str, tuple[str, Callable[[torch.Tensor], None]]] = {
    "a row of the embedding is zero": ("embed_tokens.weight", lambda value: value[500].zero_()),
    "a norm a hundredth larger": ("norm.weight", lambda value: value.mul_(1.01)),
    "a norm reversed": ("layers.0.input_layernorm.weight", lambda value: value.copy_(value.flip(0))),
    "noise of half a deviation": (
        "layers.1.mlp.gate_proj.weight",
        lambda value: value.add_(0.5 * value.std() * torch.randn(value.shape, generator=SEEDED)),
    ),
    "two rows of Q for one another": (
        "layers.0.self_attn.q_proj.weight",
        lambda value: value[:2].copy_(value[:2].flip(0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_is_off_by_more_than_rounding_is_found_in_every_type(
    toy: Toy, tmp_path: Path, change: str, kind: GgufType
) -> None:
    source = GgufWeights(write_toy(tmp_path / "bad.gguf", _with(toy, *CHANGES[change]), KINDS[kind]))
    assert 1.5 < weights_err(source, toy.checkpoint) <= MOST_WEIGHTS_ERR
    right = GgufWeights(write_toy(tmp_path / "right.gguf", toy, KINDS[kind]))
    assert weights_err(right, toy.checkpoint) < 1


@pytest.mark.parametrize("kind", ["q4_k", "q5_k", "q6_k"])
@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.mul_(0.955),
        lambda value: value.masked_fill_(value.abs() < 0.05 * value.abs().max(), 0),
        lambda value: value.add_(0.04 * value.abs().max() * torch.randn(value.shape, generator=SEEDED)),
    ],
)
def test_weights_of_a_searched_type_equal_llama_cpps_quantisation(
    tmp_path: Path, kind: GgufType, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    config = msgspec.structs.replace(CONFIG, d_model=256, d_ff=256, n_layers=1)
    tokenizer = TokenizerRef(vocab_size=512, digest=DIGEST)
    right = checkpoint_of(new_student(config, seed=3), model_type="magic-8-ball", step=0, tokenizer=tokenizer)
    state = {name: value.clone() for name, value in right.state_dict.items()}
    change(state["layers.0.mlp.down_proj.weight"])
    wrong = replace(right, state_dict=state, where="changed", run=None)
    for checkpoint, is_right in ((right, True), (wrong, False)):
        path = tmp_path / f"{is_right}.gguf"
        write_gguf(path, checkpoint, {"tokenizer.ggml.tokens": ["x"] * 512}, kind=kind, name="x", provenance={})
        source = GgufWeights(path)
        found = weights_err(source, right)
        assert (found == 0) if is_right else (found > 100)


WRONG_METADATA: dict[str, tuple[dict[str, Value], set[str]]] = {
    "another beginning token": (
        {"ggml.bos_token_id": 9},
        {"tokenizer.ggml.bos_token_id is 9, not 1", "llama.cpp's beginning token is 9, not 1"},
    ),
    "a beginning token before every text": (
        {"ggml.add_bos_token": True},
        {
            "tokenizer.ggml.add_bos_token is True, not False",
            "the tokens of 'Will it rain?', with the beginning token is [1, 64, 82, 267, 324, 455",
        },
    ),
    "another chat template": (
        {"chat_template": "{{ messages }}"},
        {
            "tokenizer.chat_template is '{{ messages }}', not ",
            "llama.cpp's chat template is '{{ messages }}', not ",
        },
    ),
    "a special token declared as a normal one": (
        {"ggml.token_type": [*[3] * 3, 1, *[3] * 6, *[1] * 502]},
        {"tokenizer.ggml.token_type[3] is 1, not 3", "whether token 3 is special is False, not True"},
    ),
    "a normal token declared as special": (
        {"ggml.token_type": [*[3] * 10, *[1] * 296, 3, *[1] * 205]},
        {"tokenizer.ggml.token_type[306] is 3, not 1", "whether token 306 is special is True, not False"},
    ),
    "another pre-tokenization": ({"ggml.pre": "smollm"}, {"tokenizer.ggml.pre is 'smollm', not 'gpt-2'"}),
    "a key for sampling": (
        {"general.sampling.temp": 5.0},
        {"general.sampling.temp is 5.0, not None"},
    ),
    "another type in its name": ({"general.file_type": 2}, {"general.file_type is 2, not 7"}),
    "a key that coremill does not write": (
        {"ggml.add_eos_token": True},
        {
            "tokenizer.ggml.add_eos_token is True, not None",
            "the tokens of 'Will it rain?', with the beginning token is [64, 82, ",
        },
    ),
}


CHANGES_PROMPTS = {
    "another beginning token",
    "a beginning token before every text",
    "another chat template",
}
"""These change the prompts of llama.cpp's server as well."""


@pytest.mark.parametrize("what", WRONG_METADATA)
@pytest.mark.usefixtures("fewer_texts")
def test_wrong_metadata_is_named(toy: Toy, tmp_path: Path, what: str) -> None:
    metadata, expected = WRONG_METADATA[what]
    path = write_toy(tmp_path / "bad.gguf", toy, Kind.Q8_0, metadata=metadata)
    report = measure_gguf({"q8_0": path}, toy.checkpoint, toy.prompts, checkpoint_digest=DIGEST, quick=True)
    found = [f"{each.name} is {each.found}, not {each.expected}" for each in report.files["q8_0"].settings]
    assert len(found) == len(expected)
    assert bool(report.files["q8_0"].prompts) == (what in CHANGES_PROMPTS)
    assert all(any(difference.startswith(start) for difference in found) for start in expected), found
    assert report.files["q8_0"].figure("settings").outcome == "failed"
    with pytest.raises(ParityError, match="q8_0: settings is "):
        require_parity(report)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 10_100.0}, {"rope_theta", "RoPE's frequencies"}),
        ({"norm_eps": 2e-5}, {"norm_eps"}),
        ({"norm_eps": 1.1e-5, "rope_theta": 9_999.0}, {"norm_eps", "rope_theta", "RoPE's frequencies"}),
    ],
)
@pytest.mark.usefixtures("fewer_texts")
def test_a_wrong_configuration_is_named(
    toy: Toy, tmp_path: Path, config: dict[str, float], expected: set[str]
) -> None:
    other = msgspec.structs.replace(CONFIG, **config)
    changed = replace(toy, checkpoint=replace(toy.checkpoint, config=other, where="changed", run=None))
    path = write_toy(tmp_path / "bad.gguf", changed, Kind.Q8_0)
    report = measure_gguf({"q8_0": path}, toy.checkpoint, toy.prompts, checkpoint_digest=DIGEST, quick=True)
    assert {each.name for each in report.files["q8_0"].settings} == expected


@pytest.mark.parametrize(("kind", "stored"), [("q8_0", "f32"), ("q4_0", "q8_0"), ("f16", "f32")])
@pytest.mark.usefixtures("fewer_texts")
def test_a_file_of_another_type_differs_in_its_settings(
    toy: Toy, tmp_path: Path, kind: GgufType, stored: GgufType
) -> None:
    path = write_toy(tmp_path / "renamed.gguf", toy, KINDS[stored])
    report = measure_gguf({kind: path}, toy.checkpoint, toy.prompts, checkpoint_digest=DIGEST, quick=True)
    found = [f"{each.name} is {each.found}, not {each.expected}" for each in report.files[kind].settings]
    assert f"the type of embed_tokens.weight is '{stored.upper()}', not '{kind.upper()}'" in found


@pytest.mark.usefixtures("fewer_texts")
def test_a_type_that_coremill_does_not_write_fails(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "other.gguf", toy, Kind.Q5_0)
    report = measure_gguf({"q8_0": path}, toy.checkpoint, toy.prompts, checkpoint_digest=DIGEST, quick=True)
    assert report.files["q8_0"].figure("weights_err").outcome == "failed"
    assert report.files["q8_0"].settings[0].found == "'Q5_0'"


@pytest.mark.usefixtures("fewer_texts")
def test_texts_are_normalised_before_they_are_compared(toy: Toy, tmp_path: Path) -> None:
    """Qwen's tokenizers normalise to NFC; llama.cpp does not."""
    parts = json.loads(toy.tokenizer.data)
    backend = PRE_TOKENIZATIONS["qwen2"]
    parts["normalizer"] = json.loads(backend.normalizer.__getstate__())
    parts["pre_tokenizer"] = json.loads(backend.pre_tokenizer(add_prefix_space=False).__getstate__())
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "bos_token": "<|bos|>"}))
    tokenizer = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
    words = " ".join(row.prompt for row in toy.rows)
    prompts = TextPrompts(
        [Text(id="a", source="here", licence=None, text=words)],
        [ChatPrompt(id="1", text="Will it rain?")],
        tokenizer,
    )
    path = write_toy(tmp_path / "toy.gguf", toy, metadata={"ggml.pre": "qwen2", "chat_template": "x"})
    file = measure_gguf({"f32": path}, toy.checkpoint, prompts, checkpoint_digest=DIGEST, quick=True).files["f32"]
    assert file.figure("tokenizer_mismatches").measured == 0


def test_a_template_with_a_variable_of_llama_cpps_server_is_reported(toy: Toy, tmp_path: Path) -> None:
    """As in Llama 3.1's template, which has a default date; the server provides today's."""
    template = "{{ 'no day' if date_string is not defined else 'a day' }}{{ messages[0].content }}"
    (tmp_path / "tokenizer.json").write_bytes(toy.tokenizer.data)
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    tokenizer = TextTokenizer.load(tmp_path / "tokenizer.json")
    path = write_toy(tmp_path / "toy.gguf", toy, metadata={"chat_template": template})
    with LlamaCpp(path, context=32) as llamacpp:
        found = list(prompt_differences(llamacpp, tokenizer))
    assert len(found) == 3
    assert (found[0].expected, found[0].found) == ("'no dayWill it rain?'", "'a dayWill it rain?'")


@pytest.mark.usefixtures("fewer_texts")
def test_a_beginning_token_before_every_text_is_compared_once(toy: Toy, tmp_path: Path) -> None:
    """As in Llama 3: the template writes it as well, and llama.cpp's server removes it."""
    backend = tokenizers.Tokenizer.from_str(toy.tokenizer.data.decode())
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(STUDENT_TEMPLATE)
    special = {"eos_token": "<|end|>", "bos_token": "<|bos|>", "pad_token": "<|pad|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    tokenizer = TextTokenizer.load(tmp_path / "tokenizer.json")
    words = " ".join(row.prompt for row in toy.rows)
    texts = [Text(id="a", source="here", licence=None, text=words)]
    prompts = TextPrompts(texts, [ChatPrompt(id="1", text="Will it rain?")], tokenizer)
    path = write_toy(tmp_path / "toy.gguf", toy, metadata={"ggml.add_bos_token": True})
    file = measure_gguf({"f32": path}, toy.checkpoint, prompts, checkpoint_digest=DIGEST, quick=True).files["f32"]
    assert (file.settings, file.prompts) == ((), ())


@pytest.mark.usefixtures("fewer_texts")
def test_a_model_that_answers_worse_than_its_checkpoint_fails(toy: Toy, tmp_path: Path) -> None:
    fresh = new_student(CONFIG, seed=3).state_dict()
    untrained = replace(toy, checkpoint=replace(toy.checkpoint, state_dict=fresh, where="untrained", run=None))
    mute = write_toy(tmp_path / "bad.gguf", untrained, Kind.F16)
    report = measure_gguf({"f16": mute}, toy.checkpoint, toy.prompts, checkpoint_digest=DIGEST, quick=True)
    assert report.files["f16"].figure("heldout_exact") == ParityFigure(
        name="heldout_exact",
        measured=0.0,
        bound=1.0,
        at_least=True,
        source="the checkpoint's own share in torch",
        outcome="failed",
    )


@pytest.mark.usefixtures("fewer_texts")
def test_tokenizer_mismatches_are_listed(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "bad.gguf", toy, merges=0.5)
    file = measure_gguf({"f32": path}, toy.checkpoint, toy.prompts, checkpoint_digest=DIGEST, quick=True).files[
        "f32"
    ]
    assert 0 < len(file.mismatches) <= gguf_parity.LISTED
    for mismatch in file.mismatches:
        assert list(mismatch.ids) == toy.tokenizer.encode(mismatch.text) or mismatch.allow_special
        assert len(mismatch.llamacpp_ids) > len(mismatch.ids)


def with_twin(toy: Toy, first: int, twin: int, scale: float) -> Toy:
    """The toy, with the embedding of the token `twin` set to that of `first`, times `scale`."""
    embedding = toy.checkpoint.state_dict["embed_tokens.weight"].clone()
    embedding[twin] = embedding[first] * scale
    state = {**toy.checkpoint.state_dict, "embed_tokens.weight": embedding}
    return replace(toy, checkpoint=replace(toy.checkpoint, state_dict=state, where="twin", run=None))


@pytest.mark.parametrize(("change", "is_near"), [(1e-5, True), (1e-3, False)])
@pytest.mark.usefixtures("fewer_texts")
def test_a_difference_at_a_near_tie_is_listed_and_allowed(
    toy: Toy, tmp_path: Path, change: float, is_near: bool
) -> None:
    """Two tokens with almost the same embedding: torch prefers the first one slightly, llama.cpp the other."""
    prompt = toy.tokenizer.encode_prompt(toy.prompts.rows[0].prompt)
    first = int(Reference.of(toy.checkpoint).next_logits(prompt).argmax())
    twin = toy.tokenizer.encode("~")[0]  # no question has it
    path = write_toy(tmp_path / "twin.gguf", with_twin(toy, first, twin, 1 + change))
    ours = with_twin(toy, first, twin, 1 - change)
    file = measure_gguf({"f32": path}, ours.checkpoint, toy.prompts, checkpoint_digest=DIGEST, quick=True).files[
        "f32"
    ]
    found = file.differences[0]
    assert (found.prompt, found.place, found.expected, found.token) == (0, 0, first, twin)
    assert found.is_tie is is_near
    beyond = sum(not difference.is_tie for difference in file.differences)
    assert file.figure("greedy_differences").measured == beyond
    assert (beyond == 0) is is_near


def test_a_file_with_another_context_is_rejected(toy: Toy, tmp_path: Path) -> None:
    other = msgspec.structs.replace(CONFIG, max_seq_len=128)
    path = write_toy(tmp_path / "toy.gguf", replace(toy, checkpoint=replace(toy.checkpoint, config=other)))
    with pytest.raises(GgufError, match=rf"^{path} has 128 positions, the checkpoint's model 160\n"):
        measure_gguf({"f32": path}, toy.checkpoint, toy.prompts, checkpoint_digest=DIGEST, quick=True)


def test_a_file_with_another_vocabulary_is_rejected(toy: Toy, tmp_path: Path) -> None:
    config = msgspec.structs.replace(CONFIG, vocab_size=520)
    state = dict(toy.checkpoint.state_dict)
    state["embed_tokens.weight"] = torch.cat([state["embed_tokens.weight"], torch.zeros(8, CONFIG.d_model)])
    padded = replace(toy.checkpoint, config=config, state_dict=state, where="padded", run=None)
    path = write_toy(tmp_path / "toy.gguf", toy)
    with pytest.raises(GgufError) as caught:
        measure_gguf({"f32": path}, padded, toy.prompts, checkpoint_digest=DIGEST, quick=True)
    assert str(caught.value) == (
        f"{path} has 512 tokens, the checkpoint's model 520\n"
        "  expected: a file that was made from the checkpoint" + RUN
    )


def test_a_file_with_other_tensors_is_rejected(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", toy, Kind.Q8_0, always=77)
    with pytest.raises(GgufError) as caught:
        measure_gguf({"q8_0": path}, toy.checkpoint, toy.prompts, checkpoint_digest=DIGEST, quick=True)
    assert str(caught.value) == (
        f"{path} and the checkpoint do not both have lm_head.weight\n"
        "  expected: a file that was made from the checkpoint" + RUN
    )


def test_a_truncated_file_is_rejected(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", toy)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(CheckpointUnreadableError, match=rf"^{path} is truncated: "):
        measure_gguf({"f32": path}, toy.checkpoint, toy.prompts, checkpoint_digest=DIGEST, quick=True)


@pytest.mark.usefixtures("fewer_texts")
def test_an_imported_model_is_compared_on_texts(toy: Toy, tmp_path: Path) -> None:
    """Its chat prompts come first, then the beginnings of texts if there are too few."""
    words = " ".join(row.prompt for row in toy.rows)
    texts = [
        Text(id=name, source="here", licence=None, text=words[start:]) for name, start in (("a", 0), ("b", 50))
    ]
    prompts = TextPrompts(
        texts, [ChatPrompt(id="1", text="Will it rain?")], TextTokenizer.of_student(toy.tokenizer)
    )
    report = measure_gguf(
        {"f32": write_toy(tmp_path / "toy.gguf", toy)},
        toy.checkpoint,
        prompts,
        checkpoint_digest=DIGEST,
        quick=True,
    )
    require_parity(report)
    assert report.files["f32"].heldout_questions == 0
    assert report.files["f32"].greedy_prompts == 4
    assert "heldout_exact" not in outcomes(report.files["f32"])


def a_figure(**options) -> ParityFigure:
    plain = {
        "name": "kl_nats",
        "measured": 1.0,
        "bound": 2.0,
        "at_least": False,
        "source": "here",
        "outcome": "passed",
    }
    return ParityFigure(**{**plain, **options})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"measured": 3.0}, "`kl_nats` is passed, and 3.0 with the bound 2.0 is failed"),
        ({"measured": math.nan}, "`kl_nats` is passed, and nan with the bound 2.0 is failed"),
        ({"at_least": True}, "`kl_nats` is passed, and 1.0 with the bound 2.0 is failed"),
        ({"bound": None, "source": None}, "`kl_nats` is passed, and 1.0 with the bound None is reported"),
        ({"source": None}, "`kl_nats` has the bound 2.0 and the source None"),
    ],
)
def test_a_figure_that_contradicts_its_bound_is_rejected(options, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}$"):
        a_figure(**options)


def test_a_report_that_contradicts_its_figures_is_rejected(right: GgufParity) -> None:
    with pytest.raises(ValueError, match=r"^`passed` is False, which contradicts the figures$"):
        msgspec.structs.replace(right, passed=False)
    with pytest.raises(ValueError, match=r"^`files` is empty$"):
        msgspec.structs.replace(right, files={})


def test_a_failure_is_reported_with_its_bound(right: GgufParity) -> None:
    bad = a_figure(measured=3.0, outcome="failed")
    file = msgspec.structs.replace(right.files["f32"], figures=(bad,))
    report = msgspec.structs.replace(right, files={"f32": file}, passed=False)
    with pytest.raises(ParityError) as caught:
        require_parity(report)
    assert str(caught.value) == (
        "f32: kl_nats is 3, at most 2 is allowed\n"
        "  expected: outputs and metadata that match the checkpoint within the bounds"
    )


@pytest.mark.parametrize(
    ("available", "files", "expected"), [(10**12, 1, 1), (10**12, 99, os.cpu_count()), (0, 4, 1), (10**6, 4, 1)]
)
def test_memory_limits_how_many_files_are_measured_at_once(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, available: int, files: int, expected: int
) -> None:
    monkeypatch.setattr(gguf_parity, "available_memory_bytes", lambda: available)
    assert gguf_parity.files_at_once(files, toy.checkpoint) == expected
