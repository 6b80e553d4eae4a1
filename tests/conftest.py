"""Rules for all tests: only the markers of platforms skip a test, and the skipped ones are counted.

A test leaves torch's settings as they were: a later test would fail for them, far from the cause.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from coremill.infra.devices import cuda_device_count

# Fixtures that several packages share, with the package that each needs.
pytest_plugins = [
    plugin
    for plugin, package in {"tests.toy_dataset": "tokenizers", "tests.converted": "coremltools"}.items()
    if importlib.util.find_spec(package)
]

# No deadline: on a busy machine single examples are slow.
settings.register_profile("coremill", deadline=None, max_examples=60)
settings.load_profile("coremill")


def _ollama_serves() -> bool:
    """Return whether the command is installed and a server responds."""
    if shutil.which("ollama") is None:
        return False
    try:
        return subprocess.run(["ollama", "list"], capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


PLATFORMS = {
    "needs_macos": ("needs macOS", sys.platform == "darwin"),
    "needs_cuda": ("needs a CUDA device", cuda_device_count() > 0),
    "needs_ollama": ("needs an Ollama server", _ollama_serves()),
}
_NOT_RUN = pytest.StashKey[dict[str, int]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_NOT_RUN] = {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, (reason, present) in PLATFORMS.items():
        if item.get_closest_marker(marker) and not present:
            counts = item.config.stash[_NOT_RUN]
            counts[reason] = counts.get(reason, 0) + 1
            pytest.skip(f"not_run: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Any other skip is a failure: a missing dependency is an error of the environment."""
    report = yield
    if report.skipped and not any(item.get_closest_marker(marker) for marker in PLATFORMS):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped itself; only a platform marker may: {', '.join(PLATFORMS)}"
    return report


_TORCH_DEFAULTS = {
    "contexts of functions": 0,
    "has a default device": False,
    "dtype": "torch.float32",
    "gradients": True,
    "deterministic": False,
}


def _torch_settings() -> dict[str, object]:
    """Return torch's settings for new tensors; its defaults if nothing has imported it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return _TORCH_DEFAULTS
    found = (
        torch._C._len_torch_function_stack(),  # one of them is the default device's
        # torch.get_default_device() fails if it was set to None, as torch.set_default_device(None) does
        hasattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context"),
        str(torch.get_default_dtype()),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )
    return dict(zip(_TORCH_DEFAULTS, found, strict=True))


@pytest.fixture(autouse=True)
def _settings_of_torch_stay() -> Iterator[None]:
    before = _torch_settings()
    yield
    assert _torch_settings() == before, "the test changed torch's settings and left them so"


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    counts = config.stash[_NOT_RUN]
    reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    terminalreporter.write_line(f"not_run: {sum(counts.values())}" + (f" ({reasons})" if reasons else ""))
