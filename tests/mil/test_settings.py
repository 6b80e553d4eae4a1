"""The caller's settings of torch and numpy: no package notices them, and all are as before afterwards."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from tests.mil.conftest import reset_default_device

from coremill.core.errors import PredictionInputError
from coremill.measures import max_abs_err
from coremill.mil import MLModel
from coremill.mil.commands.selftest import BUNDLE, read_bundle
from coremill.mil.ops.registry import find
from coremill.mil.settings import neutral

CPU = torch.device("cpu")


def _flushes() -> bool:
    return sys.float_info.min * float("0.5") == 0.0


def _set_default_device(device: torch.device) -> None:
    if device == CPU:
        reset_default_device()
    else:
        torch.set_default_device(device)


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], None], Any]] = {
    "default device": (torch.get_default_device, _set_default_device, torch.device("meta")),
    "default dtype float16": (torch.get_default_dtype, torch.set_default_dtype, torch.float16),
    "default dtype float64": (torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "grad": (torch.is_grad_enabled, torch.set_grad_enabled, False),
    "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "denormals": (_flushes, torch.set_flush_denormal, True),
    "medium": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "high": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "autocast": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda value: torch.set_autocast_enabled("cpu", value),
        True,
    ),
    "mathematical attention": (
        torch.backends.cuda.math_sdp_enabled,
        torch.backends.cuda.enable_math_sdp,
        False,
    ),
    "oneDNN": (
        lambda: torch.backends.mkldnn.enabled,
        lambda value: setattr(torch.backends.mkldnn, "enabled", value),
        False,
    ),
    "numpy's errors": (lambda: np.geterr()["under"], lambda value: np.seterr(all=value), "raise"),
}
"""How each is read and set, and a value that differs from the default."""

CONTEXTS = {
    "device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def _outputs(cases: Any) -> list[dict[str, Any]]:
    """Load and run every package, states across its calls."""
    found = []
    for case in cases:
        model = MLModel(case.package)
        state = model.make_state() if model.states else None
        found += [model.predict(call.inputs, state) for call in case.calls]
        if state is not None:
            found.append({spec.name: state.read(spec.name) for spec in model.states})
    return found


@pytest.fixture(scope="module")
def cases() -> Any:
    return read_bundle(BUNDLE)


@pytest.fixture(scope="module")
def expected(cases: Any) -> list[dict[str, Any]]:
    return _outputs(cases)


def _assert_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]], *, exactly: bool = True) -> None:
    for own, other in zip(found, expected, strict=True):
        assert own.keys() == other.keys()
        for name, array in own.items():
            assert array.dtype == other[name].dtype
            assert max_abs_err(array, other[name]) <= (0 if exactly else 1e-6 * np.abs(other[name]).max()), name


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_changes_nothing_and_stays(cases, expected, name):
    read, write, value = SETTINGS[name]
    before = read()
    assert before != value
    try:
        write(value)
        found = _outputs(cases)
        assert read() == value
    finally:
        write(before)
    # oneDNN sums in another order than the library that replaces it
    _assert_equal(found, expected, exactly=name != "oneDNN")


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_changes_nothing(cases, expected, name):
    with CONTEXTS[name]():
        found = _outputs(cases)
    _assert_equal(found, expected)


def test_a_failed_run_restores_the_settings(build):
    table = np.arange(8, dtype=np.float32).reshape(4, 2)
    model = MLModel(build({"i": np.zeros(2, np.int32)}, lambda i: mb.gather(x=table, indices=i, axis=0, name="y")))
    torch.set_float32_matmul_precision("medium")
    torch.set_flush_denormal(True)
    try:
        with torch.device("meta"), pytest.raises(PredictionInputError):
            model.predict({"i": np.array([0, 9], np.int32)})
        assert torch.get_float32_matmul_precision() == "medium"
        assert _flushes()
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_flush_denormal(False)


def test_precision_of_one_backend_is_neutral_and_restored():
    """torch 2.9 has a setting for each backend and operation; then the common one cannot be read."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return
    product, convolution = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    before = product.fp32_precision
    product.fp32_precision = "bf16"
    try:
        with neutral(CPU):
            assert (product.fp32_precision, convolution.fp32_precision) == ("none", "none")
        assert product.fp32_precision == "bf16"
    finally:
        product.fp32_precision = before
    torch.backends.fp32_precision = "bf16"  # of all of them
    try:
        with neutral(CPU):
            assert (product.fp32_precision, convolution.fp32_precision) == ("ieee", "ieee")
        assert convolution.fp32_precision == "bf16"
        torch.backends.fp32_precision = "none"
        assert convolution.fp32_precision == "none"  # still inherited
    finally:
        torch.backends.fp32_precision = "none"


