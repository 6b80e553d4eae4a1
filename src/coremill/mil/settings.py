"""The caller's settings of torch that would change results, neutralised while `coremill.mil` computes.

A thread has its own default device, autocast, grad and inference mode, and denormal flushing. Threads that torch
started while denormals were flushed go on flushing them; torch has no function to reach them.
The precisions of products and the backends of attention belong to the process: all runs share one neutral setting,
and the last one to end restores the caller's. torch's default dtype also belongs to the process, and another thread
of the caller may need it at any time; it is never changed, and every kernel names its dtypes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class _Setting(NamedTuple):
    """A setting of the process."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    neutral: Any


class _Shared:
    """Settings that are neutral as long as a run needs them; runs in other threads may overlap."""

    def __init__(self, settings: Sequence[_Setting]) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._runs = 0
        self._callers: dict[int, Any] = {}
        """The caller's values that are not neutral, by position."""

    def __enter__(self) -> None:
        with self._lock:
            self._runs += 1
            for position, setting in enumerate(self._settings):
                value = setting.read()
                if value != setting.neutral:  # also if the caller has set it since another run started
                    self._callers[position] = value
                    setting.write(setting.neutral)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._runs -= 1
            if self._runs:
                return
            # The last to be changed is the first to be restored: some settings imply others.
            for position, value in reversed(self._callers.items()):
                setting = self._settings[position]
                if setting.read() == setting.neutral:  # else the caller has set it since
                    setting.write(value)
            self._callers.clear()


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller has set a precision of one backend, which is read below
        return "highest"


def _fp32_precision(holder: Any) -> _Setting:
    """Return the setting of one backend and operation, as torch has them from 2.9 on."""

    def write(value: str) -> None:
        holder.fp32_precision = "none"  # inherited
        if read() != value:
            holder.fp32_precision = value

    def read() -> str:
        # "none" is float32 throughout, as "ieee" is
        precision: str = holder.fp32_precision
        return "ieee" if precision == "none" else precision

    return _Setting(read, write, "ieee")


_PROCESS = _Shared(
    [
        _Setting(_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        *(
            _fp32_precision(holder)
            for name in ("matmul", "conv", "rnn")
            if (holder := getattr(torch.backends.mkldnn, name, None)) is not None
        ),
        _Setting(torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp, True),
    ]
)


def _allow_tf32_in_cudnn(allow: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allow


_PROCESS_ON_CUDA = _Shared([_Setting(lambda: torch.backends.cudnn.allow_tf32, _allow_tf32_in_cudnn, False)])


def neutral(device: torch.device) -> contextlib.ExitStack:
    """Return the context to load, compile and compute in on `device`, whatever the caller has set."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_PROCESS)
        if device.type != "cpu":
            stack.enter_context(device)
            stack.enter_context(_PROCESS_ON_CUDA)
        elif torch._C._len_torch_function_stack():
            # Kernels name no device, because torch's own default is the CPU. A context for it would cost time at
            # each operation; this one sets the caller's aside.
            stack.enter_context(torch._C.DisableTorchFunction())
        if _flushes_denormals():
            stack.callback(torch.set_flush_denormal, True)
            torch.set_flush_denormal(False)
        return stack.pop_all()


def _flushes_denormals() -> bool:
    """Return whether this thread rounds numbers below the normal range to 0; torch has no function for it."""
    return _HALF_OF_THE_LEAST() == 0.0


_HALF_OF_THE_LEAST = functools.partial(sys.float_info.min.__mul__, 0.5)
