"""Whether the constants that a package stores are the checkpoint's weights, value by value; nothing is run.

A prompt reads few rows of an embedding, so a wrong row of a rare token changes no measured output. Here every
constant is compared. coremltools 9.0 names a constant after the graph's parameter (`decoder_layers_0_qkv_weight`)
and stores it in the parameter's shape and order, rounded to the constant's dtype. Of equal constants it keeps one,
under one of their names, and it drops a multiplication by a norm's weight if that is all 1. It adds zeros as the
bias of a product without one, and computes parts of the tables in advance.

Each function has its own constants, which share memory if they are stored at the same place. Two things are checked
of each: it has every tensor of the checkpoint, and it has nothing else: a constant that is in the weight file, or
that has more than one floating-point value, is a tensor of the checkpoint, a table of the model, or such a bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from coremill.core.config import ModelConfig
from coremill.core.errors import CoremillError
from coremill.coreml.converter import Spec
from coremill.coreml.decoder import Decoder, decoder_weights
from coremill.mil.graph import operation_name, read_value
from coremill.mil.loader import Package, open_package
from coremill.mil.values import STRING
from coremill.model.checkpoint import Checkpoint

_CHUNK = 1 << 20
"""Values that are compared at once: the memory for a comparison, whatever the size of the tensor."""

_REPORTED = 3
"""Problems that are described; the others are counted."""

_PARAMETER = "decoder_"
"""Precedes a parameter's name in a constant's name, after what the front end adds."""
_CAST = "_to_fp16"
"""Follows the name of a constant that coremltools itself rounded."""

_SMALLEST = 2.0**-24
"""The smallest positive float16."""

_MERGED = {torch.float16: 6e-8, torch.float32: 1e-12}
"""The largest difference of values in constants that coremltools merges: `const_deduplication.DTYPE2ATOL`."""

_BEYOND_FLOAT16 = 65_520.0
"""The smallest magnitude that float16 rounds to infinity."""


class StoredWeights(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared, and what was found."""

    tensors: int
    """Of the checkpoint."""
    values: int
    functions: int
    """Of the package, each of which stores every tensor."""
    problem: str | None = None
    """What is not the checkpoint's."""

    def __str__(self) -> str:
        functions = f"{self.functions} function{'' if self.functions == 1 else 's'}"
        return f"{self.tensors} tensors, {self.values:,} values, in {functions}"


def compare_stored_weights(package: Path, checkpoint: Checkpoint) -> StoredWeights:
    """Compare each constant of the package's functions with the checkpoint's tensor, rounded to its dtype.

    Weights are mapped; one joined tensor is in memory at a time.
    """
    tensors = checkpoint.state_dict.values()
    count, values = len(tensors), sum(tensor.numel() for tensor in tensors)
    try:
        opened = open_package(package)
        functions = tuple(_functions(opened, checkpoint.config))
        problem = _problem(functions, checkpoint)
        opened.weights.check_sizes()
    except CoremillError as failure:  # of a part that is missing or malformed
        return StoredWeights(tensors=count, values=values, functions=0, problem=failure.found)
    return StoredWeights(tensors=count, values=values, functions=len(functions), problem=problem)


# --- the constants of a package ---------------------------------------------------------------------


@dataclass(slots=True)
class _Constant:
    """A constant of one function."""

    name: str
    parameter: str | None
    """The parameter or table of :class:`Decoder` that its name says it is."""
    value: Tensor
    in_file: bool
    """It is in the weight file, and not in the program."""
    known: bool = False
    """It was compared with what it should be."""

    @property
    def must_be_known(self) -> bool:
        return self.in_file or self.parameter is not None or (self._is_float and self.value.numel() > 1)

    @property
    def is_empty_bias(self) -> bool:
        """Whether it is zeros, which a product without a bias adds."""
        return self.parameter is None and self._is_float and self.value.dim() == 1 and not self.value.any()

    @property
    def _is_float(self) -> bool:
        return self.value.is_floating_point()

    def __str__(self) -> str:
        return f"{self.name!r}, {_name_of(self.value.dtype)} {list(self.value.shape)}"


