"""The backends that run a package: `coremill.mil` anywhere, Core ML on macOS.

Legend: T sequence length, S positions of the cache, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from coremill.core.contract import Contract, PackageFunction, TensorSpec
from coremill.core.errors import CacheFullError, ContractMismatchError, PredictionInputError
from coremill.core.reports import Backend
from coremill.coreml.converter import ct
from coremill.coreml.graph import DECODE, PREFILL
from coremill.measures import Float32Array
from coremill.mil import MLModel

Input = npt.NDArray[np.int32]

State = Any
"""The state of a model between predictions; coremill.mil and Core ML each have their own type."""


class Predictor(Protocol):
    """The part of coremltools' MLModel that both backends have."""

    def predict(self, data: Mapping[str, Input]) -> dict[str, Float32Array]: ...


class StatefulPredictor(Protocol):
    """The same for a function with states."""

    def make_state(self) -> State: ...
    def predict(self, data: Mapping[str, Input], state: State) -> dict[str, Float32Array]: ...


class Runner:
    """A package and its backend; every prediction is checked against the contract."""

    def __init__(
        self, predictor: Predictor, backend: Backend, contract: Contract, *, operations: int | None = None
    ) -> None:
        self.backend = backend
        self.operations = operations
        """The number of operations that the backend lowered; None if it does not report it."""
        self._predictor = predictor
        (self._input,) = contract.inputs
        self._outputs = contract.outputs

    def run(self, ids: Sequence[int]) -> dict[str, Float32Array]:
        """Return the outputs by name for `ids` (T,), T one of the package's lengths, without the batch dimension.

        Raises:
            PredictionInputError: the package does not accept this length or input.
            ContractMismatchError: an output is missing, or differs from the contract in shape or dtype.
        """
        found = self._predictor.predict({self._input.name: _given(self._input, [list(ids)])})
        return {spec.name: _checked(spec, found, len(ids)) for spec in self._outputs}


class StatefulRunner:
    """A package's functions with a key/value cache: read a prompt, then decode tokens one by one.

    There is one cache, initially empty. Every prediction is checked against the contract, and a token that does not
    fit the cache is an error.

    Args:
        predictors: by the names of the contract's functions of a package that have states. They share one state.
        pad_id: the padding token; its keys and values are masked until they are overwritten.

    Raises:
        ValueError: these functions are not one `decode`, and a `prefill` for each of some lengths.
    """

    def __init__(
        self, predictors: Mapping[str, StatefulPredictor], backend: Backend, contract: Contract, *, pad_id: int
    ) -> None:
        functions = [function for function in contract.package_functions if function.states]
        decode = [_Function(each, predictors[each.name]) for each in functions if each.graph == DECODE]
        prefill = {
            seq_len: _Function(each, predictors[each.name])
            for each in functions
            if each.graph == PREFILL
            for seq_len in each.lengths
        }
        if len(decode) != 1 or not prefill or len(decode) + len(prefill) != len(functions):
            names = [function.name for function in functions]
            raise ValueError(f"the contract has the functions {names} in addition to `main`")
        self.backend = backend
        self.capacity = contract.cache_positions
        """S: the number of tokens that the cache can hold."""
        (self._decode,) = decode
        self._prefill = dict(sorted(prefill.items()))
        self.pad_id = pad_id
        self.reset()

    @property
    def position(self) -> int:
        """The number of tokens in the cache: the position of the next one."""
        return self._position

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths to which prompts are padded, ascending."""
        return tuple(self._prefill)

    def reset(self, position: int = 0) -> None:
        """Empty the cache.

        Args:
            position: the number of tokens that the cache then counts, with zeros as keys and values: for checks
                that decode depends on the cache, or near its end.

        Raises:
            ValueError: `position` is outside the cache.
        """
        if not 0 <= position <= self.capacity:
            raise ValueError(f"position {position} of a cache of {self.capacity}")
        self._state = self._decode.predictor.make_state()
        self._position = position

    def prefill(
        self, ids: Sequence[int], *, seq_len: int | None = None, pad_id: int | None = None
    ) -> dict[str, Float32Array]:
        """Read a prompt into the empty cache.

        Args:
            ids: (n,) token ids.
            seq_len: the length to pad to; by default the smallest that fits.
            pad_id: overrides the runner's own.

        Returns:
            The outputs by name at the last token: `logits` (V,), `halt_logits` (2,).

        Raises:
            CacheFullError: more tokens than the cache can hold; nothing was run.
            PredictionInputError: more tokens than the longest length, or a length that the package does not have.
            ContractMismatchError: an output is missing, or differs from the contract in shape or dtype.
            ValueError: there are no tokens, or the cache is not empty.
        """
        if not ids or self._position:
            raise ValueError(f"a prompt of {len(ids)} tokens for a cache that holds {self._position}")
        self._check_room(len(ids))
        fitting = [length for length in self._prefill if length >= len(ids) and seq_len in (None, length)]
        if not fitting:
            raise PredictionInputError(
                f"a prompt of {len(ids)} tokens" + ("" if seq_len is None else f" padded to {seq_len}"),
                expected=f"at most one of {list(self._prefill)}",
            )
        padding = [self.pad_id if pad_id is None else pad_id] * (fitting[0] - len(ids))
        outputs = self._prefill[fitting[0]].run([*ids, *padding], len(ids), self._state)
        self._position = len(ids)
        return outputs

    def decode(self, token: int) -> dict[str, Float32Array]:
        """Append `token` to the cache.

        Returns:
            The outputs by name at this token: `logits` (V,), `halt_logits` (2,).

        Raises:
            CacheFullError: the cache is full; nothing was run.
            ContractMismatchError: an output is missing, or differs from the contract in shape or dtype.
        """
        self._check_room(1)
        outputs = self._decode.run([token], self._position, self._state)
        self._position += 1
        return outputs

    def _check_room(self, tokens: int) -> None:
        if self._position + tokens > self.capacity:
            raise CacheFullError(
                f"the cache holds {self._position} tokens; {tokens} more exceed its {self.capacity} positions",
                expected="a shorter conversation, or a package with more positions: export.context",
            )


class _Function:
    """`prefill` or `decode`, with its predictor."""

    def __init__(self, function: PackageFunction, predictor: StatefulPredictor) -> None:
        self.predictor = predictor
        self._ids, self._number = function.inputs
        self._outputs = function.outputs

    def run(self, ids: Sequence[int], number: int, state: State) -> dict[str, Float32Array]:
        """Return the outputs for `ids` and the function's number: the length of the prompt, or the position."""
        given = {
            self._ids.name: _given(self._ids, [list(ids)]),
            self._number.name: _given(self._number, [number]),
        }
        found = self.predictor.predict(given, state)
        return {spec.name: _checked(spec, found, len(ids))[0] for spec in self._outputs}


