"""GGUF files written by the `gguf` package: weights and logits match; broken files are rejected."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coremill.core.config import FrequencyFactors, LinearScaling, RopeScaling, YarnScaling
from coremill.core.errors import (
    CheckpointContentError,
    CheckpointUnreadableError,
    CoremillError,
    UnsupportedModelError,
)
from coremill.formats.gguf.reader import from_interleaved
from coremill.formats.gguf_file import GgufFile, Value
from coremill.formats.weights import GgufWeights, open_weights
from coremill.model.student import Student

Kind = gguf.GGMLQuantizationType

SIZES: dict[str, int] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def a_model(architecture: str, **options: Any) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **options})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                centre = 1.0 if name.endswith("norm.weight") else 0.0
                parameter.normal_(centre, 0.3 if parameter.dim() == 1 else 0.12)
    return model


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of Q and K in the order of llama.cpp's conversion."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write(
    path: Path, model: transformers.PreTrainedModel, kind: Kind = Kind.F32, **keys: Value | np.ndarray
) -> Path:
    """The model as a GGUF file; matrices as `kind`, vectors in float32. `keys` add to the metadata."""
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    for key, value in {**{f"{arch}.{key}": value for key, value in values.items()}, **keys}.items():
        add(writer, key, value)
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            value = permuted(value, heads)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        as_kind = kind if value.ndim == 2 else Kind.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(value, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Value | np.ndarray) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, np.ndarray):
        writer.add_tensor(key, value)
    else:
        writer.add_array(key, value)


def gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def opened(path: Path) -> GgufWeights:
    source = open_weights(path)
    assert isinstance(source, GgufWeights)
    return source


def student_of(source: GgufWeights) -> Student:
    student = Student(source.config).eval()
    student.load_state_dict(dict(source.read()))
    return student


def check_same(model: transformers.PreTrainedModel, path: Path) -> GgufWeights:
    source = opened(path)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, (found,) = model(ids).logits, student_of(source)(ids)
    assert expected.std() > 0.4
    assert (expected - found).abs().max() <= 1e-5
    assert torch.equal(expected.argmax(-1), found.argmax(-1))
    return source


MODELS = {
    "llama": ("Llama", {}, {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, {}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama-head-size": (
        "Llama",
        {"head_dim": 32},
        {
            "llama.attention.key_length": 32,
            "llama.attention.value_length": 32,
            "llama.rope.dimension_count": 32,
        },
    ),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    ),
    "qwen2": ("Qwen2", {}, {}),
    "qwen2-yarn": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 1e4,
            }
        },
        {
            "qwen2.rope.scaling.type": "yarn",
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 16,
        },
    ),
    "qwen3": (
        "Qwen3",
        {"head_dim": 32, "tie_word_embeddings": True},
        {"qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_transformers(tmp_path: Path, name: str) -> None:
    architecture, options, keys = MODELS[name]
    model = a_model(architecture, **options)
    source = check_same(model, write(tmp_path / "model.gguf", model, **keys))
    assert source.model_type == architecture.lower()
    assert source.dtypes == ("F32",)


def test_llama3_scaling_is_read_from_factors(tmp_path: Path) -> None:
    """llama.cpp's conversion writes Llama 3.1's rule as a divisor of each frequency."""
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 1e4,
    }
    model = a_model("Llama", rope_parameters=rope)
    plain = 1e4 ** -(np.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq.double().numpy()).astype(np.float32)
    assert factors.max() == 8.0
    source = check_same(model, write(tmp_path / "model.gguf", model, **{"rope_freqs.weight": factors}))
    assert source.config.rope_scaling == FrequencyFactors(factors=tuple(factors.tolist()))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_every_type_is_read_as_the_gguf_package_stores_it(tmp_path: Path, kind: Kind) -> None:
    model = a_model("Llama")
    source = opened(write(tmp_path / "model.gguf", model, kind))
    assert source.dtypes == (kind.name, "F32")
    read = dict(source.read())
    kept = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    for name, tensor in read.items():
        value = model.state_dict()[name if name == "lm_head.weight" else f"model.{name}"].numpy()
        if value.ndim == 2:
            assert tensor.dtype == kept, name
            value = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
        assert np.array_equal(tensor.float().numpy(), value), name
    assert source.size_bytes == sum(tensor.nbytes for tensor in read.values())


def test_a_tensor_dequantised_in_parts_equals_one_dequantised_at_once(tmp_path: Path) -> None:
    model = a_model("Llama", vocab_size=9000)  # the embedding takes more than one part
    path = write(tmp_path / "model.gguf", model, Kind.Q4_0)
    reader = gguf.GGUFReader(path)
    file = GgufFile(path)
    assert len(reader.tensors) == len(file.tensors) == 21
    for tensor in reader.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(file.dequantized(tensor.name), expected), tensor.name


def test_metadata_equals_what_the_gguf_package_reads(tmp_path: Path) -> None:
    keys = {
        "a.flag": True,
        "a.text": "Ünïcode",
        "a.list": ["one", "", "漢字"],
        "a.numbers": [1, -2, 3],
        "a.half": 0.5,
    }
    path = write(tmp_path / "model.gguf", a_model("Llama"), **keys)
    found = GgufFile(path).metadata
    expected = gguf.GGUFReader(path).fields
    assert [key for key in expected if not key.startswith("GGUF.")] == list(found)
    for key, value in found.items():
        contents = expected[key].contents()
        assert value == (float(str(np.float32(contents))) if isinstance(contents, float) else contents), key
    assert found["llama.attention.layer_norm_rms_epsilon"] == 1e-6  # and not 9.999999974752427e-07


@settings(max_examples=30, deadline=None)
@given(heads=st.integers(1, 5), half=st.integers(1, 6), columns=st.integers(0, 4))
def test_the_permutation_is_undone(heads: int, half: int, columns: int) -> None:
    shape = (heads * half * 2, *([columns] if columns else []))  # a weight or a bias
    value = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    there = torch.from_numpy(permuted(value.numpy(), heads).copy())
    assert torch.equal(from_interleaved(there, heads), value)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"llama.rope.scaling.factor": 4.0}, LinearScaling(factor=4.0)),
        ({"llama.rope.scale_linear": 2.0}, LinearScaling(factor=2.0)),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, None),
        ({"rope_freqs.weight": np.ones(8, dtype=np.float32)}, None),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.attn_factor": 0.5,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
                "llama.rope.scaling.yarn_beta_slow": 2.0,
            },
            YarnScaling(
                factor=2.0,
                original_max_seq_len=64,
                beta_fast=16.0,
                beta_slow=2.0,
                attention_factor=0.5 * 1.0693147180559945,  # 0.1 ln 2 + 1
            ),
        ),
    ],
)
def test_scalings_are_read_as_llama_cpp_reads_them(
    tmp_path: Path, keys: dict[str, Value], expected: RopeScaling | None
) -> None:
    assert opened(write(tmp_path / "model.gguf", a_model("Llama"), **keys)).config.rope_scaling == expected


# --- errors --------------------------------------------------------------------------------


def refusal(path: Path, kind: type[CoremillError]) -> str:
    with pytest.raises(CoremillError) as caught:
        open_weights(path)
    assert type(caught.value) is kind
    assert caught.value.expected
    return caught.value.found


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"general.architecture": "gemma2"}, "the architecture 'gemma2'"),
        ({"general.type": "adapter"}, "a GGUF file of type 'adapter'"),
        ({"split.count": 3}, "one of 3 parts of a model"),
        ({"llama.expert_count": 8}, "a mixture of 8 experts"),
        (
            {"llama.attention.sliding_window": 32},
            "a sliding window of 32 positions in a context of 64",
        ),
        ({"llama.rope.dimension_count": 8}, "RoPE on 8 of a head's 16 dimensions"),
        ({"llama.attention.value_length": 8}, "heads of 16 for keys and 8 for values"),
        ({"llama.rope.scaling.type": "longrope"}, "RoPE scaling 'longrope'"),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale is set, which coremill does not support"),
    ],
)
def test_an_unsupported_option_is_named(tmp_path: Path, keys: dict[str, Value], found: str) -> None:
    path = write(
        tmp_path / "model.gguf", a_model("Llama"), **{k: v for k, v in keys.items() if k[:8] != "general."}
    )
    if architecture := keys.get("general.architecture"):
        rename_value(path, "llama", architecture)
    if kind := keys.get("general.type"):
        path = write(tmp_path / "other.gguf", a_model("Llama"), **{"general.type": kind})
    assert refusal(path, UnsupportedModelError) == f"{path}: {found}"


def rename_value(path: Path, old: str, new: str) -> None:
    """Replace the value of general.architecture; the padding before the tensors absorbs the change in length."""
    data = path.read_bytes()
    key = b"general.architecture" + struct.pack("<I", 8)
    start = data.index(key) + len(key)
    end = start + 8 + len(old)
    header = GgufFile(path)
    first = min(tensor.start for tensor in header.tensors.values())
    changed = data[:start] + struct.pack("<Q", len(new)) + new.encode() + data[end:first]
    changed = changed.rstrip(b"\0")
    changed += bytes(first - len(changed)) if len(changed) <= first else bytes(first + 32 - len(changed))
    path.write_bytes(changed + data[first:])


def test_a_type_that_cannot_be_dequantised_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", a_model("Llama"), **{"rope_freqs.weight": np.ones(8, np.int32)})
    assert refusal(path, UnsupportedModelError) == (
        f"{path}: rope_freqs.weight is of type I32, which the gguf package does not dequantise"
    )


def test_the_error_for_an_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", a_model("Llama"))
    rename_value(path, "llama", "phi3")
    with pytest.raises(UnsupportedModelError) as caught:
        open_weights(path)
    assert str(caught.value) == (
        f"{path}: the architecture 'phi3'\n  expected: a GGUF file of one of the architectures llama, qwen2, qwen3"
    )


def test_the_error_for_a_truncated_file_names_the_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", a_model("Llama"))
    file = GgufFile(path)
    last = max(file.tensors, key=lambda name: file.tensors[name].start)
    end = file.tensors[last].start + file.tensors[last].size_bytes
    path.write_bytes(path.read_bytes()[: end - 1])
    assert refusal(path, CheckpointUnreadableError) == (
        f"{path} is truncated: {last} ends at byte {end} of a file of {end - 1}"
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tokens = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1]}
    path = write(tmp_path_factory.mktemp("small") / "model.gguf", a_model("Llama"), **tokens)
    return path.read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_truncated_anywhere_is_rejected(small: bytes, tmp_path: Path, share: float) -> None:
    path = tmp_path / "part.gguf"
    data = small.rstrip(b"\0")  # the padding at the end may be missing
    path.write_bytes(data[: int(len(data) * share)])
    refusal(path, CheckpointUnreadableError)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_read_or_rejected(small: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever a byte of the header is, the file is read or rejected at once, with one of our errors."""
    damaged = bytearray(small)
    damaged[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        open_weights(path)
    except CoremillError as error:
        assert str(path) in error.found  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "is empty"),
        (b"GG", "is not a GGUF file: it begins with b'GG'"),
        (b"these are not weights", "is not a GGUF file: it begins with b'thes'"),
        (b"GGUF" + struct.pack("<I", 1), "is of GGUF version 1"),
        (b"GGUF" + struct.pack(">I", 3), "is of GGUF version 50331648 (or big-endian)"),
        (b"GGUF" + struct.pack("<IQ", 3, 5), "is truncated: 16 bytes end within its header"),
    ],
)
def test_a_file_of_another_format_is_rejected(tmp_path: Path, data: bytes, found: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert refusal(path, CheckpointUnreadableError) == f"{path} {found}"


def test_a_list_longer_than_the_file_is_rejected_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**62)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
    assert refusal(path, CheckpointUnreadableError) == f"{path} is truncated: 49 bytes end within its header"


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.gguf", CheckpointUnreadableError) == f"there is no {tmp_path}/none.gguf"


