"""The accelerators of this machine, without importing torch."""

from __future__ import annotations

import ctypes

CUDA_DRIVER = "libcuda.so.1"
"""The library that NVIDIA's driver installs on Linux; CUDA is not available on macOS."""


def cuda_device_count(driver: str = CUDA_DRIVER) -> int:
    """Return the number of CUDA devices that this process can use; 0 without a driver or a device.

    Queries the driver as torch does, so `CUDA_VISIBLE_DEVICES` is respected:
    https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__DEVICE.html

    Args:
        driver: file name or path of the driver's library.
    """
    try:
        library = ctypes.CDLL(driver)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    # Both functions return 0 on success. cuInit fails when the driver is installed and there is no device.
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
