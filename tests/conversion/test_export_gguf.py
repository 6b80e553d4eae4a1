"""The export to GGUF: every type, the halt head, the Modelfile; an error leaves earlier files unchanged."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import torch
from safetensors.torch import load_file

import coremill
from coremill.conversion.export_gguf import main, parse_types, run_stage
from coremill.core import layout, machine
from coremill.core.config import DatasetConfig, GgufConfig, ModelConfig, read_config
from coremill.core.contract import ModelArch, TokenizerRef
from coremill.core.digest import file_digest
from coremill.core.documents import read_json
from coremill.core.errors import (
    CheckpointUnreadableError,
    ConfigError,
    CoremillError,
    DatasetError,
    GgufError,
    MachineError,
    OutputError,
    ParityError,
    TokenizerError,
    VocabularyMismatchError,
)
from coremill.core.parity import GgufParity
from coremill.core.stage import StageContext
from coremill.data.lines import write_lines
from coremill.data.make_toy_kd import DatasetFiles, make_dataset
from coremill.data.rows import read_rows
from coremill.data.texts import ChatPrompt, Text
from coremill.formats.gguf.writer import size_bytes
from coremill.formats.gguf_file import GgufFile
from coremill.formats.llamacpp.process import LlamaCpp
from coremill.formats.weights import open_weights
from coremill.model.checkpoint import IMPORTED_FROM, Checkpoint, build_student, checkpoint_of, save_checkpoint
from coremill.model.student import Student, new_student, parameter_shapes
from coremill.text.model_tokenizer import STUDENT_TEMPLATE, TextTokenizer
from coremill.text.student_tokenizer import Tokenizer

torch.set_num_threads(1)

NAME = "tiny-ball"
ErrorT = TypeVar("ErrorT", bound=CoremillError)
CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = ModelConfig(
    vocab_size=400, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=128,
    arch=ModelArch(use_halt_head=True, tie_embeddings=True),
)  # fmt: skip


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    make_dataset(
        DatasetConfig(kind="magic-8-ball", n=256, heldout_n=8, seed=4, vocab_size=400),
        DatasetFiles(
            train=layout.dataset_file(folder),
            heldout=layout.heldout_file(folder),
            tokenizer=layout.tokenizer_file(folder),
        ),
    )
    return folder


@pytest.fixture(scope="session")
def toy(dataset: Path) -> Checkpoint:
    tokenizer = Tokenizer.load(layout.tokenizer_file(dataset))
    ref = TokenizerRef(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest)
    return checkpoint_of(new_student(CONFIG, seed=6), model_type="magic-8-ball", step=0, tokenizer=ref)


@pytest.fixture
def source(dataset: Path, toy: Checkpoint, tmp_path: Path) -> Path:
    """A directory with the toy's checkpoint and its tokenizer, which a test may change."""
    folder = tmp_path / "source"
    folder.mkdir()
    save_checkpoint(folder / "tiny_ball.ckpt", toy)
    for path in (layout.tokenizer_file(dataset), layout.heldout_file(dataset), layout.answer_key_file(dataset)):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def run(source: Path, out: Path, *options: str) -> int:
    return main(["--checkpoint", str(source / "tiny_ball.ckpt"), "--out", str(out), *options])


def test_every_type_and_the_halt_head(
    source: Path, toy: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gguf"
    assert run(source, out) == 0
    names = ["tiny_ball-f32.gguf", "tiny_ball-f16.gguf", "tiny_ball-q8_0.gguf", "tiny_ball-q4_0.gguf"]
    names.append("halt_head-tiny_ball.safetensors")
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "Modelfile", "parity.json"])
    printed = [
        f"{file_digest(out / name).removeprefix('sha256:')}  {out / name}" for name in sorted([*names, "Modelfile"])
    ]
    assert capsys.readouterr().out.splitlines() == printed
    halt_head = load_file(layout.halt_head_file(out, NAME))["halt_head.weight"]
    assert torch.equal(halt_head, toy.state_dict["halt_head.weight"])
    f32 = open_weights(out / names[0])
    assert all(torch.equal(value, toy.state_dict[name]) for name, value in f32.read())
    digest = toy.tokenizer.digest
    for name in names[:4]:
        found = GgufFile(out / name).metadata
        assert {key: value for key, value in found.items() if key.startswith("coremill.")} == {
            "coremill.version": coremill.__version__,
            "coremill.model_type": "magic-8-ball",
            "coremill.checkpoint_digest": file_digest(source / "tiny_ball.ckpt"),
            "coremill.tokenizer_digest": digest,
            "coremill.halt_head_file": "halt_head-tiny_ball.safetensors",
            "coremill.halt_head_digest": file_digest(layout.halt_head_file(out, NAME)),
        }
        assert (found["general.name"], found["tokenizer.chat_template"]) == (NAME, STUDENT_TEMPLATE)


