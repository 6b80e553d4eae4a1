"""Fixtures that build programs with coremltools' builder, run them, and infer their values with coremltools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813 - as every example of coremltools spells it
from coremltools.converters.mil.mil import get_new_symbol, types

from coremill.mil import MLModel

# These models are too small to gain from a second thread, and two threads on busy cores wait for each other.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # ct.convert relies on garbage collection to remove the temporary directory of the weights.
    config.addinivalue_line("filterwarnings", "ignore:Implicitly cleaning up <Temp:ResourceWarning")


_MIL_TYPES = {
    np.dtype(np.float16): types.fp16,
    np.dtype(np.float32): types.fp32,
    np.dtype(np.int32): types.int32,
}
_TARGETS = {
    15: ct.target.iOS15,
    16: ct.target.iOS16,
    17: ct.target.iOS17,
    18: ct.target.iOS18,
}


def _range(size: Any) -> Any:
    return ct.RangeDim(*size) if isinstance(size, tuple) else size


def _symbol(size: Any) -> Any:
    return get_new_symbol() if isinstance(size, tuple) else size


def package_of(program: Any, ios: int, inputs: list[Any] | None) -> Any:
    """Return a coremltools model of a built program; no pass of the converter changes the program."""
    return ct.convert(
        program,
        inputs=inputs,
        convert_to="mlprogram",
        minimum_deployment_target=_TARGETS[ios],
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """`build({"x": array}, lambda x: mb.relu(x=x), ios=18)` returns a coremltools model with such inputs.

    Instead of an array, `(shape, dtype)` is accepted; a size in the shape may be a range, `(minimum, maximum)`.
    """

    def build_model(inputs: Mapping[str, Any], body: Callable[..., Any], *, ios: int = 18) -> Any:
        specs = []
        for each in inputs.values():
            shape, dtype = (each.shape, each.dtype) if isinstance(each, np.ndarray) else each
            specs.append(mb.TensorSpec(tuple(map(_symbol, shape)), dtype=_MIL_TYPES[np.dtype(dtype)]))
        flexible = [
            ct.TensorType(name, ct.Shape(tuple(map(_range, each[0]))))
            for name, each in inputs.items()
            if not isinstance(each, np.ndarray)
        ]
        function = eval(f"lambda {', '.join(inputs)}: body({', '.join(inputs)})", {"body": body})
        program = mb.program(input_specs=specs, opset_version=_TARGETS[ios])(function)
        return package_of(program, ios, flexible or None)

    return build_model


@pytest.fixture(scope="session")
def evaluate(build: Callable[..., Any]) -> Callable[..., list[np.ndarray[Any, Any]]]:
    """`evaluate({"x": array}, lambda x: mb.relu(x=x))` returns the evaluator's outputs of the function."""

    def run(
        inputs: Mapping[str, np.ndarray[Any, Any]],
        body: Callable[..., Any],
        *,
        ios: int = 18,
        mode: str = "declared",
    ) -> list[np.ndarray[Any, Any]]:
        model = MLModel(build(inputs, body, ios=ios), mode=mode)
        return list(model.predict(dict(inputs)).values())

    return run


@pytest.fixture(scope="session")
def inferred() -> Callable[..., list[Any] | None]:
    """`inferred(inputs, body)` returns the values that coremltools infers for constant inputs, or None."""

    def infer(inputs: Mapping[str, Any], body: Callable[..., Any], *, ios: int = 18) -> list[Any] | None:
        values: list[Any] = []

        def function(unused: Any) -> Any:
            result = body(*(mb.const(val=value) for value in inputs.values()))
            for each in result if isinstance(result, (list, tuple)) else [result]:
                values.append(each.val)
            return mb.identity(x=unused)

        specs = [mb.TensorSpec((1,), dtype=types.fp32)]
        mb.program(input_specs=specs, opset_version=_TARGETS[ios])(function)
        return None if any(value is None for value in values) else values

    return infer
