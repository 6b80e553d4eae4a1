"""The toolchain of this process, for manifests, contracts and diagnostics."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from coremill.core.contract import Toolchain

RECORDED_PACKAGES = ("coremltools", "numpy", "tokenizers", "torch")
"""The packages that affect a graph or its outputs."""


def current_toolchain(*also: str) -> Toolchain:
    """Return the versions of the interpreter, the platform and the installed packages, without importing them.

    Args:
        also: packages to record as well as RECORDED_PACKAGES.
    """
    installed = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    return Toolchain(
        # Not `platform.python_version()`: that of a development build ends in '+', which is not valid in PEP 440.
        python="{}.{}.{}".format(*sys.version_info[:3]),
        platform=platform.platform(),
        packages={name: installed[name] for name in sorted({*RECORDED_PACKAGES, *also}) if name in installed},
    )
