"""Reading Hugging Face directories: logits equal those of transformers; broken ones are rejected."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from coremill.core.contract import TokenizerRef
from coremill.core.errors import (
    CheckpointContentError,
    CheckpointUnreadableError,
    CoremillError,
    DocumentError,
    UnsafeCheckpointError,
    UnsupportedModelError,
)
from coremill.formats.huggingface.reader import FAMILIES, HuggingFaceWeights
from coremill.formats.weights import open_weights
from coremill.model.checkpoint import Checkpoint, build_student, load_checkpoint, save_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def a_model(architecture: str, **options: Any) -> transformers.PreTrainedModel:
    """A random model of transformers in which every parameter has an effect: no bias is 0, no norm is 1."""
    model_type = architecture.removesuffix("ForCausalLM")
    config = getattr(transformers, f"{model_type}Config")(**{**SIZES, **options})
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = getattr(transformers, architecture)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
                else:
                    parameter.normal_(0.0, 0.15)
    return model


def import_checkpoint(folder: Path) -> tuple[HuggingFaceWeights, Checkpoint]:
    """Import the directory into a checkpoint, and load that."""
    source = open_weights(folder)
    assert isinstance(source, HuggingFaceWeights)
    ckpt = Checkpoint(
        model_type=source.model_type,
        model_arch=source.config.arch,
        config=source.config,
        step=0,
        tokenizer=TokenizerRef(vocab_size=source.config.vocab_size, digest="sha256:0"),
        state_dict=dict(source.read()),
    )
    save_checkpoint(folder / "imported.ckpt", ckpt)
    return source, load_checkpoint(folder / "imported.ckpt")


def some_ids(length: int = 48) -> torch.Tensor:
    return torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(3))


def check_same(model: transformers.PreTrainedModel, folder: Path) -> HuggingFaceWeights:
    source, ckpt = import_checkpoint(folder)
    ids = some_ids()
    with torch.no_grad():
        expected, (found,) = model(ids).logits, build_student(ckpt)(ids)
    assert expected.std() > 0.4
    assert (expected - found).abs().max() <= 1e-5
    assert torch.equal(expected.argmax(-1), found.argmax(-1))
    return source


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "attention-bias": ("LlamaForCausalLM", {"attention_bias": True}),
    "mlp-bias": ("LlamaForCausalLM", {"mlp_bias": True}),
    "head-size": ("LlamaForCausalLM", {"head_dim": 12}),
    "no-groups": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "eps": ("LlamaForCausalLM", {"rms_norm_eps": 0.05}),
    "theta": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    "linear": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "dynamic": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}},
    ),
    "llama3": ("LlamaForCausalLM", {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}}),
    "yarn": ("LlamaForCausalLM", {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
    "yarn-mscale": (
        "LlamaForCausalLM",
        {"rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 1.5, "mscale_all_dim": 0.5}},
    ),
    "yarn-all": (
        "LlamaForCausalLM",
        {
            "head_dim": 16,
            "rope_parameters": {
                **YARN,
                "rope_theta": 500.0,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "attention_factor": 1.3,
                "truncate": False,
            },
        },
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-wide-window": ("MistralForCausalLM", {"sliding_window": 64, "head_dim": 16}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-inactive-window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "qwen3-bias-yarn": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 16,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN, "rope_theta": 1e4},
        },
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_equal_those_of_transformers(tmp_path: Path, option: str) -> None:
    architecture, options = OPTIONS[option]
    model = a_model(architecture, **options)
    model.save_pretrained(tmp_path)
    source = check_same(model, tmp_path)
    assert source.model_type == architecture.removesuffix("ForCausalLM").lower()
    assert source.dtypes == ("F32",)


@pytest.mark.parametrize(
    "option", [option for option, (_, options) in OPTIONS.items() if "rope_parameters" in options]
)
def test_names_of_version_4_give_the_same_config(tmp_path: Path, option: str) -> None:
    architecture, options = OPTIONS[option]
    model = a_model(architecture, **options)
    model.save_pretrained(tmp_path)
    new = open_weights(tmp_path).config

    def respell(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}

    change_config(tmp_path, respell)
    assert open_weights(tmp_path).config == new
    # transformers reads those names too.
    reread = getattr(transformers, architecture).from_pretrained(tmp_path).eval()
    check_same(reread, tmp_path)


@pytest.mark.parametrize("option", [{"sliding_window": 8}, {"attention_chunk_size": 8}])
def test_llama_with_a_window_contradicts_itself_in_transformers(option: dict[str, int]) -> None:
    """Why these options are rejected: with a cache, later tokens do not attend to the first ones."""
    model = a_model("LlamaForCausalLM", **option)
    with torch.no_grad():
        at_once = model(some_ids()).logits
        head = model(some_ids()[:, :40], use_cache=True)
        continued = model(some_ids()[:, 40:], past_key_values=head.past_key_values).logits
    assert torch.allclose(at_once[:, :40], head.logits, atol=1e-5)
    assert (at_once[:, 40:] - continued).abs().max() > 0.1


def test_options_change_the_logits(tmp_path: Path) -> None:
    """If both sides ignored an option, their logits would still be equal."""
    seen = []
    for option in ("llama", "theta", "linear", "llama3", "yarn", "yarn-mscale", "eps"):
        architecture, options = OPTIONS[option]
        model = a_model(architecture, **options)
        with torch.no_grad():
            seen.append(model(some_ids()).logits)
    for one, other in itertools.combinations(seen, 2):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors_keep_their_type(tmp_path: Path, dtype: torch.dtype) -> None:
    a_model("Qwen3ForCausalLM", head_dim=16).to(dtype).save_pretrained(tmp_path)
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    source = check_same(reread, tmp_path)
    assert source.dtypes == ({torch.bfloat16: "BF16", torch.float16: "F16"}[dtype],)
    _, ckpt = import_checkpoint(tmp_path)
    assert {tensor.dtype for tensor in ckpt.state_dict.values()} == {dtype}
    assert source.size_bytes == 2 * sum(tensor.numel() for tensor in ckpt.state_dict.values())


def test_shards_are_combined(tmp_path: Path) -> None:
    model = a_model("LlamaForCausalLM")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    source = check_same(model, tmp_path)
    assert [path.name for path in source.files] == ["config.json", *shards]


def reread(folder: Path) -> transformers.PreTrainedModel:
    """The model that transformers reads from the directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def two_sets(folder: Path) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel]:
    """Write a model in shards, and another one next to them in one file; return both."""
    sharded, whole = a_model("LlamaForCausalLM"), a_model("LlamaForCausalLM")
    with torch.no_grad():
        sharded.model.embed_tokens.weight.mul_(-1)
    sharded.save_pretrained(folder, max_shard_size="20KB")
    whole.save_pretrained(folder / "new")
    (folder / "new" / "model.safetensors").rename(folder / "model.safetensors")
    return sharded, whole


