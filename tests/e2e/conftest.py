"""Whole builds through nox, each stage in its own interpreter, in a temporary build directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def nox_build() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `nox -s SESSION -- --build-dir BUILD_DIR ARGUMENTS` in the checkout `root`; its output is in `stdout`."""

    def run(session: str, build_dir: Path, *arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nox", "-f", str(root / "noxfile.py"), "-s", session]
        command += ["--", "--build-dir", str(build_dir), *arguments]
        environ = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120"}
        ended = subprocess.run(
            command,
            cwd=root,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        sys.stdout.write(ended.stdout)
        return ended

    return run


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    """A configuration with little data and training: the build takes seconds, and the answers are nonsense."""
    text = (ROOT / "configs" / "magic-8-ball.toml").read_text()
    for key, value in [
        ("name", '"tiny"'),
        ("n", "256"),
        ("heldout_n", "64"),
        ("epochs", "1"),
        ("warmup_steps", "4"),
        ("n_layers", "1"),
    ]:
        text, found = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert found == 1, key
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(text + "\n[verify]\nheldout_answers = 4\nsampled_answers = 4\nmin_distinct_sampled = 1\n")
    return path
