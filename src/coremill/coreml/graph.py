"""The exported program of a model: trace it, save it, load it, and read its interface off the program itself.

A program is `main`. With a key/value cache it is an archive of three graphs that share their weights: its
attributes `main`, `prefill` and `decode`; called, it is `main` all the same. Where `torch.export` took it, it is an
`ExportedMain`.

Legend: T sequence length, S positions of the cache, V vocabulary.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coremill.core.contract import Contract, Dim, DType, Frontend, StatefulFunction, TensorSpec
from coremill.core.documents import Record
from coremill.core.errors import ContractMismatchError, TorchScriptError
from coremill.coreml.exported import ExportedMain, load_main

Program = Any
"""A torch.jit.ScriptModule or an ExportedMain; torch has no types where this is checked."""

SEQ_DIM = "T"
INPUT_NAME = "input_ids"
LOGITS, HALT_LOGITS = "logits", "halt_logits"
MAIN, PREFILL, DECODE = "main", "prefill", "decode"
CACHES = ("key_cache", "value_cache")
"""The states of `prefill` and `decode`, (L, 1, K, S, D) each; their attributes of that name."""

_DTYPES = {torch.int32: DType.INT32, torch.float16: DType.FLOAT16, torch.float32: DType.FLOAT32}
_CALLED: Mapping[Frontend, str] = {"torchscript": "TorchScript", "torch-export": "torch.export"}
_MEMBER: Mapping[Frontend, str] = {"torchscript": "/constants.pkl", "torch-export": "/models/model.json"}
"""What the archive of such a program holds, and no other."""
_EXPORT = "python -m coremill.conversion.export_pytorch --help"
_SHORT = (16, 24)
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


class GraphInterface(Record):
    """What goes into a program and what comes out; a dimension that follows T is called `T`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class FunctionInterface(Record):
    """What goes into `prefill` or `decode`, and what comes out."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def as_input(ids: Sequence[int]) -> Tensor:
    """Token ids as the graphs take them: (1, T) int32."""
    return torch.tensor([list(ids)], dtype=torch.int32)


def trace(
    model: nn.Module,
    ids: Sequence[int],
    output_names: Sequence[str],
    stateful: Mapping[str, nn.Module] | None = None,
) -> Program:
    """Trace `model` on `ids`, and name what it returns; the names are kept in the saved program.

    Args:
        stateful: `prefill` and `decode`, whose caches are of one shape; none for a program without a cache.

    Raises:
        ValueError: `model` does not return a tuple of as many tensors as there are names.
    """
    main = _trace_one(model, (as_input(ids),), output_names)
    if not stateful:
        return main
    number = torch.ones(1, dtype=torch.int32)
    examples = {PREFILL: (as_input(ids[: _SHORT[0]]), number), DECODE: (as_input(ids[:1]), number)}
    functions = {name: _trace_one(module, examples[name], output_names) for name, module in stateful.items()}
    for function in functions.values():
        for cache in CACHES:
            # One zero for all of it: an archive holds what a tensor's memory holds, and this one starts empty.
            setattr(function, cache, torch.zeros(1).expand(getattr(function, cache).shape))
    with torch.no_grad():
        return torch.jit.trace(_Functions(main, functions), (as_input(ids[:1]),), check_trace=False)


def _trace_one(model: nn.Module, example: tuple[Tensor, ...], output_names: Sequence[str]) -> Program:
    with torch.no_grad():
        # Checked by the caller, on the saved program and at every listed length rather than at this one.
        program = torch.jit.trace(model.eval(), example, check_trace=False)
    values = _output_values(program)
    if len(values) != len(output_names):
        raise ValueError(f"the model returns {len(values)} tensors, the names are {list(output_names)}")
    for value, name in zip(values, output_names, strict=True):
        value.setDebugName(name)
    return program


class _Functions(nn.Module):
    """What the archive of a program with a cache is made of."""

    def __init__(self, main: Program, functions: Mapping[str, Program]) -> None:
        super().__init__()
        self.main = main
        for name, function in functions.items():
            self.add_module(name, function)
        self.eval()

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.main(input_ids)
        return outputs


def find_function(program: Program, name: str) -> Program:
    """The graph `name` of a program.

    Raises:
        ContractMismatchError: it has none of that name.
    """
    if name == MAIN:
        return getattr(program, MAIN, program)  # a program without a cache is `main` itself
    if not hasattr(program, name):
        raise ContractMismatchError(
            f"the program has no function `{name}`",
            expected="`prefill` and `decode`, which an export with `stateful` has",
            run=_EXPORT,
        )
    return getattr(program, name)


class StatefulProgram:
    """`prefill` and `decode` of a program, with one cache, which is empty at first."""

    def __init__(self, program: Program) -> None:
        self._prefill, self._decode = find_function(program, PREFILL), find_function(program, DECODE)
        for cache in CACHES:
            empty = torch.zeros(getattr(self._decode, cache).shape)
            setattr(self._prefill, cache, empty)
            setattr(self._decode, cache, empty)

    def prefill(self, ids: Sequence[int], length: int) -> tuple[Tensor, ...]:
        """The outputs (1, 1, …) at token `length` - 1 of `ids` (T,), whose first `length` tokens are the prompt."""
        with torch.no_grad():
            return _as_tuple(self._prefill(as_input(ids), torch.tensor([length], dtype=torch.int32)))

    def decode(self, token: int, position: int) -> tuple[Tensor, ...]:
        """The outputs (1, 1, …) after `token` at `position`."""
        with torch.no_grad():
            return _as_tuple(self._decode(as_input([token]), torch.tensor([position], dtype=torch.int32)))


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


def load_program(path: Path, frontend: Frontend = "torchscript") -> Program:
    """Load the program at `path`, on the CPU; `frontend` says how it was taken from torch.

    Raises:
        TorchScriptError: unreadable, truncated, damaged, or something else.
    """
    try:
        # Not read into memory first: torch then takes three times as long.
        return _parsed(Path(path), where=str(path), frontend=frontend)
    except OSError as failure:
        raise TorchScriptError(
            f"cannot read {path}: {failure.strerror}", expected=f"a {_CALLED[frontend]} program", run=_EXPORT
        ) from failure


def parse_program(data: bytes, *, where: str, frontend: Frontend = "torchscript") -> Program:
    """Load the program that `data` holds; `where` names it in errors. Raises as `load_program`."""
    return _parsed(io.BytesIO(data), where=where, frontend=frontend)


def _parsed(source: Path | io.BytesIO, *, where: str, frontend: Frontend) -> Program:
    called = f"a {_CALLED[frontend]} program"
    expected = f"{called} as export_pytorch saves it"
    try:
        with zipfile.ZipFile(source) as archive:
            damaged = archive.testzip()  # torch does not check the checksums
            names = archive.namelist()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as failure:
        raise TorchScriptError(f"{where} is not {called}: {failure}", expected=expected, run=_EXPORT) from failure
    if damaged is not None:
        raise TorchScriptError(
            f"{where} is damaged: the checksum of {damaged} is wrong", expected=expected, run=_EXPORT
        )
    if not any(name.endswith(_MEMBER[frontend]) for name in names):
        found = _kind_of_archive(names)
        raise TorchScriptError(f"{where} is {found}, not {called}", expected=expected, run=_EXPORT)
    if isinstance(source, io.BytesIO):
        source.seek(0)
    try:
        if frontend == "torch-export":
            return load_main(source)
        return torch.jit.load(source, map_location="cpu").eval()
    except (RuntimeError, ValueError, LookupError) as failure:
        reason = str(failure).strip().splitlines()[0]
        raise TorchScriptError(f"{where} is not {called}: {reason}", expected=expected, run=_EXPORT) from failure


def _kind_of_archive(names: Sequence[str]) -> str:
    for frontend, member in _MEMBER.items():
        if any(name.endswith(member) for name in names):
            return f"a {_CALLED[frontend]} program"
    return "a checkpoint" if any(name.endswith("/data.pkl") for name in names) else "a zip archive"


def run_program(program: Program, ids: Sequence[int]) -> tuple[Tensor, ...]:
    """The outputs of `program` for `ids` (T,), in its order."""
    with torch.no_grad():
        return _as_tuple(program(as_input(ids)))


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def interface_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Lengths at which the interface of a program that works at `lengths` is read: two show what follows T.

    Where several work the graph follows T, and short sequences say as much as long ones, which may take seconds.
    """
    return tuple(sorted(lengths))[:2] if len(lengths) < 2 or min(lengths) < max(_SHORT) else _SHORT


