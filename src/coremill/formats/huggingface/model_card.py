"""The model card: README.md of a Hugging Face directory, YAML metadata before Markdown.

Metadata: https://huggingface.co/docs/hub/model-cards#model-card-metadata. Only what is known is said: no
language, and no licence that nobody gave.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from coremill.core.documents import Record

CARD = "README.md"

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
{prompt}
answer = model.generate(**prompt, max_new_tokens=32)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
_CHAT = """\
question = [{"role": "user", "content": "Will it rain tomorrow?"}]
prompt = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
_TEXT = """\
prompt = tokenizer("It was a dark and stormy night", return_tensors="pt")"""


class CardFacts(Record):
    """What a card says of a model."""

    name: str
    architecture: str
    """transformers' class, such as `LlamaForCausalLM`."""
    model_type: str
    """The run's, such as `magic-8-ball`."""
    parameters: int
    """Of the tensors in model.safetensors."""
    max_seq_len: int
    dtype: str
    license: str | None
    """SPDX identifier."""
    checkpoint_digest: str
    tokenizer_digest: str
    training: dict[str, Any]
    """What the checkpoint says of how it came about."""
    imported_from: dict[str, Any] | None
    """What it was imported from; None for a model that coremill trained."""
    has_chat_template: bool
    halt_head: str | None
    """The file of the halt head; None where the model has none."""
    parity: str
    """The file that says how the directory was compared with its checkpoint."""
    coremill: str
    """Version."""


def model_card(facts: CardFacts) -> str:
    """The card as text; equal facts give equal text."""
    return "\n".join([*_metadata(facts), "", *_body(facts)]) + "\n"


def _metadata(facts: CardFacts) -> Iterator[str]:
    yield "---"
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    if facts.license is not None:
        yield f"license: {_quoted(facts.license)}"
    yield "tags:"
    for tag in dict.fromkeys(("coremill", facts.model_type)):
        yield f"- {_quoted(tag)}"
    yield "---"


def _quoted(text: str) -> str:
    """A JSON string is a YAML string, whatever it holds."""
    return json.dumps(text, ensure_ascii=False)


def _body(facts: CardFacts) -> Iterator[str]:
    yield f"# {facts.name}"
    yield ""
    yield (
        f"A causal language model of {facts.parameters:,} parameters with a context of {facts.max_seq_len:,} "
        f"tokens, stored as {facts.dtype}; transformers computes it as `{facts.architecture}`."
    )
    yield ""
    yield "## Where it comes from"
    yield ""
    yield from _table(_provenance(facts))
    yield ""
    yield "## How to use it"
    yield ""
    yield "With transformers:"
    yield ""
    yield _USE.format(prompt=_CHAT if facts.has_chat_template else _TEXT)
    yield ""
    yield "With [mlx-lm](https://github.com/ml-explore/mlx-lm), on a Mac with Apple silicon:"
    yield ""
    yield "```sh"
    yield 'mlx_lm.generate --model . --prompt "Will it rain tomorrow?"'
    yield "```"
    yield ""
    yield (
        "mlx-lm runs on a Mac alone: where this directory was not written on one, that command was not run. "
        f"`{facts.parity}` says what was: the directory was loaded with transformers and compared with its "
        "checkpoint."
    )
    if facts.halt_head is not None:
        yield ""
        yield from _halt_head(facts.halt_head)


def _provenance(facts: CardFacts) -> Iterator[tuple[str, str]]:
    yield "Checkpoint", f"`{facts.checkpoint_digest}`"
    yield "Tokenizer", f"`{facts.tokenizer_digest}`"
    if facts.imported_from is not None:
        files = facts.imported_from.get("files")
        for name, digest in files.items() if isinstance(files, Mapping) else ():
            yield "Imported from", f"`{name}`, `{digest}`"
        if facts.imported_from.get("source_dtypes"):
            yield "Weights of the source", ", ".join(map(str, facts.imported_from["source_dtypes"]))
    else:
        yield "Trained by", "distillation from a teacher's distribution over answers"
        for key, what in (("dataset_digest", "Dataset"), ("steps", "Optimizer steps"), ("seed", "Seed")):
            if key in facts.training:
                yield what, f"`{facts.training[key]}`"
    yield "Written by", f"coremill {facts.coremill}"


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    for what, value in rows:
        yield f"| {what} | {value.replace('|', chr(92) + '|')} |"


def _halt_head(file: str) -> Iterator[str]:
    yield "## The halt head"
    yield ""
    yield (
        f"`{file}` holds what the class of transformers has no place for: `halt_head.weight`, (2, hidden size), "
        "float32. Its product with the last hidden state, after the final norm, gives two logits for each "
        "position, of [continue, halt]. Generation does not need it: an answer ends with its end token."
    )
    yield ""
    yield "```python"
    yield "from safetensors.torch import load_file"
    yield ""
    yield f'weight = load_file(folder + "/{file}")["halt_head.weight"]'
    yield "hidden = model(**prompt, output_hidden_states=True).hidden_states[-1]"
    yield "print(hidden.float() @ weight.T)"
    yield "```"
