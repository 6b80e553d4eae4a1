"""`MLModel`: predicts with a Core ML package as coremltools' class of the name does on a Mac."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from coremill.core.digest import digest
from coremill.core.errors import DigestError, MachineError, PredictionInputError
from coremill.measures import Array
from coremill.mil.coremltools_quietly import CoreMLToolsModel
from coremill.mil.description import (
    ImageSpec,
    InputSpec,
    OutputSpec,
    TensorSpec,
    choose_function,
    describe_function,
)
from coremill.mil.images import Image, image_from_array, tensor_from_image
from coremill.mil.loader import open_package
from coremill.mil.plan import Observer, Target
from coremill.mil.program import Program
from coremill.mil.values import Numerics, StateCell, Value, as_tensor


class State:
    """The tensors that a stateful model keeps between predictions; made by :meth:`MLModel.make_state`.

    One state serves every function that has states of the same names, types and shapes.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def read(self, name: str) -> Array:
        """A copy of one state's content.

        Raises:
            PredictionInputError: there is no state of that name.
        """
        content: Array = self._tensor(name).cpu().numpy().copy()
        return content

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise PredictionInputError(
                f"the state object has no state {name!r}", expected=f"one of {sorted(self._tensors)}"
            )
        return self._tensors[name]


class MLModel:
    """A function of a Core ML package, run on this machine's CPU in reference numerics.

    Args:
        model: path of an .mlpackage directory, or a coremltools MLModel.
        function_name: which function of the package; by default the one that the package names, else `main`.
        mode: "declared" rounds every value to its declared type and accumulates in fp32; "oracle" holds and
            computes fp16 values in fp32, and returns them so; "oracle-fp64" computes every float in fp64.
        device: "cpu", or "cuda" where torch sees such a device.
        expected_digest: of the whole package, as `coremill.core.digest.digest` gives it and a manifest records it.
            Without one a flipped bit in a weight goes unnoticed: the format has no checksums.

    Raises:
        DigestError: the package's bytes are not those of `expected_digest`.
        PackageError: the package is broken, is no ML Program, or lacks the function.
        UnsupportedOperationError: the function holds an operation that is not supported.
        MachineError: torch has no such device.
        ValueError: an unknown mode.
    """

    def __init__(
        self,
        model: str | Path | CoreMLToolsModel,
        *,
        function_name: str | None = None,
        mode: Literal["declared", "oracle", "oracle-fp64"] = "declared",
        device: str = "cpu",
        expected_digest: str | None = None,
    ) -> None:
        if expected_digest is not None:
            _check_digest(model, expected_digest)
        self._target = Target(Numerics(mode), _device(device))
        package = open_package(model)
        self.function_name = choose_function(package, function_name)
        self.program = Program(package, self.function_name)
        self._description = describe_function(package, self.function_name, self.program.graph)
        # Compiled now, so that a constant that cannot be computed is found on opening.
        self.program.plan(self._target)

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        return self._description.inputs

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        return self._description.outputs

    @property
    def states(self) -> tuple[TensorSpec, ...]:
        return self._description.states

    def supported_shapes(self, name: str) -> list[tuple[int, ...]] | None:
        """The shapes that an input may have, the default first; None where ranges allow too many to list.

        Those of an image are (1, channels, height, width).

        Raises:
            PredictionInputError: there is no input of that name.
        """
        for spec in self.inputs:
            if spec.name == name:
                return (spec.tensor if isinstance(spec, ImageSpec) else spec).supported_shapes
        raise PredictionInputError(f"no input {name!r}", expected=f"one of {[each.name for each in self.inputs]}")

    def make_state(self) -> State:
        """A new state, every element 0."""
        return State({name: tensor.contiguous() for name, tensor in self._empty_states().items()})

    def predict(
        self, data: Mapping[str, Array | Image], state: State | None = None, *, observe: Observer | None = None
    ) -> dict[str, Any]:
        """Run the function.

        Args:
            data: an array for each input. An integer array of any type is taken for an int32 input if every value
                fits, and a floating-point one of any type for a float input, rounded as IEEE says (beyond the
                type's range to an infinity); nothing else is converted.
                For an image a PIL image of mode RGB (color spaces RGB and BGR), L (GRAYSCALE) or F
                (GRAYSCALE_FLOAT16). An optional input may be left out, and has its default then.
            state: what :meth:`make_state` made, for a function with states. It is left as it was if this raises.
            observe: called after each operation that runs; see `coremill.mil.plan.Observer`.

        Returns:
            An array for each output, of its declared type (in oracle mode float32 for float16), with the shape the
            program gives; NaN and infinities as they came out. A scalar is an array of shape (1,), as Core ML has
            no others. For an image a PIL image: of mode RGBA, opaque, for color spaces RGB and BGR, L for
            GRAYSCALE, F for GRAYSCALE_FLOAT16; see `coremill.mil.images.image_from_array` for its rounding. For a
            classifier the predicted label, a str or int, and a dictionary of the probabilities by label.

        Raises:
            PredictionInputError: a missing or unknown input, a type or shape that the package does not admit, or
                values that an operation does not (an id outside an embedding, …), which it names.
            PackageError: an operation cannot run on the shapes that the package admits.
            MachineError: an output is an image, and Pillow is not installed.
        """
        self._check_names(data)
        given = {spec.name: _input_tensor(spec, data) for spec in self.inputs}
        cells = self._cells(state)
        graph = self.program.graph
        values: dict[str, Value] = {**given, **cells}
        for slot in graph.inputs:
            if graph.types[slot].shape == () and graph.names[slot] in given:
                values[graph.names[slot]] = given[graph.names[slot]].reshape(())
        try:
            results = self.program.run([values[graph.names[slot]] for slot in graph.inputs], self._target, observe)
            outputs = self._outputs(dict(zip(graph.outputs, results, strict=True)), given, cells)
            contents = self._contents(cells, given)
        except BaseException:
            for cell in cells.values():
                cell.restore()
            raise
        if state is not None:
            state._tensors.update(contents)
        return outputs

    def _contents(
        self, cells: Mapping[str, StateCell], given: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What the states hold after a run, each in memory of its own: the next run may write into it."""
        taken = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
        plan = self.program.plan(self._target)
        contents = {}
        for name, cell in cells.items():
            tensor = cell.tensor.contiguous()
            if tensor.untyped_storage().data_ptr() in taken or plan.keeps(tensor):
                tensor = tensor.clone()
            taken.add(tensor.untyped_storage().data_ptr())
            contents[name] = tensor
        return contents

    def _check_names(self, data: Mapping[str, Array | Image]) -> None:
        names = [spec.name for spec in self.inputs]
        optional = {spec.name for spec in self.inputs if isinstance(spec, TensorSpec) and spec.default is not None}
        missing = [name for name in names if name not in data and name not in optional]
        unknown = sorted(set(data) - set(names))
        if missing or unknown:
            found = [f"missing {missing}" if missing else "", f"unknown {unknown}" if unknown else ""]
            raise PredictionInputError(
                f"inputs {' and '.join(each for each in found if each)}",
                expected=f"exactly {names}" + (f", of which {sorted(optional)} are optional" if optional else ""),
            )

    def _cells(self, state: State | None) -> dict[str, StateCell]:
        """A cell for each state, on the state's present tensors."""
        if not self.states:
            if state is not None:
                raise PredictionInputError(f"a state for function {self.function_name!r}, which has none")
            return {}
        if state is None:
            raise PredictionInputError(
                f"no state for function {self.function_name!r}, which has {[spec.name for spec in self.states]}",
                expected="predict(data, state) with what make_state() made",
            )
        cells = {}
        for name, expected in self._empty_states().items():
            tensor = state._tensor(name)
            if (tensor.shape, tensor.dtype, tensor.device.type) != (
                expected.shape,
                expected.dtype,
                expected.device.type,
            ):
                raise PredictionInputError(
                    f"state {name!r} is {_describe_state(tensor)}",
                    expected=f"{_describe_state(expected)}, from make_state() of a model of this mode and device",
                )
            cells[name] = StateCell(tensor)
        return cells

    def _empty_states(self) -> dict[str, torch.Tensor]:
        """By name, tensors like the states as the mode and device hold them: all 0, and not yet in memory."""
        graph, target = self.program.graph, self._target
        types = {graph.names[slot]: graph.types[slot] for slot in graph.inputs}
        return {
            spec.name: torch.zeros(
                (), dtype=target.numerics.storage(types[spec.name].element), device=target.device
            ).expand(tuple(size or 0 for size in spec.shape))
            for spec in self.states
        }

    def _outputs(
        self, results: Mapping[int, Value], given: Mapping[str, torch.Tensor], cells: Mapping[str, StateCell]
    ) -> dict[str, Any]:
        graph = self.program.graph
        by_name = {graph.names[slot]: value for slot, value in results.items()}
        # What the caller gets must not change with the next prediction, nor change this model when written to.
        kept = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
        kept |= {cell.tensor.untyped_storage().data_ptr() for cell in cells.values()}
        outputs: dict[str, Any] = {}
        for spec in self.outputs:
            value = by_name[spec.name]
            if isinstance(spec, TensorSpec):
                tensor = as_tensor(value)
                outputs[spec.name] = self._array(spec, tensor, kept)
                kept.add(tensor.untyped_storage().data_ptr())  # another output may be a view of it
            elif isinstance(spec, ImageSpec):
                outputs[spec.name] = image_from_array(spec, as_tensor(value).cpu().numpy())
            else:
                outputs[spec.name] = dict(value) if isinstance(value, dict) else value
        return outputs

    def _array(self, spec: TensorSpec, value: torch.Tensor, kept: AbstractSet[int]) -> Array:
        """An output's array; a copy where its memory is among `kept` or the program's own."""
        is_shared = value.untyped_storage().data_ptr() in kept or self.program.plan(self._target).keeps(value)
        dtype = _returned_dtype(spec.dtype, self._target.numerics)
        return np.array(value.cpu().numpy(), dtype=dtype, order="C", copy=is_shared or None, ndmin=1)


def _returned_dtype(declared: str, numerics: Numerics) -> np.dtype[np.generic]:
    """numpy's type of an output: the declared one, but as wide as a mode computes."""
    dtype = np.dtype(declared)
    if dtype.kind != "f" or numerics is Numerics.DECLARED:
        return dtype
    return np.dtype(np.float64) if numerics is Numerics.ORACLE_FP64 else np.promote_types(dtype, np.float32)


def _check_digest(model: str | Path | CoreMLToolsModel, expected: str) -> None:
    if isinstance(model, CoreMLToolsModel):
        raise ValueError("`expected_digest` is of a package on disk, and this model is in memory")
    found = digest(Path(model)) if Path(model).exists() else "nothing"
    if found != expected:
        raise DigestError(f"{model}: found {found}", expected=f"{expected}, as it was recorded")


def _describe_state(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device.type}"


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))) or (
        name == "cuda" and not torch.cuda.is_available()
    ):
        raise MachineError(
            f"torch {torch.__version__} has no device {name!r} here",
            expected='"cpu", or "cuda" where torch.cuda.is_available()',
        )
    return torch.device(name)


