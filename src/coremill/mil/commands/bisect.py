"""`coremill mil bisect`: the rounding error of each operation of a program.

The program runs twice on the same inputs, step by step: as declared, with each value rounded to its type, and as
the oracle, which computes fp16 in fp32. The relative error of an operation is the root mean square of the
difference divided by that of the oracle's values; it includes the rounding of all operations before it. Operations
on constants run once, when the package is loaded; they are listed only if they overflow. The exit code is 0
whatever the errors are.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from coremill.core.command import command_parser
from coremill.core.errors import ConfigError, CoremillError
from coremill.measures import MOST_DB, Array
from coremill.mil.commands.arrays import as_images, draw_inputs, read_npz
from coremill.mil.commands.inspect import NonfiniteConstant, is_finite, nonfinite_constants
from coremill.mil.commands.output import console, decibels, number, shape_text, table, title
from coremill.mil.commands.run import finite_text
from coremill.mil.graph import Graph, Node
from coremill.mil.images import Image
from coremill.mil.model import MLModel
from coremill.mil.plan import Step
from coremill.mil.values import Value

BOUND = 0.01
"""The default bound of the relative error: an SQNR of 40 dB, as verification requires of a converted model's
outputs.

One rounding to fp16 changes a value by at most 2⁻¹¹ ≈ 0.0005 of it; the error grows with the depth of a model."""

LISTED = 10
"""The number of operations in each list."""

_PART_ELEMENTS = 1 << 22
"""The number of elements that are compared at a time."""


@dataclass(frozen=True)
class Deviation:
    """How the outputs of one operation, as declared, differ from the oracle's."""

    name: str
    op_type: str
    relative: float
    """Relative error of the worst output; infinite if only one of the two is finite, the oracle is all 0, or the
    shapes differ. NaN if no output is compared: lists, labels and dictionaries are not."""
    max_abs_err: float
    """Of values that are finite in both; NaN if the shapes differ."""
    inputs_relative: float
    """Relative error of its worst input; NaN if an input was not compared."""
    shapes: str | None
    """Both shapes, if they differ: a size may depend on the data."""
    saturated: int
    """Values at the largest magnitude of their fp16 or bf16 type, if no input was at it."""
    infinite: int
    """Infinities from finite inputs."""
    nan: int
    """NaNs from inputs without NaN: 0 · ∞, ∞ − ∞, or a finite value outside the operation's domain."""
    inputs_finite: bool
    oracle_finite: bool
    """Whether the oracle's outputs are finite; if not, a wider type does not help."""
    agrees_in_nonfinite: bool
    """Whether an element is NaN, or the same infinity, in both runs; such elements count as no error."""

    @property
    def is_compared(self) -> bool:
        return not math.isnan(self.relative)

    @property
    def overflows(self) -> bool:
        return bool(self.saturated or self.infinite or self.nan)

    def __str__(self) -> str:
        return f"operation {self.name!r} ({self.op_type})"


class _StoppedError(Exception):
    """The declared run ended early; the oracle's run ends too."""


class _Oracle:
    """The oracle's run in its own thread, one operation ahead of the declared run; the two take turns.

    Only the values of one operation are in memory, they do not change while they are compared, and both runs draw
    the same random numbers.
    """

    def __init__(self) -> None:
        self._steps: queue.Queue[tuple[str, list[Value]] | None] = queue.Queue()
        self._turn = threading.Semaphore(0)
        self._current: tuple[str, list[Value]] | None = None
        self._count = 0
        self._stopped = False

    def run(self, model: MLModel, data: Mapping[str, Array | Image]) -> None:
        """Run the model; called in the thread."""
        try:
            self._wait()
            model.predict(data, model.make_state() if model.states else None, observe=self._put)
        finally:
            self._steps.put(None)

    def _put(self, step: Step, values: list[Value]) -> None:
        self._steps.put((step.node.name, [values[slot] for slot in step.outputs]))
        self._wait()

    def _wait(self) -> None:
        self._turn.acquire()
        if self._stopped:
            raise _StoppedError

    def current(self, name: str) -> list[Value]:
        """Return the oracle's outputs of operation `name`, which `advance` ran; valid until the next call of it."""
        if self._current is None:
            raise _StoppedError
        assert self._current[0] == name, "both plans run the same operations in the same order"
        return self._current[1]

    def advance(self) -> None:
        """Let the oracle run one operation, and wait for it."""
        self._count += 1
        torch.manual_seed(self._count)
        self._turn.release()
        self._current = self._steps.get()
        torch.manual_seed(self._count)

    def stop(self) -> None:
        """End a waiting run."""
        self._stopped = True
        self._turn.release()


