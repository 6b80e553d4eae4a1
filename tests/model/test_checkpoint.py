"""The checkpoint format: round trips, equal bytes for equal contents, and an error for each kind of bad file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coremill.core.config import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from coremill.core.contract import ModelArch, TokenizerRef
from coremill.core.errors import (
    CheckpointContentError,
    CheckpointUnreadableError,
    CoremillError,
    SchemaVersionError,
    UnsafeCheckpointError,
    VocabularyMismatchError,
)
from coremill.core.plain import Plain
from coremill.model import checkpoint as checkpoint_module
from coremill.model.checkpoint import (
    Checkpoint,
    build_student,
    check_vocabulary,
    checkpoint_of,
    load_checkpoint,
    save_checkpoint,
)
from coremill.model.student import new_student

CONFIG = ModelConfig(
    vocab_size=20,
    d_model=8,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    d_ff=12,
    max_seq_len=16,
    arch=ModelArch(use_halt_head=True, tie_embeddings=True),
)
TOKENIZER = TokenizerRef(vocab_size=20, digest="sha256:abc")


def a_checkpoint(**changes: Any) -> Checkpoint:
    ckpt = checkpoint_of(
        new_student(CONFIG, seed=4),
        model_type="toy",
        step=7,
        tokenizer=TOKENIZER,
        training={"loss": {"first": 3.5, "last": 1.25}, "seed": 4},
    )
    return dataclasses.replace(ckpt, **changes)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "toy.ckpt"
    save_checkpoint(path, a_checkpoint())
    return path


def rewrite(path: Path, change: Callable[[dict[str, Plain]], None]) -> None:
    """Read the dict of a checkpoint, change it, and save it again with torch."""
    value = torch.load(path, weights_only=True)
    changed = change(value)
    torch.save(value if changed is None else changed, path)


def refusal(path: Path, kind: type[CoremillError]) -> str:
    with pytest.raises(CoremillError) as caught:
        load_checkpoint(path)
    assert type(caught.value) is kind
    assert caught.value.expected
    assert caught.value.run
    return caught.value.found


def test_a_checkpoint_round_trips(saved: Path) -> None:
    ckpt, loaded = a_checkpoint(), load_checkpoint(saved)
    for name in ("model_type", "model_arch", "config", "step", "tokenizer", "training"):
        assert getattr(loaded, name) == getattr(ckpt, name), name
    assert loaded.state_dict.keys() == ckpt.state_dict.keys()
    assert all(torch.equal(loaded.state_dict[name], ckpt.state_dict[name]) for name in ckpt.state_dict)


def test_the_file_contains_the_documented_dict(saved: Path) -> None:
    value = torch.load(saved, weights_only=True)
    assert sorted(value) == [
        "config",
        "model_arch",
        "model_type",
        "schema_version",
        "state_dict",
        "step",
        "tokenizer",
        "training",
    ]
    assert value["model_arch"] == {"use_halt_head": True, "tie_embeddings": True}
    assert value["tokenizer"] == {"vocab_size": 20, "digest": "sha256:abc"}
    assert (value["model_type"], value["schema_version"], value["step"]) == ("toy", "1.0", 7)


def test_the_built_model_has_the_outputs_of_the_saved_one(saved: Path) -> None:
    ids = torch.arange(16, dtype=torch.int32).unsqueeze(0)
    built = build_student(load_checkpoint(saved))
    assert not built.training
    with torch.no_grad():
        for expected, found in zip(new_student(CONFIG, seed=4).eval()(ids), built(ids), strict=True):
            assert torch.equal(expected, found)


def test_later_changes_of_a_student_do_not_change_its_checkpoint() -> None:
    student = new_student(CONFIG, seed=4)
    ckpt = checkpoint_of(student, model_type="toy", step=0, tokenizer=TOKENIZER)
    with torch.no_grad():
        student.norm.weight.zero_()
    assert ckpt.state_dict["norm.weight"].tolist() == [1.0] * 8


def test_equal_contents_give_equal_bytes(saved: Path, tmp_path: Path) -> None:
    # Views of a larger storage, another order of keys, and equal strings of different identity.
    big = {name: torch.cat((tensor, tensor)) for name, tensor in a_checkpoint().state_dict.items()}
    views = {name: big[name][: len(big[name]) // 2] for name in sorted(big, reverse=True)}
    training = {"seed": 4, "".join(["lo", "ss"]): {"".join(["la", "st"]): 1.25, "first": 3.5}}
    other = tmp_path / "elsewhere" / "another-name.ckpt"
    save_checkpoint(other, a_checkpoint(state_dict=views, training=training))
    assert other.read_bytes() == saved.read_bytes()
    save_checkpoint(other, load_checkpoint(saved))
    assert other.read_bytes() == saved.read_bytes()
    save_checkpoint(other, a_checkpoint(step=8))
    assert other.read_bytes() != saved.read_bytes()


def test_equal_strings_of_different_identity_give_equal_bytes(tmp_path: Path) -> None:
    """Pickle writes a string once, and then a reference to it if it is the same object."""
    once = "".join(["a ", "word"])
    paths = [tmp_path / "same.ckpt", tmp_path / "equal.ckpt"]
    save_checkpoint(paths[0], a_checkpoint(training={"first": once, "second": [once, {once: 1}]}))
    apart = {"first": "".join(["a", " word"]), "second": ["".join(["a w", "ord"]), {"".join(["a wo", "rd"]): 1}]}
    save_checkpoint(paths[1], a_checkpoint(training=apart))
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_failed_save_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(TypeError, match="numpy"):
        save_checkpoint(saved, a_checkpoint(training={"loss": np.float32(1.0)}))
    assert saved.read_bytes() == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["toy.ckpt"]


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    found = refusal(tmp_path / "none.ckpt", CheckpointUnreadableError)
    assert found == f"cannot read {tmp_path}/none.ckpt: No such file or directory"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_rejected(saved: Path, tmp_path: Path, share: float) -> None:
    data = saved.read_bytes()
    part = tmp_path / "part.ckpt"
    part.write_bytes(data[: int(len(data) * share)])
    refusal(part, CheckpointUnreadableError)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_rejected_or_harmless(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Some bytes of a zip archive have no effect, but no flipped bit changes the weights that are read."""
    damaged = bytearray(saved.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(damaged)
    try:
        loaded = load_checkpoint(path)
    except CoremillError:
        return
    expected = load_checkpoint(saved)
    assert loaded.step == expected.step
    assert all(torch.equal(loaded.state_dict[name], expected.state_dict[name]) for name in expected.state_dict)


def test_a_damaged_tensor_is_named(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        member = archive.getinfo("archive/data/0")
    data = bytearray(saved.read_bytes())
    start = data.index(archive_payload(saved, member.filename))
    data[start] ^= 1
    saved.write_bytes(data)
    assert refusal(saved, CheckpointUnreadableError) == (
        f"{saved} is damaged: the checksum of archive/data/0 is wrong"
    )


def test_a_tensor_with_the_directory_attribute_is_rejected(saved: Path) -> None:
    """torch.load leaves such a tensor uninitialised and does not report it."""
    data = bytearray(saved.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"archive/data/0"))
    data[entry + 38] |= 0x10  # external attributes of the entry in the central directory
    saved.write_bytes(data)
    assert refusal(saved, CheckpointUnreadableError) == (
        f"{saved} is damaged: archive/data/0 has attributes that torch.save does not write"
    )


@pytest.mark.parametrize("offset", range(4, 20))
def test_a_damaged_end_of_the_archive_is_rejected(saved: Path, offset: int) -> None:
    """The error of zipfile for a broken end record depends on the byte and on the Python version; ours does not.

    A number of another disk may be read past: in an archive of one disk it means nothing.
    """
    data = bytearray(saved.read_bytes())
    data[len(data) - 22 + offset] ^= 0x5A
    saved.write_bytes(data)
    with contextlib.suppress(CheckpointUnreadableError):
        assert load_checkpoint(saved).step == 7


def archive_payload(path: Path, member: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(member)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "is not a checkpoint: 0 bytes"),
        (b"these are not weights\n", "is not a checkpoint: 22 bytes"),
        (b"\x80\x02}q\x00.", "is not a checkpoint: 6 bytes"),
        (b"PK\x03\x04" + bytes(50), "is truncated: 54 bytes"),
    ],
)
def test_a_file_of_another_format_is_rejected(tmp_path: Path, data: bytes, found: str) -> None:
    path = tmp_path / "else.ckpt"
    path.write_bytes(data)
    assert refusal(path, CheckpointUnreadableError) == f"{path} {found}"


