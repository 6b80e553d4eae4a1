"""CUDA devices: the real driver if it is installed, and each result that a driver can return."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys

import pytest

from coremill.infra.devices import cuda_device_count

COUNT = "from coremill.infra.devices import cuda_device_count; print(cuda_device_count())"


def count_in_new_process(**environ: str) -> int:
    """Count the devices in another process, because the driver reads its environment only once."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env={**os.environ, **environ}, capture_output=True, check=True
    )
    return int(done.stdout)


def test_device_count_equals_that_of_nvidia_smi():
    expected = 0
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
        expected = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    assert count_in_new_process() == (expected if visible is None else min(expected, len(visible.split(","))))


@pytest.mark.needs_cuda
def test_hidden_devices_are_not_counted():
    assert count_in_new_process() >= 1
    assert count_in_new_process(CUDA_VISIBLE_DEVICES="") == 0


def test_machine_without_a_driver_has_no_device(tmp_path):
    assert cuda_device_count("libcuda-that-is-not-installed.so.1") == 0
    unreadable = tmp_path / "libcuda.so.1"
    unreadable.write_text("not a library")
    assert cuda_device_count(str(unreadable)) == 0


class Driver:
    """A driver with the given results of cuInit and cuDeviceGetCount, and the given count."""

    def __init__(self, init: int, status: int, count: int) -> None:
        self.cuInit = lambda flags: init
        self.status, self.count = status, count

    def cuDeviceGetCount(self, pointer) -> int:  # noqa: N802 - the driver's name
        pointer._obj.value = self.count
        return self.status


@pytest.mark.parametrize(
    ("driver", "count"),
    [(Driver(0, 0, 2), 2), (Driver(0, 0, 0), 0), (Driver(100, 0, 2), 0), (Driver(0, 3, 2), 0)],
    ids=["two devices", "no device", "CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_NOT_INITIALIZED"],
)
def test_driver_results(driver, count, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert cuda_device_count() == count