def test_numbers_below_the_normal_range_are_kept(build):
    x = np.array([1e-38, 2e-38], np.float32)
    model = MLModel(build({"x": x}, lambda x: mb.mul(x=x, y=np.float32(0.125), name="y")))
    torch.set_flush_denormal(True)
    try:
        found = model.predict({"x": x})["y"]
        assert _flushes()
    finally:
        torch.set_flush_denormal(False)
    assert found.tolist() == (x * np.float32(0.125)).tolist()
    assert found.all()


# --- threads ----------------------------------------------------------------------------------------------------


def test_overlapping_runs_share_the_neutral_precision():
    """The first to end does not give the second the caller's precision, and the last one restores it.

    They are in two threads: the mode of inference, which belongs to a thread, must end in the order of its starts.
    """
    torch.set_float32_matmul_precision("medium")
    second = contextlib.ExitStack()
    try:
        with ThreadPoolExecutor(1) as other:
            with neutral(CPU):
                other.submit(lambda: second.enter_context(neutral(CPU))).result()
            assert torch.get_float32_matmul_precision() == "highest"
            other.submit(second.close).result()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_precision_that_the_caller_sets_during_a_run_stays():
    try:
        with neutral(CPU):
            torch.set_float32_matmul_precision("medium")
            with neutral(CPU):
                assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
        with neutral(CPU):
            torch.set_float32_matmul_precision("high")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_threads_never_run_in_the_callers_precision(build):
    """Every operation of every run sees the neutral precision, and the caller's is back after each round."""
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    package = build({"x": x}, lambda x: mb.softmax(x=mb.matmul(x=x, y=x), axis=-1, name="y"))
    models = [MLModel(package) for _ in range(4)]
    expected = models[0].predict({"x": x})["y"]
    seen: set[str] = set()

    def run(model: MLModel, barrier: threading.Barrier) -> None:
        barrier.wait()
        for _ in range(50):
            found = model.predict({"x": x}, observe=lambda *_: seen.add(torch.get_float32_matmul_precision()))
            np.testing.assert_array_equal(found["y"], expected)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    torch.set_float32_matmul_precision("medium")
    try:
        with ThreadPoolExecutor(len(models)) as pool:
            for _ in range(5):
                barrier = threading.Barrier(len(models))
                for each in [pool.submit(run, model, barrier) for model in models]:
                    each.result()
                assert torch.get_float32_matmul_precision() == "medium"
    finally:
        sys.setswitchinterval(before)
        torch.set_float32_matmul_precision("highest")
    assert seen == {"highest"}


# --- kernels without a tensor to take the dtype from --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_kernels_name_their_dtypes(dtype):
    torch.set_default_dtype(dtype)
    try:
        assert find("fill", 18).kernel(shape=(2,)).dtype is torch.float32
        drawn = find("random_uniform", 18).kernel(shape=(1000,), seed=1)
        assert drawn.dtype is torch.float32
        assert 0.4 < float(drawn.mean()) < 0.6
        assert find("random_normal", 18).kernel(shape=(9,), seed=1).dtype is torch.float32
        assert find("exp2", 18).kernel(torch.tensor([20], dtype=torch.int32)).tolist() == [1 << 20]
    finally:
        torch.set_default_dtype(torch.float32)