def test_shapes_that_contradict_the_metadata_are_rejected(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", a_model("Llama"), **{"llama.feed_forward_length": 128})
    assert refusal(path, CheckpointContentError) == (
        f"{path}: layers.0.mlp.gate_proj.weight has shape (96, 64), and the configuration requires (128, 64)"
    )


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (
            {"llama.block_count": 3},
            "layers.2.input_layernorm.weight, layers.2.self_attn.q_proj.weight, layers.2.self_attn.k_proj.weight "
            "and 6 more are missing",
        ),
        ({"llama.block_count": 2**31}, "21 tensors, fewer than 2147483648 layers"),
        ({"llama.embedding_length": "64"}, "llama.embedding_length is '64'"),
        ({"llama.attention.head_count": 0}, "`n_heads` must be positive, found 0"),
        ({"llama.attention.head_count": [4, 4]}, "llama.attention.head_count is [4, 4]"),
        ({"blk.0.extra.weight": np.ones(4, np.float32)}, "blk.0.extra.weight is not part of the model"),
    ],
)
def test_invalid_metadata_is_rejected(tmp_path: Path, keys: dict[str, Value], found: str) -> None:
    path = write(tmp_path / "model.gguf", a_model("Llama"), **keys)
    assert refusal(path, CheckpointContentError).startswith(f"{path}: {found}")
