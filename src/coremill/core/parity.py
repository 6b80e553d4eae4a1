"""`parity.json`: an exported format compared with the checkpoint; `source_parity.json`: an import, with its source.

`HuggingFaceParity` is for a Hugging Face directory under transformers, `GgufParity` for GGUF files under llama.cpp,
`SourceParity` for either as the source of an import.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec

from coremill.core.contract import Toolchain
from coremill.core.documents import Document, Record
from coremill.core.gates import Finding, Gate, at_most

MAX_RELATIVE_ERR = 1e-5
"""The largest allowed difference between the float32 outputs of two programs with the same weights, relative to the
largest output. They sum in different orders, which amounts to some hundred roundings of 6e-8 each.

Where a softmax decides between large scores, or sums cancel, right programs differ by more: `relative_bound`."""

OWN_ERRORS = 4
"""How many times float32's own error, which `model.float32` measures, two right programs may differ by.

Measured: at most 1.9 times, in 98 comparisons of transformers and llama.cpp with models whose own error is between
2.5e-6 and 2.5e-4; half of them differ by less than the own error."""

MOST_RELATIVE_ERR = 1e-3
"""The largest bound, whatever float32's own error is: beyond it a comparison in float32 shows little."""


class RelativeBound(NamedTuple):
    """The bound of a difference between two programs in float32, relative to the largest output."""

    limit: float
    reason: str | None
    """Why it is not `MAX_RELATIVE_ERR`; None if it is."""

    def finding(self, relative_err: float) -> Finding:
        """Compare a difference with the bound; the reason says where a bound that is not the usual one is from."""
        found = at_most(relative_err, self.limit)
        if self.reason is None:
            return found
        return found._replace(reason=f"{found.reason}: {self.reason}" if found.reason else self.reason)


def relative_bound(own_err: float) -> RelativeBound:
    """Return the bound for a model that float32 computes with `own_err`, relative to the largest output."""
    if not OWN_ERRORS * own_err > MAX_RELATIVE_ERR:  # also if it is NaN
        return RelativeBound(MAX_RELATIVE_ERR, None)
    own = f"float32's own error, {own_err:.2g} of the largest output"
    if OWN_ERRORS * own_err > MOST_RELATIVE_ERR:
        return RelativeBound(MOST_RELATIVE_ERR, f"the largest bound there is, less than {OWN_ERRORS} times {own}")
    return RelativeBound(OWN_ERRORS * own_err, f"{OWN_ERRORS} times {own}")


class TokenDifference(Record):
    """A token of another program's greedy decoding that is not the checkpoint's choice after the same tokens."""

    prompt: int
    """Index of the prompt."""
    place: int
    """Index of the token in the answer."""
    token: int
    """The other program's choice."""
    expected: int
    """The checkpoint's choice."""
    gap: float
    """The checkpoint's logit of its own choice minus that of the other, in logits."""
    is_tie: bool
    """Whether the gap is within rounding."""


# --- the source of an import -------------------------------------------------------------------------


class SourceParity(Document):
    """`source_parity.json`: what an imported checkpoint computes, compared with its source in another program."""

    checkpoint_digest: str
    program: str
    """The program that ran the source, with its version, such as `transformers 5.23.0`."""
    positions: int
    """Positions whose V logits were compared."""
    gates: tuple[Gate, ...]


# --- a Hugging Face directory -----------------------------------------------------------------------


class HuggingFaceParity(Document):
    """`parity.json` of a Hugging Face directory: figures with their bounds, and the files that were compared."""

    kind: Literal["huggingface"] = "huggingface"
    checkpoint_digest: str
    dtype: str
    """Of the tensors. For the comparison the checkpoint was rounded to it too; both then computed in float32."""
    files: dict[str, str]
    """The digest of each file of the directory except this one."""
    gates: tuple[Gate, ...]
    logits_max_abs: float
    """The largest absolute difference of logits; the gate compares the relative one."""
    differences: tuple[TokenDifference, ...]
    """All differences of greedy tokens, including ties."""
    toolchain: Toolchain

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each file of the directory except this one."""
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

- `max_abs_err`: the largest absolute difference of logits;
- `relative_err`: the same, relative to the checkpoint's largest logit;
- `kl_nats`: KL(torch ‖ llama.cpp), mean over positions;
- `top1_agreement`: the share of positions with the same most likely token;
- `arithmetic_kl_nats`: as `kl_nats`, with the file's own dequantised weights in torch;
- `weights_err`: the largest error of a stored weight, relative to the largest rounding error of its type;
- `settings`: the number of settings that differ from the checkpoint and the tokenizer, in the file or in llama.cpp;
- `greedy_differences`: the number of greedy tokens that differ from torch's, except ties;
- `tokenizer_mismatches`: the number of texts whose token ids differ;
- `heldout_exact`: the share of held-out questions whose answer is exactly one that the toy can give.

`kl_nats` includes the loss of quantisation, which can hide a small defect. `arithmetic_kl_nats`, `weights_err` and
`settings` do not.
"""


