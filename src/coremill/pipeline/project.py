"""The project's root, and the options of all build commands that choose a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from coremill.core.config import RunConfig, read_config
from coremill.core.errors import MachineError, OutputError
from coremill.core.layout import RunLayout

DEFAULT_CONFIG = Path("configs/magic-8-ball.toml")
DEFAULT_BUILD = Path("build")


def project_root() -> Path:
    """Return the checkout of the working directory: the nearest directory with a noxfile and requirements.

    Raises:
        MachineError: there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "noxfile.py").is_file() and (folder / "requirements").is_dir():
            return folder
    raise MachineError(
        f"{here} is not in a coremill checkout",
        expected="a directory with noxfile.py and requirements/",
        run="cd …",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and `--build-dir`."""
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, help="the run's configuration (default: %(default)s)"
    )
    parser.add_argument(
        "--build-dir", type=Path, default=DEFAULT_BUILD, help="where runs are built (default: %(default)s)"
    )


def chosen_run(options: argparse.Namespace) -> tuple[RunConfig, RunLayout]:
    """Return the configuration and the layout that the options of :func:`add_run_options` choose.

    Raises:
        ConfigError: the configuration is invalid.
        OutputError: the build directory is a file.
    """
    config = read_config(options.config)
    if options.build_dir.exists() and not options.build_dir.is_dir():
        raise OutputError(
            f"--build-dir {options.build_dir} is a file",
            expected="a directory, or a new path",
            run=f"ls -ld {options.build_dir}",
        )
    return config, RunLayout(build=options.build_dir.resolve(), run=config.name)
