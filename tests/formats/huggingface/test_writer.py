"""Writing Hugging Face directories: transformers gives the logits of the model, and reading gives the model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tests.formats.huggingface.test_reader import OPTIONS, a_model, some_ids

from coremill.core.config import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from coremill.core.contract import ModelArch, TokenizerRef
from coremill.core.digest import file_digest
from coremill.core.errors import CheckpointContentError, OutputError, UnsupportedModelError
from coremill.formats.huggingface.writer import TokenIds, architecture_of, write_huggingface
from coremill.formats.weights import open_weights
from coremill.model.checkpoint import Checkpoint, build_student
from coremill.model.student import parameter_shapes

torch.set_num_threads(1)

TOKENS = TokenIds(bos=1, eos=(2,), pad=0)


def a_config(**options: Any) -> ModelConfig:
    sizes = {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40}
    arch = ModelArch(use_halt_head=options.pop("halt_head", False), tie_embeddings=options.pop("tied", False))
    return ModelConfig(**{**sizes, "max_seq_len": 64, "arch": arch, **options})


def a_checkpoint(config: ModelConfig, model_type: str = "toy", *, seed: int = 5, scale: float = 0.15) -> Checkpoint:
    """Every parameter has an effect: no bias is 0, no norm is 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        value = torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else scale)
        tensors[name] = value + 1 if name.endswith("norm.weight") else value
    return Checkpoint(
        model_type=model_type,
        model_arch=config.arch,
        config=config,
        step=0,
        tokenizer=TokenizerRef(vocab_size=config.vocab_size, digest="sha256:0"),
        state_dict=tensors,
    )


def check_logits(folder: Path, checkpoint: Checkpoint) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = some_ids()
    with torch.no_grad():
        found, expected = model(ids).logits, build_student(checkpoint)(ids)[0]
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("option", OPTIONS)
def test_reading_gives_the_checkpoint_and_transformers_its_logits(tmp_path: Path, option: str) -> None:
    architecture, options = OPTIONS[option]
    a_model(architecture, **options).save_pretrained(tmp_path / "given")
    given_weights = open_weights(tmp_path / "given")
    checkpoint = Checkpoint(
        model_type=given_weights.model_type,
        model_arch=given_weights.config.arch,
        config=given_weights.config,
        step=0,
        tokenizer=TokenizerRef(vocab_size=96, digest="sha256:0"),
        state_dict=dict(given_weights.read()),
    )
    write_huggingface(tmp_path / "written", checkpoint, dtype="float32", tokens=TOKENS)
    written = open_weights(tmp_path / "written")
    assert (written.config, written.model_type) == (checkpoint.config, checkpoint.model_type)
    found = dict(written.read())
    assert found.keys() == checkpoint.state_dict.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, checkpoint.state_dict[name]), name
    check_logits(tmp_path / "written", checkpoint)


SCALINGS: tuple[RopeScaling | None, ...] = (
    None,
    LinearScaling(factor=3.0),
    Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16),
    YarnScaling(
        factor=4.0, original_max_seq_len=16, beta_fast=4.0, beta_slow=0.5, attention_factor=1.3, truncate=False
    ),
    FrequencyFactors(factors=(1.0, 1.5, 4.0, 8.0)),
)


