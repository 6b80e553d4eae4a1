"""Input and output arrays of a model: read from .npz files, drawn from a description, and written."""

from __future__ import annotations

import importlib.util
import io
import lzma
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coremill.core.errors import MachineError, PredictionInputError
from coremill.core.publish import write_atomic
from coremill.measures import Array
from coremill.mil.commands.inspect import all_nodes
from coremill.mil.description import ColorSpace, ImageSpec, TensorSpec
from coremill.mil.graph import Graph, Node
from coremill.mil.images import Image
from coremill.mil.model import MLModel

_SAVED = "an .npz file as numpy.savez writes it, with an array for each input by its name"

_UNREADABLE = (
    *(EOFError, LookupError, MemoryError, OverflowError, RuntimeError, SyntaxError, TypeError, ValueError),
    *(lzma.LZMAError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
"""What zipfile, the decompressors and numpy (which parses headers as Python literals) raise for a file that is
damaged, encrypted or far too large."""

_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)

_DRAWN_SIZE = 16
"""The drawn size of a dimension with a range, or the nearest size in the range."""

_KEEPS_IDS = frozenset(
    (
        *("add", "cast", "expand_dims", "identity", "reshape", "select", "slice_by_index", "slice_by_size"),
        *("split", "squeeze", "tile", "transpose"),
    )
)
"""Operations through which ids are traced to the gather that reads them. The converter adds `add` and `select` to
let negative ids count from the end."""


def read_npz(path: Path) -> dict[str, Array]:
    """Return the arrays of an .npz file by name; nothing is unpickled.

    Raises:
        PredictionInputError: it is unreadable, or contains Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {}
            for name in archive.namelist():
                with archive.open(name) as member:
                    array = np.load(member, allow_pickle=False)
                    if not isinstance(array, np.ndarray):
                        raise ValueError(f"{name} is not an array")
                    arrays[name.removesuffix(".npy")] = array
            return arrays
    except OSError as error:
        raise PredictionInputError(f"cannot read {path}: {error.strerror or error}", expected=_SAVED) from error
    except _UNREADABLE as error:
        raise PredictionInputError(f"{path} is not readable: {error}", expected=_SAVED) from error


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays under their names; equal arrays give equal bytes.

    `numpy.savez` is not used: it does not accept an array called `file`, and it writes the current time.

    Raises:
        OutputError: the file cannot be written.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=_ZIP_EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content.getvalue())
    write_atomic(path, buffer.getvalue())


def draw_inputs(model: MLModel, seed: int) -> dict[str, Array]:
    """Return random arrays for the model's inputs; they depend on the seed and the description alone.

    Floats are standard normal. Integers are at least 0 and less than the size of the tables that they index, or
    0 or 1 if the graph has no such table. Pixels are 0 to 255. Enumerated shapes use the default; for ranges see
    `_DRAWN_SIZE`.
    """
    generator = np.random.default_rng(seed)
    limits = index_limits(model.program.graph)
    drawn = {}
    for spec in model.inputs:
        if isinstance(spec, ImageSpec):
            _, channels, *sizes = _drawn_shape(spec.tensor)
            pixels = generator.integers(0, 256, (*sizes, channels)).astype(_pixel_dtype(spec.color_space))
            drawn[spec.name] = pixels if channels > 1 else pixels[..., 0]
        elif np.dtype(spec.dtype).kind == "f":
            drawn[spec.name] = generator.standard_normal(_drawn_shape(spec)).astype(spec.dtype)
        else:
            drawn[spec.name] = generator.integers(0, limits.get(spec.name, 2), _drawn_shape(spec)).astype(
                spec.dtype
            )
    return drawn


def as_images(model: MLModel, data: Mapping[str, Array]) -> dict[str, Array | Image]:
    """Return the arrays, those of image inputs as PIL images; an image is (height, width) or (height, width, 3).

    Raises:
        PredictionInputError: an array is not an image.
        MachineError: there is an image input, and Pillow is not installed.
    """
    images = {spec.name: spec.color_space for spec in model.inputs if isinstance(spec, ImageSpec)}
    return {name: _image(name, array, images[name]) if name in images else array for name, array in data.items()}


def _image(name: str, array: Array, color_space: ColorSpace) -> Image:
    if importlib.util.find_spec("PIL") is None:
        raise MachineError(
            f"Pillow is not installed in {sys.prefix}, and input {name!r} is an image", run="pip install pillow"
        )
    import PIL.Image

    dtype = _pixel_dtype(color_space)
    sizes = "(height, width)" if color_space.channels == 1 else "(height, width, 3)"
    channels = (3,) if color_space.channels == 3 else ()
    if array.ndim < 2 or array.shape[2:] != channels or array.dtype.kind != dtype.kind:
        raise PredictionInputError(
            f"image input {name!r} is {array.dtype} of shape {list(array.shape)}", expected=f"{dtype} {sizes}"
        )
    image: Image = PIL.Image.fromarray(array.astype(dtype))
    return image


def _pixel_dtype(color_space: ColorSpace) -> np.dtype[np.generic]:
    """Return the type of an image's pixels in Pillow."""
    return np.dtype(np.float32 if color_space is ColorSpace.GRAYSCALE_FLOAT16 else np.uint8)


def as_arrays(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Return outputs as arrays: an image's pixels, a classifier's label, its probabilities in order."""
    return {
        name: np.array(list(value.values())) if isinstance(value, Mapping) else np.asarray(value)
        for name, value in outputs.items()
    }


def _drawn_shape(spec: TensorSpec) -> tuple[int, ...]:
    listed = spec.supported_shapes
    if listed is not None:
        return listed[0]
    ranges = spec.size_ranges or tuple((size or 1, size) for size in spec.shape)
    return tuple(max(low, _DRAWN_SIZE if high is None else min(high, _DRAWN_SIZE)) for low, high in ranges)


def index_limits(graph: Graph) -> dict[str, int]:
    """Return the size of the smallest table that each input indexes; inputs that index none are missing."""
    limits = {}
    for slot in graph.inputs:
        if sizes := _tables(graph, {slot}):
            limits[graph.names[slot]] = min(sizes)
    return limits


def _tables(graph: Graph, carriers: set[int]) -> list[int]:
    """Return the sizes of the tables that the values in these slots index, also through other operations."""
    sizes = []
    for owner, node in all_nodes(graph):
        if owner is not graph:
            continue  # a nested block has its own slots
        if node.op_type.startswith("gather"):
            size = _table_size(graph, node, carriers)
            if size is not None:
                sizes.append(size)
        elif node.op_type in _KEEPS_IDS and carriers.intersection(node.tensor_slots):
            carriers.update(node.outputs)
    return sizes


def _table_size(graph: Graph, node: Node, carriers: set[int]) -> int | None:
    if node.definition is None or node.op_type == "gather_nd":
        return None
    slots = dict(zip([each.name for each in node.definition.tensors], node.tensors, strict=True))
    if not carriers.intersection(slots["indices"]):
        return None
    table = graph.types[slots["x"][0]].shape
    axis = graph.constants.get(node.attributes["axis"][0]) if "axis" in node.attributes else torch.tensor(0)
    # the prediction rejects an invalid axis, or an index into a table without rows
    if not isinstance(axis, torch.Tensor) or axis.numel() != 1 or not -len(table) <= int(axis) < len(table):
        return None
    return table[int(axis)] or None
