"""What the converter said: `diagnostics.json` of a conversion, and `conversion_failed.json` of one that failed."""

from __future__ import annotations

import enum

from coremill.core.contract import ComputePrecision, Toolchain
from coremill.core.documents import Document, Record


class NoticeKind(str, enum.Enum):
    HARMLESS = "harmless"
    """Known, and known to change nothing."""
    COMPATIBILITY = "compatibility"
    """The converter says that it was not tested with a package's version."""
    WARNING = "warning"
    ERROR = "error"


class Notice(Record):
    """One thing that the converter said, however often.

    Raises:
        ValueError: a harmless notice does not say why it is.
    """

    kind: NoticeKind
    source: str
    """Where it came from: a logger, a warning category, `stdout` or `stderr`."""
    text: str
    count: int
    why: str | None = None
    """Why it is harmless."""

    def __post_init__(self) -> None:
        if self.kind is NoticeKind.HARMLESS and not self.why:
            raise ValueError(f"the notice {self.text!r} is called harmless without a reason")


def count_notices(notices: tuple[Notice, ...]) -> dict[str, int]:
    """How many notices of each kind, repetitions included; every kind has an entry."""
    return {kind.value: sum(n.count for n in notices if n.kind is kind) for kind in NoticeKind}


class ConversionDiagnostics(Document):
    """`diagnostics.json`, beside every package.

    Raises:
        ValueError: `counts` contradicts the notices.
    """

    package: str
    """File name of the .mlpackage."""
    package_digest: str
    toolchain: Toolchain
    deployment_target: str
    compute_precision: ComputePrecision
    notices: tuple[Notice, ...]
    counts: dict[str, int]

    def __post_init__(self) -> None:
        if self.counts != count_notices(self.notices):
            raise ValueError(f"`counts` is {self.counts}, the notices say {count_notices(self.notices)}")

    def of_kind(self, kind: NoticeKind) -> tuple[Notice, ...]:
        return tuple(notice for notice in self.notices if notice.kind is kind)


class ConversionFailure(Document):
    """`conversion_failed.json`: the record of a conversion that made no package. It fails every gate."""

    package: str
    """File name of the .mlpackage that was not made."""
    graph_digest: str
    contract_digest: str
    error: str
    traceback_tail: tuple[str, ...]
    toolchain: Toolchain
    notices: tuple[Notice, ...]