@pytest.mark.parametrize("spelling", ["version 4 and 5", "version 5", "version 4"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: type(scaling).__name__)
def test_rope_names_of_either_version_give_the_logits(
    tmp_path: Path, scaling: RopeScaling | None, spelling: str
) -> None:
    checkpoint = a_checkpoint(a_config(rope_theta=500.0, rope_scaling=scaling))
    write_huggingface(tmp_path, checkpoint, dtype="float32", tokens=TOKENS)
    values = json.loads((tmp_path / "config.json").read_text())
    unread = {"version 5": ("rope_theta", "rope_scaling"), "version 4": ("rope_parameters",)}.get(spelling, ())
    (tmp_path / "config.json").write_text(json.dumps({key: values[key] for key in values if key not in unread}))
    check_logits(tmp_path, checkpoint)
    if not isinstance(scaling, FrequencyFactors):  # the reader rejects LongRoPE
        assert open_weights(tmp_path).config == checkpoint.config


@given(
    st.fixed_dictionaries(
        {
            "attention_bias": st.sampled_from(["none", "qkv", "qkvo"]),
            "mlp_bias": st.booleans(),
            "qk_norm": st.booleans(),
            "head_size": st.sampled_from([None, 6, 10]),
            "n_kv_heads": st.sampled_from([1, 2, 4]),
            "tied": st.booleans(),
            "halt_head": st.booleans(),
            "rope_scaling": st.sampled_from(SCALINGS[:-1]),
            "rope_theta": st.sampled_from([10_000.0, 1e5, 123.25]),
            "norm_eps": st.sampled_from([1e-5, 1e-6, 0.02]),
        }
    ),
    st.sampled_from(["magic-8-ball", "llama", "mistral", "qwen2", "qwen3"]),
)
@settings(max_examples=40)
def test_every_model_is_written_completely_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], model_type: str
) -> None:
    folder = tmp_path_factory.mktemp("written")
    checkpoint = a_checkpoint(a_config(**options), model_type)
    unfit = options["attention_bias"] == "qkv", options["mlp_bias"], options["qk_norm"]
    if sum(unfit) > 1:
        with pytest.raises(UnsupportedModelError, match=r"^no class of transformers computes a model with `"):
            write_huggingface(folder, checkpoint, dtype="float32", tokens=TOKENS)
        assert not list(folder.iterdir())
        return
    write_huggingface(folder, checkpoint, dtype="float32", tokens=TOKENS)
    written = open_weights(folder)
    config = checkpoint.config
    assert written.config == a_config(**{**options, "halt_head": False})
    tensors = dict(written.read())
    assert tensors.keys() == checkpoint.state_dict.keys() - {"halt_head.weight"}
    assert all(torch.equal(tensor, checkpoint.state_dict[name]) for name, tensor in tensors.items())
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        architecture_of(config, model_type)
    ]


@pytest.mark.parametrize(
    ("options", "model_type", "architecture"),
    [
        ({}, "magic-8-ball", "LlamaForCausalLM"),
        ({}, "mistral", "MistralForCausalLM"),
        ({"mlp_bias": True}, "mistral", "LlamaForCausalLM"),
        ({}, "qwen2", "LlamaForCausalLM"),
        ({"attention_bias": "qkv"}, "llama", "Qwen2ForCausalLM"),
        ({"attention_bias": "qkvo"}, "toy", "LlamaForCausalLM"),
        ({"qk_norm": True, "attention_bias": "qkvo"}, "toy", "Qwen3ForCausalLM"),
        ({"n_heads": 6, "n_kv_heads": 3, "head_size": 8}, "llama", "MistralForCausalLM"),
    ],
)
def test_class_computes_the_model(
    tmp_path: Path, options: dict[str, Any], model_type: str, architecture: str
) -> None:
    checkpoint = a_checkpoint(a_config(**options), model_type)
    assert architecture_of(checkpoint.config, model_type) == architecture
    write_huggingface(tmp_path, checkpoint, dtype="float32", tokens=TOKENS)
    check_logits(tmp_path, checkpoint)


@pytest.mark.parametrize(
    ("options", "model_type", "own"),
    [
        ({"mlp_bias": True}, "llama", {"attention_bias": False, "mlp_bias": True}),
        ({}, "mistral", {"sliding_window": None}),
        ({"attention_bias": "qkv"}, "qwen2", {"use_sliding_window": False}),
        ({"qk_norm": True}, "qwen3", {"attention_bias": False, "use_sliding_window": False}),
    ],
)
def test_every_class_attends_to_the_whole_context(
    tmp_path: Path, options: dict[str, Any], model_type: str, own: dict[str, Any]
) -> None:
    """A missing key has transformers' default, a window of 4096 for Mistral."""
    write_huggingface(tmp_path, a_checkpoint(a_config(**options), model_type), dtype="float32", tokens=TOKENS)
    names = ("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window")
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in names if name in written} == own
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert getattr(config, "sliding_window", None) is None
    assert set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}


