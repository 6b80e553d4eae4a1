"""The exported graphs match the student, also in float16."""

from __future__ import annotations

import msgspec
import pytest
import torch

from coremill.core.config import Llama3Scaling, ModelConfig
from coremill.core.contract import ModelArch
from coremill.coreml.decoder import (
    MASKED_SCORE,
    Decode,
    Decoder,
    Main,
    Prefill,
    ScaledRMSNorm,
    decoder_weights,
)
from coremill.model.student import RMSNorm, Student, new_student

CONTEXT = 24

PLAIN = ModelConfig(
    vocab_size=96,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ff=48,
    max_seq_len=CONTEXT,
    arch=ModelArch(use_halt_head=False, tie_embeddings=True),
)
OPTIONS = {
    "plain": {},
    "as many key/value heads as heads": {"n_kv_heads": 4},
    "one key/value head": {"n_kv_heads": 1},
    "heads of another size": {"head_size": 12},
    "biases": {"attention_bias": "qkvo", "mlp_bias": True},
    "biases of queries, keys and values": {"attention_bias": "qkv"},
    "norms of queries and keys": {"qk_norm": True, "head_size": 10},
    "a halt head and its own unembedding": {"arch": ModelArch(use_halt_head=True, tie_embeddings=False)},
    "scaled positions": {
        "rope_scaling": Llama3Scaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16
        )
    },
}


def student_of(**changes) -> Student:
    student = new_student(msgspec.structs.replace(PLAIN, **changes), seed=2).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.dim() == 1:  # norms and biases, which start at 1 and 0
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
            assert parameter.abs().sum() > 0, name
    return student


def decoder_of(student: Student) -> Decoder:
    decoder = Decoder(student.config, CONTEXT).eval()
    return decoder.set_weights(decoder_weights(student.config, student.state_dict()))


def scaled(norm: RMSNorm) -> ScaledRMSNorm:
    other = ScaledRMSNorm(*norm.weight.shape, eps=norm.eps)
    other.weight = torch.nn.Parameter(norm.weight.detach().clone())
    return other


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(0, 96, (1, length), generator=torch.Generator().manual_seed(length), dtype=torch.int32)


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_every_function_matches_the_student(changes):
    student = student_of(**changes)
    decoder = decoder_of(student)
    ids = ids_of(CONTEXT)
    prefill, decode = Prefill(decoder, CONTEXT), Decode(decoder, CONTEXT)
    decode.key_cache, decode.value_cache = prefill.key_cache, prefill.value_cache
    with torch.no_grad():
        expected = student(ids)
        for found, wanted in zip(Main(decoder)(ids), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        padded = torch.cat([ids[:, :7], torch.full((1, 9), 5, dtype=torch.int32)], dim=1)
        for found, wanted in zip(prefill(padded, torch.tensor([7])), expected, strict=True):
            torch.testing.assert_close(found[0, 0], wanted[0, 6], rtol=0, atol=1e-5)
        for position in range(7, CONTEXT):
            outputs = decode(ids[:, position : position + 1], torch.tensor([position]))
            for found, wanted in zip(outputs, expected, strict=True):
                torch.testing.assert_close(found[0, 0], wanted[0, position], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [OPTIONS["plain"], OPTIONS["a halt head and its own unembedding"]])
def test_a_trace_at_one_length_matches_the_student_at_others(changes):
    student = student_of(**changes)
    traced = torch.jit.trace(Main(decoder_of(student)).eval(), ids_of(16))
    with torch.no_grad():
        for length in (1, 2, 15, 16, 17, CONTEXT - 1, CONTEXT):
            for found, wanted in zip(traced(ids_of(length)), student(ids_of(length)), strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_an_exported_program_accepts_every_length():
    student = student_of()
    seq_len = torch.export.Dim("T", min=2, max=CONTEXT)
    main = Main(decoder_of(student)).eval()
    program = torch.export.export(main, (ids_of(16),), dynamic_shapes=({1: seq_len},)).module()
    with torch.no_grad():
        for length in (2, 15, CONTEXT - 1, CONTEXT):
            for found, wanted in zip(program(ids_of(length)), student(ids_of(length)), strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("score", [-1.0e4, 0.0, 1.0e4])
def test_a_masked_score_has_no_weight_next_to_the_lowest_visible_one(score, dtype):
    masked = torch.tensor(score, dtype=dtype) + torch.tensor(MASKED_SCORE, dtype=dtype)
    assert torch.isfinite(masked)
    assert torch.stack((torch.tensor(-1.0e4, dtype=dtype), masked)).softmax(0).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 300.0, 6e4])
def test_the_float16_norm_is_precise_at_every_magnitude(size):
    """In float16, squares of 300 and more overflow, and those of 1e-3 underflow."""
    norm = RMSNorm(64, 1e-5)
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    x = (x / x.abs().max() * size).half()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 64))
        expected = norm(x.double().to(torch.float64))
        found = scaled(norm).half()(x)
    assert found.dtype == torch.float16
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=4e-3, atol=1e-4 * float(expected.abs().max())
    )


def test_the_norm_of_zeros_is_zeros():
    """The embedding of a padding token may be zeros."""
    found = scaled(RMSNorm(8, 1e-5)).half()(torch.zeros(1, 2, 8, dtype=torch.float16))
    assert found.tolist() == torch.zeros(1, 2, 8).tolist()


def test_an_outlier_channel_does_not_reduce_the_precision_of_others():
    """Trained models have such channels: one of 25,000 and others of about 1."""
    norm = RMSNorm(64, 1e-5)
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(3))
    x[..., 11] = 25_000.0
    x = x.half()
    expected = norm(x.double()).float()
    torch.testing.assert_close(scaled(norm).half()(x).float(), expected, rtol=5e-3, atol=1e-6)