def _input_tensor(spec: InputSpec, data: Mapping[str, Array | Image]) -> torch.Tensor:
    """The tensor of an input: from what is given for it, else its default."""
    if isinstance(spec, ImageSpec):
        return tensor_from_image(spec, data[spec.name])
    if spec.name in data:
        return _tensor_from_array(spec, data[spec.name])
    assert spec.default is not None, "the names are checked before"
    return torch.from_numpy(np.full(spec.default.shape, spec.default.value, dtype=np.dtype(spec.dtype)))


def _tensor_from_array(spec: TensorSpec, array: Array | Image) -> torch.Tensor:
    """An array as the tensor of an input.

    Raises:
        PredictionInputError: it is not an array of the input's kind and shapes, or a value does not fit.
    """
    if not isinstance(array, np.ndarray):
        raise PredictionInputError(
            f"input {spec.name!r} is a {type(array).__name__}", expected=f"a numpy array of {spec.dtype}"
        )
    dtype = np.dtype(spec.dtype)
    same_kind = (array.dtype.kind in "iu") if dtype.kind == "i" else (array.dtype.kind == "f")
    if not same_kind:
        raise PredictionInputError(f"input {spec.name!r} is of {array.dtype}", expected=spec.dtype)
    if not spec.admits(array.shape):
        raise PredictionInputError(
            f"input {spec.name!r} is of shape {list(array.shape)}", expected=spec.describe_shapes()
        )
    if dtype.kind == "i" and array.dtype != dtype and array.size:
        info = np.iinfo(dtype)
        for value in (array.min(), array.max()):
            if not info.min <= value <= info.max:
                raise PredictionInputError(
                    f"input {spec.name!r} holds {value}", expected=f"{info.min} to {info.max}, as {spec.dtype}"
                )
    with np.errstate(over="ignore"):  # A float beyond the type's range becomes an infinity, as IEEE rounds it.
        converted = np.ascontiguousarray(array, dtype=dtype)
    if not converted.flags.writeable:
        converted = converted.copy()  # torch warns of memory that it must not write, though nothing here does.
    return torch.from_numpy(converted).reshape(array.shape)
