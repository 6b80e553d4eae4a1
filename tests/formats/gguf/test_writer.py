"""GGUF files as they are written: read back they are the checkpoint; what cannot be stored is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coremill.core.config import (
    FrequencyFactors,
    GgufType,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from coremill.core.contract import ModelArch, TokenizerRef
from coremill.core.errors import GgufError, OutputError, UnsupportedModelError, VocabularyMismatchError
from coremill.formats.gguf.contents import config_differences
from coremill.formats.gguf.reader import GgufWeights
from coremill.formats.gguf.tokenizer import gguf_metadata
from coremill.formats.gguf.writer import architecture_of, check_kind, check_writable, size_bytes, write_gguf
from coremill.formats.gguf_file import GgufFile, Value
from coremill.formats.llamacpp.process import LlamaCpp
from coremill.formats.weights import open_weights
from coremill.model.checkpoint import Checkpoint, checkpoint_of
from coremill.model.rope import inverse_frequencies
from coremill.model.student import Student, new_student
from coremill.text.model_tokenizer import TextTokenizer
from coremill.text.student_tokenizer import Tokenizer

torch.set_num_threads(1)

Kind = gguf.GGMLQuantizationType

TEXT = "Ask again later, when the moon is up and the owl has flown over the hill and far away. " * 3
ROWS = 330

LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32)
YARN = YarnScaling(factor=4.0, original_max_seq_len=32, attention_factor=1.1386294361119891)

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "llama"),
    "toy": ("magic-8-ball", {"arch": ModelArch(use_halt_head=True, tie_embeddings=True)}, "llama"),
    "mistral": ("mistral", {"norm_eps": 1e-3, "rope_theta": 1e6}, "llama"),
    "llama-biases": ("llama", {"attention_bias": "qkvo", "mlp_bias": True}, "llama"),
    "llama-qkv": ("llama", {"attention_bias": "qkv"}, "llama"),
    "llama-head-size": ("llama", {"head_size": 32}, "llama"),
    "llama-linear": ("llama", {"rope_scaling": LinearScaling(factor=4.0)}, "llama"),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3}, "llama"),
    "llama-yarn": ("llama", {"rope_scaling": msgspec.structs.replace(YARN, attention_factor=1.5)}, "llama"),
    "qwen2": ("qwen2", {"attention_bias": "qkv"}, "qwen2"),
    "qwen2-yarn": ("qwen2", {"attention_bias": "qkv", "rope_scaling": YARN}, "qwen2"),
    "qwen2-llama3": ("qwen2", {"attention_bias": "qkv", "rope_scaling": LLAMA3}, "llama"),
    "qwen2-without-biases": ("qwen2", {}, "llama"),
    "qwen3": ("qwen3", {"qk_norm": True, "head_size": 32}, "qwen3"),
    "qwen3-qkv": ("qwen3", {"qk_norm": True, "attention_bias": "qkv"}, "qwen3"),
    "toy-with-norms": ("toy", {"qk_norm": True}, "qwen3"),
}
"""Model type, options, and the architecture in the file."""


def a_config(**options: Any) -> ModelConfig:
    sizes = {"vocab_size": ROWS, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96}
    arch = ModelArch(use_halt_head=False, tie_embeddings=False)
    return ModelConfig(**{**sizes, "max_seq_len": 128, "arch": arch, **options})


def a_student(config: ModelConfig) -> Student:
    """A student with large weights, so that each option has a large effect on the logits."""
    student = new_student(config, seed=5).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3, generator=generator)
            elif "embed" not in name:
                parameter.mul_(1.5)
    return student


def of(student: Student, model_type: str = "llama") -> Checkpoint:
    ref = TokenizerRef(vocab_size=320, digest="sha256:0")
    return checkpoint_of(student, model_type=model_type, step=0, tokenizer=ref)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    words = [chr(97 + i) + chr(97 + j) for i in range(26) for j in range(i, 26)]
    return Tokenizer.train([*words * 2, TEXT], 320)


@pytest.fixture(scope="session")
def metadata(tokenizer: Tokenizer) -> dict[str, Value]:
    return gguf_metadata(TextTokenizer.of_student(tokenizer), vocab_size=ROWS)


def write(path: Path, checkpoint: Checkpoint, metadata: dict[str, Value], kind: GgufType = "f32") -> Path:
    write_gguf(path, checkpoint, metadata, kind=kind, name="a model", provenance={"checkpoint_digest": "sha256:1"})
    return path


@pytest.mark.parametrize("name", MODELS)
def test_a_file_that_is_read_back_equals_the_checkpoint(
    tmp_path: Path, metadata: dict[str, Value], name: str
) -> None:
    model_type, options, architecture = MODELS[name]
    ours = of(a_student(a_config(**options)), model_type)
    source = open_weights(write(tmp_path / "model.gguf", ours, metadata))
    assert source.model_type == architecture
    scaling, read = ours.config.rope_scaling, source.config.rope_scaling
    if scaling is LLAMA3:
        assert isinstance(read, FrequencyFactors)
        assert inverse_frequencies(source.config).numpy() == pytest.approx(
            inverse_frequencies(ours.config).numpy(), rel=1e-7
        )
    elif isinstance(scaling, YarnScaling):
        assert isinstance(read, YarnScaling)
        assert read.attention_factor == pytest.approx(scaling.attention_factor, rel=1e-7)  # it is a float32
        assert msgspec.structs.replace(read, attention_factor=scaling.attention_factor) == scaling
    else:
        assert read == scaling
    arch = ModelArch(use_halt_head=False, tie_embeddings=ours.config.arch.tie_embeddings)
    expected = msgspec.structs.replace(ours.config, arch=arch, rope_scaling=None)
    assert msgspec.structs.replace(source.config, rope_scaling=None) == expected
    tensors = dict(source.read())
    assert tensors.keys() == ours.state_dict.keys() - {"halt_head.weight"}
    for tensor, value in tensors.items():
        assert torch.equal(value, ours.state_dict[tensor]), tensor


def largest_difference(path: Path, student: Student, ids: list[int]) -> float:
    with torch.no_grad():
        expected = student(torch.tensor([ids]))[0][0].numpy()
    assert np.abs(expected[3] - expected[40]).max() > 1
    with LlamaCpp(path, context=128) as llamacpp:
        return float(np.abs(llamacpp.logits(ids) - expected).max())


@pytest.mark.parametrize("factor", [1.1, 4.0, 7.3, 40.0])
@pytest.mark.parametrize(
    "attention", [0.9634746568860826, 0.1, 1.0, 1.7]
)  # the first: mscale 0.7, mscale_all_dim 1
@pytest.mark.parametrize(("theta", "eps"), [(1e4, 1e-5), (123456.789, 1.2345678e-6)])
def test_numbers_differ_by_the_rounding_to_float32_at_most(
    tmp_path: Path, metadata: dict[str, Value], factor: float, attention: float, theta: float, eps: float
) -> None:
    """YaRN's factor is stored as a quotient in float32; llama.cpp and the reader multiply it back."""
    yarn = YarnScaling(factor=factor, original_max_seq_len=32, attention_factor=attention)
    config = a_config(rope_scaling=yarn, rope_theta=theta, norm_eps=eps)
    found = GgufWeights(write(tmp_path / "model.gguf", of(Student(config)), metadata)).config
    assert list(config_differences(found, config)) == []
    for share in (1 - 1e-6, 1 + 1e-6):
        other = msgspec.structs.replace(yarn, attention_factor=attention * share)
        differences = config_differences(found, msgspec.structs.replace(config, rope_scaling=other))
        assert [each.name for each in differences] == ["RoPE's factor"]


