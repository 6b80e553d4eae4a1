"""The exported program of a model: trace it, save it, load it, and read its interface from the program itself.

A program without a key/value cache is the graph `main`. With a cache it is an archive of three graphs that share
their weights: its attributes `main`, `prefill` and `decode`; calling the program calls `main`. A program captured
by `torch.export` is an `ExportedMain`.

Legend: T sequence length, S positions of the cache, V vocabulary.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from coremill.core.contract import MAIN, Contract, Dim, DType, Frontend, TensorSpec
from coremill.core.documents import Record
from coremill.core.errors import ContractMismatchError, TorchScriptError
from coremill.coreml.exported import ExportedMain, load_main
from coremill.model.student import HALT_LOGITS

Program: TypeAlias = torch.jit.ScriptModule | ExportedMain

SEQ_DIM = "T"
PREFILL, DECODE = "prefill", "decode"
CACHES = ("key_cache", "value_cache")
"""The states of `prefill` and `decode`, (L, 1, K, S, D) each, and the names of the graphs' attributes for them."""

_DTYPES: Mapping[torch.dtype, DType] = {getattr(torch, each.value): each for each in DType}
_NAMES: Mapping[Frontend, str] = {"torchscript": "TorchScript", "torch-export": "torch.export"}
_MEMBER: Mapping[Frontend, str] = {"torchscript": "/constants.pkl", "torch-export": "/models/model.json"}
"""A member that only the archive of such a program has."""
_EXPORT = "python -m coremill.conversion.export_pytorch --help"
_SHORT = (16, 24)
_COPIED_BYTES = 1 << 20
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


class FunctionInterface(Record):
    """The inputs and outputs of a graph; a dimension that equals the sequence length is named `T`."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def as_input(ids: Sequence[int]) -> Tensor:
    """Token ids as input of a graph: (1, T) int32."""
    return torch.tensor([list(ids)], dtype=torch.int32)


def trace(
    model: nn.Module,
    ids: Sequence[int],
    output_names: Sequence[str],
    stateful: Mapping[str, nn.Module] | None = None,
) -> torch.jit.ScriptModule:
    """Trace `model` on `ids` and name its outputs; the saved program keeps the names.

    Args:
        stateful: `prefill` and `decode`, whose caches have the same shape; None for a program without a cache.

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
            # Expanded from one zero: an archive stores the storage of a tensor, and the cache starts empty.
            setattr(function, cache, torch.zeros(1).expand(getattr(function, cache).shape))
    with torch.no_grad():
        traced = torch.jit.trace(_Functions(main, functions), (as_input(ids[:1]),), check_trace=False)
    program: torch.jit.ScriptModule = traced
    return program


def _trace_one(
    model: nn.Module, example: tuple[Tensor, ...], output_names: Sequence[str]
) -> torch.jit.ScriptModule:
    with torch.no_grad():
        # The caller checks the saved program instead, at every listed length.
        program: torch.jit.ScriptModule = torch.jit.trace(model.eval(), example, check_trace=False)
    values = _output_values(program)
    if len(values) != len(output_names):
        raise ValueError(f"the model returns {len(values)} tensors, the names are {list(output_names)}")
    for value, name in zip(values, output_names, strict=True):
        value.setDebugName(name)
    return program


