"""The evidence that the gates are evaluated on: the subject, its files, and what running it measured."""

from __future__ import annotations

import msgspec

from coremill.core.config import DistilledVerify, ImportedVerify, VerifyConfig
from coremill.core.contract import Contract, shape_key
from coremill.core.diagnostics import ConversionDiagnostics
from coremill.core.reports import ShapeError, ShapeMeasured
from coremill.verification.measurement import Measurement
from coremill.verification.stored_weights import StoredWeights


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """The properties of the model and its run that decide which gates apply."""

    model_type: str
    """The checkpoint's."""
    imported: bool
    """The run imports its model: there are texts, and no held-out answers."""
    stateful: bool
    """The run exports functions with a key/value cache."""
    has_halt_head: bool
    """The checkpoint's model has a halt head."""
    asks_moods: bool
    """The held-out questions have moods that an answer must match."""


class FileChecks(msgspec.Struct, frozen=True, kw_only=True):
    """What the files contain, compared with one another; nothing is run. A problem is None if there is none."""

    graph_problem: str | None
    """Why the exported program next to the contract is not the one that the contract describes."""
    checkpoint_problem: str | None
    """Why the checkpoint is not the exported one."""
    source_problem: str | None
    """Why an imported checkpoint is not known to compute what its source computes."""
    contract_problem: str | None
    """Why the package was not made from this contract."""
    diagnostics: ConversionDiagnostics | None
    """Of this package; None if there is a `diagnostics_problem`."""
    diagnostics_problem: str | None
    interface_problems: tuple[str, ...]
    """Differences between the interfaces of the package and of the contract."""
    weights: StoredWeights
    """The constants of the package, compared with the checkpoint's tensors."""
    parameters: int
    """Of the checkpoint's model."""
    package_bytes: int


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the gates are evaluated on."""

    subject: Facts
    contract: Contract
    config: VerifyConfig
    files: FileChecks
    measured: Measurement

    @property
    def primary(self) -> str:
        """The key of the primary shape, such as `T128`."""
        return shape_key(self.contract.shapes.primary)

    @property
    def primary_shape(self) -> ShapeMeasured | None:
        """The measurement at the primary shape; None if the package does not run there."""
        shape = self.measured.shapes[self.primary]
        return None if isinstance(shape, ShapeError) else shape

    @property
    def unmeasured(self) -> str:
        """The reason why a figure is None."""
        if self.measured.load_problem is not None:
            return f"the package does not load: {self.measured.load_problem}"
        if self.primary_shape is None:
            return f"the package does not run at the primary shape {self.primary}"
        what = "text or question" if self.subject.imported else "held-out conversation"
        return f"nothing was compared: no {what} is suitable"

    @property
    def distilled(self) -> DistilledVerify:
        """The settings for a trained model."""
        assert isinstance(self.config, DistilledVerify)  # the rows that ask for it apply to no other
        return self.config

    @property
    def imported(self) -> ImportedVerify:
        """The settings for an imported model."""
        assert isinstance(self.config, ImportedVerify)  # the rows that ask for it apply to no other
        return self.config
