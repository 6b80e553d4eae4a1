"""A checkout with the repository's locks, and environments as nox creates them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from coremill.cli.examination import GB, Machine
from coremill.pipeline.environments import BUILD_ENVIRONMENTS, Environment, write_stamp

ROOT = Path(__file__).parents[2]

REAL = Path(sys.executable).resolve()


class Checkout:
    """A directory with the repository's locks, in which tests create environments."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "requirements").mkdir(parents=True)
        (root / "noxfile.py").touch()
        for environment in BUILD_ENVIRONMENTS:
            shutil.copy(environment.lock(ROOT), environment.lock(root))

    def install(self, environment: Environment, python: str, **packages: str) -> Path:
        """Create the files of an environment that coremill reads: stamp, pyvenv.cfg, metadata."""
        folder = self.root / ".nox" / environment.name
        minor = ".".join(python.split(".")[:2])
        site = folder / "lib" / f"python{minor}" / "site-packages"
        site.mkdir(parents=True)
        (folder / "bin").mkdir()
        (folder / "bin" / "python").symlink_to(REAL)
        (folder / "pyvenv.cfg").write_text(f"home = /usr/bin\nimplementation = CPython\nversion_info = {python}\n")
        for name, version in packages.items():
            info = site / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
        write_stamp(self.root, environment, folder)
        return folder

    def interpreter(self, version: str) -> Path:
        """Create a pyenv whose Python reports `version`."""
        minor = ".".join(version.split(".")[:2])
        path = self.root / ".pyenv" / "versions" / version / "bin" / f"python{minor}"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho Python {version}\n")
        path.chmod(0o755)
        return path

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables of a machine with no interpreters except those of `interpreter`."""
        return {"HOME": str(self.root), "HOMEBREW_PREFIX": str(self.root / "brew"), "PATH": ""}


@pytest.fixture
def linux() -> Machine:
    """A machine that has all that a build needs."""
    return Machine(
        system="Linux",
        architecture="x86_64",
        cores=2,
        memory_bytes=25 * GB,
        free_bytes=60 * GB,
        cuda_devices=0,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")
