"""Random combinations of options: the imported model's logits are those of transformers, or the import refuses."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file

from coremill.core.errors import DocumentError, UnsupportedModelError
from coremill.formats.weights import open_weights
from coremill.model.student import Student

ABSENT = "absent"
MAX_SEQ_LEN = 64
IDS = torch.randint(0, 48, (1, MAX_SEQ_LEN), generator=torch.Generator().manual_seed(3))
ODD_SHARE = 0.02
"""How often an option has an odd value; a set has some forty options."""


class Draw:
    """Draws the values of options."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.values: dict[str, Any] = {}

    def put(self, key: str, *usual: Any, odd: tuple[Any, ...] = (), share: float = 1.0) -> None:
        """Set `key` to a usual or, rarely, to an odd value; or leave it absent, always so except in `share`."""
        if odd and self.random.random() < ODD_SHARE:
            value = self.random.choice(odd)
        elif self.random.random() < share:
            value = self.random.choice(usual)
        else:
            value = ABSENT
        if value is not ABSENT:
            self.values[key] = value


def rope(seed: int, *, theta: float) -> Any:
    """RoPE's options, as in `rope_parameters` of version 5 or `rope_scaling` of version 4.

    Args:
        theta: how often `rope_theta` is among them.
    """
    draw = Draw(seed)
    kind = draw.random.choice(["default", "linear", "dynamic", "llama3", "yarn", "yarn"])
    spelling = draw.random.choice(["rope_type", "type", "both"])
    draw.put("rope_type", kind, odd=("longrope", "", None), share=float(spelling != "type"))
    draw.put("type", kind if spelling == "type" else "linear", share=float(spelling != "rope_type"))
    scaled, original = kind != "default", kind in ("llama3", "yarn")
    draw.put("factor", 2.0, 3, 8.0, 1.0, odd=(ABSENT, None, 0.5, -2, "4"), share=1.0 if scaled else 0.2)
    draw.put(
        "original_max_position_embeddings",
        16,
        32,
        64,
        odd=(None, 16.5, 128, 1, "16"),
        share=0.7 if original else 0.1,
    )
    draw.put("low_freq_factor", 1.0, 0.5, odd=(ABSENT, 4.0, 8.0), share=float(kind == "llama3"))
    draw.put("high_freq_factor", 4, 2.5, odd=(ABSENT, 1.0), share=float(kind == "llama3"))
    yarn = 0.5 if kind == "yarn" else 0.05
    draw.put("beta_fast", 32, 4.0, odd=(None, 0, 0.5), share=yarn)
    draw.put("beta_slow", 1, 0.5, odd=(None, 0, 64), share=yarn)
    draw.put("attention_factor", 1.3, 0.7, odd=(None, 0.0), share=yarn / 2)
    draw.put("mscale", 1.0, 0.7, odd=(None, 0, -0.5), share=yarn)
    draw.put("mscale_all_dim", 1.0, 0.5, odd=(None, 0), share=yarn)
    draw.put("truncate", True, False, odd=(None, 0), share=yarn)
    draw.put("rope_theta", 10_000.0, 500.0, 300, odd=(None, 1.0, 0.5, 1e40), share=theta)
    draw.put("partial_rotary_factor", 1.0, odd=(0.5, None), share=0.1)
    return {"full_attention": draw.values} if draw.random.random() < ODD_SHARE else draw.values


