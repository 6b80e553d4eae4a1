"""Sessions, and the Python that each runs in. The work itself is library code in src/coremill.

Tags: `environment` (make or update one environment), `build` (a stage), `check` (tests, style, types),
`upkeep` (locks, schemas, measurements).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nox
import uv

from coremill.core.config import read_config
from coremill.core.errors import CoremillError
from coremill.infra.interpreters import interpreter_directories
from coremill.pipeline.build import Build, Task, tasks_for
from coremill.pipeline.environments import (
    CONVERT,
    CONVERT_PYTHON,
    ENVIRONMENTS,
    LANES,
    LINT,
    PRIMARY_LANE,
    STAMP,
    TRAIN,
    TRAIN_PYTHON,
    Environment,
    installed,
    is_current,
    write_stamp,
)
from coremill.pipeline.project import add_run_options, chosen_run
from coremill.pipeline.stages import EVERY_STAGE, Stage, find_stage, table_of

nox.needs_version = ">=2026.10.20"
nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
# Otherwise a missing interpreter skips its session with exit code 0, and the sessions that require it still run.
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["pipeline"]
# Otherwise a reused environment ignores a changed Python version.
os.environ["NOX_ENABLE_STALENESS_CHECK"] = "1"

ROOT = Path(__file__).parent
UV = uv.find_uv_bin()

# The real interpreters come before pyenv's shims, which may exist but fail.
os.environ["PATH"] = os.pathsep.join(
    [*map(str, interpreter_directories([TRAIN_PYTHON, CONVERT_PYTHON])), os.environ["PATH"]]
)
# Imports take most of the time of a short stage, and bytecode halves it.
SESSION_ENV = {"PYTHONDONTWRITEBYTECODE": None, "PYTHONPATH": None}
# By default, threads of torch spin while they wait, and so compete for the cores: on a busy machine, a
# verification took 774 s of CPU time instead of 282 s.
STAGE_ENV = {"OMP_WAIT_POLICY": "PASSIVE"}

# No abbreviations, because this also sees the arguments of pytest and of benchmarks.
parser = argparse.ArgumentParser(prog="nox -s pipeline --", allow_abbrev=False)
add_run_options(parser)
parser.add_argument("--torch", choices=LANES, default=PRIMARY_LANE, help="the lane to build (default: %(default)s)")
parser.add_argument(
    "--force", nargs="?", const="all", choices=["all", *(stage.name for stage in EVERY_STAGE)],
    help="run every stage, or the named one, even if it is fresh",
)  # fmt: skip
parser.add_argument("--dry-run", action="store_true", help="report what would run, and why, without running it")
parser.add_argument(
    "--fallback",
    action="store_true",
    help="if the lane's conversion fails, build the other lane instead, and report it",
)
# The run and the lane must be known before the sessions are defined. The arguments may be those of any session, so
# unknown ones are ignored here; each build session then parses its own strictly.
POSARGS = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
CHOSEN = parser.parse_known_args([] if {"-h", "--help"} & set(POSARGS) else POSARGS)[0]
LANE: str = CHOSEN.torch
OTHER_LANE = next(lane for lane in LANES if lane != LANE)


def chosen_stages() -> tuple[Stage, ...]:
    """The stages of the chosen run, or all stages if its configuration cannot be read: each then reports that."""
    try:
        return table_of(read_config(CHOSEN.config))
    except CoremillError:
        return EVERY_STAGE


STAGES = chosen_stages()


# --- environments -----------------------------------------------------------------------------------


def fill(session: nox.Session, environment: Environment) -> None:
    """Install the environment's lock and coremill itself, unless its stamp shows that both are up to date."""
    folder = Path(session.virtualenv.location)
    if is_current(ROOT, environment, folder):
        return
    if CHOSEN.dry_run:
        session.log(f"would install requirements/{environment.name}.txt")
        return
    (folder / STAMP).unlink(missing_ok=True)
    pip = (UV, "pip")
    quiet = ("--quiet", "--python", str(folder))
    lock = str(environment.lock(ROOT).relative_to(ROOT))
    session.run(*pip, "sync", *quiet, "--require-hashes", lock, external=True)
    session.run(*pip, "install", *quiet, "--no-deps", "--no-build-isolation", "--editable", ".", external=True)
    write_stamp(ROOT, environment, folder)


