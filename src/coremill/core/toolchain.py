"""What this process runs with, for manifests, contracts and diagnostics."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from coremill.core.contract import Toolchain

RECORDED_PACKAGES = ("coremltools", "numpy", "tokenizers", "torch")
"""The packages that bear on a graph or on its numbers."""


def current_toolchain(*also: str) -> Toolchain:
    """The interpreter, the platform and the installed packages that bear on the result; nothing is imported.

    Args:
        also: packages that bear on this result alone.
    """
    installed = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    return Toolchain(
        # Not `platform.python_version()`: a development build ends in '+', which is no version to compare.
        python="{}.{}.{}".format(*sys.version_info[:3]),
        platform=platform.platform(),
        packages={name: installed[name] for name in sorted({*RECORDED_PACKAGES, *also}) if name in installed},
    )
