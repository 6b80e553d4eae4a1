"""Make llama_golden.json: logits of transformers' LlamaForCausalLM for weights from a formula.

This is not a test. It needs its own environment:

    uv venv golden-venv && uv pip install -p golden-venv torch==2.9.1 transformers==5.23.0 numpy
    golden-venv/bin/python tests/model/make_llama_golden.py > tests/model/llama_golden.json

`tests/model/test_student.py` fills a Student by the same formula and compares the logits.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers

CONFIGS = {
    # grouped queries, tied embeddings
    "tied": {"vocab_size": 48, "d_model": 24, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "d_ff": 40},
    # one key/value head, untied, another base and epsilon
    "untied": {"vocab_size": 40, "d_model": 16, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "d_ff": 20},
}
ROPE_THETA = {"tied": 10_000.0, "untied": 500.0}
NORM_EPS = {"tied": 1e-5, "untied": 1e-3}
MAX_SEQ_LEN = 32
N_TOKENS = 20


def weight(index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the weights of the parameter at `index` in the sorted list of names: sines that all differ."""
    count = int(torch.tensor(shape).prod())
    values = torch.sin((torch.arange(count, dtype=torch.float64) + 1) * (0.37 + 0.11 * index)).reshape(shape)
    return (1 + 0.3 * values if len(shape) == 1 else 0.4 * values).float()


def token_ids(vocab_size: int) -> list[int]:
    return [(7 * index * index + 3 * index + 1) % vocab_size for index in range(N_TOKENS)]


def golden(name: str) -> dict[str, object]:
    sizes = CONFIGS[name]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["d_model"],
            num_hidden_layers=sizes["n_layers"],
            num_attention_heads=sizes["n_heads"],
            num_key_value_heads=sizes["n_kv_heads"],
            intermediate_size=sizes["d_ff"],
            max_position_embeddings=MAX_SEQ_LEN,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA[name]},
            rms_norm_eps=NORM_EPS[name],
            tie_word_embeddings=name == "tied",
        )
    ).eval()
    # By the Student's names, sorted: without `model.`, and with the tied head once.
    named = {key.removeprefix("model."): value for key, value in model.named_parameters()}
    with torch.no_grad():
        for index, key in enumerate(sorted(named)):
            named[key].copy_(weight(index, tuple(named[key].shape)))
        logits = model(torch.tensor([token_ids(sizes["vocab_size"])])).logits[0]
    return {"logits": [[float(f"{value:.7g}") for value in row] for row in logits.tolist()]}


if __name__ == "__main__":
    document = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        **{name: golden(name) for name in CONFIGS},
    }
    json.dump(document, sys.stdout)
    sys.stdout.write("\n")
