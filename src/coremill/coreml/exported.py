"""The program of a model as `torch.export` takes it: `main` alone, saved as a `.pt2` archive.

`decode` writes at a position that is a value, not a size, and `torch.export` (2.8 and 2.9) refuses a slice that
depends on one: `GuardOnDataDependentSymNode`. So a program with a cache is traced; see `graph.py`.

Legend: T sequence length.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NOT_OF_THE_MODEL = ("stack_trace", "nn_module_stack", "source_fn_stack")
"""What nodes carry of the code that they come from, with the paths of this machine."""


class ExportedMain:
    """A program of `torch.export`; called with token ids (1, T) int32, it returns what `main` returns."""

    def __init__(self, program: Any) -> None:
        self.program = program
        """The torch.export.ExportedProgram."""
        self._module = program.module()
        self.input_names: list[str] = list(program.graph_signature.user_inputs)
        self.output_names: list[str] = list(program.call_spec.out_spec.context)

    def __call__(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        try:
            return tuple(self._module(input_ids).values())
        except AssertionError as failure:  # torch 2.9's way to say that a size is out of range; 2.8 raises this:
            raise RuntimeError(str(failure)) from failure

    def converted_form(self) -> Any:
        """The program in the dialect that coremltools reads."""
        return self.program.run_decompositions({})


class _Named(nn.Module):
    """Returns a dictionary, whose keys the exported program keeps."""

    def __init__(self, main: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.main = main
        self.names = tuple(names)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.main(input_ids), strict=True))


def export_main(main: nn.Module, ids: Tensor, longest: int, output_names: Sequence[str]) -> bytes:
    """The archive of `main`, for T from 2 to `longest`; the same model gives the same bytes.

    Args:
        ids: (1, T) int32.

    Raises:
        RuntimeError, ValueError: `torch.export` cannot take it.
    """
    lengths = torch.export.Dim("T", min=2, max=longest)
    named = _Named(main.eval(), output_names)
    program = torch.export.export(named, (ids,), dynamic_shapes=({1: lengths},))
    for node in program.graph.nodes:
        for key in _NOT_OF_THE_MODEL:
            node.meta.pop(key, None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def load_main(source: Path | io.BytesIO) -> ExportedMain:
    """The program in an archive that :func:`export_main` made; RuntimeError and the like if it is none."""
    with warnings.catch_warnings():
        # torch 2.9 warns that bytes are not writable; nothing writes to the weights.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return ExportedMain(torch.export.load(source))
