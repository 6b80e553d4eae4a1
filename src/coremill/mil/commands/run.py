"""`coremill mil run`: predict with the arrays of an .npz file, and describe the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from coremill.core.command import command_parser
from coremill.core.publish import check_apart
from coremill.measures import Array
from coremill.mil.commands.arrays import as_arrays, as_images, read_npz, write_npz
from coremill.mil.commands.output import console, number, shape_text, table
from coremill.mil.model import MLModel
from coremill.mil.values import Numerics

MODES = tuple(each.value for each in Numerics)


def predict(model: MLModel, data: Mapping[str, Array]) -> dict[str, Array]:
    """Predict once, from arrays to arrays; states are new.

    Raises:
        PredictionInputError: the model rejects `data`.
    """
    return as_arrays(model.predict(as_images(model, data), model.make_state() if model.states else None))


def finite_text(array: Array) -> str:
    """Return `all`, or the counts of other values: `3 NaN, 1 inf`."""
    if array.dtype.kind != "f":
        return "all"
    counts = ((int(np.isnan(array).sum()), "NaN"), (int(np.isinf(array).sum()), "inf"))
    return ", ".join(f"{count} {name}" for count, name in counts if count) or "all"


def describe(name: str, array: Array) -> tuple[str, ...]:
    """Return a row of the table: name, type, shape, minimum, maximum and mean of the finite values, and other
    values."""
    if array.dtype.kind == "U":
        return (name, "string", str(array), "", "", "", "")
    finite = array[np.isfinite(array)]
    figures = ("", "", "")
    if finite.size:
        wide = finite.astype(np.float64)
        figures = (number(wide.min()), number(wide.max()), number(wide.mean()))
    return (name, str(array.dtype), shape_text(array.shape), *figures, finite_text(array))


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("mil run", __doc__, example="model.mlpackage --input x.npz --out y.npz")
    parser.add_argument("package", type=Path, help="an .mlpackage")
    parser.add_argument("--input", type=Path, required=True, metavar="X.npz", help="an array for each input")
    parser.add_argument("--function", help="the function to run (default: the package's own)")
    parser.add_argument(
        "--mode", choices=MODES, default=MODES[0], help="numerics of floating-point values (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda if torch has it (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="Y.npz", help="write the outputs")
    options = parser.parse_args(argv)
    if options.out is not None:
        check_apart([options.out], [options.input])
    data = read_npz(options.input)
    model = MLModel(options.package, function_name=options.function, mode=options.mode, device=options.device)
    outputs = predict(model, data)
    console().print(
        table(
            ["output", "dtype", "shape", ">min", ">max", ">mean", "finite"],
            [describe(name, array) for name, array in outputs.items()],
        )
    )
    if options.out is not None:
        write_npz(options.out, outputs)
    return 0
