"""States: tensors that outlive a prediction.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS18.states`, and `coreml_dialect`, which says
that `coreml_update_state` is saved as a `write_state` and, where its result is used, a `read_state`.
"""

from __future__ import annotations

from torch import Tensor

from coremill.mil.ops.registry import op
from coremill.mil.values import StateCell


@op("read_state", since=18, native=True, pure=False)
def read_state(input: StateCell) -> Tensor:
    """read_state: the state's content. No copy: no kernel writes to its inputs, and `write_state` replaces."""
    return input.tensor


@op("write_state", since=18, native=True, pure=False)
def write_state(input: StateCell, data: Tensor) -> tuple[()]:
    """write_state: makes `data` the state's content."""
    input.tensor = data
    return ()
