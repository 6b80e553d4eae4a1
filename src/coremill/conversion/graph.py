"""The TorchScript program of a graph: trace it, save it, load it, and read its interface off the program itself.

Legend: T sequence length, V vocabulary.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coremill.core.contract import Contract, Dim, DType, TensorSpec
from coremill.core.documents import Record
from coremill.core.errors import ContractMismatchError, TorchScriptError

Program = Any
"""A torch.jit.ScriptModule; torch has no types where this is checked."""

SEQ_DIM = "T"
INPUT_NAME = "input_ids"
LOGITS, HALT_LOGITS = "logits", "halt_logits"

_DTYPES = {torch.int32: DType.INT32, torch.float16: DType.FLOAT16, torch.float32: DType.FLOAT32}
_EXPORT = "python -m coremill.conversion.export_pytorch --help"
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


class GraphInterface(Record):
    """What goes into a program and what comes out; a dimension that follows T is called `T`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def as_input(ids: Sequence[int]) -> Tensor:
    """Token ids as the graphs take them: (1, T) int32."""
    return torch.tensor([list(ids)], dtype=torch.int32)


def trace(model: nn.Module, ids: Sequence[int], output_names: Sequence[str]) -> Program:
    """Trace `model` on `ids`, and name what it returns; the names are kept in the saved program.

    Raises:
        ValueError: `model` does not return a tuple of as many tensors as there are names.
    """
    with torch.no_grad():
        # Checked by the caller, on the saved program and at every listed length rather than at this one.
        program = torch.jit.trace(model, (as_input(ids),), check_trace=False)
    values = _output_values(program)
    if len(values) != len(output_names):
        raise ValueError(f"the model returns {len(values)} tensors, the names are {list(output_names)}")
    for value, name in zip(values, output_names, strict=True):
        value.setDebugName(name)
    return program