def register_environment(environment: Environment) -> None:
    @nox.session(
        name=environment.session,
        python=environment.python,
        tags=["environment"],
        default=False,
        allow_parallel=True,
    )
    def env(session: nox.Session) -> None:
        fill(session, environment)

    env.__doc__ = f"Python {environment.python} with requirements/{environment.name}.txt."


for _environment in ENVIRONMENTS:
    register_environment(_environment)


# --- the build --------------------------------------------------------------------------------------


def build_options(session: nox.Session) -> argparse.Namespace:
    """Parse the arguments after `--` strictly."""
    try:
        options = parser.parse_args(session.posargs)
    except SystemExit as stop:
        if stop.code:
            session.error("invalid arguments after `--`")
        session.skip("printed the help")
    forceable = ["all", *(stage.name for stage in STAGES)]
    if options.force is not None and options.force not in forceable:
        session.error(
            f"--force {options.force}: {options.config} has no such stage; expected one of {', '.join(forceable)}"
        )
    return options


def show(task: Task, line: str) -> None:
    sys.stdout.write(f"{task!s:<13} | {line}\n")
    sys.stdout.flush()


@contextmanager
def started_build(session: nox.Session) -> Iterator[tuple[Build, argparse.Namespace]]:
    """Yield the build of the chosen run; an error ends the session."""
    options = build_options(session)
    try:
        config, layout = chosen_run(options)
        env = {**SESSION_ENV, **STAGE_ENV}
        with Build(
            ROOT, options.config, config, layout, env=env, force=options.force, show=show, dry_run=options.dry_run
        ) as build:
            yield build, options
    except CoremillError as error:
        session.error(str(error))


def register_stage(stage: Stage, lane: str) -> None:
    @nox.session(
        name=f"{stage.name}(torch='{lane}')" if stage.per_lane else stage.name,
        venv_backend="none",
        requires=environment_sessions(tasks_for([stage.name], STAGES, [lane])),
        tags=["build"],
        default=False,
    )
    def one_stage(session: nox.Session) -> None:
        with started_build(session) as (build, _):
            find_stage(stage.name, build.stages)  # it may be switched off
            build.run(tasks_for([stage.name], build.stages, [lane]))
        if build.failed:
            session.error(f"failed: {', '.join(map(str, build.failed))}")

    environment = stage.environment(lane if stage.per_lane else None)
    one_stage.__doc__ = (
        f"{stage.purpose} (Python {environment.python}{f', torch {lane}' if stage.per_lane else ''})."
    )


def environment_sessions(tasks: Sequence[Task]) -> list[str]:
    return list(dict.fromkeys(task.environment.session for task in tasks))


for _stage in STAGES:
    for _lane in LANES if _stage.per_lane else (LANE,):
        register_stage(_stage, _lane)


def build_lanes(session: nox.Session, lanes: Sequence[str]) -> None:
    """Build the lanes and print the run's tables; fails unless every stage succeeded and all must-gates passed."""
    with started_build(session) as (build, options):
        reported, fell_back = list(lanes), []
        build.run(tasks_for(None, build.stages, lanes))
        if options.fallback and lanes == [LANE] and build.conversion_failed(LANE):
            session.warn(
                f"conversion failed with torch {LANE}: building with torch {OTHER_LANE}, and the report shows it"
            )
            build.run(tasks_for(None, build.stages, [OTHER_LANE]))
            reported, fell_back = [OTHER_LANE], ["--fell-back-from", LANE]
        if options.dry_run:
            return
        if unrecorded := build.unrecorded_failures:
            session.error(f"failed, without a report: {', '.join(map(str, unrecorded))}")
        command = ["-m", "coremill", "report", "--config", str(options.config)]
        command += ["--build-dir", str(options.build_dir), *fell_back]
        for lane in reported:
            command += ["--torch", lane]
        session.run(sys.executable, *command, env=SESSION_ENV, external=True)


@nox.session(
    venv_backend="none",
    requires=environment_sessions(tasks_for(None, STAGES, LANES if CHOSEN.fallback else [LANE])),
    tags=["build"],
)
def pipeline(session: nox.Session) -> None:
    """The whole build in one lane, from the first stage of the run to its report."""
    build_lanes(session, [LANE])