def test_one_file_is_read_before_shards(tmp_path: Path) -> None:
    _, whole = two_sets(tmp_path)
    assert torch.equal(reread(tmp_path).model.embed_tokens.weight, whole.model.embed_tokens.weight)
    source = check_same(whole, tmp_path)
    assert source.files == (tmp_path / "config.json", tmp_path / "model.safetensors")
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert source.notes == (
        f"the weights are those of model.safetensors, as in transformers; ignored: {', '.join(shards[:4])} "
        f"and {len(shards) - 3} more",  # the index too
    )


def test_config_names_the_weights_that_are_read(tmp_path: Path) -> None:
    sharded, whole = two_sets(tmp_path)
    index = "model.safetensors.index.json"
    change_config(tmp_path, lambda config: config.update(transformers_weights=index))
    assert torch.equal(reread(tmp_path).model.embed_tokens.weight, sharded.model.embed_tokens.weight)
    source = check_same(sharded, tmp_path)
    assert source.notes == (f"the weights are those of {index}, as in transformers; ignored: model.safetensors",)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    change_config(tmp_path, lambda config: config.update(transformers_weights="other.safetensors"))
    assert torch.equal(reread(tmp_path).model.embed_tokens.weight, whole.model.embed_tokens.weight)
    check_same(whole, tmp_path)
    change_config(tmp_path, lambda config: config.update(transformers_weights="absent.safetensors"))
    with pytest.raises(OSError, match="absent"):
        reread(tmp_path)
    assert refusal(tmp_path, CheckpointUnreadableError).startswith(
        f"{tmp_path} has its weights only in model-00001-"
    )
    change_config(tmp_path, lambda config: config.update(transformers_weights="../model.safetensors"))
    assert refusal(tmp_path, DocumentError) == (
        f"{tmp_path}/config.json: `transformers_weights` is '../model.safetensors'"
    )


