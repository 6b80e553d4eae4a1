"""What can run a package: `coremill.mil` anywhere, Core ML itself on macOS.

Legend: T sequence length, S positions of the cache, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from coremill.core.contract import Contract, StatefulFunction, TensorSpec, shape_key
from coremill.core.errors import CacheFullError, ContractMismatchError, PredictionInputError
from coremill.core.reports import Backend
from coremill.coreml.converter import ct
from coremill.coreml.graph import DECODE, PREFILL
from coremill.mil import MLModel

Array = Any
"""An np.ndarray; numpy has no types where this is checked."""

State = Any
"""What a stateful model keeps between predictions; coremill.mil and Core ML have each their own."""


class Predictor(Protocol):
    """The part of coremltools' MLModel that both have."""

    def predict(self, data: Mapping[str, Array]) -> dict[str, Array]: ...


class StatefulPredictor(Protocol):
    """The same of a function with states."""

    def make_state(self) -> State: ...
    def predict(self, data: Mapping[str, Array], state: State) -> dict[str, Array]: ...


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
        found = self._predictor.predict({self._input.name: _given(self._input, [list(ids)])})
        return {spec.name: _checked(spec, found, len(ids)) for spec in self._outputs}


class StatefulRunner:
    """A package's functions with a key/value cache: a prompt is read, then tokens follow one by one.

    There is one cache, empty at first. Every prediction is checked against the contract, and no token goes in where
    there is no room for it.

    Args:
        predictors: the package's functions by name: one `prefill` for each length that passed, and `decode`. The
            state that one makes serves all.
        pad_id: what a prompt is padded with; its keys and values are hidden until they are overwritten.

    Raises:
        ValueError: the contract has no such functions, or a predictor is missing.
    """

    def __init__(
        self, predictors: Mapping[str, StatefulPredictor], backend: Backend, contract: Contract, *, pad_id: int
    ) -> None:
        functions = {function.name: function for function in contract.functions}
        if functions.keys() != {PREFILL, DECODE}:
            raise ValueError(f"the contract has the functions {sorted(functions)} beside `main`")
        self.backend = backend
        self.capacity = contract.cache_positions
        """S: how many tokens the cache holds."""
        self._decode = _Function(functions[DECODE], predictors[DECODE])
        self._prefill = {
            seq_len: _Function(functions[PREFILL], predictors[_prefill_name(seq_len)])
            for seq_len in sorted(contract.working_lengths)
        }
        self.pad_id = pad_id
        self.reset()

    @property
    def position(self) -> int:
        """How many tokens the cache holds; the next one's place."""
        return self._position

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that prompts are padded to, ascending."""
        return tuple(self._prefill)

    def reset(self, position: int = 0) -> None:
        """Empty the cache.

        Args:
            position: how many tokens it is to count as holding all the same; their keys and values are zeros. A
                check that the cache matters, or one near its end, begins there.

        Raises:
            ValueError: `position` is beyond the cache.
        """
        if not 0 <= position <= self.capacity:
            raise ValueError(f"position {position} of a cache of {self.capacity}")
        self._state = self._decode.predictor.make_state()
        self._position = position

    def prefill(
        self, ids: Sequence[int], *, seq_len: int | None = None, pad_id: int | None = None
    ) -> dict[str, Array]:
        """Read a prompt into the empty cache.

        Args:
            ids: (n,) token ids.
            seq_len: the length to pad to; the smallest that holds them if it is not given.
            pad_id: instead of the runner's own.

        Returns:
            The outputs by name at the last token: `logits` (V,), `halt_logits` (2,).

        Raises:
            CacheFullError: more tokens than the cache holds; nothing was run.
            PredictionInputError: more tokens than the longest length, or a length that the package has not.
            ContractMismatchError: an output of the contract is missing, or has another shape or dtype.
            ValueError: no tokens, or a cache that is not empty.
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

    def decode(self, token: int) -> dict[str, Array]:
        """Put `token` at the next place of the cache.

        Returns:
            The outputs by name after it: `logits` (V,), `halt_logits` (2,).

        Raises:
            CacheFullError: there is no next place; nothing was run.
            ContractMismatchError: an output of the contract is missing, or has another shape or dtype.
        """
        self._check_room(1)
        outputs = self._decode.run([token], self._position, self._state)
        self._position += 1
        return outputs

    def _check_room(self, tokens: int) -> None:
        if self._position + tokens > self.capacity:
            raise CacheFullError(
                f"the cache holds {self._position} tokens, and {tokens} more are beyond its {self.capacity}",
                expected="a shorter conversation, or a package with more positions: export.context",
            )