def bisect(declared: MLModel, oracle: MLModel, data: Mapping[str, Array | Image]) -> list[Deviation]:
    """Run both models on the same inputs, and compare every operation in order; nested blocks are not compared
    inside.

    Raises:
        PredictionInputError: the models reject `data`.
    """
    found = _overflows_of_constants(declared, oracle)
    graph = declared.program.graph
    errors: dict[int, float] = {}
    ahead = _Oracle()

    def observe(step: Step, values: list[Value]) -> None:
        reference = ahead.current(step.node.name)
        inputs, outputs = ([values[slot] for slot in slots] for slots in (step.inputs, step.outputs))
        # numpy's maximum is NaN if an input was not compared
        of_inputs = float(np.max([errors.get(slot, 0.0) for slot in step.inputs], initial=0.0))
        found.append(_compared(graph, step.node, inputs, outputs, reference, of_inputs))
        for slot, own, other in zip(step.outputs, outputs, reference, strict=True):
            errors[slot] = _deviation(own, other)[0]
        ahead.advance()

    with torch.random.fork_rng(devices=[]), ThreadPoolExecutor(1) as pool:
        running = pool.submit(ahead.run, oracle, data)
        try:
            ahead.advance()
            declared.predict(data, declared.make_state() if declared.states else None, observe=observe)
        except _StoppedError:
            _raise_as_the_oracles(running)
            raise
        finally:
            ahead.stop()
    return found


def _raise_as_the_oracles(running: Future[None]) -> None:
    """Raise the error that ended the oracle; the declared run has passed the same operation."""
    try:
        running.result()
    except CoremillError as error:
        raise type(error)(
            f"only the oracle's run fails: {error.found}",
            expected=error.expected
            or "inputs for which rounding changes no index or shape that an operation rejects",
            run=error.run,
        ) from error


def _overflows_of_constants(declared: MLModel, oracle: MLModel) -> list[Deviation]:
    """Return the operations on constants alone that overflow; no run repeats them."""
    graph = declared.program.graph
    own, other = declared.plan.general.template, oracle.plan.general.template
    found = []
    for node in graph.nodes:
        outputs, reference = ([template[slot] for slot in node.outputs] for template in (own, other))
        if not any(value is None for value in outputs):  # else computed in each run
            found.append(_compared(graph, node, [own[slot] for slot in node.tensor_slots], outputs, reference, 0.0))
    return [each for each in found if each.overflows]


def _compared(
    graph: Graph,
    node: Node,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    reference: Sequence[Value],
    inputs_relative: float,
) -> Deviation:
    """Compare the outputs of one operation with the oracle's."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    halves = [
        value
        for slot, value in zip(node.outputs, outputs, strict=True)
        if slot in graph.types and graph.types[slot].element.is_half and isinstance(value, Tensor)
    ]
    return Deviation(
        node.name,
        node.op_type,
        *_worst_part([_deviation(own, other) for own, other in zip(outputs, reference, strict=True)]),
        inputs_relative,
        next(filter(None, map(_other_shapes, outputs, reference)), None),
        *_overflows(tensors, halves, outputs),
        all(map(_is_finite, tensors)),
        all(map(_is_finite, reference)),
        any(map(_agree_in_nonfinite, outputs, reference)),
    )


def _deviation(declared: Value, oracle: Value) -> tuple[float, float]:
    """Return the relative and the largest absolute error; elements that are equal or both NaN have no error.

    Both are NaN for a list, a label or a dictionary; for different shapes see :class:`Deviation`.
    """
    if not isinstance(declared, Tensor) or not isinstance(oracle, Tensor):
        return (math.nan, math.nan)
    if declared.shape != oracle.shape:
        return (math.inf, math.nan)
    wide = torch.float32 if oracle.is_floating_point() and oracle.dtype is not torch.float64 else torch.float64
    noise = signal = largest = 0.0
    equal, lost = True, False
    for own_part, other_part in zip(_parts(declared), _parts(oracle), strict=True):
        own, other = own_part.to(wide), other_part.to(wide)
        differs = (own != other) & ~(own.isnan() & other.isnan())
        finite = own.isfinite() & other.isfinite()
        error = torch.where(finite & differs, own - other, 0)
        # in float64: the square of a large float32 is infinite
        noise = math.hypot(noise, float(torch.linalg.vector_norm(error, dtype=torch.float64)))
        signal = math.hypot(
            signal, float(torch.linalg.vector_norm(torch.where(finite, other, 0), dtype=torch.float64))
        )
        largest = max(largest, float(error.abs().max()))
        equal = equal and not bool(differs.any())
        lost = lost or bool((differs & ~finite).any())
    if equal:
        return (0.0, 0.0)
    return (math.inf if lost or signal == 0 else noise / signal, largest)


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Return the elements in order, in parts: intermediate values of a whole weight would take several times its
    memory."""
    return tensor.reshape(-1).split(_PART_ELEMENTS) if tensor.numel() else ()


