"""Join converted functions into the model of one package, with each weight stored once.

`coremltools.utils.save_multifunction` does the same, but it parses each saved package into coremltools' own program
and saves that again; for a decoder of 135 million parameters and six functions, this takes longer than the
conversions. Here the saved programs are not changed, except for the offsets of their weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter

from coremill.core.contract import MAIN
from coremill.coreml.converter import MLModel, Spec, ct
from coremill.measures import Array

_MIL = ct.proto.MIL_pb2
_ACCESS = {
    _MIL.FLOAT16: "fp16",
    _MIL.FLOAT32: "float",
    _MIL.INT8: "int8",
    _MIL.UINT8: "uint8",
    _MIL.INT16: "int16",
    _MIL.UINT16: "uint16",
    _MIL.INT32: "int32",
    _MIL.UINT32: "uint32",
}
"""The names of a decoder's dtypes in the methods of coremltools' weight file reader and writer."""


class FunctionJoiner:
    """Collects functions, and writes their weights to one file as they are added; equal weights are written once.

    Args:
        weights: the weight file to write, in an existing directory.
    """

    def __init__(self, weights: Path) -> None:
        self._writer = _BlobStorageWriter(str(weights))
        self._name = f"@model_path/{weights.parent.name}/{weights.name}"
        self._offsets: dict[tuple[str, bytes], int] = {}
        self._specs: dict[str, Spec] = {}

    def add(self, name: str, model: MLModel) -> None:
        """Add the function `main` of a converted model, under the name `name`."""
        spec = model.get_spec()
        reader = _Reader(Path(model.weights_dir)) if model.weights_dir else None
        for value in _stored_values(spec.mlProgram.functions[MAIN]):
            stored = value.blobFileValue
            kind = _ACCESS[value.type.tensorType.dataType]
            data = reader.read(kind, stored.fileName, stored.offset) if reader else None
            if data is None:
                raise ValueError(f"function {name} refers to weights, but its model has no weight file")
            stored.offset = self._offset_of(kind, data)
            stored.fileName = self._name
        self._specs[name] = spec

    def _offset_of(self, kind: str, data: Array) -> int:
        """The offset of `data` in the weight file; it is written if it is not there yet."""
        key = (kind, hashlib.sha256(data.data).digest())
        if key not in self._offsets:
            self._offsets[key] = int(getattr(self._writer, f"write_{kind}_data")(data))
        return self._offsets[key]

    def finish(self) -> Spec:
        """Return the model of all functions, with `main` as the default; a single function is a plain model.

        This completes the weight file; nothing can be added afterwards.
        """
        del self._writer  # its destructor writes the end of the file
        (_, joined), *others = self._specs.items()
        if not others:
            return joined
        first = ct.proto.Model_pb2.Model()
        first.CopyFrom(joined)
        for field in ("input", "output", "state"):
            joined.description.ClearField(field)
        joined.description.defaultFunctionName = MAIN
        for name, spec in {MAIN: first, **dict(others)}.items():
            described = joined.description.functions.add(name=name)
            for field in ("input", "output", "state"):
                getattr(described, field).extend(getattr(spec.description, field))
            joined.mlProgram.functions[name].CopyFrom(spec.mlProgram.functions[MAIN])
            joined.specificationVersion = max(joined.specificationVersion, spec.specificationVersion)
        return joined


class _Reader:
    """The weight files of one converted model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, _BlobStorageReader] = {}

    def read(self, kind: str, name: str, offset: int) -> Array:
        """Read the data at `offset` of the file named `name` in the program; float16 as the uint16 of its bits."""
        if name not in self._files:
            self._files[name] = _BlobStorageReader(str(self._folder / Path(name).name))
        return np.asarray(getattr(self._files[name], f"read_{kind}_data")(offset))


def _stored_values(function: Spec) -> Iterator[Spec]:
    """Each value of a function that is stored in a weight file, in the order of its operations."""
    for opset in sorted(function.block_specializations):
        yield from _in_block(function.block_specializations[opset])


def _in_block(block: Spec) -> Iterator[Spec]:
    for operation in block.operations:
        values = [operation.attributes[name] for name in sorted(operation.attributes)]
        for name in sorted(operation.inputs):
            values += [binding.value for binding in operation.inputs[name].arguments if binding.HasField("value")]
        yield from (value for value in values if value.WhichOneof("value") == "blobFileValue")
        for inner in operation.blocks:
            yield from _in_block(inner)