def _positive(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False)


_FACTORS = _positive(0.1, 1000)
_SCALINGS = st.one_of(
    st.none(),
    st.builds(LinearScaling, factor=_FACTORS),
    st.builds(
        YarnScaling, factor=_FACTORS, original_max_seq_len=st.just(32), attention_factor=_positive(0.01, 100)
    ),
    st.builds(
        Llama3Scaling,
        factor=_FACTORS,
        low_freq_factor=_positive(0.1, 2),
        high_freq_factor=_positive(3, 8),
        original_max_seq_len=st.just(32),
    ),
)


@given(theta=_positive(10, 1e30), eps=_positive(1e-12, 0.1), scaling=_SCALINGS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_numbers_are_read_back_as_those_of_the_checkpoint(
    tmp_path: Path, metadata: dict[str, Value], theta: float, eps: float, scaling: RopeScaling | None
) -> None:
    config = a_config(rope_scaling=scaling, rope_theta=theta, norm_eps=eps)
    found = GgufWeights(write(tmp_path / "model.gguf", of(Student(config)), metadata)).config
    assert list(config_differences(found, config)) == []


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ("llama", "mistral", "qwen2-without-biases")]
)
def test_llama_cpps_logits_match_torch(
    tmp_path: Path, tokenizer: Tokenizer, metadata: dict[str, Value], name: str
) -> None:
    model_type, options, _ = MODELS[name]
    student = a_student(a_config(**options))
    path = write(tmp_path / "model.gguf", of(student, model_type), metadata)
    assert largest_difference(path, student, tokenizer.encode(TEXT)[:100]) < 1e-4


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k"])
def test_matrices_are_stored_as_the_type_specifies(
    tmp_path: Path, metadata: dict[str, Value], kind: GgufType
) -> None:
    config = a_config(d_model=256, d_ff=256, n_layers=1, attention_bias="qkv")
    ours = of(a_student(config))
    path = write(tmp_path / "model.gguf", ours, metadata, kind)
    file, limits = (
        GgufFile(path),
        {"f16": 5e-4, "q8_0": 6e-3, "q4_0": 0.12, "q4_k": 0.09, "q5_k": 0.05, "q6_k": 0.025},
    )
    for name, tensor in file.tensors.items():
        finer = kind == "q8_0" and name == "blk.0.attn_v.weight"
        stored = Kind.F32 if len(tensor.shape) == 1 else Kind.F16 if finer else Kind[kind.upper()]
        assert tensor.kind == stored, name
    assert sum(tensor.size_bytes for tensor in file.tensors.values()) == size_bytes(config, kind)
    for name, value in open_weights(path).read():
        expected = ours.state_dict[name]
        error = float((value.float() - expected).norm() / expected.norm())
        assert error == 0 if expected.dim() == 1 else 0 < error < limits[kind], (name, error)