def read_interface(program: Program, sequences: Sequence[Sequence[int]]) -> GraphInterface:
    """Names from the program's code, dtypes and shapes from running it on `sequences` of different lengths.

    A dimension is `T` where it was each sequence's length, and a number where it was the same for all. With
    one sequence only, nothing was seen to vary, and every dimension is a number.

    Raises:
        ContractMismatchError: more than one input, a program that does not run at one of the lengths, a dimension
            that is neither, or an output of a dtype that no contract knows.
    """
    main = find_function(program, MAIN)
    input_names = _input_names(main)
    if len(input_names) != 1:
        raise ContractMismatchError(
            f"the graph has {len(input_names)} inputs: {', '.join(input_names)}",
            expected="one, the token ids",
            run=_EXPORT,
        )
    output_names = _output_names(main)
    runs = [_run_for_shapes(program, ids, len(output_names)) for ids in sequences]
    lengths = [len(ids) for ids in sequences]
    outputs = _output_specs(output_names, runs, lengths)
    seq_dim = _dim(tuple(lengths), lengths, INPUT_NAME)
    inputs = tuple(TensorSpec(name=name, dtype=DType.INT32, shape=(1, seq_dim)) for name in input_names)
    return GraphInterface(inputs=inputs, outputs=outputs)


def read_stateful(program: Program, sequences: Sequence[Sequence[int]]) -> tuple[FunctionInterface, ...]:
    """The interfaces of `prefill` and `decode`, as :func:`read_interface` reads that of `main`; () without a
    cache."""
    if not hasattr(program, DECODE):
        return ()
    stateful = StatefulProgram(program)
    lengths = [len(ids) for ids in sequences]
    seq_dim = _dim(tuple(lengths), lengths, INPUT_NAME)
    runs = {
        PREFILL: [stateful.prefill(ids, len(ids)) for ids in sequences],
        DECODE: [stateful.decode(ids[0], 0) for ids in sequences],
    }
    shapes: dict[str, tuple[tuple[Dim, ...], ...]] = {PREFILL: ((1, seq_dim), (1,)), DECODE: ((1, 1), (1,))}
    found = []
    for name, outputs in runs.items():
        function = find_function(program, name)
        inputs = zip(_input_names(function), shapes[name], strict=True)
        found.append(
            FunctionInterface(
                name=name,
                inputs=tuple(TensorSpec(name=each, dtype=DType.INT32, shape=shape) for each, shape in inputs),
                outputs=_output_specs(_output_names(function), outputs, lengths),
            )
        )
    return tuple(found)


