"""The model card: its metadata is YAML, and its text is pinned."""

from __future__ import annotations

from typing import Any

import msgspec
import yaml

from coremill.formats.huggingface.model_card import CardFacts, model_card

TOY = CardFacts(
    name="magic-8-ball",
    architecture="LlamaForCausalLM",
    model_type="magic-8-ball",
    parameters=500_000,
    max_seq_len=1024,
    dtype="float32",
    license="apache-2.0",
    checkpoint_digest="sha256:c0",
    tokenizer_digest="sha256:70",
    training={"dataset_digest": "sha256:da", "steps": 820, "seed": 8, "loss": {"last": 0.1}},
    imported_from=None,
    has_chat_template=True,
    halt_head="halt_head-magic_8_ball.safetensors",
    parity="parity.json",
    coremill="0.1.0",
)
IMPORTED = msgspec.structs.replace(
    TOY,
    name="smollm2-135m",
    model_type="llama",
    license=None,
    training={},
    imported_from={
        "files": {"config.json": "sha256:1", "a|b.safetensors": "sha256:2"},
        "source_dtypes": ["Q4_1", "F32"],
        "format": "huggingface",
        "notes": [],
    },
    has_chat_template=False,
    halt_head=None,
)

TOY_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: "apache-2.0"
tags:
- "coremill"
- "magic-8-ball"
---

# magic-8-ball

A causal language model of 500,000 parameters with a context of 1,024 tokens, stored as float32. The class in \
transformers is `LlamaForCausalLM`.

## Origin

| | |
|---|---|
| Checkpoint | `sha256:c0` |
| Tokenizer | `sha256:70` |
| Trained by | distillation from a teacher's distribution over answers |
| Dataset | `sha256:da` |
| Optimizer steps | `820` |
| Seed | `8` |
| Written by | coremill 0.1.0 |

## Usage

With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the directory of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
question = [{"role": "user", "content": "Will it rain tomorrow?"}]
prompt = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=32)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

With [mlx-lm](https://github.com/ml-explore/mlx-lm), on a Mac with Apple silicon:

```sh
mlx_lm.generate --model . --prompt "Will it rain tomorrow?"
```

mlx-lm runs only on a Mac, so coremill did not run this command. It loaded the directory with transformers and \
compared it with its checkpoint; `parity.json` contains the results.

## The halt head

`halt_head-magic_8_ball.safetensors` contains a tensor that the class in transformers does not have: \
`halt_head.weight`, (2, hidden size), float32. \
Its product with the last hidden state, after the final norm, gives two logits for each \
position: [continue, halt]. Generation does not need it: an answer ends with an end token.

```python
from safetensors.torch import load_file

weight = load_file(folder + "/halt_head-magic_8_ball.safetensors")["halt_head.weight"]
hidden = model(**prompt, output_hidden_states=True).hidden_states[-1]
print(hidden.float() @ weight.T)
```
"""


def metadata(facts: CardFacts) -> dict[str, Any]:
    _, front, _ = model_card(facts).split("---\n", 2)
    return yaml.safe_load(front)


def test_card_of_a_toy_is_pinned() -> None:
    assert model_card(TOY) == TOY_CARD
    assert metadata(TOY) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["coremill", "magic-8-ball"],
    }


def test_unknown_facts_are_omitted() -> None:
    assert metadata(IMPORTED) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["coremill", "llama"],
    }
    card = model_card(IMPORTED)
    assert "halt" not in card
    assert "Trained by" not in card
    assert "apply_chat_template" not in card
    assert 'prompt = tokenizer("It was a dark and stormy night", return_tensors="pt")' in card


def test_card_names_every_imported_file() -> None:
    assert [
        line for line in model_card(IMPORTED).splitlines() if line.startswith(("| Imported", "| Weight types"))
    ] == [
        "| Imported from | `config.json`, `sha256:1` |",
        "| Imported from | `a\\|b.safetensors`, `sha256:2` |",
        "| Weight types of the source | Q4_1, F32 |",
    ]


def test_metadata_quotes_any_licence() -> None:
    facts = msgspec.structs.replace(TOY, license='no: "yes"\n---', model_type="coremill")
    assert metadata(facts)["license"] == 'no: "yes"\n---'
    assert metadata(facts)["tags"] == ["coremill"]