def options(family: str, seed: int) -> dict[str, Any]:
    """config.json of a small model of the family."""
    draw = Draw(seed)
    n_heads = draw.random.choice([2, 4, 8])
    draw.values |= {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), "vocab_size": 48}
    draw.values |= {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": n_heads,
    }
    optional = family == "Llama"  # the default of the others is 8 or 32
    draw.put("num_key_value_heads", 1, 2, n_heads, odd=(ABSENT, None, 3), share=0.8 if optional else 1.0)
    draw.put("max_position_embeddings", MAX_SEQ_LEN, odd=(ABSENT,))
    draw.put("head_dim", 4, 8, 16, 6, odd=(None, 5, 3), share=0.9 if family == "Qwen3" else 0.5)
    draw.put("hidden_act", "silu", "swish", odd=("gelu", "relu", None), share=0.5)
    draw.put("rms_norm_eps", 1e-6, 0.05, 1e-12, odd=(0.0, -1e-6), share=0.7)
    draw.put("tie_word_embeddings", True, False, odd=(None,), share=0.7)
    draw.put("attention_bias", True, False, odd=(None, "no"), share=0.4)
    draw.put("mlp_bias", True, False, share=0.4)
    draw.put("qkv_bias", True, False, share=0.1)
    draw.put("attention_dropout", 0.0, 0.5, share=0.5)
    draw.put("rope_theta", 10_000.0, 500.0, 300, odd=(None, 1.0, 0.5, -5.0, "1e4"), share=0.5)
    draw.put("partial_rotary_factor", 1.0, odd=(0.5, None), share=0.1)
    draw.put("original_max_position_embeddings", 16, 32, odd=(16.5, None), share=0.15)
    draw.put("rope_parameters", rope(seed + 1, theta=0.6), {}, None, rope(seed + 2, theta=0.6), share=0.6)
    draw.put("rope_scaling", rope(seed + 3, theta=0.2), {}, None, rope(seed + 4, theta=0.2), share=0.4)
    draw.put("sliding_window", None, 64, 128, 8, odd=(63, 0), share=0.05 if optional else 0.8)
    draw.put("use_sliding_window", True, False, share=0.6 if family.startswith("Qwen") else 0.1)
    draw.put("max_window_layers", 2, 28, 1, odd=(0,), share=0.5)
    full, windowed = "full_attention", "sliding_attention"
    draw.put("layer_types", None, [full] * 2, odd=([full, windowed], [full], ["linear_attention"] * 2), share=0.3)
    draw.put("is_causal", True, odd=(False, None), share=0.1)
    draw.put("attention_chunk_size", None, odd=(8,), share=0.1)
    draw.put("eos_token_id", 2, [1, 2, 3, 4, 5], None, share=0.5)
    draw.put("pad_token_id", 0, 47, None, share=0.3)
    return draw.values


def write(folder: Path, config: dict[str, Any], *, seed: int) -> None:
    """Write a random model in which every parameter has an effect, with the tensors of transformers' model."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():  # a tied one once
        value = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() == 1 else 0.25)
        tensors[name] = value + 1.0 if name.endswith("norm.weight") else value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


INVALID = (
    StrictDataclassError, TypeError, KeyError, ValueError, AttributeError, AssertionError, ZeroDivisionError,
    RuntimeError,
)  # fmt: skip
"""What transformers raises for options that it does not compute; it has no error of its own for them."""


def logits_of_transformers(folder: Path, config: dict[str, Any], *, seed: int) -> torch.Tensor | None:
    try:
        write(folder, config, seed=seed)
        with torch.no_grad():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            logits: torch.Tensor = model(IDS).logits
    except INVALID:
        return None
    return logits


def logits_of_coremill(folder: Path) -> torch.Tensor | str:
    """The imported model's logits, or what the error found."""
    try:
        source = open_weights(folder)
    except (UnsupportedModelError, DocumentError) as failure:
        return failure.found
    student = Student(source.config)
    student.load_state_dict(dict(source.read()))
    with torch.no_grad():
        return student(IDS)[0]


def compare(folder: Path, config: dict[str, Any], *, seed: int) -> str:
    """Return `same`, `refused` by coremill, or `invalid` for transformers."""
    expected = logits_of_transformers(folder, config, seed=seed)
    if expected is None:
        return "invalid"
    found = logits_of_coremill(folder)
    if isinstance(found, str):
        assert found.startswith(f"{folder}/config.json: "), config
        return "refused"
    assert expected.std() > 0.4
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), config
    return "same"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors this small, a second thread only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("number", range(4))
def test_random_options_give_the_logits_of_transformers_or_an_error(tmp_path: Path, number: int) -> None:
    """Fifty sets for each family."""
    family = ["Llama", "Mistral", "Qwen2", "Qwen3"][number]
    seeds = range(10_000 * number, 10_000 * number + 500, 10)
    found = Counter(compare(tmp_path, options(family, seed), seed=seed) for seed in seeds)
    assert found["same"] >= 20
    assert found["refused"] >= 3
    assert found.total() == 50
