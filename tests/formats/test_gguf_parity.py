"""GGUF files beside their checkpoint: right ones pass, and each planted defect shows in a figure that names it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import msgspec
import pytest
import torch
from tests.formats.toy_gguf import CONFIG, Kind, Toy, train_toy, write_toy

from coremill.conversion import gguf_parity
from coremill.conversion.gguf_parity import _random_texts, measure_gguf, require_parity
from coremill.conversion.prompts import TextPrompts
from coremill.core.config import GgufType
from coremill.core.documents import encode, from_builtins
from coremill.core.errors import GgufError, ParityError
from coremill.core.parity import FileParity, GgufParity, ParityFigure
from coremill.data.text_tokenizer import TextTokenizer
from coremill.data.texts import ChatPrompt, Text

KINDS: dict[GgufType, gguf.GGMLQuantizationType] = {
    "f32": Kind.F32,
    "f16": Kind.F16,
    "q8_0": Kind.Q8_0,
    "q4_0": Kind.Q4_0,
}
RUN = "\n  run: python -m coremill.conversion.export_gguf --help"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    torch.set_num_threads(1)
    return train_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def right(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> GgufParity:
    folder = tmp_path_factory.mktemp("gguf")
    files = {name: write_toy(folder / f"toy-{name}.gguf", toy, kind) for name, kind in KINDS.items()}
    return measure_gguf(files, toy.checkpoint, toy.prompts, quick=True)


@pytest.fixture
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_parity, "TEXTS", 40)


def outcomes(file: FileParity) -> dict[str, str]:
    return {figure.name: figure.outcome for figure in file.figures}


def test_right_files_pass(right: GgufParity) -> None:
    require_parity(right)
    assert right.passed
    assert outcomes(right.files["f32"]) == {
        "max_abs_err": "passed",
        "kl_nats": "reported",
        "top1_agreement": "reported",
        "greedy_differences": "passed",
        "tokenizer_mismatches": "passed",
        "heldout_exact": "passed",
    }
    assert outcomes(right.files["q4_0"]) == {
        "max_abs_err": "reported",
        "kl_nats": "passed",
        "top1_agreement": "reported",
        "arithmetic_kl_nats": "passed",
        "weights_gain_err": "passed",
        "tokenizer_mismatches": "passed",
        "heldout_exact": "reported",
    }


def test_the_figures_are_those_of_each_type(right: GgufParity) -> None:
    files = right.files
    assert files["f32"].figure("max_abs_err").measured < 4e-5
    assert 1e-3 < files["f16"].figure("max_abs_err").measured < 5e-2
    assert 1e-5 < files["q8_0"].figure("kl_nats").measured < 5e-3
    assert 5e-3 < files["q4_0"].figure("kl_nats").measured < 0.5
    assert files["q4_0"].figure("arithmetic_kl_nats").measured < files["q4_0"].figure("kl_nats").measured / 10
    assert files["f32"].figure("heldout_exact").measured == files["f16"].figure("heldout_exact").measured == 1
    assert (files["f32"].positions, files["f32"].greedy_prompts, files["f32"].greedy_tokens) == (154, 4, 256)
    assert (files["f16"].greedy_prompts, files["f16"].heldout_questions) == (0, 16)


def test_the_report_is_a_document(right: GgufParity) -> None:
    assert from_builtins(msgspec.json.decode(encode(right)), GgufParity, where="parity.json") == right


DEFECTS: dict[str, tuple[Callable[[Path, Toy, gguf.GGMLQuantizationType], Path], dict[GgufType, set[str]]]] = {
    "Q and K in rotate-half's order": (
        lambda path, toy, kind: write_toy(path, toy, kind, permute=False),
        {
            "f32": {"max_abs_err", "greedy_differences"},
            "q8_0": {"kl_nats", "weights_gain_err"},
            "q4_0": {"weights_gain_err"},
        },
    ),
    "another rope theta": (
        lambda path, toy, kind: write_toy(path, toy, kind, rope_theta=CONFIG.rope_theta / 2),
        {"f32": {"max_abs_err"}, "q8_0": {"kl_nats"}, "q4_0": {"arithmetic_kl_nats"}},
    ),
    "half of the merges": (
        lambda path, toy, kind: write_toy(path, toy, kind, merges=0.5),
        {kind: {"tokenizer_mismatches"} for kind in KINDS},
    ),
    "a matrix a tenth larger": (
        lambda path, toy, kind: write_toy(path, toy, kind, scaled="blk.1.ffn_up.weight"),
        {
            "f32": {"max_abs_err"},
            "q8_0": {"weights_gain_err"},
            "q4_0": {"weights_gain_err"},
        },
    ),
}


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.usefixtures("fewer_texts")
def test_a_planted_defect_shows_in_a_figure(toy: Toy, tmp_path: Path, defect: str, kind: GgufType) -> None:
    write, expected = DEFECTS[defect]
    path = write(tmp_path / "bad.gguf", toy, KINDS[kind])
    report = measure_gguf({kind: path}, toy.checkpoint, toy.prompts, quick=True)
    failed = {name for name, outcome in outcomes(report.files[kind]).items() if outcome == "failed"}
    assert expected[kind] <= failed
    assert ("tokenizer_mismatches" in failed) == (defect == "half of the merges")
    with pytest.raises(ParityError, match=f"{kind}: {min(expected[kind])} is "):
        require_parity(report)


@pytest.mark.usefixtures("fewer_texts")
def test_a_model_that_answers_worse_than_its_checkpoint_is_named(toy: Toy, tmp_path: Path) -> None:
    mute = write_toy(tmp_path / "bad.gguf", toy, Kind.F16, always=77)
    report = measure_gguf({"f16": mute}, toy.checkpoint, toy.prompts, quick=True)
    assert report.files["f16"].figure("heldout_exact") == ParityFigure(
        name="heldout_exact",
        measured=0.0,
        bound=1.0,
        at_least=True,
        source="the checkpoint's own share in torch",
        outcome="failed",
    )


@pytest.mark.usefixtures("fewer_texts")
def test_a_mismatch_of_the_tokenizer_is_listed(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "bad.gguf", toy, merges=0.5)
    file = measure_gguf({"f32": path}, toy.checkpoint, toy.prompts, quick=True).files["f32"]
    assert 0 < len(file.mismatches) <= gguf_parity.LISTED
    for mismatch in file.mismatches:
        assert list(mismatch.ids) == toy.tokenizer.encode(mismatch.text) or mismatch.allow_special
        assert len(mismatch.llamacpp_ids) > len(mismatch.ids)


def with_twin(toy: Toy, first: int, twin: int, scale: float) -> Toy:
    """The toy, the token `twin` embedded as `first` is, times `scale`."""
    embedding = toy.checkpoint.state_dict["embed_tokens.weight"].clone()
    embedding[twin] = embedding[first] * scale
    state = {**toy.checkpoint.state_dict, "embed_tokens.weight": embedding}
    return replace(toy, checkpoint=replace(toy.checkpoint, state_dict=state, where="twin", run=None))


@pytest.mark.parametrize(("change", "is_near"), [(1e-5, True), (1e-3, False)])
@pytest.mark.usefixtures("fewer_texts")
def test_a_difference_at_a_near_tie_is_listed_and_allowed(
    toy: Toy, tmp_path: Path, change: float, is_near: bool
) -> None:
    """Two tokens of all but one embedding: the first a little likelier to torch, the other to llama.cpp."""
    asked = toy.tokenizer.encode_prompt(toy.prompts.rows[0].prompt)
    first = int(gguf_parity._Reference(toy.checkpoint).next_log_probs(asked).argmax())
    twin = toy.tokenizer.encode("~")[0]  # no question has it
    path = write_toy(tmp_path / "twin.gguf", with_twin(toy, first, twin, 1 + change))
    ours = with_twin(toy, first, twin, 1 - change)
    file = measure_gguf({"f32": path}, ours.checkpoint, toy.prompts, quick=True).files["f32"]
    found = file.differences[0]
    assert (found.prompt, found.place, found.torch_token, found.token) == (0, 0, first, twin)
    assert found.near_tie is is_near
    assert (found.gap_nats <= 1e-3) is is_near
    beyond = sum(not difference.near_tie for difference in file.differences)
    assert file.figure("greedy_differences").measured == beyond
    assert (beyond == 0) is is_near


def test_a_file_of_another_vocabulary_is_refused(toy: Toy, tmp_path: Path) -> None:
    config = msgspec.structs.replace(CONFIG, vocab_size=520)
    state = dict(toy.checkpoint.state_dict)
    state["embed_tokens.weight"] = torch.cat([state["embed_tokens.weight"], torch.zeros(8, CONFIG.d_model)])
    padded = replace(toy.checkpoint, config=config, state_dict=state, where="padded", run=None)
    path = write_toy(tmp_path / "toy.gguf", toy)
    with pytest.raises(GgufError) as caught:
        measure_gguf({"f32": path}, padded, toy.prompts, quick=True)
    assert str(caught.value) == (
        f"{path} has 512 tokens, the checkpoint's model 520\n"
        "  expected: the file that was made of the checkpoint" + RUN
    )


def test_a_file_of_other_tensors_is_refused(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", toy, Kind.Q8_0, always=77)
    with pytest.raises(GgufError) as caught:
        measure_gguf({"q8_0": path}, toy.checkpoint, toy.prompts, quick=True)
    assert str(caught.value) == (
        f"{path} and the checkpoint do not both have lm_head.weight\n"
        "  expected: the file that was made of the checkpoint" + RUN
    )


def test_a_truncated_file_is_refused(toy: Toy, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", toy)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(GgufError, match=rf"^{path} is truncated: "):
        measure_gguf({"f32": path}, toy.checkpoint, toy.prompts, quick=True)


@pytest.mark.usefixtures("fewer_texts")
def test_an_imported_model_is_asked_about_texts(toy: Toy, tmp_path: Path) -> None:
    """Its chat questions first; the beginnings of texts where these are too few."""
    words = " ".join(row.prompt for row in toy.rows)
    texts = [
        Text(id=name, source="here", licence=None, text=words[start:]) for name, start in (("a", 0), ("b", 50))
    ]
    prompts = TextPrompts(
        texts, [ChatPrompt(id="1", text="Will it rain?")], TextTokenizer.of_student(toy.tokenizer)
    )
    report = measure_gguf({"f32": write_toy(tmp_path / "toy.gguf", toy)}, toy.checkpoint, prompts, quick=True)
    require_parity(report)
    assert report.files["f32"].heldout_questions == 0
    assert report.files["f32"].greedy_prompts == 4
    assert "heldout_exact" not in outcomes(report.files["f32"])


def test_the_random_texts_are_the_same_each_time_and_of_many_scripts() -> None:
    texts = list(_random_texts(500))
    assert texts == list(_random_texts(500))
    assert len(set(texts)) == 500
    letters = set("".join(texts))
    assert sum(ord(letter) > 0xFFFF for letter in letters) > 300
    assert not any(0xD800 <= ord(letter) < 0xE000 for letter in letters)


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
        ({"measured": 3.0}, "`kl_nats` is passed, 3.0 by 2.0 is failed"),
        ({"measured": math.nan}, "`kl_nats` is passed, nan by 2.0 is failed"),
        ({"at_least": True}, "`kl_nats` is passed, 1.0 by 2.0 is failed"),
        ({"bound": None, "source": None}, "`kl_nats` is passed, 1.0 by None is reported"),
        ({"source": None}, "`kl_nats` has the bound 2.0 from None"),
    ],
)
def test_a_figure_does_not_contradict_its_bound(options, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}$"):
        a_figure(**options)


def test_a_report_does_not_contradict_its_figures(right: GgufParity) -> None:
    with pytest.raises(ValueError, match=r"^`passed` is False, the figures say otherwise$"):
        msgspec.structs.replace(right, passed=False)
    with pytest.raises(ValueError, match=r"^`files` is empty$"):
        msgspec.structs.replace(right, files={})


def test_a_failure_is_said_with_its_bound(right: GgufParity) -> None:
    bad = a_figure(measured=3.0, outcome="failed")
    file = msgspec.structs.replace(right.files["f32"], figures=(bad,))
    report = msgspec.structs.replace(right, files={"f32": file}, passed=False)
    with pytest.raises(ParityError) as caught:
        require_parity(report, run="this")
    assert str(caught.value) == (
        "f32: kl_nats is 3, at most 2 is allowed\n"
        "  expected: llama.cpp to compute what the checkpoint computes, within the bounds of "
        "coremill.conversion.gguf_parity\n  run: this"
    )
