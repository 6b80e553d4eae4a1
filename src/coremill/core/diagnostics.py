"""The converter's messages: `diagnostics.json` of a conversion, `conversion_failed.json` of a failed one."""

from __future__ import annotations

import enum

from coremill.core.contract import ComputePrecision, Toolchain
from coremill.core.documents import Document, Record


class NoticeKind(str, enum.Enum):
    HARMLESS = "harmless"
    """Known to have no effect on the package."""
    COMPATIBILITY = "compatibility"
    """The converter reports that it was not tested with the version of a package."""
    WARNING = "warning"
    ERROR = "error"


class Notice(Record):
    """A message of the converter, and how often it was repeated.

    Raises:
        ValueError: a harmless notice has no reason.
    """

    kind: NoticeKind
    source: str
    """A logger, a warning category, `stdout` or `stderr`."""
    text: str
    count: int
    why: str | None = None
    """Why it is harmless."""

    def __post_init__(self) -> None:
        if self.kind is NoticeKind.HARMLESS and not self.why:
            raise ValueError(f"the notice {self.text!r} is harmless without a reason")


def count_notices(notices: tuple[Notice, ...]) -> dict[str, int]:
    """Return the number of notices of each kind, including repetitions; every kind has an entry."""
    return {kind.value: sum(n.count for n in notices if n.kind is kind) for kind in NoticeKind}


class ConversionDiagnostics(Document):
    """`diagnostics.json`, in the directory of every package.

    Raises:
        ValueError: `counts` differs from the notices.
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
            raise ValueError(f"`counts` is {self.counts}, and the notices are {count_notices(self.notices)}")

    def of_kind(self, kind: NoticeKind) -> tuple[Notice, ...]:
        return tuple(notice for notice in self.notices if notice.kind is kind)


class ConversionFailure(Document):
    """`conversion_failed.json`: the record of a conversion that failed. It fails every gate."""

    package: str
    """File name of the .mlpackage that was not written."""
    graph_digest: str
    contract_digest: str
    error: str
    traceback_tail: tuple[str, ...]
    toolchain: Toolchain
    notices: tuple[Notice, ...]