class _Function:
    """The constants of a function that must be known."""

    def __init__(self, name: str, constants: Sequence[_Constant]) -> None:
        self.name = name
        self.constants = constants
        self.by_parameter: dict[str, list[_Constant]] = {}
        self.by_shape: dict[torch.Size, list[_Constant]] = {}
        for each in constants:
            each.known = each.is_empty_bias
            self.by_shape.setdefault(each.value.shape, []).append(each)
            if each.parameter is not None:
                self.by_parameter.setdefault(each.parameter, []).append(each)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the parameters had before the conversion: coremltools casts none to float32."""
        wide = any(each.parameter is not None and each.value.dtype == torch.float32 for each in self.constants)
        return torch.float32 if wide else torch.float16


def _functions(package: Package, config: ModelConfig) -> Iterator[_Function]:
    """Read the constants of each function; those of all operation sets, of which a device runs one."""
    decoder = Decoder(config, positions=0)
    names = [name for named in (decoder.named_parameters(), decoder.named_buffers()) for name, _ in named]
    parameters = {name.replace(".", "_"): name for name in names}
    if config.arch.tie_embeddings:
        parameters["lm_head"] = "embed_tokens.weight"
    for name, function in sorted(package.spec.mlProgram.functions.items()):
        for _, block in sorted(function.block_specializations.items()):
            constants = []
            for label, value in _values(block):
                content, _ = read_value(value, package.weights, f"{package.name}: {label!r} of {name}")
                if isinstance(content, Tensor):
                    in_file = value.WhichOneof("value") == "blobFileValue"
                    constants.append(_Constant(label, parameters.get(_stem(label)), content, in_file))
            yield _Function(name, [each for each in constants if each.must_be_known])


def _values(block: Spec) -> Iterator[tuple[str, Spec]]:
    """Yield each tensor that a block's operations contain, nested blocks included, with a name."""
    for operation in block.operations:
        name = operation_name(operation)
        values = [
            (operation.outputs[0].name if operation.type == "const" else f"{name}.{key}", value)
            for key, value in sorted(operation.attributes.items())
        ]
        for key, argument in sorted(operation.inputs.items()):
            bound = [each.value for each in argument.arguments if each.WhichOneof("binding") == "value"]
            values += [(f"{name}.{key}", value) for value in bound]
        for label, value in values:
            if value.type.WhichOneof("type") == "tensorType" and value.type.tensorType.dataType != STRING:
                yield label, value
        for nested in operation.blocks:
            yield from _values(nested)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stem(name: str) -> str:
    """Return the parameter's part of a constant's name, with `_` for each dot; empty if there is none."""
    _, found, stem = name.removesuffix(_CAST).rpartition(_PARAMETER)
    return stem if found else ""


# --- what they should be ----------------------------------------------------------------------------


def _problem(functions: Sequence[_Function], checkpoint: Checkpoint) -> str | None:
    """Return what is wrong with the constants, each problem once with the functions that have it; else None."""
    if not functions:
        return "the package has no functions"
    problems: dict[str, list[str]] = {}

    def add(problem: str | None, function: _Function) -> None:
        if problem is not None and function.name not in problems.setdefault(problem, []):
            problems[problem].append(function.name)

    for name, expected in decoder_weights(checkpoint.config, checkpoint.state_dict):
        compared: dict[int, _Difference | None] = {}  # functions share constants
        for function in functions:
            named = function.by_parameter.get(name, [])
            for each in named:
                if id(each.value) not in compared:
                    compared[id(each.value)] = _difference(name, expected, each)
                if (difference := compared[id(each.value)]) is not None:
                    add(difference.text, function)
                each.known = True
            if _find_unnamed(function, expected) or named:
                continue
            if not _is_merged(function, expected) and not _is_dropped(function, name, expected):
                add(f"{name} {list(expected.shape)} is not stored", function)
    tables = _Tables(checkpoint.config, functions)
    for function in functions:
        for each in function.constants:
            if not each.known:
                add(tables.problem(each), function)
    return _listed(problems)


def _find_unnamed(function: _Function, expected: Tensor) -> bool:
    """Find the constants that are equal to a tensor and are named after nothing; they are then known."""
    found = [
        each
        for each in function.by_shape.get(expected.shape, [])
        if each.parameter is None and not each.known and _is_equal(expected, each.value)
    ]
    for each in found:
        each.known = True
    return bool(found)


def _is_merged(function: _Function, expected: Tensor) -> bool:
    """Return whether a tensor is stored under the name of an equal one."""
    return any(
        _is_equal(expected, each.value, within=_MERGED.get(each.value.dtype, 0.0))
        for each in function.by_shape.get(expected.shape, [])
    )


def _is_dropped(function: _Function, name: str, expected: Tensor) -> bool:
    """Return whether a tensor is a norm's weight that changes nothing."""
    return name.endswith("norm.weight") and bool((expected.to(function.dtype) == 1).all())


class _Tables:
    """The constants that the decoder computes from its configuration."""

    def __init__(self, config: ModelConfig, functions: Sequence[_Function]) -> None:
        lengths = [
            each.value.shape[0]
            for function in functions
            for each in function.constants
            if not each.known and each.value.dim() == 2 and each.value.shape[1] == config.head_dim
        ]
        self._decoder = Decoder(config, positions=max(lengths, default=0))
        self._buffers = dict(self._decoder.named_buffers())
        self._compared: dict[tuple[str, int], str | None] = {}  # functions share constants

    def problem(self, constant: _Constant) -> str | None:
        """Return how a constant differs from its table, or from every table; None if it is one."""
        key = (constant.name, id(constant.value))
        if key not in self._compared:
            self._compared[key] = self._problem(constant)
        return self._compared[key]

    def _problem(self, constant: _Constant) -> str | None:
        unlike = [
            _difference(name, expected, constant, within=_table_error(name, constant.value.dtype))
            for name, expected in self._candidates(constant)
        ]
        differences = [each for each in unlike if each is not None]
        if len(differences) < len(unlike):
            return None
        nearest = [min(differences, key=lambda each: each.count).text] if differences else []
        named = [] if constant.parameter is not None and nearest else [f"{constant}, is no weight and no table"]
        return "; ".join(named + nearest)

    def _candidates(self, constant: _Constant) -> Iterator[tuple[str, Tensor]]:
        """Yield the tables of a constant's kind, as long as the constant."""
        shape, buffers = constant.value.shape, self._buffers
        if not constant.value.is_floating_point():
            # Of any shape: reshaped to be compared.
            yield "positions", torch.arange(constant.value.numel()).reshape(shape)
        elif constant.parameter is not None:
            table = buffers[constant.parameter]
            yield constant.parameter, table[: shape[0]] if shape[1:] == table.shape[1:] else table
        elif len(shape) == 2:
            if shape[1] == self._decoder.head_dim:
                yield "cos", buffers["cos"][: shape[0]]
                yield "sin", buffers["sin"][: shape[0]]
            if shape[0] == shape[1]:  # of one length T, the mask is computed in advance
                yield "the causal mask", torch.full(shape, float(buffers["masked"])).triu(1)