def figure_outcome(
    measured: float, bound: float | None, *, at_least: bool
) -> Literal["passed", "failed", "reported"]:
    if bound is None:
        return "reported"
    return "passed" if (measured >= bound if at_least else measured <= bound) else "failed"


class ParityFigure(Record):
    """A figure of a file.

    Raises:
        ValueError: `outcome` contradicts the bound, or a bound has no source.
    """

    name: Measure
    measured: float
    bound: float | None
    """None if the figure is only reported."""
    at_least: bool
    """Whether the bound is a minimum; otherwise it is a maximum."""
    source: str | None
    """The reason for the bound."""
    outcome: Literal["passed", "failed", "reported"]

    def __post_init__(self) -> None:
        if (expected := figure_outcome(self.measured, self.bound, at_least=self.at_least)) != self.outcome:
            raise ValueError(
                f"`{self.name}` is {self.outcome}, and {self.measured} with the bound {self.bound} is {expected}"
            )
        if (self.bound is None) != (self.source is None):
            raise ValueError(f"`{self.name}` has the bound {self.bound} and the source {self.source}")


class TokenizerMismatch(Record):
    """A text whose token ids differ between llama.cpp's tokenizer and ours."""

    text: str
    allow_special: bool
    ids: tuple[int, ...]
    """Ours."""
    llamacpp_ids: tuple[int, ...]


class SettingDifference(Record):
    """A setting of the model in a file that differs from the expected value."""

    name: str
    expected: str
    found: str


class FileParity(Record):
    """The comparison of one file."""

    file: str
    digest: str
    size_bytes: int
    positions: int
    """Positions whose V logits were compared."""
    greedy_prompts: int
    """0 for a file that is not float32: its greedy tokens are not compared."""
    greedy_tokens: int
    """Of all prompts together."""
    heldout_questions: int
    """0 for a model that was imported."""
    figures: tuple[ParityFigure, ...]
    differences: tuple[TokenDifference, ...]
    """All differences of greedy tokens, including ties."""
    mismatches: tuple[TokenizerMismatch, ...]
    """The first few."""
    settings: tuple[SettingDifference, ...]
    prompts: tuple[SettingDifference, ...]
    """Prompts that differ in llama.cpp's server. Only reported: its templates define more variables."""

    def figure(self, name: Measure) -> ParityFigure:
        """Return the figure of that name.

        Raises:
            KeyError: there is none.
        """
        return {figure.name: figure for figure in self.figures}[name]


class GgufParity(Document):
    """`parity.json` of GGUF files: each under llama.cpp, compared with the checkpoint in torch's float32.

    Raises:
        ValueError: there are no files, or `passed` contradicts the figures.
    """

    checkpoint_digest: str
    model_type: str
    xllamacpp: str
    """The release of xllamacpp, which determines that of llama.cpp."""
    quick: bool
    files: dict[str, FileParity]
    """By type, such as `q8_0`."""
    others: dict[str, str] = msgspec.field(default_factory=dict)
    """The digests of the other files of the directory, except this one."""
    passed: bool

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("`files` is empty")
        if self.passed != (not any(self.failures())):
            raise ValueError(f"`passed` is {self.passed}, which contradicts the figures")

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each file of the directory except this one."""
        return {file.file: file.digest for file in self.files.values()} | self.others

    def failures(self) -> Iterator[str]:
        """Yield a description of each figure outside its bound, and of each setting that differs."""
        for kind, file in self.files.items():
            for figure in file.figures:
                if figure.outcome == "failed":
                    side = "at least" if figure.at_least else "at most"
                    yield f"{kind}: {figure.name} is {figure.measured:.3g}, {side} {figure.bound:g} is allowed"
            for setting in file.settings:
                yield f"{kind}: {setting.name} is {setting.found}, not {setting.expected}"
