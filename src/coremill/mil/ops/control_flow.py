"""Selection, branches and loops.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.control_flow`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coremill.mil.ops.registry import op

Block = Callable[..., tuple[Any, ...]]
"""A nested block of a program: maps the values of its inputs to the values of its outputs."""


@op("select", native=True)
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """select: a where cond is true, else b; all three broadcast."""
    return torch.where(cond, a, b)


def run_cond(pred: Tensor, *, if_true: Block, if_false: Block) -> tuple[Any, ...]:
    """cond: the outputs of one of two blocks; the other block does not run."""
    return if_true() if bool(pred) else if_false()


def run_while_loop(loop_vars: tuple[Any, ...], *, condition: Block, body: Block) -> tuple[Any, ...]:
    """while_loop: run the body on its own outputs while the condition holds."""
    while bool(condition(*loop_vars)[0]):
        loop_vars = body(*loop_vars)
    return loop_vars
