"""`MLModel`: predicts with a Core ML package, as coremltools' class of that name does on macOS."""

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
from coremill.mil.plan import Observer, Plan, Target
from coremill.mil.program import Program
from coremill.mil.values import Numerics, StateCell, Value, as_tensor


class State:
    """The tensors that a stateful model keeps between predictions; made by :meth:`MLModel.make_state`.

    One state serves every function that has states of the same names, types and shapes.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def read(self, name: str) -> Array:
        """Return a copy of a state's content.

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
        function_name: a function of the package; default: the package's default function, or `main`.
        mode: "declared" rounds every value to its declared type and accumulates in fp32; "oracle" stores,
            computes and returns fp16 values in fp32; "oracle-fp64" computes every float in fp64.
        device: "cpu", or "cuda" if torch has such a device.
        expected_digest: digest of the package, as `coremill.core.digest.digest` returns it and a manifest records
            it. Without it a flipped bit in a weight is not detected: the format has no checksums.

    Raises:
        DigestError: the package's digest is not `expected_digest`.
        PackageError: the package is malformed, is not an ML Program, or lacks the function.
        UnsupportedOperationError: the function contains an unsupported operation.
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
        # Compiled now, so that an invalid constant is reported at opening.
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

    @property
    def plan(self) -> Plan:
        """The function, compiled for this model's mode and device."""
        return self.program.plan(self._target)

    def supported_shapes(self, name: str) -> list[tuple[int, ...]] | None:
        """Return the shapes that an input may have, the default first; None if its shapes are ranges.

        The shapes of an image are (1, channels, height, width).

        Raises:
            PredictionInputError: there is no input of that name.
        """
        for spec in self.inputs:
            if spec.name == name:
                return (spec.tensor if isinstance(spec, ImageSpec) else spec).supported_shapes
        raise PredictionInputError(f"no input {name!r}", expected=f"one of {[each.name for each in self.inputs]}")

    def make_state(self) -> State:
        """Return a new state with every element 0."""
        return State({name: tensor.contiguous() for name, tensor in self._empty_states().items()})

    def predict(
        self, data: Mapping[str, Array | Image], state: State | None = None, *, observe: Observer | None = None
    ) -> dict[str, Any]:
        """Run the function.

        Args:
            data: an array for each input. An int32 input accepts an integer array of any type if every value fits.
                A float input accepts a floating-point array of any type, rounded as IEEE specifies (to an infinity
                beyond the type's range). Nothing else is converted.
                An image input takes a PIL image of mode RGB (color spaces RGB and BGR), L (GRAYSCALE) or F
                (GRAYSCALE_FLOAT16). An optional input may be missing; its default is used.
            state: the result of :meth:`make_state`, for a function with states. It is unchanged if this method
                raises.
            observe: called after each operation; see `coremill.mil.plan.Observer`.

        Returns:
            An array for each output, of its declared type (in oracle mode float32 for float16) and the shape that
            the program computes. NaN and infinities are kept. A scalar is an array of shape (1,), as in Core ML. An
            image output is a PIL image: of mode RGBA (opaque) for color spaces RGB and BGR, L for GRAYSCALE, F for
            GRAYSCALE_FLOAT16; see `coremill.mil.images.image_from_array` for its rounding. A classifier returns
            the predicted label, a str or int, and a dictionary of the probabilities by label.

        Raises:
            PredictionInputError: a missing or unknown input, a type or shape that the package does not allow, or
                values that an operation rejects (for example, an id outside an embedding).
            PackageError: an operation fails on shapes that the package allows.
            MachineError: an output is an image, and Pillow is not installed.
        """
        with np.errstate(all="ignore"):  # NaN, infinities and rounding are values here, whatever the caller has set
            return self._predict(data, state, observe)

    def _predict(
        self, data: Mapping[str, Array | Image], state: State | None, observe: Observer | None
    ) -> dict[str, Any]:
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
            with torch.inference_mode():  # where the run has made the tensors that it wrote into
                for cell in cells.values():
                    cell.restore()
            raise
        if state is not None:
            state._tensors.update(contents)
        return outputs

    def _contents(
        self, cells: Mapping[str, StateCell], given: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the states' content after a run, each in its own memory: the next run may write into it."""
        taken = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
        plan = self.plan
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
        """Return a cell with the current tensor of each state."""
        if not self.states:
            if state is not None:
                raise PredictionInputError(f"a state for function {self.function_name!r}, which has none")
            return {}
        if state is None:
            raise PredictionInputError(
                f"no state for function {self.function_name!r}, which has {[spec.name for spec in self.states]}",
                expected="predict(data, state) with the result of make_state()",
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
        """Return zero tensors with the states' types, shapes and device, by name; they take no memory yet."""
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
        # Outputs must not change with the next prediction, and writing to them must not change the model.
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
        """Return an output's array; a copy if its memory is in `kept` or belongs to the program."""
        is_shared = value.untyped_storage().data_ptr() in kept or self.plan.keeps(value)
        dtype = _returned_dtype(spec.dtype, self._target.numerics)
        return np.array(value.cpu().numpy(), dtype=dtype, order="C", copy=is_shared or None, ndmin=1)


def _returned_dtype(declared: str, numerics: Numerics) -> np.dtype[np.generic]:
    """Return the numpy type of an output: the declared type, or the wider one that the mode computes in."""
    dtype = np.dtype(declared)
    if dtype.kind != "f" or numerics is Numerics.DECLARED:
        return dtype
    return np.dtype(np.float64) if numerics is Numerics.ORACLE_FP64 else np.promote_types(dtype, np.float32)


def _check_digest(model: str | Path | CoreMLToolsModel, expected: str) -> None:
    if isinstance(model, CoreMLToolsModel):
        raise ValueError("`expected_digest` needs a package on disk; this model is in memory")
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
    """Return the tensor of an input, or of its default."""
    if isinstance(spec, ImageSpec):
        return tensor_from_image(spec, data[spec.name])
    if spec.name in data:
        return _tensor_from_array(spec, data[spec.name])
    assert spec.default is not None, "the names are checked before"
    return torch.from_numpy(np.full(spec.default.shape, spec.default.value, dtype=np.dtype(spec.dtype)))


def _tensor_from_array(spec: TensorSpec, array: Array | Image) -> torch.Tensor:
    """Convert an array to the tensor of an input.

    Raises:
        PredictionInputError: it is not an array of the input's kind and shape, or a value is out of range.
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
    # A float beyond the type's range becomes an infinity, as IEEE specifies.
    converted = np.ascontiguousarray(array, dtype=dtype)
    if not converted.flags.writeable:
        converted = converted.copy()  # torch warns about read-only memory
    return torch.from_numpy(converted).reshape(array.shape)