class _Function:
    """`prefill` or `decode`, with what runs it."""

    def __init__(self, function: StatefulFunction, predictor: StatefulPredictor) -> None:
        self.predictor = predictor
        self._ids, self._number = function.inputs
        self._outputs = function.outputs

    def run(self, ids: Sequence[int], number: int, state: State) -> dict[str, Array]:
        """The outputs for `ids` and the function's number: the length of a prompt, or a position."""
        given = {
            self._ids.name: _given(self._ids, [list(ids)]),
            self._number.name: _given(self._number, [number]),
        }
        found = self.predictor.predict(given, state)
        return {spec.name: _checked(spec, found, len(ids))[0] for spec in self._outputs}


def reference_runner(package: Path, contract: Contract) -> Runner:
    """`coremill.mil` on the package: parsed, validated and lowered here, or an error that says why not.

    Raises:
        PackageError: unreadable, or a part is missing.
        UnsupportedOperationError: it has an operation that coremill.mil does not run.
    """
    model = MLModel(package)
    operations = len(model.program.graph.nodes)  # what the package became, not what its protobuf lists
    return Runner(model, Backend.MIL_REFERENCE, contract, operations=operations)


def reference_stateful_runner(package: Path, contract: Contract, *, pad_id: int) -> StatefulRunner:
    """`coremill.mil` on the package's functions with a cache; raises as :func:`reference_runner` does."""
    predictors = {name: MLModel(package, function_name=name) for name in _stateful_names(contract)}
    return StatefulRunner(predictors, Backend.MIL_REFERENCE, contract, pad_id=pad_id)


def wide_stateful_runner(package: Path, contract: Contract, *, pad_id: int) -> StatefulRunner:
    """The functions with a cache, their constants as saved; all arithmetic, and the cache, in float32."""
    predictors = {name: MLModel(package, function_name=name, mode="oracle") for name in _stateful_names(contract)}
    return StatefulRunner(predictors, Backend.MIL_REFERENCE, contract, pad_id=pad_id)


def has_core_ml() -> bool:
    return sys.platform == "darwin"


def core_ml_runner(package: Path, contract: Contract) -> Runner:
    """Core ML itself on the package, on the CPU, whose results do not depend on the machine's other units."""
    return Runner(_core_ml_model(package), Backend.COREML, contract)


def core_ml_stateful_runner(package: Path, contract: Contract, *, pad_id: int) -> StatefulRunner:
    """Core ML itself on the package's functions with a cache, on the CPU."""
    predictors = {name: _core_ml_model(package, name) for name in _stateful_names(contract)}
    return StatefulRunner(predictors, Backend.COREML, contract, pad_id=pad_id)


def _core_ml_model(package: Path, function_name: str | None = None) -> Any:
    return ct.models.MLModel(str(package), compute_units=ct.ComputeUnit.CPU_ONLY, function_name=function_name)


def _stateful_names(contract: Contract) -> list[str]:
    return [function.name for function in contract.package_functions if function.states]


def _prefill_name(seq_len: int) -> str:
    return f"{PREFILL}_{shape_key(seq_len)}"


def _given(spec: TensorSpec, values: Sequence[Any]) -> Array:
    return np.asarray(values, dtype=spec.dtype.value)


def _checked(spec: TensorSpec, found: Mapping[str, Array], seq_len: int) -> Array:
    """The output that `spec` promises, without its batch dimension."""
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
    return array[0]
