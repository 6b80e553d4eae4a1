"""The TorchScript program: its archive, and its interface."""

from __future__ import annotations

import io
import zipfile

import msgspec
import pytest
import torch
from tests.converted import saved_and_loaded
from torch import nn

from coremill.core.contract import DType, ModelArch, StatefulFunction, TensorSpec
from coremill.core.errors import ContractMismatchError, TorchScriptError
from coremill.coreml.graph import (
    check_contract,
    describe,
    load_program,
    read_interface,
    run_program,
    trace,
)


class Doubled(nn.Module):
    """Returns twice as many values as its input has."""

    def forward(self, input_ids):
        return (torch.cat([input_ids, input_ids], dim=1).float(),)


class Baked(nn.Module):
    """Its first output is the first four tokens, whatever the length."""

    def forward(self, input_ids):
        return input_ids[:, :4].float(), input_ids.to(torch.float16)


class Long(nn.Module):
    def forward(self, input_ids):
        return (input_ids.long(),)


def test_the_interface_is_read_from_the_program(pristine):
    program = load_program(pristine.graph)
    interface = read_interface(program, [[0] * 80, [0] * 96, [0] * 7])
    assert describe(interface.inputs) == "input_ids int32 (1, T)"
    assert describe(interface.outputs) == "logits float32 (1, T, 512), halt_logits float32 (1, T, 2)"


def test_a_dimension_that_is_the_same_at_every_length_is_a_number():
    program = saved_and_loaded(Baked(), ["first", "all_of_them"])
    interface = read_interface(program, [[0] * 6, [0] * 9])
    assert interface.outputs == (
        TensorSpec(name="first", dtype=DType.FLOAT32, shape=(1, 4)),
        TensorSpec(name="all_of_them", dtype=DType.FLOAT16, shape=(1, "T")),
    )


def test_with_one_length_every_dimension_of_an_output_is_a_number():
    interface = read_interface(saved_and_loaded(Baked(), ["first", "rest"]), [[0] * 6])
    assert [spec.shape for spec in interface.outputs] == [(1, 4), (1, 6)]
    assert interface.inputs[0].shape == (1, "T")


def test_a_dimension_that_varies_otherwise_is_an_error():
    with pytest.raises(ContractMismatchError) as caught:
        read_interface(saved_and_loaded(Doubled(), ["twice"]), [[0] * 6, [0] * 9])
    assert caught.value.found == "a dimension of `twice` is [12, 18] at lengths [6, 9]"


def test_an_output_of_an_unsupported_dtype_is_an_error():
    with pytest.raises(ContractMismatchError, match=r"^output `ids` is torch\.int64"):
        read_interface(saved_and_loaded(Long(), ["ids"]), [[0] * 6, [0] * 9])


class TwoInputs(nn.Module):
    def forward(self, input_ids, mask):
        return (input_ids * mask).float()


class SixTokens(nn.Module):
    """Runs at six tokens only."""

    def forward(self, input_ids):
        return (input_ids.view(1, 2, 3).float(),)


def test_a_graph_with_two_inputs_is_an_error():
    ids = torch.ones(1, 6, dtype=torch.int32)
    program = torch.jit.trace(TwoInputs(), (ids, ids))
    with pytest.raises(ContractMismatchError, match=r"^the graph has 2 inputs: input_ids, mask"):
        read_interface(program, [[0] * 6])


def test_a_graph_that_fails_at_a_length_is_an_error():
    with pytest.raises(ContractMismatchError, match=r"^the graph does not run at length 9: .*\[1, 2, 3\]"):
        read_interface(saved_and_loaded(SixTokens(), ["halves"]), [[0] * 6, [0] * 9])


def test_every_output_needs_a_name():
    with pytest.raises(ValueError, match=r"^the model returns 2 tensors, the names are \['logits'\]$"):
        trace(Baked(), [1, 2, 3, 4, 5], ["logits"])


def test_the_archive_has_no_local_paths(pristine):
    with zipfile.ZipFile(pristine.graph) as archive:
        names = archive.namelist()
        everything = b"".join(archive.read(name) for name in names)
    assert not [name for name in names if name.endswith(".debug_pkl") or "serialization_id" in name]
    assert b"site-packages" not in everything
    assert b"student.py" not in everything
    assert b"tiny_ball" not in everything  # nor the name of the file