def test_index_without_its_shards_is_ignored_beside_one_file(tmp_path: Path) -> None:
    a_model("LlamaForCausalLM").save_pretrained(tmp_path, max_shard_size="20KB")
    model = a_model("LlamaForCausalLM", rms_norm_eps=0.05)
    model.save_pretrained(tmp_path)  # removes the shards, and leaves their index
    assert not list(tmp_path.glob("model-*"))
    source = check_same(reread(tmp_path), tmp_path)
    assert source.notes == (
        "the weights are those of model.safetensors, as in transformers; ignored: model.safetensors.index.json",
    )


def test_variants_and_pickles_beside_the_weights_are_ignored(saved: Path) -> None:
    others = ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin"]
    for name in (*others, "training_args.bin"):
        (saved / name).write_bytes(b"")
    source = check_same(reread(saved), saved)
    assert source.notes == (
        f"the weights are those of model.safetensors, as in transformers; ignored: {', '.join(others)}",
    )


def test_weights_that_transformers_does_not_look_for_are_named(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "consolidated.safetensors")
    (saved / "model.gguf").write_bytes(b"")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        reread(saved)
    assert refusal(saved, CheckpointUnreadableError) == (
        f"{saved} has its weights only in consolidated.safetensors, model.gguf"
    )


def test_adapter_beside_the_weights_is_rejected(saved: Path) -> None:
    (saved / "adapter_config.json").write_text("{}")
    assert refusal(saved, UnsupportedModelError) == f"{saved}: an adapter, adapter_config.json"


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("shards", [False, True])
def test_tied_weights_may_be_stored_as_the_head(tmp_path: Path, architecture: str, shards: bool) -> None:
    options = {"sliding_window": None} if architecture == "MistralForCausalLM" else {}
    model = a_model(architecture, tie_word_embeddings=True, **options)
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if shards else {}))
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
            save_file(tensors, path)
    if shards:
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model.embed_tokens.weight", "lm_head.weight"))
    theirs = reread(tmp_path)
    assert torch.equal(theirs.model.embed_tokens.weight, model.model.embed_tokens.weight)
    check_same(theirs, tmp_path)


