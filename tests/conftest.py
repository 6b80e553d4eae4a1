"""Rules for all tests: only the markers of platforms skip a test, and the skipped ones are counted."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

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


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    counts = config.stash[_NOT_RUN]
    reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    terminalreporter.write_line(f"not_run: {sum(counts.values())}" + (f" ({reasons})" if reasons else ""))
