"""Fixtures that build programs with coremltools' builder, run them, and infer their values with coremltools."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
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


def reset_default_device() -> None:
    """Undo `torch.set_default_device`. After its own None, `torch.get_default_device` of torch 2.9 fails."""
    torch.set_default_device(None)
    del torch._GLOBAL_DEVICE_CONTEXT.device_context


@contextlib.contextmanager
def hostile_settings() -> Iterator[None]:
    """Set everything that a caller can set, and that would change values or fail; `evaluate` must not notice."""
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float16)
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("medium")
        stack.callback(torch.use_deterministic_algorithms, False)
        torch.use_deterministic_algorithms(True)
        stack.callback(torch.set_flush_denormal, False)
        torch.set_flush_denormal(True)
        stack.callback(torch.backends.cuda.enable_math_sdp, True)
        torch.backends.cuda.enable_math_sdp(False)
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        stack.callback(reset_default_device)
        torch.set_default_device("meta")
        stack.enter_context(np.errstate(all="raise"))
        yield


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
        package = build(inputs, body, ios=ios)
        generator = torch.get_rng_state()
        plain = list(MLModel(package, mode=mode).predict(dict(inputs)).values())
        torch.set_rng_state(generator)
        with hostile_settings():
            found = list(MLModel(package, mode=mode).predict(dict(inputs)).values())
        for own, other in zip(found, plain, strict=True):
            assert own.dtype == other.dtype
            np.testing.assert_array_equal(own, other)
        return plain

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