def test_a_checkpoint_in_half_precision_is_written_as_float32(tmp_path: Path, metadata: dict[str, Value]) -> None:
    ours = of(a_student(a_config()))
    half = replace(ours, state_dict={name: tensor.bfloat16() for name, tensor in ours.state_dict.items()})
    for name, value in open_weights(write(tmp_path / "model.gguf", half, metadata)).read():
        assert torch.equal(value, half.state_dict[name].float()), name


def test_the_metadata_of_a_file(tmp_path: Path, metadata: dict[str, Value]) -> None:
    config = a_config(rope_scaling=YARN)
    file = GgufFile(write(tmp_path / "model.gguf", of(a_student(config)), metadata, "q8_0"))
    found = {key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.")}
    assert {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")} == metadata
    assert found == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "a model",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.vocab_size": ROWS,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
        "llama.rope.scaling.attn_factor": 1.0,
        "coremill.checkpoint_digest": "sha256:1",
    }


def test_equal_checkpoints_give_equal_bytes(tmp_path: Path, metadata: dict[str, Value]) -> None:
    config = a_config()
    first = write(tmp_path / "a.gguf", of(a_student(config)), metadata, "q4_0").read_bytes()
    path = write(tmp_path / "b.gguf", of(a_student(config)), dict(metadata), "q4_0")
    assert path.read_bytes() == first
    write(path, of(a_student(config)), metadata, "f16")
    assert path.read_bytes() != first
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


# --- errors --------------------------------------------------------------------------------


def test_an_existing_directory_is_rejected(tmp_path: Path, metadata: dict[str, Value]) -> None:
    with pytest.raises(OutputError) as caught:
        write(tmp_path, of(a_student(a_config())), metadata)
    assert caught.value.found == f"{tmp_path} is not a regular file"
    assert not any(tmp_path.iterdir())


def test_an_earlier_file_is_kept_if_writing_fails(
    tmp_path: Path, metadata: dict[str, Value], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"before")

    def fail(matrix: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coremill.formats.gguf.writer.quantize", fail)
    with pytest.raises(OutputError) as caught:
        write(path, of(a_student(a_config())), metadata, "q4_0")
    assert caught.value.found == f"cannot write {path}: No space left on device"
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("kind", "sizes", "found", "expected"),
    [
        (
            "q4_k",
            {},
            "q4_k stores rows in blocks of 256, which do not fit the rows of embed_tokens.weight (64), "
            "layers.0.self_attn.q_proj.weight (64), layers.0.self_attn.k_proj.weight (64) and 13 more",
            "rows of a multiple of 256, or one of the types that fit this model: f32, f16, q8_0, q4_0",
        ),
        (
            "q8_0",
            {"d_ff": 100, "n_layers": 1},
            "q8_0 stores rows in blocks of 32, which do not fit the rows of layers.0.mlp.down_proj.weight (100)",
            "rows of a multiple of 32, or one of the types that fit this model: f32, f16",
        ),
    ],
)
def test_a_type_whose_blocks_do_not_fit_the_rows_is_rejected(
    tmp_path: Path, metadata: dict[str, Value], kind: GgufType, sizes: dict[str, int], found: str, expected: str
) -> None:
    config = a_config(**sizes)
    for check in (
        lambda: check_kind(config, kind),
        lambda: write(tmp_path / "model.gguf", of(a_student(config)), metadata, kind),
    ):
        with pytest.raises(GgufError) as caught:
            check()
        assert (caught.value.found, caught.value.expected) == (found, expected)
    assert not any(tmp_path.iterdir())


def test_the_halt_head_is_not_checked() -> None:
    student = a_student(a_config(arch=ModelArch(use_halt_head=True, tie_embeddings=True)))
    with torch.no_grad():
        student.halt_head.weight[0, 0] = 7e4
    check_writable(of(student), ("f16", "q4_0"))


@pytest.mark.parametrize(
    ("options", "found", "expected"),
    [
        (
            {"qk_norm": True, "attention_bias": "qkvo"},
            "no architecture of llama.cpp computes a model with `qk_norm` and `attention_bias` qkvo",
            "the options of one of llama, qwen2, qwen3",
        ),
        (
            {"qk_norm": True, "mlp_bias": True},
            "no architecture of llama.cpp computes a model with `qk_norm` and `mlp_bias`",
            "the options of one of llama, qwen2, qwen3",
        ),
        (
            {"qk_norm": True, "rope_scaling": LLAMA3},
            "no architecture of llama.cpp computes a model with `qk_norm` and a divisor for each RoPE frequency",
            "the options of one of llama, qwen2, qwen3",
        ),
        (
            {"rope_scaling": msgspec.structs.replace(YARN, truncate=False)},
            "llama.cpp does not compute YaRN with `truncate` False",
            "`beta_fast` 32.0, `beta_slow` 1.0, `truncate` True",
        ),
        (
            {"rope_scaling": msgspec.structs.replace(YARN, beta_fast=16.0)},
            "llama.cpp does not compute YaRN with `beta_fast` 16.0",
            "`beta_fast` 32.0, `beta_slow` 1.0, `truncate` True",
        ),
    ],
)
def test_options_that_llama_cpp_does_not_compute_are_named(
    options: dict[str, Any], found: str, expected: str
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        architecture_of(a_config(**options), "qwen3")
    assert (caught.value.found, caught.value.expected) == (found, expected)


def test_values_beyond_float16_are_rejected() -> None:
    student = a_student(a_config())
    with torch.no_grad():
        student.layers[1].mlp.up_proj.weight[3, 4] = -7e4
    check_writable(of(student), ("f32",))
    with pytest.raises(GgufError) as caught:
        check_writable(of(student), ("f32", "q8_0"))
    assert str(caught.value) == (
        "layers.1.mlp.up_proj.weight has values up to 70000, beyond what q8_0 can store\n"
        "  expected: values up to 65504, or the type f32"
    )


def test_a_tokenizer_of_another_size_is_rejected(tmp_path: Path, tokenizer: Tokenizer) -> None:
    metadata = gguf_metadata(TextTokenizer.of_student(tokenizer), vocab_size=329)
    with pytest.raises(VocabularyMismatchError) as caught:
        write(tmp_path / "model.gguf", of(a_student(a_config())), metadata)
    assert caught.value.found == "the tokenizer's metadata has 329 tokens, the embedding 330 rows"