def program_bytes(program: Program) -> bytes:
    """The program as a TorchScript archive; the same program, traced first in its process, gives the same bytes.

    A later trace in one process has other bytes: torch gives its modules' classes names of their own.

    Source locations are left out: they hold the paths of this machine and bear on error messages alone. So is
    the archive's id, which is a hash of everything, the locations included.
    """
    saved, canonical = io.BytesIO(), io.BytesIO()
    torch.jit.save(program, saved)  # not to a path: its stem would be written into the archive
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(canonical, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            if not name.endswith((".debug_pkl", "/.data/serialization_id")):
                target.writestr(zipfile.ZipInfo(name, date_time=_ZIP_EPOCH), source.read(name))
    return canonical.getvalue()


def load_program(path: Path) -> Program:
    """Load the TorchScript program at `path`, on the CPU.

    Raises:
        TorchScriptError: unreadable, truncated, damaged, or something else.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as failure:
        raise TorchScriptError(
            f"cannot read {path}: {failure.strerror}", expected="a TorchScript program", run=_EXPORT
        ) from failure
    return parse_program(data, where=str(path))


def parse_program(data: bytes, *, where: str) -> Program:
    """Load the TorchScript program that `data` holds; `where` names it in errors. Raises as `load_program`."""
    expected = "a TorchScript program as export_pytorch saves it"
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()  # torch does not check the checksums
            names = archive.namelist()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as failure:
        raise TorchScriptError(
            f"{where} is not a TorchScript program: {failure}", expected=expected, run=_EXPORT
        ) from failure
    if damaged is not None:
        raise TorchScriptError(
            f"{where} is damaged: the checksum of {damaged} is wrong", expected=expected, run=_EXPORT
        )
    if not any(name.endswith("/constants.pkl") for name in names):
        what = "a checkpoint" if any(name.endswith("/data.pkl") for name in names) else "a zip archive"
        raise TorchScriptError(f"{where} is {what}, not a TorchScript program", expected=expected, run=_EXPORT)
    try:
        return torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
    except RuntimeError as failure:
        reason = str(failure).strip().splitlines()[0]
        raise TorchScriptError(
            f"{where} is not a TorchScript program: {reason}", expected=expected, run=_EXPORT
        ) from failure


def run_program(program: Program, ids: Sequence[int]) -> tuple[Tensor, ...]:
    """The outputs of `program` for `ids` (T,), in its order."""
    with torch.no_grad():
        outputs = program(as_input(ids))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def read_interface(program: Program, sequences: Sequence[Sequence[int]]) -> GraphInterface:
    """Names from the program's code, dtypes and shapes from running it on `sequences` of different lengths.

    A dimension is `T` where it was each sequence's length, and a number where it was the same for all. With
    one sequence only, nothing was seen to vary, and every dimension is a number.

    Raises:
        ContractMismatchError: more than one input, a program that does not run at one of the lengths, a dimension
            that is neither, or an output of a dtype that no contract knows.
    """
    input_names = [_plain_name(value) for value in list(program.graph.inputs())[1:]]  # the first is `self`
    if len(input_names) != 1:
        raise ContractMismatchError(
            f"the graph has {len(input_names)} inputs: {', '.join(input_names)}",
            expected="one, the token ids",
            run=_EXPORT,
        )
    output_names = [_plain_name(value) for value in _output_values(program)]
    runs = [_run_for_shapes(program, ids, len(output_names)) for ids in sequences]
    lengths = [len(ids) for ids in sequences]
    outputs = []
    for index, name in enumerate(output_names):
        tensors = [run[index] for run in runs]
        dtype = tensors[0].dtype
        if dtype not in _DTYPES:
            raise ContractMismatchError(
                f"output `{name}` is {dtype}", expected="one of " + ", ".join(map(str, _DTYPES)), run=_EXPORT
            )
        if len({tensor.dim() for tensor in tensors}) > 1:
            raise ContractMismatchError(
                f"output `{name}` is of shapes {[list(tensor.shape) for tensor in tensors]} at lengths {lengths}",
                expected="as many dimensions at every length",
                run=_EXPORT,
            )
        dims = tuple(
            _dim(sizes, lengths, name) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)
        )
        outputs.append(TensorSpec(name=name, dtype=_DTYPES[dtype], shape=dims))
    seq_dim = _dim(tuple(lengths), lengths, INPUT_NAME)
    inputs = tuple(TensorSpec(name=name, dtype=DType.INT32, shape=(1, seq_dim)) for name in input_names)
    return GraphInterface(inputs=inputs, outputs=tuple(outputs))


def check_contract(
    contract: Contract, program: Program, *, graph_digest: str, sequences: Sequence[Sequence[int]]
) -> None:
    """Check that `contract` describes `program`, whose file has `graph_digest`.

    Raises:
        ContractMismatchError: says what the contract says and what the graph is.
    """
    if contract.graph_digest != graph_digest:
        raise ContractMismatchError(
            f"the graph is {graph_digest}, its contract describes {contract.graph_digest}",
            expected="the contract that was exported with this graph",
            run=_EXPORT,
        )
    check_main(contract)
    found = read_interface(program, sequences)
    for kind in ("inputs", "outputs"):
        promised, seen = getattr(contract, kind), getattr(found, kind)
        if promised != seen:
            raise ContractMismatchError(
                f"the contract's {kind} are {describe(promised)}, the graph's are {describe(seen)}",
                expected="a contract that describes the graph",
                run=_EXPORT,
            )


def check_main(contract: Contract) -> None:
    """Check that `contract` can be that of a graph `main`: one input, no state, T alone, the halt head's output
    where the architecture has a halt head.

    Raises:
        ContractMismatchError: it cannot; says why.
    """
    tensors = (*contract.inputs, *contract.outputs)
    symbols = sorted({dim for spec in tensors for dim in spec.shape if isinstance(dim, str)} - {SEQ_DIM})
    has_halt = HALT_LOGITS in [spec.name for spec in contract.outputs]
    problem = None
    if len(contract.inputs) != 1:
        problem = f"has {len(contract.inputs)} inputs ({describe(contract.inputs)}), `main` takes one"
    elif contract.states:
        problem = f"has the states {describe(contract.states)}, `main` has none"
    elif symbols:
        problem = f"has the dimensions {', '.join(symbols)}, `main` has {SEQ_DIM} alone"
    elif has_halt != contract.model_arch.use_halt_head:
        flag = str(contract.model_arch.use_halt_head).lower()
        problem = f"has use_halt_head {flag}, and {'an' if has_halt else 'no'} output `{HALT_LOGITS}`"
    if problem is not None:
        raise ContractMismatchError(
            f"the contract {problem}", expected="a contract that export_pytorch wrote", run=_EXPORT
        )


def describe(specs: Sequence[TensorSpec]) -> str:
    """Specs as text: `logits float32 (1, T, 512)`."""
    return ", ".join(f"{spec.name} {spec.dtype.value} ({', '.join(map(str, spec.shape))})" for spec in specs)


def _output_values(program: Program) -> list[Any]:
    """The values that the program returns, one a tensor."""
    (result,) = program.graph.outputs()
    node = result.node()
    return list(node.inputs()) if node.kind() == "prim::TupleConstruct" else [result]


def _run_for_shapes(program: Program, ids: Sequence[int], n_outputs: int) -> tuple[Tensor, ...]:
    """The outputs of a program at a length at which it is said to run; a ContractMismatchError if it does not."""
    try:
        outputs = run_program(program, ids)
    except (RuntimeError, ValueError) as failure:
        reason = str(failure).strip().splitlines()[-1]
        raise ContractMismatchError(
            f"the graph does not run at length {len(ids)}: {reason}",
            expected="a graph that runs at every length that the contract calls ok",
            run=_EXPORT,
        ) from failure
    if len(outputs) != n_outputs or not all(isinstance(value, Tensor) for value in outputs):
        raise ContractMismatchError(
            f"the graph returns {', '.join(type(value).__name__ for value in outputs)}",
            expected="tensors alone",
            run=_EXPORT,
        )
    return outputs


def _plain_name(value: Any) -> str:
    """The name of a value as the code spells it; loading appends `.1` to make it unique."""
    return re.sub(r"\.\d+$", "", str(value.debugName()))


def _dim(sizes: Sequence[int], lengths: Sequence[int], name: str) -> Dim:
    if len(set(sizes)) == 1:
        return int(sizes[0])
    if list(sizes) == list(lengths):
        return SEQ_DIM
    raise ContractMismatchError(
        f"a dimension of `{name}` is {list(sizes)} at lengths {list(lengths)}",
        expected="the length, or one size at every length",
        run=_EXPORT,
    )
