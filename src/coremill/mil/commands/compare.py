"""`coremill mil compare`: two models on the same inputs, the second measured against the first.

Each is an .mlpackage, run in reference numerics, or a TorchScript file (*.pt), run by torch in float32. States are
new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coremill.core.command import command_parser
from coremill.core.errors import (
    GATES_FAILED,
    OK,
    ConfigError,
    PackageError,
    PredictionInputError,
    TorchScriptError,
)
from coremill.measures import MOST_DB, Array, kl_nats, max_abs_err, sqnr_db
from coremill.mil.commands.arrays import draw_inputs, read_npz
from coremill.mil.commands.output import console, decibels, number, shape_text, table, title
from coremill.mil.commands.run import MODES, finite_text, predict
from coremill.mil.model import MLModel

Runner = Callable[[Mapping[str, Array]], dict[str, Array]]

TORCHSCRIPT = (".pt", ".pth", ".ts")
"""The suffixes of TorchScript files."""


@dataclass(frozen=True)
class Difference:
    """How one output of the measured model differs from the reference's."""

    name: str
    dtype: str
    """Both types, if they differ."""
    shape: tuple[int, ...]
    max_abs_err: float
    """NaN if a value of either is not finite; so are the other measures."""
    sqnr_db: float
    kl_nats: float | None
    """The mean over all positions; None if the output is not compared as logits."""
    finite: str
    """`all` if every value is finite, otherwise the counts of other values."""

    def passes(self, max_abs: float | None, min_sqnr: float | None) -> bool:
        """Return whether it is within both bounds; NaN is not."""
        within = max_abs is None or self.max_abs_err <= max_abs
        return within and (min_sqnr is None or self.sqnr_db >= min_sqnr)


def compare(
    reference: Mapping[str, Array], measured: Mapping[str, Array], logits: Collection[str] = ()
) -> list[Difference]:
    """Compare outputs by name, or in order if the names differ.

    Args:
        logits: names of further outputs to compare as logits; those with `logits` in their name always are.

    Raises:
        PackageError: the numbers of outputs, or the shapes of two, differ.
        ConfigError: `logits` has an unknown name, or an output whose last axis is not a distribution.
    """
    if len(reference) != len(measured):
        raise PackageError(
            f"the measured model has the outputs {list(measured)}",
            expected=f"as many as the first, {list(reference)}",
        )
    if unknown := sorted(set(logits) - set(reference)):
        raise ConfigError(f"--kl {unknown[0]}: no such output", expected=f"one of {list(reference)}")
    names = reference if set(reference) == set(measured) else measured
    return [
        _difference(name, reference[name], measured[other], name in logits)
        for name, other in zip(reference, names, strict=True)
    ]


def _difference(name: str, reference: Array, measured: Array, as_logits: bool) -> Difference:
    if reference.shape != measured.shape:
        raise PackageError(
            f"output {name!r} of the measured model is of shape {list(measured.shape)}",
            expected=f"{list(reference.shape)}, as of the first",
        )
    has_classes = reference.dtype.kind == "f" and reference.ndim > 0 and reference.shape[-1] > 1
    if as_logits and not has_classes:
        raise ConfigError(
            f"--kl {name}: it is {reference.dtype} of shape {list(reference.shape)}",
            expected="floats with at least two classes along the last axis",
        )
    dtypes = dict.fromkeys((str(reference.dtype), str(measured.dtype)))
    if "U" in (reference.dtype.kind, measured.dtype.kind):  # labels
        same = bool(np.all(reference == measured))
        return Difference(name, "string", (), *((0.0, MOST_DB) if same else (math.inf, 0.0)), None, "all")
    with np.errstate(invalid="ignore", over="ignore"):
        kl = None
        if as_logits or (has_classes and "logits" in name):
            kl = float(kl_nats(reference.astype(np.float64), measured.astype(np.float64)).mean())
        return Difference(
            name,
            " / ".join(dtypes),
            reference.shape,
            max_abs_err(reference, measured),
            sqnr_db(reference, measured),
            kl,
            _finite(reference, measured),
        )


def _finite(reference: Array, measured: Array) -> str:
    texts = (finite_text(reference), finite_text(measured))
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} / {texts[1]}"


def is_torchscript(path: Path) -> bool:
    return path.suffix in TORCHSCRIPT and not path.is_dir()


