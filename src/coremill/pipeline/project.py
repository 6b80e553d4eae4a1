"""What the commands of the build share: the project's root, and the options that choose a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from coremill.core.config import RunConfig, read_config
from coremill.core.errors import MachineError, OutputError
from coremill.core.layout import RunLayout

DEFAULT_CONFIG = Path("configs/magic-8-ball.toml")
DEFAULT_BUILD = Path("build")


def project_root() -> Path:
    """The checkout that the working directory lies in: the nearest folder with a noxfile and requirements."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "noxfile.py").is_file() and (folder / "requirements").is_dir():
            return folder
    raise MachineError(
        f"{here} is not in a coremill checkout", expected="a folder with noxfile.py and requirements/", run="cd …"
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """`--config` and `--build-dir`, which say the same for every command of the build."""
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, help="the run's configuration (default: %(default)s)"
    )
    parser.add_argument(
        "--build-dir", type=Path, default=DEFAULT_BUILD, help="where runs are built (default: %(default)s)"
    )


def chosen_run(options: argparse.Namespace) -> tuple[RunConfig, RunLayout]:
    """The configuration and the layout that the options of :func:`add_run_options` name."""
    config = read_config(options.config)
    if options.build_dir.exists() and not options.build_dir.is_dir():
        raise OutputError(
            f"--build-dir {options.build_dir} is a file", expected="a folder, or nothing", run="ls -ld build"
        )
    return config, RunLayout(build=options.build_dir.resolve(), run=config.name)
