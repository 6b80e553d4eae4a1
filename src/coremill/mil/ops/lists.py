"""Lists of tensors of one shape.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.control_flow`; coremltools' own
test of lists shows that an unwritten element is 0.

A negative index or one past the end is an error, except that a write past the end grows a list of dynamic length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from coremill.mil.ops.registry import Ints, OperationError, Symbols, op
from coremill.mil.values import FP32, INT32, ElementType, TensorList


@op("make_list", native=True)
def make_list(
    *, init_length: int = 1, dynamic_length: bool = True, elem_shape: Symbols = (), dtype: ElementType = FP32
) -> TensorList:
    """make_list: a list of zeros. A symbolic size becomes known with the first write."""
    if init_length < 0:
        raise OperationError(f"a list of length {init_length}")
    shape = tuple(None if isinstance(size, str) else size for size in elem_shape)
    return TensorList(init_length, {}, shape, dtype.storage, dynamic_length)


@op("list_length", native=True)
def list_length(ls: TensorList) -> Tensor:
    """list_length: the number of elements."""
    return torch.tensor(ls.length, dtype=INT32.storage)


@op("list_read", native=True)
def list_read(ls: TensorList, *, index: int) -> Tensor:
    """list_read: the element at the index."""
    return _element(ls, index)


@op("list_gather", native=True)
def list_gather(ls: TensorList, *, indices: Ints) -> Tensor:
    """list_gather: (len(indices), …), the elements at the indices."""
    if not indices:
        return torch.zeros((0, *_known_shape(ls)), dtype=ls.dtype)
    return torch.stack([_element(ls, index) for index in indices])


@op("list_write", native=True)
def list_write(ls: TensorList, value: Tensor, *, index: int) -> TensorList:
    """list_write: a copy of the list with `value` at the index."""
    return _with_elements(ls, [(index, value)])


@op("list_scatter", native=True)
def list_scatter(ls: TensorList, value: Tensor, *, indices: Ints) -> TensorList:
    """list_scatter: a copy of the list with the slices of `value` along its first axis at the indices."""
    if value.shape[0] != len(indices):
        raise OperationError(f"{value.shape[0]} values for {len(indices)} indices")
    return _with_elements(ls, zip(indices, value.unbind(0), strict=True))


def _element(ls: TensorList, index: int) -> Tensor:
    if not 0 <= index < ls.length:
        raise OperationError(f"index {index} is out of bounds: the list has {ls.length} elements")
    found = ls.written.get(index)
    return torch.zeros(_known_shape(ls), dtype=ls.dtype) if found is None else found


def _known_shape(ls: TensorList) -> tuple[int, ...]:
    known = tuple(size for size in ls.shape if size is not None)
    if len(known) != len(ls.shape):
        raise OperationError(f"nothing was written to the list, whose elements are of shape {_text(ls.shape)}")
    return known


def _with_elements(ls: TensorList, elements: Iterable[tuple[int, Tensor]]) -> TensorList:
    written = dict(ls.written)
    shape, length = ls.shape, ls.length
    for index, value in elements:
        if index < 0 or (index >= length and not ls.is_dynamic):
            raise OperationError(f"index {index} is out of bounds: the list has {length} elements")
        fits = len(shape) == value.dim() and all(
            size in (None, found) for size, found in zip(shape, value.shape, strict=True)
        )
        if not fits:
            raise OperationError(f"a value of shape {_text(value.shape)}, the list's are of {_text(shape)}")
        shape, length = tuple(value.shape), max(length, index + 1)
        written[index] = value
    return replace(ls, length=length, written=written, shape=shape)


def _text(shape: Iterable[int | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