def test_the_saved_program_gives_the_traced_outputs():
    program = saved_and_loaded(Baked(), ["first", "all_of_them"])
    first, rest = run_program(program, [7, 8, 9, 10, 11])
    assert first.tolist() == [[7.0, 8.0, 9.0, 10.0]]
    assert rest.tolist() == [[7.0, 8.0, 9.0, 10.0, 11.0]]


def _checkpoint_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    return buffer.getvalue()


def _zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"f\.pt is not a TorchScript program: File is not a zip file"),
        (b"print('hello')\n", r"f\.pt is not a TorchScript program: File is not a zip file"),
        (_checkpoint_bytes(), r"f\.pt is a checkpoint, not a TorchScript program"),
        (_zip_bytes(), r"f\.pt is a zip archive, not a TorchScript program"),
    ],
)
def test_a_file_that_is_not_a_program_is_an_error(tmp_path, data, message):
    path = tmp_path / "f.pt"
    path.write_bytes(data)
    with pytest.raises(TorchScriptError, match=message) as caught:
        load_program(path)
    assert caught.value.exit_code == 41
    assert caught.value.run == "python -m coremill.conversion.export_pytorch --help"


def test_a_missing_truncated_or_damaged_program_is_an_error(build):
    data = build.graph.read_bytes()
    build.graph.write_bytes(data[: len(data) // 2])
    with pytest.raises(TorchScriptError, match="is not a TorchScript program: File is not a zip file"):
        load_program(build.graph)
    damaged = bytearray(data)
    damaged[len(data) // 3] ^= 1
    build.graph.write_bytes(bytes(damaged))
    with pytest.raises(TorchScriptError, match=r"is damaged: the checksum of archive/data/\d+ is wrong"):
        load_program(build.graph)
    build.graph.unlink()
    with pytest.raises(TorchScriptError, match=r"^cannot read .*tiny_ball\.pt: No such file or directory"):
        load_program(build.graph)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph_digest": "sha256:0"}, r"^the graph is sha256:\w+, its contract describes sha256:0"),
        (
            {"outputs": (TensorSpec(name="halt_logits", dtype=DType.FLOAT32, shape=(1, "T", 2)),)},
            r"^the contract's outputs are halt_logits float32 \(1, T, 2\), the graph's are logits float32 \(1",
        ),
        (
            {"inputs": (TensorSpec(name="tokens", dtype=DType.INT32, shape=(1, "T")),)},
            r"^the contract's inputs are tokens int32 \(1, T\), the graph's are input_ids int32 \(1, T\)",
        ),
        ({"inputs": ()}, r"^the contract has 0 inputs \(\), `main` takes one"),
        (
            {
                "states": (TensorSpec(name="kv", dtype=DType.FLOAT16, shape=(1, 4)),),
                "functions": (StatefulFunction(name="decode", inputs=(), outputs=(), max_abs_err=0.0),),
            },
            r"^the contract's states are kv float16 \(1, 4\), the graph's are none",
        ),
        (
            {"inputs": (TensorSpec(name="input_ids", dtype=DType.INT32, shape=("B", "T")),)},
            r"^the contract has the dimensions B, `main` has only T",
        ),
        (
            {"model_arch": ModelArch(use_halt_head=False, tie_embeddings=True)},
            r"^the contract has use_halt_head false, and an output `halt_logits`",
        ),
        ({"outputs": ()}, r"^the contract has use_halt_head true, and no output `halt_logits`"),
    ],
)
def test_a_contract_that_differs_from_the_graph_is_an_error(pristine, change, message):
    contract = pristine.read_contract()
    changed = msgspec.structs.replace(contract, **change)
    program, sequences = load_program(pristine.graph), [[0] * 80, [0] * 96]
    check_contract(contract, program, graph_digest=contract.graph_digest, sequences=sequences)
    with pytest.raises(ContractMismatchError, match=message) as caught:
        check_contract(changed, program, graph_digest=contract.graph_digest, sequences=sequences)
    assert caught.value.exit_code == 42