def read_states(program: Program) -> tuple[TensorSpec, ...]:
    """The caches as a package keeps them: Core ML's states are float16."""
    if not hasattr(program, DECODE):
        return ()
    decode = find_function(program, DECODE)
    return tuple(
        TensorSpec(name=name, dtype=DType.FLOAT16, shape=tuple(getattr(decode, name).shape)) for name in CACHES
    )


def _output_specs(
    names: Sequence[str], runs: Sequence[Sequence[Tensor]], lengths: Sequence[int]
) -> tuple[TensorSpec, ...]:
    """What was returned at each of `lengths`, as specs."""
    outputs = []
    for index, name in enumerate(names):
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
    return tuple(outputs)


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
    _check_tensors(contract, read_interface(program, sequences), "the contract", "the graph")
    _check_stateful(contract, program, sequences)


def _check_stateful(contract: Contract, program: Program, sequences: Sequence[Sequence[int]]) -> None:
    """Check that the contract's states and functions are the program's."""
    states, functions = read_states(program), read_stateful(program, sequences)
    for kind, promised, seen in (
        ("states", describe(contract.states), describe(states)),
        ("functions", _names(contract.functions), _names(functions)),
    ):
        if promised != seen:
            raise ContractMismatchError(
                f"the contract's {kind} are {promised or 'none'}, the graph's are {seen or 'none'}",
                expected="a contract that describes the graph",
                run=_EXPORT,
            )
    for said, found in zip(contract.functions, functions, strict=True):
        _check_tensors(said, found, f"the contract's `{said.name}`", f"the graph's `{said.name}`")


def _names(functions: Sequence[StatefulFunction | FunctionInterface]) -> str:
    return ", ".join(function.name for function in functions)


def _check_tensors(
    promised: Contract | StatefulFunction, found: GraphInterface | FunctionInterface, whose: str, other: str
) -> None:
    for kind in ("inputs", "outputs"):
        said, seen = getattr(promised, kind), getattr(found, kind)
        if said != seen:
            raise ContractMismatchError(
                f"{whose}'s {kind} are {describe(said)}, {other}'s are {describe(seen)}",
                expected="a contract that describes the graph",
                run=_EXPORT,
            )


def check_main(contract: Contract) -> None:
    """Check that `contract` can be that of a graph `main`: one input, T alone, the halt head's output where the
    architecture has a halt head.

    Raises:
        ContractMismatchError: it cannot; says why.
    """
    tensors = (*contract.inputs, *contract.outputs)
    symbols = sorted({dim for spec in tensors for dim in spec.shape if isinstance(dim, str)} - {SEQ_DIM})
    has_halt = HALT_LOGITS in [spec.name for spec in contract.outputs]
    problem = None
    if len(contract.inputs) != 1:
        problem = f"has {len(contract.inputs)} inputs ({describe(contract.inputs)}), `main` takes one"
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


def _input_names(function: Program) -> list[str]:
    if isinstance(function, ExportedMain):
        return function.input_names
    return [_plain_name(value) for value in list(function.graph.inputs())[1:]]  # the first is `self`


def _output_names(function: Program) -> list[str]:
    if isinstance(function, ExportedMain):
        return function.output_names
    return [_plain_name(value) for value in _output_values(function)]


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
