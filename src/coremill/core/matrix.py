"""AgreementMatrix: how each format of a model agrees with its checkpoint on one text, and the bounds."""

from __future__ import annotations

import enum
import math
from typing import Literal, NamedTuple, get_args

from coremill.core.config import GgufType
from coremill.core.documents import Document, Record
from coremill.core.gates import PlatformReason
from coremill.core.reports import Perplexity


class FormatInfo(NamedTuple):
    """The description of a format."""

    purpose: str
    reads: Literal["checkpoint", "program", "package", "hf", "gguf"]


EAGER, TORCHSCRIPT, TORCH_EXPORT = "eager", "torchscript", "torch-export"
MIL_REFERENCE, COREML, MIL_FLOAT32 = "mil-reference", "coreml", "mil-float32"
TRANSFORMERS = "transformers"
GGUF: dict[str, GgufType] = {f"gguf-{kind}": kind for kind in get_args(GgufType)}
"""The rows of GGUF files, by name."""
FORMATS = {
    EAGER: FormatInfo("the checkpoint's model in float32, run again", "checkpoint"),
    TORCHSCRIPT: FormatInfo("the traced program", "program"),
    TORCH_EXPORT: FormatInfo("the ExportedProgram of torch.export", "program"),
    MIL_REFERENCE: FormatInfo("the package under coremill.mil", "package"),
    COREML: FormatInfo("the package under Core ML", "package"),
    TRANSFORMERS: FormatInfo("the Hugging Face directory under transformers", "hf"),
    **{name: FormatInfo(f"the GGUF file of type {kind} under llama.cpp", "gguf") for name, kind in GGUF.items()},
    MIL_FLOAT32: FormatInfo("the package in float32 arithmetic: everything except rounding", "package"),
}
"""The rows of the matrix by name, in order."""


class Measure(str, enum.Enum):
    """A column of the matrix."""

    MAX_ABS_ERR = "max_abs_err"
    SQNR_DB = "sqnr_db"
    KL_NATS = "kl_nats"
    TOP1_AGREEMENT = "top1_agreement"
    EXCLUDED_SHARE = "excluded_share"
    PERPLEXITY_CHANGE = "perplexity_change"


AT_LEAST = frozenset({Measure.SQNR_DB, Measure.TOP1_AGREEMENT})
"""The measures for which more is better."""


class Tolerance(Record):
    """The bound of one measure.

    Raises:
        ValueError: the bound is not finite, or it applies to no rows.
    """

    measure: Measure
    bound: float
    """The minimum if more is better, the maximum if less is."""
    rows: tuple[str, ...]
    """The formats that it applies to."""
    source: str
    """The source of the bound."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.bound) or not self.rows:
            raise ValueError(f"`{self.measure.value}` has the bound {self.bound} for {list(self.rows)}")

    def admits(self, value: float) -> bool:
        """Return whether `value` is within the bound; NaN is not."""
        return value >= self.bound if self.measure in AT_LEAST else value <= self.bound


class FormatMeasured(Record, tag_field="status", tag="measured"):
    """A format that ran, against its reference.

    Errors, SQNR and KL cover every position; the first two are those of the worst output.

    Raises:
        ValueError: a figure is not finite, or a count exceeds its total.
    """

    format: str
    reference: str
    """The reference that it was compared with."""
    max_abs_err: float
    sqnr_db: float
    """At most 300, the value for equal logits."""
    kl_nats: float
    """KL(reference ‖ format), the mean over positions."""
    top1_agreement: float
    """Share of the judged, not excluded positions with the same most likely token."""
    positions: int
    judged: int
    """The positions that the top-1 agreement considers."""
    excluded: int
    """Of these, the positions at which the reference's most likely token leads by no more than the margin."""
    perplexity: Perplexity | None
    """Of real text; None for a student, which is trained on questions and answers."""
    outside: tuple[Measure, ...]
    """The measures outside their tolerances."""

    def __post_init__(self) -> None:
        for name in ("max_abs_err", "sqnr_db", "kl_nats", "top1_agreement"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` is {getattr(self, name)}")
        if not 0 <= self.excluded <= self.judged <= self.positions:
            raise ValueError(f"{self.excluded} of {self.judged} of {self.positions} positions were excluded")

    def value(self, measure: Measure) -> float | None:
        """Return the figure of a column, or None."""
        if measure is Measure.EXCLUDED_SHARE:
            return self.excluded / self.judged if self.judged else 0.0
        if measure is Measure.PERPLEXITY_CHANGE:
            return None if self.perplexity is None else self.perplexity.change
        return float(getattr(self, measure.value))


class FormatFailed(Record, tag_field="status", tag="error"):
    """A format that did not run, or whose outputs cannot be compared."""

    format: str
    error: str


class FormatNotRun(Record, tag_field="status", tag="not_run"):
    """A format that was not selected, or that this machine cannot run."""

    format: str
    reason: str
    platform_reason: PlatformReason | None = None


FormatRow = FormatMeasured | FormatFailed | FormatNotRun


class AgreementMatrix(Document):
    """`coremill agree --out`: every format of one model on the same text.

    Raises:
        ValueError: a row's `outside` contradicts the tolerances, or `within` contradicts the rows.
    """

    run: str
    lane: str
    """The release of torch that exported the graph."""
    shape: str
    """The sequence length of every format, such as `T1024`."""
    sequences: int
    checkpoint_digest: str
    contract_digest: str
    package_digest: str | None
    """None if no selected format reads the package."""
    argmax_margin: float
    """The lead in logits that the most likely token needs for its position to count."""
    tolerances: tuple[Tolerance, ...]
    rows: tuple[FormatRow, ...]
    within: bool
    """Every measured row is within its tolerances, and no row failed."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if isinstance(row, FormatMeasured) and row.outside != outside(row, self.tolerances):
                said = [measure.value for measure in row.outside]
                raise ValueError(f"{row.format}: {said} contradicts the tolerances")
        if self.within != all_within(self.rows):
            raise ValueError(f"`within` is {self.within}, which the rows contradict")


def outside(row: FormatMeasured, tolerances: tuple[Tolerance, ...]) -> tuple[Measure, ...]:
    """Return the measures of `row` that are outside a tolerance."""
    found = []
    for tolerance in tolerances:
        value = row.value(tolerance.measure) if row.format in tolerance.rows else None
        if value is not None and not tolerance.admits(value):
            found.append(tolerance.measure)
    return tuple(dict.fromkeys(found))


def all_within(rows: tuple[FormatRow, ...]) -> bool:
    """Return whether no row failed and every measured row is within its tolerances."""
    return not any(
        isinstance(row, FormatFailed) or (isinstance(row, FormatMeasured) and row.outside) for row in rows
    )
