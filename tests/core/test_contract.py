"""Contracts: round trips, and the errors of invalid ones."""

from __future__ import annotations

import msgspec
import pytest

from coremill.core.contract import (
    Contract,
    DType,
    ModelArch,
    ShapeFailed,
    ShapeOk,
    ShapeSet,
    TensorSpec,
    TokenizerRef,
    Toolchain,
    read_contract,
)
from coremill.core.documents import encode, write_json
from coremill.core.errors import DocumentError, SchemaVersionError


def contract(**changes) -> Contract:
    fields = {
        "model_type": "toy",
        "model_arch": ModelArch(use_halt_head=False, tie_embeddings=True),
        "graph": "toy.pt",
        "graph_digest": "sha256:1",
        "checkpoint_digest": "sha256:2",
        "inputs": (TensorSpec(name="input_ids", dtype=DType.INT32, shape=(1, "T")),),
        "outputs": (TensorSpec(name="logits", dtype=DType.FLOAT32, shape=(1, "T", 512)),),
        "shapes": ShapeSet(primary=128, all=(64, 128)),
        "shape_validation": {"T64": ShapeFailed(error="why"), "T128": ShapeOk(max_abs_err=1e-6)},
        "tokenizer": TokenizerRef(vocab_size=512, digest="sha256:3"),
        "toolchain": Toolchain(python="3.11.7", platform="Linux", packages={"torch": "2.9.1"}),
    }
    return Contract(**{**fields, **changes})


def test_contract_round_trip(tmp_path):
    write_json(tmp_path / "c.json", contract())
    assert read_contract(tmp_path / "c.json") == contract()


def test_shape_validation_as_json():
    plain = msgspec.json.decode(encode(contract()))["shape_validation"]
    assert plain == {"T64": {"status": "error", "error": "why"}, "T128": {"status": "ok", "max_abs_err": 1e-6}}


def test_unvalidated_shape_is_rejected():
    with pytest.raises(
        ValueError, match="shape_validation covers \\['T128'\\], and the shapes are \\['T64', 'T128'\\]"
    ):
        contract(shape_validation={"T128": ShapeOk(max_abs_err=0.0)})


def test_symbolic_dimensions_are_replaced():
    assert contract().outputs[0].at(T=64) == (1, 64, 512)


@pytest.mark.parametrize(
    ("text", "error", "code"),
    [
        (b"not json", DocumentError, 11),
        (encode(contract()).replace(b'"1.0"', b'"2.0"'), SchemaVersionError, 12),
        (encode(contract()).replace(b'"int32"', b'"int31"'), DocumentError, 11),
        (encode(contract()).replace(b'"status": "ok"', b'"status": "fine"'), DocumentError, 11),
    ],
)
def test_invalid_contract_is_rejected(tmp_path, text, error, code):
    path = tmp_path / "c.json"
    path.write_bytes(text)
    with pytest.raises(error) as caught:
        read_contract(path)
    assert caught.value.exit_code == code
    assert str(path) in str(caught.value)