def test_tensors_are_aligned_to_eight_bytes(tmp_path: Path) -> None:
    """Readers map tensors into memory, so the header is padded."""
    lengths = set()
    for size in (8, 64, 512, 4096):
        write_huggingface(tmp_path, a_checkpoint(a_config(vocab_size=size)), dtype="float32", tokens=TOKENS)
        data = (tmp_path / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        assert length % 8 == 0
        lengths.add(len(data[8 : 8 + length].rstrip(b" ")) % 8)
    assert len(lengths) > 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"qk_norm": True, "mlp_bias": True}, "`mlp_bias` and `qk_norm`"),
        ({"qk_norm": True, "attention_bias": "qkv"}, "`attention_bias` qkv and `qk_norm`"),
        ({"mlp_bias": True, "attention_bias": "qkv"}, "`attention_bias` qkv and `mlp_bias`"),
        (
            {"attention_bias": "qkvo", "n_heads": 6, "n_kv_heads": 3, "head_size": 8},
            "`attention_bias` qkvo and `d_model` 32, not a multiple of `n_heads` 6",
        ),
    ],
)
def test_options_that_no_class_computes_are_named(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        write_huggingface(tmp_path, a_checkpoint(a_config(**options)), dtype="float32", tokens=TOKENS)
    assert str(caught.value) == (
        f"no class of transformers computes a model with {named}\n"
        "  expected: the options of one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    )
    assert not list(tmp_path.iterdir())


def test_config_json_of_a_toy(tmp_path: Path) -> None:
    config = a_config(tied=True, halt_head=True)
    write_huggingface(tmp_path, a_checkpoint(config), dtype="bfloat16", tokens=TokenIds(bos=1, eos=(2, 7), pad=0))
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
        "pad_token_id": 0,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(TokenIds(None, (), None), (None, None, None)), (TokenIds(4, (5,), 6), (4, 5, 6))],
)
def test_transformers_reads_the_token_ids(
    tmp_path: Path, tokens: TokenIds, expected: tuple[int | None, ...]
) -> None:
    write_huggingface(tmp_path, a_checkpoint(a_config()), dtype="float32", tokens=tokens)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_to_nearest(tmp_path: Path, dtype: Any) -> None:
    checkpoint = a_checkpoint(a_config(tied=True))
    returned = write_huggingface(tmp_path, checkpoint, dtype=dtype, tokens=TOKENS)
    source = open_weights(tmp_path)
    assert source.dtypes == ({"float16": "F16", "bfloat16": "BF16"}[dtype],)
    for name, tensor in source.read():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, checkpoint.state_dict[name].to(tensor.dtype))
        assert torch.equal(tensor, returned[name])
    assert transformers.AutoConfig.from_pretrained(tmp_path).dtype == getattr(torch, dtype)


def test_value_beyond_float16_is_rejected(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(a_config())
    checkpoint.state_dict["norm.weight"][3:5] = torch.tensor([-1e5, 65520.0])
    with pytest.raises(CheckpointContentError) as caught:
        write_huggingface(tmp_path, checkpoint, dtype="float16", tokens=TOKENS)
    assert str(caught.value) == (
        "norm.weight: 2 values exceed the range of float16, the largest is 100000\n"
        "  expected: values up to 65504; or `dtype` bfloat16 or float32"
    )
    assert not list(tmp_path.iterdir())
    write_huggingface(tmp_path, checkpoint, dtype="bfloat16", tokens=TOKENS)


def test_half_precision_is_written_as_float32_without_loss(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(a_config())
    half = {name: tensor.to(torch.bfloat16) for name, tensor in checkpoint.state_dict.items()}
    checkpoint = Checkpoint(**{**vars(checkpoint), "state_dict": half})
    write_huggingface(tmp_path, checkpoint, dtype="float32", tokens=TOKENS)
    for name, tensor in open_weights(tmp_path).read():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, half[name].float())


def test_equal_checkpoints_give_equal_bytes(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(a_config())
    backwards = Checkpoint(**{**vars(checkpoint), "state_dict": dict(reversed(checkpoint.state_dict.items()))})
    # Views of one storage, and one that is not contiguous.
    shared = torch.cat([tensor.flatten() for tensor in checkpoint.state_dict.values()])
    sizes = [tensor.numel() for tensor in checkpoint.state_dict.values()]
    views = {
        name: part.view(tensor.shape)
        for (name, tensor), part in zip(checkpoint.state_dict.items(), shared.split(sizes), strict=True)
    }
    views["embed_tokens.weight"] = views["embed_tokens.weight"].T.contiguous().T
    viewed = Checkpoint(**{**vars(checkpoint), "state_dict": views})
    digests = []
    for number, each in enumerate((checkpoint, backwards, viewed)):
        folder = tmp_path / str(number)
        write_huggingface(folder, each, dtype="float32", tokens=TOKENS)
        digests.append([file_digest(folder / name) for name in ("config.json", "model.safetensors")])
    assert digests[0] == digests[1] == digests[2]
    with safe_open(tmp_path / "0" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {"model.layers.1.self_attn.q_proj.weight", "lm_head.weight"} <= set(file.keys())


def test_directory_at_the_path_of_a_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OutputError, match=r"model\.safetensors is not a regular file"):
        write_huggingface(tmp_path, a_checkpoint(a_config()), dtype="float32", tokens=TOKENS)