def _worst_part(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the worst errors of the compared outputs; 0 if there are no outputs."""
    compared = [part for part in parts if not math.isnan(part[0])]
    if parts and not compared:
        return (math.nan, math.nan)
    relative = max((part[0] for part in compared), default=0.0)
    return (relative, float(np.max([part[1] for part in compared], initial=0.0)))


def _other_shapes(declared: Value, oracle: Value) -> str | None:
    if not isinstance(declared, Tensor) or not isinstance(oracle, Tensor) or declared.shape == oracle.shape:
        return None
    return f"{shape_text(declared.shape)}, the oracle {shape_text(oracle.shape)}"


def _overflows(
    inputs: Sequence[Tensor], halves: Sequence[Tensor], outputs: Sequence[Value]
) -> tuple[int, int, int]:
    """Count the saturated, infinite and NaN outputs of an operation whose inputs have no such values.

    Infinite inputs explain infinite outputs, but no NaN: that is where 0 · ∞ or ∞ − ∞ was computed.
    """
    tensors = [each for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]
    saturated = sum(_at_end(each, torch.finfo(each.dtype).max) for each in halves)
    if saturated:
        ends = {torch.finfo(each.dtype).max for each in halves}
        if any(_at_end(each, end) for each in inputs if each.is_floating_point() for end in ends):
            saturated = 0
    if all(map(_is_finite, tensors)):
        return (saturated, 0, 0)
    infinite = sum(int(each.isinf().sum()) for each in tensors) if all(map(_is_finite, inputs)) else 0
    nan = 0 if any(map(_has_nan, inputs)) else sum(int(each.isnan().sum()) for each in tensors)
    return (saturated, infinite, nan)


def _at_end(tensor: Tensor, end: float) -> int:
    return sum(int((part.abs() == end).sum()) for part in _parts(tensor))


def _is_finite(value: Value) -> bool:
    return not isinstance(value, Tensor) or is_finite(value)


def _has_nan(tensor: Tensor) -> bool:
    return not is_finite(tensor) and any(bool(part.isnan().any()) for part in _parts(tensor))


def _agree_in_nonfinite(declared: Value, oracle: Value) -> bool:
    """Return whether an element is NaN in both, or the same infinity in both."""
    if _is_finite(declared) or not isinstance(declared, Tensor) or not isinstance(oracle, Tensor):
        return False
    if declared.shape != oracle.shape:
        return False
    same = (declared.isnan() & oracle.isnan()) | (declared.isinf() & (declared == oracle))
    return bool(same.any())


def sqnr_db(relative: float) -> float:
    """Convert a relative error to a signal-to-noise ratio."""
    if relative == 0:
        return MOST_DB
    return -20 * math.log10(relative) + 0.0 if math.isfinite(relative) else -math.inf


def render(
    deviations: Sequence[Deviation], constants: Sequence[NonfiniteConstant], bound: float, to: Console
) -> None:
    """Print the first operation beyond the bound, the worst ones, those not compared, and what is not finite."""
    compared = [each for each in deviations if each.is_compared]
    first = next((each for each in compared if each.relative > bound), None)
    if first is None:
        to.print(Text(f"none of {len(compared)} operations has a relative error above {number(bound)}"))
        if alike := sum(each.agrees_in_nonfinite for each in compared):
            to.print(Text(f"{alike} of them return{'s' * (alike == 1)} the same NaNs or infinities as the oracle"))
    else:
        to.print(Text(f"the first operation with a relative error above {number(bound)}:", style="bold"))
        to.print(Text(f"{first}: {_error_text(first)}, its inputs by at most {_known(first.inputs_relative)}"))
    worst = [each for each in sorted(compared, key=lambda each: -each.relative)[:LISTED] if each.relative > 0]
    if worst:
        to.print()
        to.print(title(f"the worst of {len(compared)} operations"))
        to.print(_worst_table(worst))
    to.print()
    if reshaped := [each for each in deviations if each.shapes]:
        to.print(title("operations whose shape differs from the oracle's"))
        _print_some([f"{each.name} ({each.op_type}): {each.shapes}" for each in reshaped], to)
        to.print()
    if apart := [each for each in deviations if not each.is_compared]:
        to.print(title(f"not compared: {len(apart)}, which return lists, labels or dictionaries"))
        _print_some([f"{each.name} ({each.op_type})" for each in apart], to)
        to.print()
    if constants:
        to.print(title("constants that are infinite or NaN as they are saved"))
        _print_some([str(each) for each in constants], to)
        to.print()
    overflows = [each for each in deviations if each.overflows]
    if overflows:
        to.print(title("operations that saturate, or create infinities or NaNs"))
        to.print(_overflow_table(overflows))
    else:
        to.print(Text("no operation saturates, or creates infinities or NaNs"))


def _print_some(lines: Sequence[str], to: Console) -> None:
    for line in lines[:LISTED]:
        to.print(Text(line))
    if len(lines) > LISTED:
        to.print(Text(f"… and {len(lines) - LISTED} more"))


def _error_text(each: Deviation) -> str:
    if each.shapes:
        return f"shape {each.shapes}"
    return f"{number(each.relative)} ({decibels(sqnr_db(each.relative))} dB)"


def _known(value: float) -> str:
    return "unknown" if math.isnan(value) else number(value)


def _worst_table(worst: Sequence[Deviation]) -> Table:
    return table(
        ["operation", "type", ">error", ">dB", ">of inputs", ">max abs"],
        [
            (
                each.name,
                each.op_type,
                number(each.relative),
                decibels(sqnr_db(each.relative)),
                _known(each.inputs_relative),
                _known(each.max_abs_err),
            )
            for each in worst
        ],
    )


def _overflow_table(overflows: Sequence[Deviation]) -> Table:
    return table(
        ["operation", "type", ">saturated", ">infinite", ">NaN", "inputs", "oracle"],
        [
            (
                each.name,
                each.op_type,
                str(each.saturated),
                str(each.infinite),
                str(each.nan),
                "finite" if each.inputs_finite else "not finite",
                "finite" if each.oracle_finite else "not finite",
            )
            for each in overflows
        ],
    )


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("mil bisect", __doc__, example="model.mlpackage --bound 0.01")
    parser.add_argument("package", type=Path, help="an .mlpackage")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--input", type=Path, metavar="X.npz", help="an array for each input")
    given.add_argument(
        "--seed", type=int, default=0, help="seed of the inputs drawn from the description (default: %(default)s)"
    )
    parser.add_argument("--function", help="the function to run (default: the package's own)")
    parser.add_argument(
        "--bound",
        type=float,
        default=BOUND,
        help="bound of an operation's relative error (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if not options.bound > 0:
        raise ConfigError(f"--bound {options.bound}", expected="a positive number")
    declared = MLModel(options.package, function_name=options.function)
    oracle = MLModel(options.package, function_name=options.function, mode="oracle")
    data = read_npz(options.input) if options.input else draw_inputs(declared, options.seed)
    deviations = bisect(declared, oracle, as_images(declared, data))
    to = console()
    to.print(title(f"{options.package}, function {declared.function_name}"), soft_wrap=True)
    for name, array in data.items():
        source = f"from {options.input}" if options.input else f"drawn with seed {options.seed}"
        finite = finite_text(array)
        nonfinite = "" if finite == "all" else f"; it contains {finite}"
        to.print(Text(f"input {name} {shape_text(array.shape)}, {source}{nonfinite}"), soft_wrap=True)
    to.print()
    render(deviations, nonfinite_constants(declared.program.graph), options.bound, to)
    return 0