@nox.session(
    venv_backend="none",
    requires=environment_sessions(tasks_for(None, STAGES, LANES)),
    tags=["build"],
    default=False,
)
def matrix(session: nox.Session) -> None:
    """Export, convert and verify in every lane, and compare them."""
    build_lanes(session, LANES)


# --- checks -----------------------------------------------------------------------------------------

TESTS = {
    "tests-convert": (
        f"tests-convert-torch-{PRIMARY_LANE}",
        [
            "data/test_prompts.py",
            "test_measures.py",
            "model",
            "mil",
            "coreml",
            "verification",
            "test_help.py",
            *(
                f"conversion/test_{name}.py"
                for name in ("export_pytorch", "convert_coreml", "verify_contract", "memory")
            ),
        ],
    ),
    "tests-train": (
        "tests-train",
        [
            "core",
            "text",
            "data",
            "model",
            "training",
            "formats",
            *(f"conversion/test_export_{name}.py" for name in ("gguf", "hf")),
        ],
    ),
    "tests-e2e": ("tests-tools", ["e2e", "packaging"]),
    "tests-light": (
        "tests-tools",
        ["core", "pipeline", "infra", "cli", "report", "test_noxfile.py", "test_architecture.py"],
    ),
}
"""Each test session's environment, and its paths below tests/; the longest first, because two run in parallel."""
# A file that is listed by name runs only in that session.
NAMED_FILES = {part for _, parts in TESTS.values() for part in parts if part.endswith(".py")}
OTHER_LANE_TESTS = "tests-convert-other-lane"
"""For CI's matrix; not part of `tests`."""


def register_tests(name: str, environment_name: str, parts: list[str]) -> None:
    environment = next(each for each in ENVIRONMENTS if each.name == environment_name)

    @nox.session(
        name=name,
        venv_backend="none",
        requires=[environment.session],
        tags=["check"],
        default=False,
        allow_parallel=True,
    )
    def tests(session: nox.Session) -> None:
        own = [f"tests/{part}" for part in parts]
        others = sorted(f"tests/{name}" for name in NAMED_FILES.difference(parts))
        flags = [each for each in session.posargs if not each.startswith("tests/")]
        asked = [each for each in session.posargs if each.startswith("tests/")]
        paths = [each for each in asked if each.startswith(tuple(own)) and not each.startswith(tuple(others))]
        if asked and not paths:
            session.skip("the requested tests belong to other sessions")
        python = str(installed(ROOT)[environment.name].python)
        flags += [f"--ignore={name}" for name in others]
        session.run(python, "-m", "pytest", *flags, *(paths or own), env=SESSION_ENV, external=True)

    tests.__doc__ = f"Tests of {', '.join(parts)} in {environment.name} (Python {environment.python})."


for _name, (_environment_name, _parts) in TESTS.items():
    register_tests(_name, _environment_name, _parts)
register_tests(OTHER_LANE_TESTS, f"tests-convert-torch-{LANES[1]}", TESTS["tests-convert"][1])


@nox.session(venv_backend="none", requires=[*TESTS], tags=["check"], default=False)
def tests(session: nox.Session) -> None:
    """All tests, each in the environment of its package."""


CONFORMANCE = next(each for each in ENVIRONMENTS if each.name == f"tests-convert-torch-{PRIMARY_LANE}")


@nox.session(venv_backend="none", requires=[CONFORMANCE.session], tags=["check"], default=False)
def conformance(session: nox.Session) -> None:
    """coremltools' own operation tests against coremill.mil (takes an hour; resumes if it was interrupted)."""
    python = str(installed(ROOT)[CONFORMANCE.name].python)
    session.run(python, "-m", "tests.conformance", *session.posargs, env=SESSION_ENV, external=True)


PACKAGES, BENCHES = Path("src/coremill"), Path("benchmarks")
TYPED = {
    LINT.name: [*(PACKAGES / name for name in ("core", "pipeline", "infra", "report", "cli")), Path("noxfile.py")],
    TRAIN.name: [
        *(PACKAGES / name for name in ("text", "data", "model", "formats", "training")),
        *(BENCHES / f"{name}.py" for name in ("training", "llamacpp", "huggingface_readers")),
    ],
    CONVERT[PRIMARY_LANE].name: [
        *(PACKAGES / name for name in ("mil", "coreml", "verification", "conversion")),
        *(BENCHES / f"{name}.py" for name in ("mil", "conversion", "tutorial_decoder")),
    ],
}
"""The paths that mypy checks, by the environment with the libraries that they import."""