def test_untied_model_needs_both_ends(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    head, embedding = tensors.pop("lm_head.weight"), tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": head}, saved / "model.safetensors")
    assert refusal(saved, CheckpointContentError) == f"{saved}: embed_tokens.weight is missing"
    save_file({**tensors, "model.embed_tokens.weight": embedding}, saved / "model.safetensors")
    assert refusal(saved, CheckpointContentError) == f"{saved}: lm_head.weight is missing"
    change_config(saved, lambda config: config.update(tie_word_embeddings=True))
    check_same(reread(saved), saved)
    save_file(tensors, saved / "model.safetensors")
    assert refusal(saved, CheckpointContentError) == f"{saved}: embed_tokens.weight is missing"


def rewrite_in_place(path: Path) -> str:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    return "it was rewritten"


def truncate(path: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, size // 2)
    return f"it had {size} bytes and has {size // 2}"


def replace(path: Path) -> str:
    copy = path.with_suffix(".copy")
    shutil.copy2(path, copy)
    copy.rename(path)
    return "another file replaced it"


def remove(path: Path) -> str:
    path.unlink()
    return "it was removed"


@pytest.mark.parametrize("change", [rewrite_in_place, truncate, replace, remove])
@pytest.mark.parametrize("read", [0, 1, 8, 24])
def test_shard_that_changes_while_it_is_read_is_rejected(
    sharded: Path, change: Callable[[Path], str], read: int
) -> None:
    """Before the first tensor, and while tensors of this shard and of others are read."""
    source = open_weights(sharded)
    tensors = source.read()
    for _ in range(read):
        next(tensors)
    shard = sorted(sharded.glob("model-*.safetensors"))[3]
    found = change(shard)
    with pytest.raises(CheckpointUnreadableError) as caught:
        next(tensors)
    assert str(caught.value) == (
        f"{shard} changed while it was read: {found}\n"
        "  expected: files that no other program writes until the import has ended\n"
        f"  run: ls -lL {shard}"
    )
    with pytest.raises(CheckpointUnreadableError, match="changed while it was read"):
        source.check_unchanged()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_configuration_that_changes_is_rejected(sharded: Path, name: str) -> None:
    source = open_weights(sharded)
    (sharded / name).write_text((sharded / name).read_text() + " ")
    with pytest.raises(CheckpointUnreadableError, match=f"{name} changed while it was read: it had "):
        next(source.read())


def test_dynamic_ntk_is_plain_rope_with_a_note(tmp_path: Path) -> None:
    architecture, options = OPTIONS["dynamic"]
    a_model(architecture, **options).save_pretrained(tmp_path)
    source = open_weights(tmp_path)
    assert source.config.rope_scaling is None
    assert source.config.max_seq_len == 64
    assert source.notes == (
        "dynamic NTK scaling equals plain RoPE up to max_position_embeddings, 64, where the imported model's "
        "context ends",
    )


def test_stored_tied_head_must_equal_the_embedding(tmp_path: Path) -> None:
    model = a_model("LlamaForCausalLM", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    check_same(model, tmp_path)
    tensors["lm_head.weight"][95, 31] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert refusal(tmp_path, CheckpointContentError) == (
        f"{tmp_path}: config.json ties lm_head.weight to the embedding, and the two differ"
    )


def test_buffers_of_old_files_are_ignored(tmp_path: Path) -> None:
    model = a_model("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    check_same(model, tmp_path)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_missing_keys_have_the_defaults_of_transformers(tmp_path: Path, architecture: str) -> None:
    heads = {"num_attention_heads": 32, "hidden_size": 64}
    changes = {"LlamaForCausalLM": {}, "MistralForCausalLM": {"sliding_window": None}}.get(architecture, heads)
    kept = {*SIZES, "architectures", "model_type", "sliding_window"} - {"num_key_value_heads"}
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    defaults = {key: value for key, value in SIZES.items() if key in kept} | changes
    model = a_model(architecture, **changes, num_key_value_heads=config(**defaults).num_key_value_heads)
    if architecture == "MistralForCausalLM":  # its default, 8, with as many heads
        model = a_model(architecture, **changes, num_attention_heads=8, num_key_value_heads=8)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, lambda config: [config.pop(key) for key in list(config) if key not in kept])
    check_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tmp_path)


# --- invalid directories --------------------------------------------------------------------------------


def change_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder: Path, kind: type[CoremillError]) -> str:
    with pytest.raises(CoremillError) as caught:
        open_weights(folder)
    assert type(caught.value) is kind
    assert caught.value.expected
    return caught.value.found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    a_model("LlamaForCausalLM").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    a_model("LlamaForCausalLM").save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"architectures": ["SmolLM3ForCausalLM"]}, "the architecture SmolLM3ForCausalLM"),
        ({"architectures": ["MixtralForCausalLM"]}, "the architecture MixtralForCausalLM"),
        ({"architectures": None}, "the architecture None"),
        ({"hidden_act": "gelu"}, "the activation 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "RoPE on 0.5 of each head"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "RoPE on 0.5 of each head"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "RoPE scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, "RoPE scaling 'mrope'"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "RoPE that differs between layers"),
        ({"num_local_experts": 8}, "a mixture of experts, `num_local_experts`"),
        ({"final_logit_softcapping": 30.0}, "soft-capped logits, `final_logit_softcapping`"),
        ({"no_rope_layers": [1, 0]}, "layers without RoPE, `no_rope_layers`"),
        ({"quantization_config": {"bits": 4}}, "quantised weights, `quantization_config`"),
        ({"is_causal": False}, "attention to later positions, `is_causal`"),
        ({"is_causal": None}, "attention to later positions, `is_causal`"),
        ({"attention_chunk_size": 8}, "attention in chunks, `attention_chunk_size`"),
        ({"sliding_window": 32}, "a sliding window of 32 positions in a context of 64"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "a layer of type 'sliding_attention', `layer_types`",
        ),
        ({"rope_parameters": {"full_attention": YARN}}, "RoPE that differs between layers"),
        ({"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}}, "RoPE scaling 'None'"),
        (
            {"per_layer_config": {"0": {"intermediate_size": 56}}},
            "layers with options of their own, `per_layer_config`",
        ),
        (
            {"model_type": "mistral"},
            "the architecture LlamaForCausalLM with `model_type` 'mistral'",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 32},
            "a sliding window of 32 positions in a context of 64",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 32}
            | {"model_type": "qwen2", "max_window_layers": 2},
            "a sliding window of 32 positions in a context of 64",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 32}
            | {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "a sliding window of 32 positions in a context of 64",
        ),
    ],
)
def test_unsupported_option_is_named(saved: Path, change: dict[str, Any], found: str) -> None:
    change_config(saved, lambda config: config.update(change))
    assert refusal(saved, UnsupportedModelError) == f"{saved}/config.json: {found}"


