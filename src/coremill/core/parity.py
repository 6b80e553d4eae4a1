"""How forms of a model that others run compute what its checkpoint computes: `parity.json` beside each.

`HuggingFaceParity` is of a Hugging Face directory under transformers, `GgufParity` of GGUF files under llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from coremill.core.contract import Toolchain
from coremill.core.documents import Document, Record
from coremill.core.gates import Gate

MAX_RELATIVE_ERR = 1e-5
"""Largest difference between outputs that two programs compute in float32 from the same weights, as a share of the
outputs' largest magnitude: in other orders, some hundred roundings of 6e-8 each, layer upon layer."""


class TokenDifference(Record):
    """A token that another program, decoding greedily, took, and the checkpoint would not after the same ones."""

    prompt: int
    """Number of the prompt, from 0."""
    place: int
    """Number of the token in the answer, from 0."""
    token: int
    """The one that was taken."""
    expected: int
    """The checkpoint's best."""
    gap: float
    """By how much the checkpoint prefers its own, in logits."""
    is_tie: bool
    """Whether rounding may turn the two about."""


# --- a Hugging Face directory -----------------------------------------------------------------------


class HuggingFaceParity(Document):
    """Figures with their bounds, and the files that they are about."""

    kind: Literal["huggingface"] = "huggingface"
    checkpoint_digest: str
    dtype: str
    """Of the tensors; the checkpoint was rounded alike for the comparison, which was computed in float32."""
    files: dict[str, str]
    """Each file of the directory but this one, with its digest."""
    gates: tuple[Gate, ...]
    logits_max_abs: float
    """The largest difference of logits as it is; its gate is relative to the largest logit."""
    differences: tuple[TokenDifference, ...]
    """Of greedy tokens: every one, ties among them."""
    toolchain: Toolchain

    @property
    def digests(self) -> dict[str, str]:
        """Of each file of the folder but this one."""
        return self.files


# --- GGUF files -------------------------------------------------------------------------------------

Measure = Literal[
    "max_abs_err",
    "relative_err",
    "kl_nats",
    "top1_agreement",
    "arithmetic_kl_nats",
    "weights_err",
    "settings",
    "greedy_differences",
    "tokenizer_mismatches",
    "heldout_exact",
]
"""What is measured of a file:

- `max_abs_err`: largest absolute difference of logits;
- `relative_err`: the same, as a share of the checkpoint's largest logit;
- `kl_nats`: KL(torch ‖ llama.cpp), the mean over positions;
- `top1_agreement`: the share of positions whose likeliest token is the same;
- `arithmetic_kl_nats`: as `kl_nats`, torch with the file's own weights, dequantised, in the checkpoint's model;
- `weights_err`: the largest error of a stored weight, as a share of the most that its type's rounding makes;
- `settings`: what the file says otherwise than checkpoint and tokenizer, or llama.cpp understands otherwise;
- `greedy_differences`: greedy tokens that torch would not have taken, ties aside;
- `tokenizer_mismatches`: texts whose ids are others;
- `heldout_exact`: the share of held-out questions whose answer is, to the letter, one that the toy can give.

What quantisation costs is in `kl_nats`, and may hide a small defect there; `arithmetic_kl_nats`, `weights_err` and
`settings` show one.
"""


# --- the document -----------------------------------------------------------------------------------


def figure_outcome(
    measured: float, bound: float | None, *, at_least: bool
) -> Literal["passed", "failed", "reported"]:
    if bound is None:
        return "reported"
    return "passed" if (measured >= bound if at_least else measured <= bound) else "failed"


class ParityFigure(Record):
    """One figure of a file.

    Raises:
        ValueError: `outcome` contradicts the bound.
    """

    name: Measure
    measured: float
    bound: float | None
    """None where the figure is reported alone."""
    at_least: bool
    """Whether more is better, and the bound the least that passes."""
    source: str | None
    """Where the bound comes from."""
    outcome: Literal["passed", "failed", "reported"]

    def __post_init__(self) -> None:
        if (expected := figure_outcome(self.measured, self.bound, at_least=self.at_least)) != self.outcome:
            raise ValueError(f"`{self.name}` is {self.outcome}, {self.measured} by {self.bound} is {expected}")
        if (self.bound is None) != (self.source is None):
            raise ValueError(f"`{self.name}` has the bound {self.bound} from {self.source}")


class TokenizerMismatch(Record):
    """A text that llama.cpp's tokenizer reads otherwise than ours."""

    text: str
    allow_special: bool
    ids: tuple[int, ...]
    """Ours."""
    llamacpp_ids: tuple[int, ...]


class SettingDifference(Record):
    """Something that a file says of the model, and what it should say."""

    name: str
    expected: str
    found: str


class FileParity(Record):
    """What one file showed."""

    file: str
    digest: str
    size_bytes: int
    positions: int
    """Whose V logits were compared."""
    greedy_prompts: int
    """0 where greedy tokens were not compared: of what is not stored in float32."""
    greedy_tokens: int
    """All of the prompts together."""
    heldout_questions: int
    """0 for a model that was imported."""
    figures: tuple[ParityFigure, ...]
    differences: tuple[TokenDifference, ...]
    """Of greedy tokens: every one, ties among them."""
    mismatches: tuple[TokenizerMismatch, ...]
    """The first few."""
    settings: tuple[SettingDifference, ...]
    prompts: tuple[SettingDifference, ...]
    """What llama.cpp's server makes otherwise of conversations; reported, as it defines variables of its own."""

    def figure(self, name: Measure) -> ParityFigure:
        """The figure of that name; a KeyError where there is none."""
        return {figure.name: figure for figure in self.figures}[name]


class GgufParity(Document):
    """`parity.json` beside GGUF files: what each showed in llama.cpp, beside the checkpoint in torch's float32.

    Raises:
        ValueError: there are no files, or `passed` contradicts the figures.
    """

    checkpoint_digest: str
    model_type: str
    xllamacpp: str
    """Its release, which is that of llama.cpp."""
    quick: bool
    files: dict[str, FileParity]
    """By type, such as `q8_0`."""
    others: dict[str, str] = msgspec.field(default_factory=dict)
    """The other files of the folder, this one aside, with their digests."""
    passed: bool

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("`files` is empty")
        if self.passed != (not any(self.failures())):
            raise ValueError(f"`passed` is {self.passed}, the figures say otherwise")

    @property
    def digests(self) -> dict[str, str]:
        """Of each file of the folder but this one."""
        return {file.file: file.digest for file in self.files.values()} | self.others

    def failures(self) -> Iterator[str]:
        """Each figure beyond its bound, in words."""
        for kind, file in self.files.items():
            for figure in file.figures:
                if figure.outcome == "failed":
                    side = "at least" if figure.at_least else "at most"
                    yield f"{kind}: {figure.name} is {figure.measured:.3g}, {side} {figure.bound:g} is allowed"
            for setting in file.settings:
                yield f"{kind}: {setting.name} is {setting.found}, not {setting.expected}"
