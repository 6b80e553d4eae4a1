"""The registry of operations: kernels over torch tensors, and the parameters in their signatures.

A kernel is a function. Its **positional** parameters are the operation's tensor inputs (`Tensor`, `Tensor | None`,
`Tensors` for several, `TensorList` for a value of list type, `StateCell` for a state). Its **keyword-only**
parameters are attributes: Python values, whether they are constants of the program or computed. A kernel's output
shape depends only on its tensor inputs' shapes and its attributes' values, unless it is registered with
`data_dependent_shape`.

Parameter names are those of the operation in coremltools' definitions, `coremltools.converters.mil.mil.ops.defs`,
whose documentation is the source of the semantics unless a kernel names another.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, UnionType
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from coremill.mil.values import ElementType, StateCell, TensorList, Value

Tensors = tuple[Tensor, ...]
Ints = tuple[int, ...]
Bools = tuple[bool, ...]
IntPairs = tuple[tuple[int, int], ...]
Symbols = tuple[int | str, ...]
"""Integers and strings: class labels, or sizes of which some are symbolic."""
Attribute: TypeAlias = "int | float | bool | str | Ints | Bools | IntPairs | Symbols | ElementType"
Given: TypeAlias = "Value | list[Given]"
"""The value of an attribute in a program; the numbers of a tensor are nested lists."""
Kernel: TypeAlias = "Callable[..., Value]"
_Kernel = TypeVar("_Kernel", bound="Kernel")
_Scalar = TypeVar("_Scalar", bool, int, float, str)


class OperationError(ValueError):
    """An operation rejects its values; the caller adds the operation's name."""


class Overwritten(NamedTuple):
    """What a kernel wrote into one of its inputs."""

    result: Tensor
    """The input."""
    part: Tensor
    """The view of it that was written."""
    before: Tensor
    """A copy of the part's old content."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a kernel."""

    name: str
    required: bool
    is_list: bool = False
    """Whether it takes several tensors."""
    is_state: bool = False
    is_list_value: bool = False
    """Whether it takes one value of list type."""
    convert: Callable[[Given], Attribute] | None = None
    """Converts a number, list or string of the program to the attribute's value; None for a tensor input."""
    is_element_type: bool = False
    """Whether it is an element type, which the kernel receives as an ElementType with the mode's storage."""


@dataclass(frozen=True, slots=True)
class Definition:
    """A registered operation at one version of its semantics."""

    op_type: str
    kernel: Kernel
    since: int
    """The first iOS version with these semantics."""
    native: bool
    """Whether the kernel computes in the storage type. Otherwise its fp16 inputs are widened to fp32 and its fp16
    results are rounded once. Kernels that move or compare values are native, and those whose torch kernel for fp16
    computes in fp32 and rounds once; they read and write half the bytes."""
    pure: bool
    """Whether equal inputs always give equal outputs, without side effects."""
    data_dependent_shape: bool
    tensors: tuple[Parameter, ...]
    attributes: Mapping[str, Parameter]
    returns_tuple: bool
    """Whether the kernel may return a tuple of outputs; otherwise it returns one."""
    returns_list_value: bool
    """Whether its output has list type."""
    in_place: Callable[..., Overwritten] | None
    """A kernel that writes into its first input; see `coremill.mil.in_place` for when it is used."""


@dataclass
class _Registry:
    definitions: dict[str, list[Definition]] = field(default_factory=dict)


_REGISTRY = _Registry()


def op(
    *names: str,
    since: int = 15,
    native: bool = False,
    pure: bool = True,
    data_dependent_shape: bool = False,
    fixed: Mapping[str, Attribute | None] | None = None,
    in_place: Callable[..., Overwritten] | None = None,
) -> Callable[[_Kernel], _Kernel]:
    """Register a kernel as the operation of these names; see :class:`Definition` for the options.

    Args:
        fixed: values of keyword-only parameters that this version of the operation fixes; they are not in programs.
            One kernel can thus serve several versions.
        in_place: a kernel with the same parameters that writes into its first input instead of copying it.
    """
    fixed = fixed or {}

    def register(kernel: _Kernel) -> _Kernel:
        tensors, attributes = _parameters(kernel, fixed)
        bound = functools.partial(kernel, **fixed) if fixed else kernel
        returned = inspect.signature(kernel, eval_str=True).return_annotation
        for name in names:
            definition = Definition(
                name,
                bound,
                since,
                native,
                pure,
                data_dependent_shape,
                tensors,
                MappingProxyType(attributes),
                returned not in (Tensor, TensorList),
                returned is TensorList,
                in_place,
            )
            versions = _REGISTRY.definitions.setdefault(name, [])
            if any(other.since == since for other in versions):
                raise ValueError(f"operation {name} of iOS{since} is registered twice")
            versions.append(definition)
            versions.sort(key=lambda each: each.since)
        return kernel

    return register


