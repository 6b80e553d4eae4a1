"""States: tensors that persist between predictions.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS18.states`, and `coreml_dialect`, which states
that `coreml_update_state` is saved as a `write_state` and, where its result is used, a `read_state`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coremill.mil.ops.registry import OperationError, op
from coremill.mil.values import StateCell


@op("read_state", since=18, native=True, pure=False)
def read_state(input: StateCell) -> Tensor:
    """read_state: the state's content, without a copy.

    `write_state` replaces the tensor, and an update in place writes into it only where nothing reads this value
    afterwards; see `coremill.mil.in_place`.
    """
    return input.tensor


@op("write_state", since=18, native=True, pure=False)
def write_state(input: StateCell, data: Tensor) -> tuple[()]:
    """write_state: replace the state's content with `data`, which must have its shape and type."""
    found, expected = ((tensor.shape, tensor.dtype) for tensor in (data, input.tensor))
    if found != expected:
        raise OperationError(f"a tensor of {_text(*found)} for a state, expected {_text(*expected)}")
    input.tensor = data
    return ()


def _text(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