def torchscript_runner(path: Path) -> Runner:
    """Return a function that runs a TorchScript program on arrays by name, in float32.

    Inputs are matched by name if all names agree, otherwise in the order of the arrays. bfloat16 outputs become
    float32, because numpy has no bfloat16.

    Raises:
        TorchScriptError: it is not a TorchScript program; when run, it fails or returns something else than
            tensors.
        PredictionInputError: when run, an array has a type that torch does not support.
    """
    expected = "a TorchScript program, as torch.jit.save writes it"
    try:
        program = torch.jit.load(str(path), map_location="cpu").eval()
    except (OSError, ValueError, RuntimeError) as error:  # torch raises each for one kind of file or another
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TorchScriptError(f"cannot load {path}: {reason}", expected=expected) from error
    names = [_plain_name(value) for value in list(program.graph.inputs())[1:]]  # the first is the module itself

    def run(data: Mapping[str, Array]) -> dict[str, Array]:
        ordered = names if set(names) == set(data) else list(data)
        tensors = [_tensor(name, data[name]) for name in ordered]
        try:
            with torch.no_grad():
                outputs = program(*tensors)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise TorchScriptError(f"{path} does not run on these inputs: {reason}") from error
        values = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        if not values or not all(map(_is_comparable, values)):
            raise TorchScriptError(
                f"{path} returns {', '.join(map(_kind, values)) or 'nothing'}",
                expected="only dense tensors of real numbers",
            )
        found = _output_names(program)
        if len(set(found)) != len(values):
            found = [f"output {position}" for position in range(len(values))]
        return {name: _array(value) for name, value in zip(found, values, strict=True)}

    return run


def _tensor(name: str, array: Array) -> torch.Tensor:
    if array.dtype.kind not in "biuf":
        raise PredictionInputError(f"input {name!r} is {array.dtype}", expected="numbers or bools")
    return torch.from_numpy(array.astype(np.float32) if array.dtype.kind == "f" else array)


def _is_comparable(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    return value.layout is torch.strided and not (value.is_complex() or value.is_quantized)


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{value.dtype} ({str(value.layout).removeprefix('torch.')})"


def _array(value: torch.Tensor) -> Array:
    plain = value.detach()  # a returned parameter requires gradients even here
    array: Array = (plain.float() if plain.dtype is torch.bfloat16 else plain).numpy()
    return array


def _output_names(program: Any) -> list[str]:
    (result,) = program.graph.outputs()
    node = result.node()
    returned = list(node.inputs()) if node.kind() == "prim::TupleConstruct" else [result]
    return [_plain_name(value) for value in returned]


def _plain_name(value: Any) -> str:
    """The name of a value as the code spells it; loading appends `.1` to make it unique."""
    name, _, number_part = str(value.debugName()).rpartition(".")
    return name if name and number_part.isdigit() else str(value.debugName())


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("mil compare", __doc__, example="model.pt model.mlpackage --min-sqnr 40")
    parser.add_argument("reference", type=Path, help="an .mlpackage or a TorchScript file")
    parser.add_argument("measured", type=Path, help="the one that is measured against it")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--input", type=Path, metavar="X.npz", help="an array for each input")
    given.add_argument(
        "--seed", type=int, default=0, help="seed of the inputs drawn from the description (default: %(default)s)"
    )
    parser.add_argument("--function", help="the function of each package (default: its own)")
    parser.add_argument(
        "--mode", choices=MODES, default=MODES[0], help="precision of values in packages (default: %(default)s)"
    )
    parser.add_argument("--kl", action="append", default=[], metavar="OUTPUT", help="compare it as logits")
    parser.add_argument("--max-abs", type=float, metavar="X", help="fail above this difference of any output")
    parser.add_argument("--min-sqnr", type=float, metavar="DB", help="fail below this ratio of any output")
    options = parser.parse_args(argv)

    paths = (options.reference, options.measured)
    models = {
        path: MLModel(path, function_name=options.function, mode=options.mode)
        for path in paths
        if not is_torchscript(path)
    }
    if not models and options.input is None:
        raise ConfigError("two TorchScript files, which describe no inputs", expected="--input X.npz")
    data = read_npz(options.input) if options.input else draw_inputs(next(iter(models.values())), options.seed)
    reference, measured = (
        predict(models[path], data) if path in models else torchscript_runner(path)(data) for path in paths
    )
    differences = compare(reference, measured, logits=options.kl)

    bounded = options.max_abs is not None or options.min_sqnr is not None
    passed = [each.passes(options.max_abs, options.min_sqnr) for each in differences]
    to = console()
    to.print(title(_about(paths, data, options)), soft_wrap=True)
    to.print(
        table(
            ["output", "dtype", "shape", ">max abs", ">SQNR dB", ">KL nats", "finite", *([""] if bounded else [])],
            [
                [*_row(each), *(["passed" if ok else "failed"] if bounded else [])]
                for each, ok in zip(differences, passed, strict=True)
            ],
        )
    )
    return OK if not bounded or all(passed) else GATES_FAILED


def _about(paths: tuple[Path, Path], data: Mapping[str, Array], options: Any) -> str:
    shapes = ", ".join(f"{name} {shape_text(array.shape)}" for name, array in data.items())
    source = f"from {options.input}" if options.input else f"drawn with seed {options.seed}"
    return f"{paths[1]} against {paths[0]}\ninputs {shapes}, {source}"


def _row(each: Difference) -> list[str]:
    return [
        each.name,
        each.dtype,
        shape_text(each.shape),
        number(each.max_abs_err),
        decibels(each.sqnr_db),
        "" if each.kl_nats is None else number(each.kl_nats),
        each.finite,
    ]