def test_the_bytes_do_not_depend_on_the_directory(source: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert run(source, tmp_path / folder, "--types", "q8_0") == 0
    first, second = (sorted((tmp_path / folder).iterdir()) for folder in ("a", "b"))
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_llama_cpps_answers_match_torch(source: Path, toy: Checkpoint, dataset: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "gguf", "--types", "f32") == 0
    student, tokenizer = build_student(toy), Tokenizer.load(layout.tokenizer_file(dataset))
    with LlamaCpp(tmp_path / "gguf" / "tiny_ball-f32.gguf", context=128) as llamacpp:
        for row in list(read_rows(layout.heldout_file(dataset)))[:3]:
            ids = tokenizer.encode_prompt(row.prompt)
            expected = student_tokens(student, ids)
            assert llamacpp.generate(ids, len(expected), ()) == expected


def student_tokens(student: Student, ids: list[int]) -> list[int]:
    tokens = list(ids)
    with torch.no_grad():
        while len(tokens) < len(ids) + 24:
            tokens.append(int(student(torch.tensor([tokens]))[0][0, -1].argmax()))
    return tokens[len(ids) :]


def test_an_imported_model_brings_its_own_tokenizer(source: Path, toy: Checkpoint, tmp_path: Path) -> None:
    student = TextTokenizer.of_student(Tokenizer.load(layout.tokenizer_file(source)))
    student.save(source)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    arch = ModelArch(use_halt_head=False, tie_embeddings=True)
    weights = {name: value for name, value in toy.state_dict.items() if name != "halt_head.weight"}
    imported = replace(
        toy, model_type="llama", model_arch=arch, config=msgspec.structs.replace(CONFIG, arch=arch),
        state_dict=weights, training={IMPORTED_FROM: {"files": {}}}, where="checkpoint", run=None,
    )  # fmt: skip
    save_checkpoint(source / "tiny_ball.ckpt", imported)
    texts = some_texts(source, tmp_path / "texts")
    assert run(source, tmp_path / "gguf", "--types", "f16", "--name", "my-model", "--prompts", texts) == 0
    (path,) = (tmp_path / "gguf").glob("*.gguf")
    assert path.name == "my_model-f16.gguf"
    metadata = GgufFile(path).metadata
    assert metadata["general.name"] == "my-model"
    assert metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert "coremill.halt_head_file" not in metadata


def some_texts(source: Path, folder: Path) -> str:
    """The prompts of an imported model: the toy's own words as text."""
    folder.mkdir()
    words = " ".join(f"{row.prompt} {row.teacher_text}" for row in read_rows(layout.heldout_file(source)))
    write_lines(layout.texts_file(folder), [Text(id="a", source="here", licence=None, text=words)])
    write_lines(layout.chat_prompts_file(folder), [ChatPrompt(id="1", text="Will it rain?")])
    return str(folder)


def test_the_files_are_run_and_the_report_is_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "gguf"
    assert run(source, out, "--types", "f32,q8_0") == 0
    report = read_json(layout.parity_report(out), GgufParity)
    assert (report.passed, list(report.files)) == (True, ["f32", "q8_0"])
    assert report.files["f32"].figure("max_abs_err").measured < 1e-4
    assert report.checkpoint_digest == file_digest(source / "tiny_ball.ckpt")
    assert report.digests == {
        path.name: file_digest(path) for path in out.iterdir() if path != layout.parity_report(out)
    }
    assert layout.modelfile(out).read_text().splitlines()[0] == "FROM ./tiny_ball-f32.gguf"


def test_the_stage_reports_why_ollama_was_not_run(
    toy: Checkpoint, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = msgspec.structs.replace(
        read_config(CONFIGS / "magic-8-ball.toml"), gguf=GgufConfig(types=("f16",)), name=NAME
    )
    folders = {"dataset": dataset, "training": tmp_path / "training"}
    save_checkpoint(layout.checkpoint_file(folders["training"], NAME), toy)
    out = tmp_path / "gguf"
    out.mkdir()
    figures = run_stage(StageContext(config=config, lane=None, inputs=folders, out=out))
    assert figures["ollama"] == "not_run: there is no `ollama` on PATH"
    assert figures["modelfile"] == "FROM tiny_ball-f16.gguf"
    assert figures["f16_bytes"] == (out / "tiny_ball-f16.gguf").stat().st_size
    assert figures["f16_tokenizer_mismatches"] == 0


def test_a_file_that_differs_from_the_checkpoint_is_not_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coremill.formats.gguf.writer.to_interleaved", lambda value, n_heads: value)
    with pytest.raises(ParityError, match=r"^f32: relative_err is [\d.]+, at most 1e-05 is allowed"):
        run(source, tmp_path / "gguf", "--types", "f32")
    assert not (tmp_path / "gguf").exists()


def test_an_unknown_chat_format_gives_no_modelfile(
    source: Path, toy: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The Modelfile of an earlier export is removed."""
    out = tmp_path / "gguf"
    assert run(source, out, "--types", "f32") == 0
    assert layout.modelfile(out).exists()
    imported = replace(toy, training={IMPORTED_FROM: {"format": "gguf"}}, where="toy", run=None)
    save_checkpoint(source / "tiny_ball.ckpt", imported)
    (source / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (source / "chat_template.jinja").write_text("{% for each in messages %}[{{ each['content'] }}]{% endfor %}")
    assert run(source, out, "--types", "f16", "--prompts", some_texts(source, tmp_path / "texts")) == 0
    assert {path.name for path in out.iterdir()} == {
        "halt_head-tiny_ball.safetensors",
        "parity.json",
        "tiny_ball-f16.gguf",
    }
    assert "no Modelfile: the chat template writes none of the known chat formats" in caplog.text


# --- errors, after which nothing is written ----------------------------------------------


def refusal(kind: type[ErrorT], source: Path, out: Path, *options: str) -> ErrorT:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} if out.exists() else {}
    with pytest.raises(kind) as caught:
        run(source, out, *options)
    assert type(caught.value) is kind
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} if out.exists() else {}
    assert after == before
    return caught.value


def test_every_type_is_checked_before_one_is_written(source: Path, tmp_path: Path) -> None:
    error = refusal(GgufError, source, tmp_path / "gguf", "--types", "f32,q4_k")
    assert str(error) == (
        "q4_k stores rows in blocks of 256, which do not fit the rows of embed_tokens.weight (64), "
        "layers.0.self_attn.q_proj.weight (64), layers.0.self_attn.k_proj.weight (64) and 12 more\n"
        "  expected: rows of a multiple of 256, or one of the types that fit this model: f32, f16, q8_0, q4_0"
    )


def test_a_directory_with_third_party_files_is_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "gguf"
    out.mkdir()
    layout.modelfile(out).write_text("FROM mine\n")
    error = refusal(OutputError, source, out)
    assert str(error) == (
        f"{out} does not contain coremill's GGUF files: cannot read {out}/parity.json: No such file or directory\n"
        "  expected: an empty or missing directory, or one with GGUF files that this command wrote\n"
        f"  run: ls -l {out}"
    )


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda out: (out / "notes.txt").write_text("mine"), "notes.txt, which coremill did not write"),
        (lambda out: layout.modelfile(out).write_text("FROM mine\n"), "Modelfile, which has changed since"),
    ],
)
def test_an_export_with_changes_is_kept(
    source: Path, tmp_path: Path, change: Callable[[Path], int], found: str
) -> None:
    out = tmp_path / "gguf"
    assert run(source, out, "--types", "f16") == 0
    change(out)
    assert refusal(OutputError, source, out, "--types", "f32").found == f"{out} contains {found}"


@pytest.mark.parametrize("name", ["../escaped", "a/b", "..", "a b", "-f", "a\nb", "a\udcffb"])
def test_an_invalid_name_is_rejected(source: Path, tmp_path: Path, name: str) -> None:
    error = refusal(ConfigError, source, tmp_path / "gguf", f"--name={name}")
    assert error.found == f"--name {name!r}"


def test_too_little_memory_is_reported(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = sum(math.prod(shape) for shape in parameter_shapes(CONFIG).values())
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # as many files are measured at a time
    length = min(256, CONFIG.max_seq_len)
    needed = 430_000_000 + int(2 * 0.92 * parameters + 2 * 6.8 * 4 * length * CONFIG.vocab_size)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: needed - 1)
    error = refusal(MachineError, source, tmp_path / "gguf")
    assert error.expected == f"{needed / 1e6:,.0f} MB, to export {parameters:,} parameters at T{length}"


def test_too_little_disk_space_is_reported(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = size_bytes(CONFIG, "f32")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, whole - 1))
    error = refusal(OutputError, source, tmp_path / "gguf", "--types", "f32")
    assert error.expected == f"{whole / 1e6:,.0f} MB, for the files"


def test_missing_prompts_are_reported_before_the_export(source: Path, tmp_path: Path) -> None:
    error = refusal(DatasetError, source, tmp_path / "gguf", "--prompts", str(tmp_path / "none"))
    assert error.found == f"{tmp_path}/none has no held-out set"


def test_a_held_out_set_for_an_imported_model_is_rejected(source: Path, toy: Checkpoint, tmp_path: Path) -> None:
    imported = replace(toy, training={IMPORTED_FROM: {"format": "gguf"}}, where="toy", run=None)
    save_checkpoint(source / "tiny_ball.ckpt", imported)
    error = refusal(DatasetError, source, tmp_path / "gguf")
    assert (
        str(error) == "the prompts are a held-out set, but the model was imported\n  expected: texts: see --prompts"
    )


def test_an_output_that_is_the_input_is_rejected(source: Path, tmp_path: Path) -> None:
    assert "is read and would be overwritten" in refusal(OutputError, source, source).found


def test_a_tokenizer_of_another_model_is_rejected(source: Path, toy: Checkpoint, tmp_path: Path) -> None:
    path = layout.tokenizer_file(source)
    path.write_bytes(path.read_bytes() + b"\n")
    error = refusal(VocabularyMismatchError, source, tmp_path / "gguf")
    assert error.found == f"the tokenizer is {file_digest(path)}, the model was trained with {toy.tokenizer.digest}"


def test_a_missing_tokenizer_is_reported(source: Path, tmp_path: Path) -> None:
    layout.tokenizer_file(source).unlink()
    error = refusal(TokenizerError, source, tmp_path / "gguf")
    assert error.found == f"cannot read {source}/tokenizer.json: No such file or directory"


def test_a_missing_checkpoint_is_reported(source: Path, tmp_path: Path) -> None:
    (source / "tiny_ball.ckpt").unlink()
    error = refusal(CheckpointUnreadableError, source, tmp_path / "gguf")
    assert error.found == f"cannot read {source}/tiny_ball.ckpt: No such file or directory"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("f32,q3_k", "--types names 'q3_k'"),
        ("", "--types names ''"),
        ("f32,f16,f32", "--types f32,f16,f32: `types` contains a type twice, found ['f32', 'f16', 'f32']"),
    ],
)
def test_invalid_types_are_rejected(text: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_types(text)
    assert (caught.value.found, caught.value.expected) == (found, "some of f32,f16,q8_0,q4_0,q4_k,q5_k,q6_k")


def test_types_keep_their_order() -> None:
    assert parse_types("q8_0, f32") == ("q8_0", "f32")


def test_the_module_imports_nothing_heavy() -> None:
    code = (
        "import sys; import coremill.conversion.export_gguf; "
        "print([name for name in ('torch', 'numpy', 'gguf', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