def test_unsupported_architecture_lists_the_supported_ones(saved: Path) -> None:
    change_config(saved, lambda config: config.update(architectures=["GemmaForCausalLM"]))
    with pytest.raises(UnsupportedModelError) as caught:
        open_weights(saved)
    assert str(caught.value) == (
        f"{saved}/config.json: the architecture GemmaForCausalLM\n"
        "  expected: one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "cannot read F/config.json: No such file or directory"),
        ("{", "F/config.json is not JSON: Input data was truncated"),
        ("[]", "F/config.json: found list at `$`"),
    ],
)
def test_unreadable_configuration_is_rejected(saved: Path, text: str | None, found: str) -> None:
    (saved / "config.json").unlink()
    if text is not None:
        (saved / "config.json").write_text(text)
    assert refusal(saved, DocumentError) == found.replace("F", str(saved), 1)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"hidden_size": None}, "`hidden_size` is missing"),
        ({"hidden_size": "32"}, "`hidden_size` is '32'"),
        ({"vocab_size": True}, "`vocab_size` is True"),
        ({"tie_word_embeddings": "no"}, "`tie_word_embeddings` is 'no'"),
        ({"rms_norm_eps": "small"}, "`rms_norm_eps` is 'small'"),
        ({"num_key_value_heads": 3}, "d_model 32, n_heads 4 and n_kv_heads 3 must each be a multiple of the next"),
        ({"num_attention_heads": 0}, "`n_heads` must be positive, found 0"),
        ({"rope_scaling": {"type": "linear"}}, "`factor` is missing"),
        ({"rope_scaling": {"type": "dynamic"}}, "`factor` is missing"),
        ({"rope_scaling": {"type": "yarn"}}, "`factor` is missing"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 16.5}}, "`O` is 16.5"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 16.5}, "`O` is 16.5"),
        ({"rope_parameters": {"rope_theta": None}, "rope_theta": 500.0}, "`rope_theta` is missing"),
        ({"rope_theta": 1e39, "rope_parameters": None}, "`rope_theta` is 1e+39"),
        ({"layer_types": ["full_attention"]}, "`layer_types` is ['full_attention']"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "`factor` must be positive, found -2.0"),
    ],
)
def test_invalid_configuration_is_rejected(saved: Path, change: dict[str, Any], found: str) -> None:
    change_config(saved, lambda config: config.update(change))
    found = found.replace("`O`", "`original_max_position_embeddings`")
    assert refusal(saved, DocumentError) == f"{saved}/config.json: {found}"


