"""What can run a package: `coremill.mil` anywhere, Core ML itself on macOS.

Legend: T sequence length, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from coremill.conversion.converter import ct
from coremill.core.contract import Contract, DType, TensorSpec
from coremill.core.errors import ContractMismatchError
from coremill.core.reports import Backend
from coremill.mil import MLModel

Array = Any
"""An np.ndarray; numpy has no types where this is checked."""

_NUMPY_DTYPES = {DType.INT32: np.int32, DType.FLOAT16: np.float16, DType.FLOAT32: np.float32}


class Predictor(Protocol):
    """The part of coremltools' MLModel that both have."""

    def predict(self, data: Mapping[str, Array]) -> dict[str, Array]: ...


class Runner:
    """A package and what runs it, checked against the contract at every prediction."""

    def __init__(
        self, predictor: Predictor, backend: Backend, contract: Contract, *, operations: int | None = None
    ) -> None:
        self.backend = backend
        self.operations = operations
        """How many operations the backend lowered; None where it does not tell."""
        self._predictor = predictor
        (self._input,) = contract.inputs
        self._outputs = contract.outputs

    def run(self, ids: Sequence[int]) -> dict[str, Array]:
        """The outputs by name for `ids` (T,), T one of the package's lengths; each without its batch dimension.

        Raises:
            PredictionInputError: the package does not admit this length or input.
            ContractMismatchError: an output of the contract is missing, or has another shape or dtype.
        """
        given = np.asarray([list(ids)], dtype=_NUMPY_DTYPES[self._input.dtype])
        found = self._predictor.predict({self._input.name: given})
        return {spec.name: _checked(spec, found, len(ids)) for spec in self._outputs}


def reference_runner(package: Path, contract: Contract) -> Runner:
    """`coremill.mil` on the package: parsed, validated and lowered here, or an error that says why not.

    Raises:
        PackageError: unreadable, or a part is missing.
        UnsupportedOperationError: it has an operation that coremill.mil does not run.
    """
    model = MLModel(package)
    operations = len(model.program.graph.nodes)  # what the package became, not what its protobuf lists
    return Runner(model, Backend.MIL_REFERENCE, contract, operations=operations)


def has_core_ml() -> bool:
    return sys.platform == "darwin"


def core_ml_runner(package: Path, contract: Contract) -> Runner:
    """Core ML itself on the package, on the CPU, whose results do not depend on the machine's other units."""
    model = ct.models.MLModel(str(package), compute_units=ct.ComputeUnit.CPU_ONLY)
    return Runner(model, Backend.COREML, contract)


def _checked(spec: TensorSpec, found: Mapping[str, Array], seq_len: int) -> Array:
    if spec.name not in found:
        raise ContractMismatchError(
            f"the package returns {', '.join(f'`{name}`' for name in found)}", expected=f"an output `{spec.name}`"
        )
    array, shape = found[spec.name], spec.at(T=seq_len)
    if array.shape != shape or array.dtype != _NUMPY_DTYPES[spec.dtype]:
        raise ContractMismatchError(
            f"the package returns `{spec.name}` as {array.dtype} {list(array.shape)}",
            expected=f"{spec.dtype.value} {list(shape)}",
        )
    return array[0]