def _table_error(name: str, dtype: torch.dtype) -> float:
    """Return the allowed difference of a table: sines of another machine's library may differ in the last bit."""
    return torch.finfo(dtype).eps if name in ("cos", "sin") and dtype.is_floating_point else 0.0


# --- comparing --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a constant that is not what it should be: values (n,)."""

    start: int
    """The index of the first value in the constant."""
    wrong: Tensor
    found: Tensor
    expected: Tensor


@dataclass(frozen=True, slots=True)
class _Difference:
    """How a constant differs from a tensor of the model."""

    count: int
    """The number of values that differ."""
    text: str


def _difference(name: str, expected: Tensor, constant: _Constant, within: float = 0.0) -> _Difference | None:
    """Return how a constant differs from a tensor of the model, or None."""
    found, what = constant.value, f"{name}, stored as {constant.name!r}"
    if found.shape != expected.shape:
        return _Difference(
            found.numel(), f"{what}, is of shape {list(found.shape)}, expected {list(expected.shape)}"
        )
    if expected.is_floating_point() and found.dtype not in (torch.float16, torch.float32):
        return _Difference(found.numel(), f"{what}, is {_name_of(found.dtype)}, expected float16 or float32")
    first: _Part | None = None
    count, largest = 0, 0.0
    for part in _unequal_parts(expected, found, within):
        first = first or part
        count += int(part.wrong.sum())
        errors = (part.found[part.wrong].double() - part.expected[part.wrong].double()).abs()
        largest = max(largest, float(errors.nan_to_num(nan=torch.inf, posinf=torch.inf).max()))
    if first is None:
        return None
    place = int(first.wrong.to(torch.uint8).argmax())
    index = [int(each) for each in np.unravel_index(first.start + place, found.shape)]
    return _Difference(
        count,
        f"{what}: {count:,} of {found.numel():,} values differ, by up to {largest:.3g}; "
        f"at {index} it has {first.found[place].item():.8g}, expected {first.expected[place].item():.8g}",
    )


def _is_equal(expected: Tensor, found: Tensor, within: float = 0.0) -> bool:
    is_float = found.dtype in (torch.float16, torch.float32)
    return is_float and next(_unequal_parts(expected, found, within), None) is None


def _unequal_parts(expected: Tensor, found: Tensor, within: float = 0.0) -> Iterator[_Part]:
    """Yield the parts of a tensor that are not those of a tensor of the same shape, rounded to its dtype."""
    found, expected = found.reshape(-1), expected.reshape(-1)
    for start in range(0, len(found), _CHUNK):
        stored = found[start : start + _CHUNK]
        exact = expected[start : start + _CHUNK]
        if exact.is_floating_point():
            exact = exact.float()
        rounded = exact.to(stored.dtype)
        if _is_same(stored, rounded):
            continue
        wrong = ~((stored.double() - rounded.double()).abs() <= within) if within else stored != rounded
        if stored.dtype == torch.float16:
            # coremltools rounds what is not 0 away from 0 in a small tensor, if it rounds it at all: see
            # FP16ComputePrecision._check_underflow_to_zero. Where it leaves that to torch, 0 is right.
            wrong &= ~((rounded == 0) & (exact != 0) & (stored == exact.sign() * _SMALLEST))
            wrong |= exact.abs() >= _BEYOND_FLOAT16  # infinity is no rounding of a number
        if wrong.any():
            yield _Part(start, wrong, stored, exact)


def _is_same(stored: Tensor, rounded: Tensor) -> bool:
    """Return whether all bits are equal, in less than half the time of a comparison, and no value is infinite."""
    same = torch.equal(stored.view(torch.uint8), rounded.view(torch.uint8))
    return same and not (stored.is_floating_point() and bool(torch.stack(torch.aminmax(stored)).isinf().any()))


def _listed(problems: Mapping[str, Sequence[str]]) -> str | None:
    described = [f"{', '.join(functions)}: {problem}" for problem, functions in problems.items()]
    more = [f"and {len(described) - _REPORTED} more"] if len(described) > _REPORTED else []
    return "; ".join((*described[:_REPORTED], *more)) or None