def test_missing_shard_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert refusal(sharded, CheckpointUnreadableError) == f"{sharded} lacks {gone.name}"


def test_shard_outside_the_directory_is_rejected(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"] = dict.fromkeys(value["weight_map"], "../elsewhere.safetensors")
    index.write_text(json.dumps(value))
    assert refusal(sharded, DocumentError) == f"{index}: the shard '../elsewhere.safetensors'"


def test_index_that_contradicts_its_shards_is_rejected(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    names = sorted(set(value["weight_map"].values()))
    moved = next(name for name, shard in value["weight_map"].items() if shard == names[0])
    value["weight_map"][moved] = names[1]
    index.write_text(json.dumps(value))
    assert refusal(sharded, CheckpointContentError) == f"{index}: {moved} is not in {names[1]}"


def test_truncated_shard_is_rejected(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert refusal(sharded, CheckpointUnreadableError).startswith(f"{shard} is not a complete safetensors file: ")


def test_tensor_of_another_shape_is_named(saved: Path) -> None:
    change_config(saved, lambda config: config.update(intermediate_size=60))
    assert refusal(saved, CheckpointContentError) == (
        f"{saved}: layers.0.mlp.down_proj.weight has shape (32, 56), and the configuration requires (32, 60)"
    )


def test_missing_and_unexpected_tensors_are_named(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, saved / "model.safetensors")
    assert refusal(saved, CheckpointContentError) == f"{saved}: norm.weight is missing"
    save_file({**tensors, "model.norm.weight": norm, "model.extra": norm.clone()}, saved / "model.safetensors")
    assert refusal(saved, CheckpointContentError) == (f"{saved}: model.extra is not part of the model")
    change_config(saved, lambda config: config.update(num_hidden_layers=10**9))
    assert refusal(saved, CheckpointContentError) == f"{saved}: 31 tensors, fewer than 1000000000 layers"


def test_integer_tensor_is_rejected(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, saved / "model.safetensors")
    assert refusal(saved, UnsupportedModelError) == (f"{saved}/model.safetensors: model.norm.weight is of type I8")


class Payload:
    """Unpickling this runs a command that creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def test_pickle_is_rejected_and_not_executed(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").unlink()
    witness = tmp_path / "executed"
    torch.save({"model.norm.weight": Payload(witness)}, saved / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpointError) as caught:
        open_weights(saved)
    assert str(caught.value) == (
        f"{saved} has its weights only in pytorch_model.bin, pickles that may contain code\n"
        "  expected: model.safetensors, or shards and model.safetensors.index.json; "
        "the pickle was not executed"
    )
    assert not witness.exists()
    pickle.loads(pickle.dumps(Payload(witness)))  # the payload works
    assert witness.exists()


def test_directory_without_weights_is_rejected(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    assert refusal(saved, CheckpointUnreadableError) == f"{saved} contains no weights"


def test_code_in_the_directory_is_not_run(saved: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    (saved / "modeling_own.py").write_text(f"open({str(witness)!r}, 'w')\n")
    change_config(saved, lambda config: config.update(auto_map={"AutoModelForCausalLM": "modeling_own.Own"}))
    source = open_weights(saved)
    dict(source.read())
    assert not witness.exists()
    assert source.notes == ("config.json refers to code (`auto_map`), which is neither read nor run",)