def find(op_type: str, ios_version: int) -> Definition | None:
    """Return the definition of an operation for an iOS version, or None."""
    found = None
    for definition in _REGISTRY.definitions.get(op_type, []):
        if definition.since <= ios_version:
            found = definition
    return found


def definitions() -> list[Definition]:
    """Return every registered definition, sorted by name and version."""
    return [each for name in sorted(_REGISTRY.definitions) for each in _REGISTRY.definitions[name]]


def supported_operations() -> list[str]:
    """Return the sorted names of the registered operations."""
    return sorted(_REGISTRY.definitions)


def _parameters(
    kernel: Kernel, fixed: Mapping[str, Attribute | None]
) -> tuple[tuple[Parameter, ...], dict[str, Parameter]]:
    tensors: list[Parameter] = []
    attributes: dict[str, Parameter] = {}
    parameters = inspect.signature(kernel, eval_str=True).parameters
    if unknown := sorted(set(fixed) - set(parameters)):
        raise TypeError(f"{kernel.__name__} has no parameters {unknown} to fix")
    for parameter in parameters.values():
        if parameter.name in fixed:
            continue
        required = parameter.default is inspect.Parameter.empty
        kind = _without_none(parameter.annotation)
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            attributes[parameter.name] = Parameter(
                parameter.name, required, convert=_CONVERTERS[kind], is_element_type=kind is ElementType
            )
        elif kind in (Tensor, StateCell, Tensors, TensorList):
            tensors.append(
                Parameter(
                    parameter.name,
                    required,
                    is_list=kind == Tensors,
                    is_state=kind is StateCell,
                    is_list_value=kind is TensorList,
                )
            )
        else:
            raise TypeError(f"{kernel.__name__}: positional parameter {parameter.name} is {kind}, not a tensor")
    return tuple(tensors), attributes


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (UnionType, typing.Union):
        kinds = [each for each in typing.get_args(annotation) if each is not type(None)]
        if len(kinds) == 1:
            return kinds[0]
    return annotation


def _scalar(kind: type[_Scalar]) -> Callable[[Given], _Scalar]:
    def convert(value: Given) -> _Scalar:
        while isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if isinstance(value, (list, tuple)) or (isinstance(value, str) != issubclass(kind, str)):
            raise OperationError(f"{value!r} is not one {kind.__name__}")
        return _converted(kind, value)

    return convert


def _sequence(kind: type[_Scalar]) -> Callable[[Given], tuple[_Scalar, ...]]:
    def convert(value: Given) -> tuple[_Scalar, ...]:
        values = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(each, (list, tuple, str)) for each in values):
            raise OperationError(f"{value!r} is not a list of {kind.__name__}")
        return tuple(_converted(kind, each) for each in values)

    return convert


def _converted(kind: type[_Scalar], value: Given) -> _Scalar:
    if not isinstance(value, (int, float, str)):
        raise OperationError(f"{value!r} is not of type {kind.__name__}")
    try:
        return kind(value)
    except (ValueError, OverflowError) as error:  # a string, a NaN, an infinity
        raise OperationError(f"{value!r} is not of type {kind.__name__}") from error


def _int_pairs(value: Given) -> IntPairs:
    values = value if isinstance(value, (list, tuple)) else [value]
    pairs = [pair for pair in values if isinstance(pair, (list, tuple)) and len(pair) == 2]
    if len(pairs) != len(values):
        raise OperationError(f"{value!r} is not a list of pairs of int")
    return tuple((_converted(int, first), _converted(int, second)) for first, second in pairs)


def _symbols(value: Given) -> Symbols:
    values = value if isinstance(value, (list, tuple)) else [value]
    symbols = tuple(each for each in values if isinstance(each, (int, str)))
    if len(symbols) != len(values):
        raise OperationError(f"{value!r} is not a list of int and str")
    return symbols


_CONVERTERS: dict[Any, Callable[[Given], Attribute]] = {
    int: _scalar(int),
    float: _scalar(float),
    bool: _scalar(bool),
    str: _scalar(str),
    Ints: _sequence(int),
    Bools: _sequence(bool),
    IntPairs: _int_pairs,
    Symbols: _symbols,
    # the plan sets the storage of the type
    ElementType: _scalar(str),
}