def test_a_zip_archive_of_another_format_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "else.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert refusal(path, CheckpointUnreadableError) == f"{path} is a zip archive, not a checkpoint"


def test_a_torchscript_program_is_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    assert refusal(path, CheckpointUnreadableError) == f"{path} is a TorchScript program, not a checkpoint"


class Payload:
    """Unpickling this runs a command that creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("key", ["state_dict", "training", "model_type", "extra"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_checkpoint_is_rejected_and_not_executed(
    saved: Path, tmp_path: Path, key: str, protocol: int
) -> None:
    witness = tmp_path / "executed"
    value = torch.load(saved, weights_only=True)
    value[key] = Payload(witness)
    torch.save(value, saved, pickle_protocol=protocol)
    assert refusal(saved, UnsafeCheckpointError) == f"{saved} names posix.system"
    assert not witness.exists()
    # The payload works: it is the reader that rejects it.
    torch.load(saved, weights_only=False)
    assert witness.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_hostile_pickle_is_rejected_and_not_executed(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "executed"
    path = tmp_path / "bare.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": Payload(witness)}, protocol=protocol))
    assert refusal(path, UnsafeCheckpointError) == f"{path} is a bare pickle that names posix.system"
    assert not witness.exists()
    pickle.loads(path.read_bytes())
    assert witness.exists()


def test_a_pickled_module_is_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "module.ckpt"
    torch.save(torch.nn.Linear(2, 2), path)
    assert "torch.nn.modules.linear.Linear" in refusal(path, UnsafeCheckpointError)


@pytest.mark.parametrize("version", ["2.0", "0.9", "soon"])
def test_an_unknown_major_version_is_rejected(saved: Path, version: str) -> None:
    rewrite(saved, lambda value: value.update(schema_version=version))
    assert refusal(saved, SchemaVersionError) == f"{saved}: schema_version {version!r}"


def test_a_newer_minor_version_is_read_with_a_warning(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(saved, lambda value: value.update(schema_version="1.9", added_later=1))
    assert load_checkpoint(saved).step == 7
    assert "ignoring `$.added_later`" in caplog.text


@pytest.mark.parametrize("key", ["model_type", "model_arch", "config", "step", "tokenizer", "training"])
def test_a_missing_part_is_named(saved: Path, key: str) -> None:
    rewrite(saved, lambda value: value.pop(key) and None)
    found = refusal(saved, CheckpointContentError)
    assert found == f"{saved}: Object missing required field `{key}` at `$`"


def test_a_missing_version_is_rejected(saved: Path) -> None:
    rewrite(saved, lambda value: value.pop("schema_version") and None)
    assert refusal(saved, CheckpointContentError) == f"{saved}: no `schema_version` at `$`"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda v: v.update(step="7"), "Expected `int`, got `str` at `$.step`"),
        (lambda v: v.update(step=-1), "`step` must not be negative, found -1 at `$`"),
        (lambda v: v.update(stpe=7), "unknown key `stpe` at `$`"),
        (lambda v: v["config"].update(d_modle=8), "unknown key `d_modle` at `$.config`"),
        (lambda v: v["config"].update(n_heads=3), "d_model 8, n_heads 3 and n_kv_heads 1"),
        (lambda v: v["model_arch"].update(use_halt_head=False), "`model_arch` is ModelArch(use_halt_head=False"),
        (lambda v: v["tokenizer"].update(vocab_size=21), "`config.vocab_size` is 20, `tokenizer.vocab_size` is 21"),
        (lambda v: v.pop("state_dict"), "`state_dict` is missing"),
        (lambda v: v.update(state_dict=[1]), "`state_dict` contains something other than tensors"),
        (
            lambda v: v["state_dict"].update({"norm.weight": 1.0}),
            "`state_dict` contains something other than tensors",
        ),
        (lambda v: v["state_dict"].pop("norm.weight"), "`state_dict` lacks norm.weight"),
        (
            # An attacker's size: rejected before the shapes of each layer are computed.
            lambda v: v["config"].update(n_layers=10**9),
            "`state_dict` contains 12 tensors, fewer than `config` has layers",
        ),
        (
            lambda v: v["state_dict"].update({"lm_head.weight": torch.zeros(20, 8)}),
            "`state_dict` contains lm_head.weight, which the model does not have",
        ),
        (
            lambda v: v["state_dict"].update({"norm.weight": torch.ones(9)}),
            "`state_dict['norm.weight']` has shape (9,), not (8,)",
        ),
        (
            lambda v: v["state_dict"].update({"norm.weight": torch.ones(8, dtype=torch.int32)}),
            "`state_dict['norm.weight']` is torch.int32, not of floats",
        ),
        (
            lambda v: v["state_dict"]["norm.weight"][2:4].copy_(torch.tensor([float("nan"), float("inf")])),
            "`state_dict['norm.weight']` has 2 NaN or infinite values",
        ),
    ],
)
def test_contradicting_contents_are_named(
    saved: Path, change: Callable[[dict[str, Plain]], None], found: str
) -> None:
    rewrite(saved, lambda value: [change(value), None][1])
    assert refusal(saved, CheckpointContentError).startswith(f"{saved}: {found}")


def test_a_checkpoint_that_is_not_a_dict_is_rejected(saved: Path) -> None:
    rewrite(saved, lambda value: [1, 2])
    assert refusal(saved, CheckpointContentError) == f"{saved}: found list"


def test_a_checkpoint_is_checked_before_it_is_written() -> None:
    with pytest.raises(CheckpointContentError, match=r"^checkpoint: `state_dict` contains 0 tensors, fewer than"):
        a_checkpoint(state_dict={})
    with pytest.raises(CheckpointContentError, match="`model_arch` is"):
        a_checkpoint(model_arch=ModelArch(use_halt_head=False, tie_embeddings=True))


def test_check_vocabulary_compares_size_and_digest() -> None:
    ckpt = a_checkpoint()
    check_vocabulary(ckpt, TOKENIZER)
    with pytest.raises(VocabularyMismatchError, match=r"^the tokenizer has 32002 tokens, the model 20\n"):
        check_vocabulary(ckpt, TokenizerRef(vocab_size=32002, digest="sha256:abc"))
    with pytest.raises(
        VocabularyMismatchError, match=r"^the tokenizer is sha256:def, the model was trained with sha256:abc\n"
    ):
        check_vocabulary(ckpt, TokenizerRef(vocab_size=20, digest="sha256:def"))


def test_an_embedding_may_have_more_rows_than_the_tokenizer_has_tokens(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "padded.ckpt", a_checkpoint(tokenizer=TokenizerRef(vocab_size=17, digest="sha256:abc"))
    )
    assert load_checkpoint(tmp_path / "padded.ckpt").tokenizer.vocab_size == 17


SCALINGS = [
    None,
    LinearScaling(factor=2.0),
    Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8),
    YarnScaling(factor=4.0, original_max_seq_len=8, attention_factor=1.1, truncate=False),
    FrequencyFactors(factors=(1.0, 2.5)),
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_options_of_the_family_round_trip(tmp_path: Path, scaling: RopeScaling | None) -> None:
    config = msgspec.structs.replace(
        CONFIG, head_size=4, rope_scaling=scaling, attention_bias="qkvo", mlp_bias=True, qk_norm=True
    )
    student = new_student(config, seed=1)
    ckpt = checkpoint_of(student, model_type="qwen3", step=0, tokenizer=TOKENIZER)
    save_checkpoint(tmp_path / "options.ckpt", ckpt)
    loaded = load_checkpoint(tmp_path / "options.ckpt")
    assert loaded.config == config
    assert torch.equal(build_student(loaded).cos, student.cos)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"kind": "cubic"}, "Invalid value 'cubic' at `$.config.rope_scaling.kind`"),
        ({"kind": "linear", "factor": 2.0, "fcator": 1}, "unknown key `fcator` at `$.config.rope_scaling`"),
        ({"kind": "linear", "factor": -1.0}, "`factor` must be positive, found -1.0 at `$.config.rope_scaling`"),
    ],
)
def test_an_invalid_scaling_is_rejected(saved: Path, change: dict[str, Plain], found: str) -> None:
    rewrite(saved, lambda value: value["config"].update(rope_scaling=change))
    assert refusal(saved, CheckpointContentError) == f"{saved}: {found}"


def test_imported_is_read_from_training() -> None:
    assert not a_checkpoint().imported
    assert a_checkpoint(step=0, training={"imported_from": {"format": "gguf"}}).imported


def test_half_precision_is_saved_as_it_is_and_built_in_float32(tmp_path: Path) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in a_checkpoint().state_dict.items()}
    save_checkpoint(tmp_path / "half.ckpt", a_checkpoint(state_dict=halves))
    loaded = load_checkpoint(tmp_path / "half.ckpt")
    assert all(torch.equal(loaded.state_dict[name], halves[name]) for name in halves)
    assert {tensor.dtype for tensor in loaded.state_dict.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in build_student(loaded).parameters()} == {torch.float32}


def test_tensors_that_share_a_storage_are_written_separately(saved: Path, tmp_path: Path) -> None:
    """Tensors mapped from a file may share its storage; the archive contains each separately, and nothing twice."""
    state = a_checkpoint().state_dict
    everything = torch.cat([state[name].reshape(-1) for name in state])
    parts = everything.split([state[name].numel() for name in state])
    views = {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}
    save_checkpoint(tmp_path / "views.ckpt", a_checkpoint(state_dict=views))
    assert (tmp_path / "views.ckpt").read_bytes() == saved.read_bytes()
    own = checkpoint_module._apart(views["norm.weight"])
    assert own.data_ptr() == views["norm.weight"].data_ptr()
    assert own.untyped_storage().nbytes() == own.nbytes < everything.nbytes


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_that_are_not_finite_are_counted(value: float, dtype: torch.dtype) -> None:
    tensor = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)  # finite, but their sum overflows
    assert checkpoint_module._not_finite(tensor) == 0
    tensor[1, 2] = tensor[2, 4] = value
    assert checkpoint_module._not_finite(tensor) == 2
    assert checkpoint_module._not_finite(tensor.T) == 2


@pytest.mark.parametrize(
    "vocab_size", [20, 4000]
)  # the disk is full when the file is closed, or while torch writes
def test_a_full_disk_is_named_and_leaves_the_old_file(saved: Path, vocab_size: int) -> None:
    """A limit on the size of files simulates the disk; the tensors do not fit."""
    student = new_student(msgspec.structs.replace(CONFIG, vocab_size=vocab_size), seed=4)
    save_checkpoint(saved, checkpoint_of(student, model_type="toy", step=7, tokenizer=TOKENIZER))
    before = saved.read_bytes()
    script = (
        "import resource, signal, sys; from pathlib import Path;"
        "from coremill.model.checkpoint import load_checkpoint, save_checkpoint;"
        "from coremill.core.errors import OutputError;"
        "path = Path(sys.argv[1]); ckpt = load_checkpoint(path);"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try: save_checkpoint(path, ckpt)\n"
        "except OutputError as error: print(error.found)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(saved)], capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot write {saved}: File too large\n"
    assert saved.read_bytes() == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["toy.ckpt"]


def test_a_checkpoint_that_is_replaced_while_it_is_read_has_no_effect(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = checkpoint_module._pickle_in_archive

    def check_and_replace(path: Path, file: BinaryIO) -> bytes:
        pickled = check(path, file)
        save_checkpoint(path, a_checkpoint(step=99))
        return pickled

    monkeypatch.setattr(checkpoint_module, "_pickle_in_archive", check_and_replace)
    assert load_checkpoint(saved).step == 7


def test_the_archive_does_not_contain_the_name_of_the_file(saved: Path) -> None:
    """Given a path, torch.save writes its stem into the archive, which makes the digest depend on the name."""
    with zipfile.ZipFile(io.BytesIO(saved.read_bytes())) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"archive"}
