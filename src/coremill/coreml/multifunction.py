"""Several converted functions as the model of one package, with every weight in it once.

`coremltools.utils.save_multifunction` does the same by converting each saved package back into coremltools' own
program and saving that anew; on a decoder of 135 million parameters and six functions that takes longer than the
conversions. Here the saved programs stay as they are: only the places of their weights change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter

from coremill.coreml.converter import MLModel, ct
from coremill.coreml.graph import MAIN

Spec = Any
"""A coremltools.proto.Model_pb2.Model."""

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
"""How coremltools' readers and writers of weight files call the types that decoders have."""


class FunctionJoiner:
    """Gathers functions; the weights go to a file as they come, each content once.

    Args:
        weights: the weight file to write, in an existing folder.
    """

    def __init__(self, weights: Path) -> None:
        self._writer = _BlobStorageWriter(str(weights))
        self._name = f"@model_path/{weights.parent.name}/{weights.name}"
        self._offsets: dict[tuple[str, bytes], int] = {}
        self._specs: dict[str, Spec] = {}

    def add(self, name: str, model: MLModel) -> None:
        """Take the function `main` of a converted model, as the function `name`."""
        spec = model.get_spec()
        reader = _Reader(Path(model.weights_dir)) if model.weights_dir else None
        for value in _stored_values(spec.mlProgram.functions[MAIN]):
            stored = value.blobFileValue
            kind = _ACCESS[value.type.tensorType.dataType]
            data = reader.read(kind, stored.fileName, stored.offset) if reader else None
            if data is None:
                raise ValueError(f"function {name} names weights, and the model has none")
            stored.offset = self._place(kind, data)
            stored.fileName = self._name
        self._specs[name] = spec

    def _place(self, kind: str, data: np.ndarray) -> int:
        """Where `data` is in the weight file; it is written when it is new."""
        key = (kind, hashlib.sha256(data).digest())
        if key not in self._offsets:
            self._offsets[key] = int(getattr(self._writer, f"write_{kind}_data")(data))
        return self._offsets[key]

    def finish(self) -> Spec:
        """The model of all functions; `main` is the default, and one alone is described as a plain model.

        The weight file is whole once this returns; nothing can be added after it.
        """
        del self._writer  # which writes the end of the file
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
        self._files: dict[str, Any] = {}

    def read(self, kind: str, name: str, offset: int) -> np.ndarray:
        """The data at `offset` of the file that a program calls `name`; float16 as the uint16 of its bits."""
        if name not in self._files:
            self._files[name] = _BlobStorageReader(str(self._folder / Path(name).name))
        return np.asarray(getattr(self._files[name], f"read_{kind}_data")(offset))


def _stored_values(function: Any) -> Iterator[Any]:
    """Each value of a function that lies in a weight file, in the order of its operations."""
    for opset in sorted(function.block_specializations):
        yield from _in_block(function.block_specializations[opset])


def _in_block(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        values = [operation.attributes[name] for name in sorted(operation.attributes)]
        for name in sorted(operation.inputs):
            values += [binding.value for binding in operation.inputs[name].arguments if binding.HasField("value")]
        yield from (value for value in values if value.WhichOneof("value") == "blobFileValue")
        for inner in operation.blocks:
            yield from _in_block(inner)
