"""The program of a model as `torch.export` captures it: `main` alone, saved as a `.pt2` archive.

A program with a cache is traced instead; see `graph.py`. `decode` writes at a position that is a value, not a size,
and `torch.export` (2.8 and 2.9) rejects a slice that depends on a value: `GuardOnDataDependentSymNode`.

Legend: T sequence length.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

_COPIED_BYTES = 1 << 20
_SOURCE_METADATA = ("stack_trace", "nn_module_stack", "source_fn_stack")
"""Node metadata about the source code, which contains paths of this machine."""


class ExportedMain:
    """A program of `torch.export`; called with token ids (1, T) int32, it returns the outputs of `main`."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._program = program
        self._module: nn.Module = program.module()
        self.input_names: list[str] = list(program.graph_signature.user_inputs)
        self.output_names: list[str] = list(program.call_spec.out_spec.context)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        try:
            return tuple(self._module(*inputs).values())
        except AssertionError as failure:  # a size out of range: torch 2.9 raises this, 2.8 a RuntimeError
            raise RuntimeError(str(failure)) from failure

    def parameters(self) -> Iterator[Tensor]:
        """Yield the weights, in the order of their names; one that has two names is yielded twice."""
        for name in sorted(self._program.graph_signature.parameters):
            yield self._program.state_dict[name]

    def float(self) -> ExportedMain:
        """Cast the weights to float32, in place, and return this program."""
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        return self

    def half(self) -> ExportedMain:
        """Return the program in float16 throughout: its weights, its tables and its casts. This one is used up."""
        self._module = nn.Module()  # it would keep the weights in memory
        program = self._program
        halves: dict[int, nn.Parameter] = {}
        for name, value in list(program.state_dict.items()):
            if value.is_floating_point():
                # A new object: torch remembers the type of one that it has seen.
                halves.setdefault(id(value), nn.Parameter(value.data.half(), requires_grad=False))
                program.state_dict[name] = halves[id(value)]
        for node in program.graph.nodes:
            if node.op == "call_function":
                node.args = tuple(_half_type(value) for value in node.args)
                node.kwargs = {key: _half_type(value) for key, value in node.kwargs.items()}
        return self

    def decomposed(self) -> torch.export.ExportedProgram:
        """The program in the ATen dialect that coremltools reads."""
        program: torch.export.ExportedProgram = self._program.run_decompositions({})
        return program


def _half_type(value: torch.fx.node.Argument) -> torch.fx.node.Argument:
    """Return float16 for float32, the type that an operation casts to, and any other argument as it is."""
    return torch.float16 if value is torch.float32 else value


class _Named(nn.Module):
    """Returns a dictionary, because the exported program keeps its keys."""

    def __init__(self, main: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.main = main
        self.names = tuple(names)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.main(input_ids), strict=True))


def capture_main(
    main: nn.Module, ids: Tensor, longest: int, output_names: Sequence[str]
) -> torch.export.ExportedProgram:
    """Return `main` as captured by `torch.export`, for T from 2 to `longest`.

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
    return program


def write_exported(
    program: torch.export.ExportedProgram, weights: Iterable[tuple[str, Tensor]], file: BinaryIO
) -> None:
    """Write a captured program to `file`, with `weights` in their own types; the same model gives the same bytes.

    Args:
        weights: the decoder's parameters by name.
    """
    names: dict[str, list[str]] = {}
    for name in program.graph_signature.parameters:
        names.setdefault(name.rpartition("decoder.")[2], []).append(name)
    for name, value in weights:
        parameter = nn.Parameter(value, requires_grad=False)
        for each in names[name]:
            program.state_dict[each] = parameter
    with tempfile.TemporaryDirectory(prefix="coremill-") as folder:
        saved = Path(folder) / "archive.pt2"  # torch writes the file's stem into the archive
        torch.export.save(program, saved)
        with saved.open("rb") as read:
            shutil.copyfileobj(read, file, _COPIED_BYTES)


def load_main(path: Path) -> ExportedMain:
    """Load an archive that :func:`write_exported` wrote; its weights have their stored types.

    Raises:
        RuntimeError, ValueError, LookupError: it is not such an archive.
    """
    with warnings.catch_warnings():
        # torch 2.9 warns that the buffer is read-only; nothing writes to the weights.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return ExportedMain(torch.export.load(path))