class _Functions(nn.Module):
    """The graphs in the archive of a program with a cache."""

    def __init__(self, main: nn.Module, functions: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.main = main
        for name, function in functions.items():
            self.add_module(name, function)
        self.eval()

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.main(input_ids)
        return outputs


def find_function(program: Program, name: str) -> Program:
    """Return the graph `name` of a program.

    Raises:
        ContractMismatchError: there is no graph of that name.
    """
    # A program without a cache is `main` itself.
    found: Program | None = getattr(program, name, program if name == MAIN else None)
    if found is None:
        raise ContractMismatchError(
            f"the program has no function `{name}`",
            expected="a program exported with `stateful`, which has `prefill` and `decode`",
            run=_EXPORT,
        )
    return found


class StatefulProgram:
    """`prefill` and `decode` of a program, sharing one cache that starts empty."""

    def __init__(self, program: Program) -> None:
        self._prefill, self._decode = find_function(program, PREFILL), find_function(program, DECODE)
        for cache in CACHES:
            empty = torch.zeros(getattr(self._decode, cache).shape)
            setattr(self._prefill, cache, empty)
            setattr(self._decode, cache, empty)

    def prefill(self, ids: Sequence[int], length: int) -> tuple[Tensor, ...]:
        """The outputs (1, 1, …) at the last token of the prompt, the first `length` tokens of `ids` (T,)."""
        with torch.no_grad():
            return _as_tuple(self._prefill(as_input(ids), torch.tensor([length], dtype=torch.int32)))

    def decode(self, token: int, position: int) -> tuple[Tensor, ...]:
        """The outputs (1, 1, …) after `token` at `position`."""
        with torch.no_grad():
            return _as_tuple(self._decode(as_input([token]), torch.tensor([position], dtype=torch.int32)))


def stand_ins(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return zeros in the shapes of `weights`. They share one memory, which is never written and so takes none.

    A graph does not depend on the values of the weights: it is captured, and its interface is read, with these.
    """
    # numpy's zeros are memory that the system provides when it is written; torch writes its own.
    zeros = torch.from_numpy(np.zeros(max((weight.numel() for weight in weights), default=0), np.float32))
    return [zeros[: weight.numel()].view(weight.shape) for weight in weights]


def write_traced(program: torch.jit.ScriptModule, weights: Iterable[tuple[str, Tensor]], file: BinaryIO) -> None:
    """Write a traced program to `file` as a TorchScript archive, with `weights` in their own types.

    The first trace of a model in a process gives the same bytes in every process. A second trace in the same
    process does not, because torch then gives the modules' classes other names.

    Source locations are removed: they contain paths of this machine and affect only error messages. The archive's
    id is removed too, because it is a hash that includes the locations.

    Args:
        weights: the decoder's parameters by name; every graph of the program that has one is given the same tensor.
    """
    by_name: dict[str, list[Tensor]] = {}
    for qualified, parameter in program.named_parameters(remove_duplicate=False):
        by_name.setdefault(qualified.rpartition("decoder.")[2], []).append(parameter)
    for name, value in weights:
        for each in by_name[name]:
            each.data = value
    try:
        _save_traced(program, file)
    finally:
        for parameters in by_name.values():
            for each in parameters:
                each.data = torch.empty(0)  # torch keeps traced programs


def _save_traced(program: torch.jit.ScriptModule, file: BinaryIO) -> None:
    # To a file, not to memory; torch writes the file's stem into the archive.
    with tempfile.TemporaryDirectory(prefix="coremill-") as folder:
        saved = Path(folder) / "archive.pt"
        torch.jit.save(program, saved)
        with zipfile.ZipFile(saved) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:
            for info in source.infolist():
                if not info.filename.endswith((".debug_pkl", "/.data/serialization_id")):
                    copy = zipfile.ZipInfo(info.filename, date_time=_ZIP_EPOCH)
                    copy.file_size = info.file_size
                    with source.open(info) as read, target.open(copy, "w") as written:
                        shutil.copyfileobj(read, written, _COPIED_BYTES)


def load_program(
    path: Path, frontend: Frontend = "torchscript", *, where: str | None = None, widened: bool = True
) -> Program:
    """Load the program at `path` on the CPU.

    An archive has each weight in the type that the checkpoint has it in, and the tables in float32.

    Args:
        frontend: the method that captured it.
        where: its name in errors; by default the path.
        widened: cast the weights to float32, in which the program runs; otherwise it does not run unless all types
            are equal.

    Raises:
        TorchScriptError: the file is unreadable, truncated, damaged, or not such a program.
    """
    try:
        return _loaded(Path(path), where=where or str(path), frontend=frontend, widened=widened)
    except OSError as failure:
        raise TorchScriptError(
            f"cannot read {path}: {failure.strerror}", expected=f"a {_NAMES[frontend]} program", run=_EXPORT
        ) from failure


def _loaded(path: Path, *, where: str, frontend: Frontend, widened: bool) -> Program:
    called = f"a {_NAMES[frontend]} program"
    expected = f"{called} as export_pytorch saves it"
    try:
        with zipfile.ZipFile(path) as archive:
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
    try:
        # A path, not its bytes: torch takes three times as long to load those.
        program = load_main(path) if frontend == "torch-export" else torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError, LookupError) as failure:
        reason = str(failure).strip().splitlines()[0]
        raise TorchScriptError(f"{where} is not {called}: {reason}", expected=expected, run=_EXPORT) from failure
    if widened:
        program.float()
    return program


@contextlib.contextmanager
def without_weights(program: Program) -> Iterator[None]:
    """Replace the weights by zeros for the length of the block: what an interface is read with."""
    held: list[tuple[Tensor, Tensor]] = [(parameter, parameter.data) for parameter in program.parameters()]
    try:
        for (parameter, _), zeros in zip(held, stand_ins([value for _, value in held]), strict=True):
            parameter.data = zeros
        yield
    finally:
        for parameter, value in held:
            parameter.data = value


def _kind_of_archive(names: Sequence[str]) -> str:
    for frontend, member in _MEMBER.items():
        if any(name.endswith(member) for name in names):
            return f"a {_NAMES[frontend]} program"
    return "a checkpoint" if any(name.endswith("/data.pkl") for name in names) else "a zip archive"


def run_program(program: Program, ids: Sequence[int]) -> tuple[Tensor, ...]:
    """The outputs of `main` for `ids` (T,), in its order."""
    with torch.no_grad():
        return _as_tuple(program(as_input(ids)))


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def interface_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The lengths at which to run a program that works at `lengths`, to read its interface.

    Two lengths show which dimensions equal T. If several lengths work, the graph accepts any T, so two short ones
    are enough; long ones may take seconds.
    """
    return tuple(sorted(lengths))[:2] if len(lengths) < 2 or min(lengths) < max(_SHORT) else _SHORT


def read_interface(program: Program, sequences: Sequence[Sequence[int]]) -> FunctionInterface:
    """Read the interface of `main`: names from its code, dtypes and shapes from runs on `sequences`.

    A dimension of an output is `T` if it equals the length of each sequence, and a number if it is the same for
    all. With only one sequence, every dimension of an output is a number.

    Raises:
        ContractMismatchError: `main` has more than one input, does not run at one of the lengths, has a dimension
            that is neither, or an output of a dtype that contracts do not allow.
    """
    main = find_function(program, MAIN)
    input_names = _input_names(main)
    if len(input_names) != 1:
        raise ContractMismatchError(
            f"the graph has {len(input_names)} inputs: {', '.join(input_names)}",
            expected="one input, the token ids",
            run=_EXPORT,
        )
    n_outputs = len(_output_names(main))
    runs = [_run_for_shapes(program, ids, n_outputs) for ids in sequences]
    return _interface(program, MAIN, ((1, SEQ_DIM),), runs, [len(ids) for ids in sequences])


def read_stateful(program: Program, sequences: Sequence[Sequence[int]]) -> tuple[FunctionInterface, ...]:
    """Read the interfaces of `prefill` and `decode`, as :func:`read_interface` does; () without a cache."""
    if not hasattr(program, DECODE):
        return ()
    stateful = StatefulProgram(program)
    lengths = [len(ids) for ids in sequences]
    prefilled = [stateful.prefill(ids, len(ids)) for ids in sequences]
    decoded = [stateful.decode(ids[0], 0) for ids in sequences]
    return (
        _interface(program, PREFILL, ((1, SEQ_DIM), (1,)), prefilled, lengths),
        _interface(program, DECODE, ((1, 1), (1,)), decoded, lengths),
    )


def _interface(
    program: Program,
    name: str,
    shapes: Sequence[tuple[Dim, ...]],
    runs: Sequence[Sequence[Tensor]],
    lengths: Sequence[int],
) -> FunctionInterface:
    """The interface of a function, given the shapes of its inputs and its outputs at each of `lengths`."""
    function = find_function(program, name)
    inputs = zip(_input_names(function), shapes, strict=True)
    return FunctionInterface(
        name=name,
        inputs=tuple(TensorSpec(name=each, dtype=DType.INT32, shape=shape) for each, shape in inputs),
        outputs=_output_specs(_output_names(function), runs, lengths),
    )


def read_states(program: Program) -> tuple[TensorSpec, ...]:
    """The caches as states of a package: float16, the only dtype of Core ML's states."""
    if not hasattr(program, DECODE):
        return ()
    decode = find_function(program, DECODE)
    return tuple(
        TensorSpec(name=name, dtype=DType.FLOAT16, shape=tuple(getattr(decode, name).shape)) for name in CACHES
    )


def _output_specs(
    names: Sequence[str], runs: Sequence[Sequence[Tensor]], lengths: Sequence[int]
) -> tuple[TensorSpec, ...]:
    """The outputs `runs` at each of `lengths`, as specs."""
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
                f"output `{name}` has the shapes {[list(tensor.shape) for tensor in tensors]} at lengths {lengths}",
                expected="the same number of dimensions at every length",
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
        ContractMismatchError: it does not; the error shows both.
    """
    if contract.graph_digest != graph_digest:
        raise ContractMismatchError(
            f"the graph is {graph_digest}, its contract describes {contract.graph_digest}",
            expected="the contract that was exported with this graph",
            run=_EXPORT,
        )
    check_main(contract)
    main, functions = read_interface(program, sequences), read_stateful(program, sequences)
    _check_same("inputs", describe(contract.inputs), describe(main.inputs))
    _check_same("outputs", describe(contract.outputs), describe(main.outputs))
    _check_same("states", describe(contract.states), describe(read_states(program)))
    _check_same(
        "functions", *(", ".join(function.name for function in each) for each in (contract.functions, functions))
    )
    for promised, found in zip(contract.functions, functions, strict=True):
        _check_same(f"inputs of `{found.name}`", describe(promised.inputs), describe(found.inputs))
        _check_same(f"outputs of `{found.name}`", describe(promised.outputs), describe(found.outputs))


def _check_same(what: str, promised: str, found: str) -> None:
    if promised != found:
        raise ContractMismatchError(
            f"the contract's {what} are {promised or 'none'}, the graph's are {found or 'none'}",
            expected="a contract that describes the graph",
            run=_EXPORT,
        )


def check_main(contract: Contract) -> None:
    """Check that `contract` can describe a graph `main`: one input, no symbol but T, and an output of the halt head
    if and only if the architecture has one.

    Raises:
        ContractMismatchError: it cannot.
    """
    tensors = (*contract.inputs, *contract.outputs)
    symbols = sorted({dim for spec in tensors for dim in spec.shape if isinstance(dim, str)} - {SEQ_DIM})
    has_halt = HALT_LOGITS in [spec.name for spec in contract.outputs]
    problem = None
    if len(contract.inputs) != 1:
        problem = f"has {len(contract.inputs)} inputs ({describe(contract.inputs)}), `main` takes one"
    elif symbols:
        problem = f"has the dimensions {', '.join(symbols)}, `main` has only {SEQ_DIM}"
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


def _output_values(program: torch.jit.ScriptModule) -> list[torch.Value]:
    """The values that the program returns, one per tensor."""
    (result,) = program.graph.outputs()
    node = result.node()
    return list(node.inputs()) if node.kind() == "prim::TupleConstruct" else [result]


def _run_for_shapes(program: Program, ids: Sequence[int], n_outputs: int) -> tuple[Tensor, ...]:
    """The outputs of a program that should run on `ids`; a ContractMismatchError if it does not."""
    try:
        outputs = run_program(program, ids)
    except (RuntimeError, ValueError) as failure:
        reason = str(failure).strip().splitlines()[-1]
        raise ContractMismatchError(
            f"the graph does not run at length {len(ids)}: {reason}",
            expected="a graph that runs at every length with the status ok in the contract",
            run=_EXPORT,
        ) from failure
    if len(outputs) != n_outputs or not all(isinstance(value, Tensor) for value in outputs):
        raise ContractMismatchError(
            f"the graph returns {', '.join(type(value).__name__ for value in outputs)}",
            expected="tensors only",
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


def _plain_name(value: torch.Value) -> str:
    """The name of a value in the code; loading appends `.1` to make it unique."""
    return re.sub(r"\.\d+$", "", value.debugName())


def _dim(sizes: Sequence[int], lengths: Sequence[int], name: str) -> Dim:
    if len(set(sizes)) == 1:
        return int(sizes[0])
    if list(sizes) == list(lengths):
        return SEQ_DIM
    raise ContractMismatchError(
        f"a dimension of `{name}` is {list(sizes)} at lengths {list(lengths)}",
        expected="the length, or the same size at every length",
        run=_EXPORT,
    )