@nox.session(
    venv_backend="none",
    requires=[LINT.session, TRAIN.session, CONVERT[PRIMARY_LANE].session],
    tags=["check"],
    default=False,
)
def types(session: nox.Session) -> None:
    """Types (mypy), each package with the libraries of its environment."""
    environments = installed(ROOT)
    mypy = str(environments[LINT.name].folder / "bin" / "mypy")
    for environment in ENVIRONMENTS:
        if environment.name in TYPED:
            # The light packages support Pythons older than that of the lint environment.
            python = "3.10" if environment is LINT else environment.python
            session.run(
                mypy, "--python-executable", str(environments[environment.name].python),
                "--python-version", python, "--cache-dir", f".mypy_cache/{environment.name}",
                *map(str, TYPED[environment.name]), env=SESSION_ENV, external=True,
            )  # fmt: skip


@nox.session(venv_backend="none", requires=[LINT.session, "types"], tags=["check"], default=False)
def lint(session: nox.Session) -> None:
    """Style (ruff), types (mypy), imports between packages (import-linter), the workflow (zizmor)."""
    tools = installed(ROOT)[LINT.name].folder / "bin"
    for command in (
        ["ruff", "format", "--check", "."],
        ["ruff", "check", "."],
        ["lint-imports"],
        ["zizmor", "--offline", "--quiet", ".github/workflows"],
    ):
        session.run(str(tools / command[0]), *command[1:], env=SESSION_ENV, external=True)


@nox.session(venv_backend="none", requires=[LINT.session], tags=["check"], default=False)
def format(session: nox.Session) -> None:
    """Apply the style (ruff)."""
    ruff = str(installed(ROOT)[LINT.name].folder / "bin" / "ruff")
    session.run(ruff, "check", "--fix", "--quiet", ".", env=SESSION_ENV, external=True)
    session.run(ruff, "format", ".", env=SESSION_ENV, external=True)


# --- upkeep -----------------------------------------------------------------------------------------


@nox.session(venv_backend="none", tags=["upkeep"], default=False)
def lock(session: nox.Session) -> None:
    """Recreate the hashed locks from requirements/*.in; `-- --upgrade` uses newer versions."""
    pythons = {environment.name: environment.python for environment in ENVIRONMENTS} | {"tools": "3.10"}
    for name, python in pythons.items():
        session.run(
            UV, "pip", "compile", "--quiet", "--universal", "--python-version", python, "--generate-hashes",
            "--no-emit-index-url", "--no-emit-find-links", "--custom-compile-command", "nox -s lock",
            "--excludes", "requirements/excludes.txt",
            *session.posargs, f"requirements/{name}.in", "--output-file", f"requirements/{name}.txt",
            external=True,
        )  # fmt: skip


@nox.session(venv_backend="none", tags=["upkeep"], default=False)
def schemas(session: nox.Session) -> None:
    """Regenerate docs/schemas from the types in coremill.core."""
    session.run(sys.executable, "-m", "coremill.core.schemas", "docs/schemas", external=True)


BENCHMARKS = {
    "training": TRAIN.name,
    "conversion": CONVERT[PRIMARY_LANE].name,
    "mil": CONVERT[PRIMARY_LANE].name,
    "llamacpp": TRAIN.name,
    "huggingface_readers": TRAIN.name,
    "scale": TRAIN.name,
}


@nox.session(
    venv_backend="none",
    requires=[TRAIN.session, CONVERT[PRIMARY_LANE].session],
    tags=["upkeep"],
    default=False,
)
def bench(session: nox.Session) -> None:
    """Run a benchmark by its name: training, conversion, mil, llamacpp, huggingface_readers or scale."""
    if not session.posargs or session.posargs[0] not in BENCHMARKS:
        session.error(f"expected one of {', '.join(BENCHMARKS)}: nox -s bench -- {next(iter(BENCHMARKS))}")
    name, *arguments = session.posargs
    python = str(installed(ROOT)[BENCHMARKS[name]].python)
    session.run(python, f"benchmarks/{name}.py", *arguments, env=SESSION_ENV, external=True)