def reference_runner(package: Path, contract: Contract) -> Runner:
    """Load the package with `coremill.mil`: parse, validate and lower it.

    Raises:
        PackageError: the package is unreadable, or a part is missing.
        UnsupportedOperationError: coremill.mil does not support an operation.
    """
    model = MLModel(package)
    operations = len(model.program.graph.nodes)  # after lowering, not as listed in the protobuf
    return Runner(model, Backend.MIL_REFERENCE, contract, operations=operations)


def reference_stateful_runner(package: Path, contract: Contract, *, pad_id: int) -> StatefulRunner:
    """Load the package's functions with a cache with `coremill.mil`; raises as :func:`reference_runner` does."""
    predictors = {name: MLModel(package, function_name=name) for name in _stateful_names(contract)}
    return StatefulRunner(predictors, Backend.MIL_REFERENCE, contract, pad_id=pad_id)


def wide_stateful_runner(package: Path, contract: Contract, *, pad_id: int) -> StatefulRunner:
    """Load the functions with a cache, with constants as saved, and all arithmetic and the cache in float32."""
    predictors = {name: MLModel(package, function_name=name, mode="oracle") for name in _stateful_names(contract)}
    return StatefulRunner(predictors, Backend.MIL_REFERENCE, contract, pad_id=pad_id)


def has_core_ml() -> bool:
    return sys.platform == "darwin"


def core_ml_runner(package: Path, contract: Contract) -> Runner:
    """Load the package with Core ML, on the CPU only: its results do not depend on other compute units."""
    return Runner(_core_ml_model(package), Backend.COREML, contract)


def core_ml_stateful_runner(package: Path, contract: Contract, *, pad_id: int) -> StatefulRunner:
    """Load the package's functions with a cache with Core ML, on the CPU only."""
    predictors = {name: _core_ml_model(package, name) for name in _stateful_names(contract)}
    return StatefulRunner(predictors, Backend.COREML, contract, pad_id=pad_id)


def _core_ml_model(package: Path, function_name: str | None = None) -> Any:
    return ct.models.MLModel(str(package), compute_units=ct.ComputeUnit.CPU_ONLY, function_name=function_name)


def _stateful_names(contract: Contract) -> list[str]:
    return [function.name for function in contract.package_functions if function.states]


def _given(spec: TensorSpec, values: Sequence[int] | Sequence[list[int]]) -> Input:
    return np.asarray(values, dtype=spec.dtype.value)


def _checked(spec: TensorSpec, found: Mapping[str, Float32Array], seq_len: int) -> Float32Array:
    """Return the output that `spec` describes, without its batch dimension."""
    if spec.name not in found:
        raise ContractMismatchError(
            f"the package returns {', '.join(f'`{name}`' for name in found)}", expected=f"an output `{spec.name}`"
        )
    array, shape = found[spec.name], spec.at(T=seq_len)
    if array.shape != shape or array.dtype != spec.dtype.value:
        raise ContractMismatchError(
            f"the package returns `{spec.name}` as {array.dtype} {list(array.shape)}",
            expected=f"{spec.dtype.value} {list(shape)}",
        )
    valid: Float32Array = array[0]
    return valid
