"""The model card: README.md of a Hugging Face directory, YAML metadata before Markdown.

Metadata: https://huggingface.co/docs/hub/model-cards#model-card-metadata. The card contains only what is known: no
language, and a licence only if one is configured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from coremill.core.documents import Record
from coremill.core.plain import Plain

CARD = "README.md"

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the directory of this file
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
    """The facts about a model that its card contains."""

    name: str
    architecture: str
    """The class of transformers, such as `LlamaForCausalLM`."""
    model_type: str
    """The model type of the run, such as `magic-8-ball`."""
    parameters: int
    """The number of elements of the tensors in model.safetensors."""
    max_seq_len: int
    dtype: str
    license: str | None
    """SPDX identifier."""
    checkpoint_digest: str
    tokenizer_digest: str
    training: Mapping[str, Plain]
    """How the checkpoint was made, as it records it."""
    imported_from: Mapping[str, Plain] | None
    """The origin of an imported checkpoint; None for a model that coremill trained."""
    has_chat_template: bool
    halt_head: str | None
    """The file of the halt head, or None if the model has none."""
    parity: str
    """The file with the results of the comparison with the checkpoint."""
    coremill: str
    """The version of coremill."""


def model_card(facts: CardFacts) -> str:
    """Return the card as text; equal facts give equal text."""
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
    """Quote `text` as JSON; every JSON string is also a YAML string."""
    return json.dumps(text, ensure_ascii=False)


def _body(facts: CardFacts) -> Iterator[str]:
    yield f"# {facts.name}"
    yield ""
    yield (
        f"A causal language model of {facts.parameters:,} parameters with a context of {facts.max_seq_len:,} "
        f"tokens, stored as {facts.dtype}. The class in transformers is `{facts.architecture}`."
    )
    yield ""
    yield "## Origin"
    yield ""
    yield from _table(_provenance(facts))
    yield ""
    yield "## Usage"
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
        "mlx-lm runs only on a Mac, so coremill did not run this command. It loaded the directory with "
        f"transformers and compared it with its checkpoint; `{facts.parity}` contains the results."
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
        dtypes = facts.imported_from.get("source_dtypes")
        if isinstance(dtypes, (list, tuple)) and dtypes:
            yield "Weight types of the source", ", ".join(map(str, dtypes))
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
        f"`{file}` contains a tensor that the class in transformers does not have: `halt_head.weight`, "
        "(2, hidden size), float32. Its product with the last hidden state, after the final norm, gives two logits "
        "for each position: [continue, halt]. Generation does not need it: an answer ends with an end token."
    )
    yield ""
    yield "```python"
    yield "from safetensors.torch import load_file"
    yield ""
    yield f'weight = load_file(folder + "/{file}")["halt_head.weight"]'
    yield "hidden = model(**prompt, output_hidden_states=True).hidden_states[-1]"
    yield "print(hidden.float() @ weight.T)"
    yield "```"
