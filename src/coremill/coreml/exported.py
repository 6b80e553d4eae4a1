"""The program of a model as `torch.export` captures it: `main` alone, saved as a `.pt2` archive.

A program with a cache is traced instead; see `graph.py`. `decode` writes at a position that is a value, not a size,
and `torch.export` (2.8 and 2.9) rejects a slice that depends on a value: `GuardOnDataDependentSymNode`.

Legend: T sequence length.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

_SOURCE_METADATA = ("stack_trace", "nn_module_stack", "source_fn_stack")
"""Node metadata about the source code, which contains paths of this machine."""


class ExportedMain:
    """A program of `torch.export`; called with token ids (1, T) int32, it returns the outputs of `main`."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._program = program
        self._module = program.module()
        self.input_names: list[str] = list(program.graph_signature.user_inputs)
        self.output_names: list[str] = list(program.call_spec.out_spec.context)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        try:
            return tuple(self._module(*inputs).values())
        except AssertionError as failure:  # a size out of range: torch 2.9 raises this, 2.8 a RuntimeError
            raise RuntimeError(str(failure)) from failure

    def decomposed(self) -> torch.export.ExportedProgram:
        """The program in the ATen dialect that coremltools reads."""
        program: torch.export.ExportedProgram = self._program.run_decompositions({})
        return program


class _Named(nn.Module):
    """Returns a dictionary, because the exported program keeps its keys."""

    def __init__(self, main: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.main = main
        self.names = tuple(names)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.main(input_ids), strict=True))


def export_main(main: nn.Module, ids: Tensor, longest: int, output_names: Sequence[str]) -> bytes:
    """Return the archive of `main`, for T from 2 to `longest`; the same model gives the same bytes.

    Args:
        ids: (1, T) int32.

    Raises:
        RuntimeError, ValueError: `torch.export` cannot capture the model.
    """
    lengths = torch.export.Dim("T", min=2, max=longest)
    named = _Named(main.eval(), output_names)
    program = torch.export.export(named, (ids,), dynamic_shapes=({1: lengths},))
    for node in program.graph.nodes:
        for key in _SOURCE_METADATA:
            node.meta.pop(key, None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def load_main(source: Path | io.BytesIO) -> ExportedMain:
    """Load an archive that :func:`export_main` made.

    Raises:
        RuntimeError, ValueError, LookupError: it is not such an archive.
    """
    with warnings.catch_warnings():
        # torch 2.9 warns that the buffer is read-only; nothing writes to the weights.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return ExportedMain(torch.export.load(source))
