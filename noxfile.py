"""Sessions, and the Python that each runs in. The work itself is library code in src/coremill.

Tags: `environment` (make or update one environment), `build` (a stage), `check` (tests, style, types),
`upkeep` (locks, schemas, measurements).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import nox
import uv
from nox.command import CommandFailed

from coremill.core.config import read_config
from coremill.core.errors import ConversionError, CoremillError
from coremill.core.layout import MANIFEST, RunLayout
from coremill.core.manifest import read_manifest
from coremill.core.publish import recover
from coremill.infra.interpreters import interpreter_directories
from coremill.pipeline.environments import (
    BUILD_ENVIRONMENTS,
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
from coremill.pipeline.freshness import freshness
from coremill.pipeline.lock import TOKEN_VARIABLE, RunLock
from coremill.pipeline.project import add_run_options, chosen_run
from coremill.pipeline.stages import EVERY_STAGE, Stage, find_stage, stage_folder, stages_of
from coremill.pipeline.status import run_status

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
        return stages_of(read_config(CHOSEN.config))
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

_held: dict[Path, RunLock] = {}
_fell_back: list[str] = []


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


def hold_run(session: nox.Session, layout: RunLayout) -> RunLock:
    """Acquire the run lock once per nox process; fails if another process is building the run."""
    if layout.lock not in _held:
        try:
            _held[layout.lock] = RunLock(layout)
        except CoremillError as error:
            session.error(str(error))
    return _held[layout.lock]


def run_stage(session: nox.Session, stage: Stage, lane: str | None) -> None:
    """Run one stage in its interpreter, unless it is fresh."""
    options = build_options(session)
    try:
        config, layout = chosen_run(options)
        if options.dry_run:
            return report_dry_run(session, options, stage, lane)
        lock = hold_run(session, layout)
        recover(stage_folder(layout, stage, lane))
        toolset = installed(ROOT)[stage.environment(lane).name]
        state = freshness(stage, config, layout, toolset, lane, STAGES)
    except CoremillError as error:
        session.error(str(error))
    forced = options.force in ("all", stage.name)
    if state.fresh and not forced:
        session.log("fresh")
        return
    session.log("; ".join(state.reasons) or "forced")
    command = ["-m", "coremill", "stage", stage.name, "--config", str(options.config)]
    command += ["--build-dir", str(options.build_dir)]
    command += ["--torch", lane] if lane else []
    command += ["--force"] if forced else []
    # By default, threads of torch spin while they wait, and so compete for the cores: on a busy machine, a
    # verification took 774 s of CPU time instead of 282 s.
    env = {**SESSION_ENV, TOKEN_VARIABLE: lock.token, "OMP_WAIT_POLICY": "PASSIVE"}
    session.run(str(toolset.python), *command, env=env, external=True)


def report_dry_run(session: nox.Session, options: argparse.Namespace, stage: Stage, lane: str | None) -> None:
    config, layout = chosen_run(options)
    states = run_status(ROOT, config, layout, [lane or LANE])
    state = next(each for each in states if each.stage == stage.name)
    reasons = [*state.reasons, *(["forced"] if options.force in ("all", stage.name) else [])]
    session.log(f"would run: {'; '.join(reasons)}" if reasons else "fresh")


def run_lane(session: nox.Session, lane: str) -> bool:
    """Run a lane's stages in order, until one fails; returns whether all of them ran."""
    for stage in STAGES:
        if stage.per_lane:
            try:
                run_stage(session, stage, lane)
            except CommandFailed:
                return False
    return True


def conversion_failed(session: nox.Session, lane: str) -> bool:
    """Whether the conversion itself failed, rather than because of a full disk, a changed input or a held lock."""
    _, layout = chosen_run(build_options(session))
    folder = layout.failed_stage("convert", lane)
    return (folder / MANIFEST).is_file() and read_manifest(folder).error_kind == ConversionError.kind


def stage_session(stage: Stage, lane: str | None) -> str:
    return f"{stage.name}(torch='{lane}')" if stage.per_lane else stage.name


def register_stage(stage: Stage, lane: str | None) -> None:
    environments = [stage.environment(lane)]
    if CHOSEN.fallback and stage.name == "convert" and lane == LANE:
        environments.append(CONVERT[OTHER_LANE])
    needs = [stage_session(find_stage(need, STAGES), lane) for need in stage.needs]

    @nox.session(
        name=stage_session(stage, lane),
        venv_backend="none",
        requires=[*(environment.session for environment in environments), *needs],
        tags=["build"],
        default=False,
    )
    def build(session: nox.Session) -> None:
        if lane in _fell_back:
            session.skip(f"the build fell back from torch {lane}")
        try:
            run_stage(session, stage, lane)
        except CommandFailed:
            if not (CHOSEN.fallback and lane == LANE and conversion_failed(session, lane)):
                raise
            session.warn(
                f"conversion failed with torch {lane}: building with torch {OTHER_LANE}, and the report shows it"
            )
            if not run_lane(session, OTHER_LANE):
                raise
            _fell_back.append(lane)

    build.__doc__ = f"{stage.purpose} (Python {stage.environment(lane).python}{f', torch {lane}' if lane else ''})."


for _stage in STAGES:
    for _lane in LANES if _stage.per_lane else (None,):
        register_stage(_stage, _lane)


def report(session: nox.Session, *lanes: str) -> None:
    """Print the run's tables; fails unless all must-gates passed."""
    options = build_options(session)
    if options.dry_run:
        return
    _, layout = chosen_run(options)
    command = ["-m", "coremill", "report", "--config", str(options.config), "--build-dir", str(options.build_dir)]
    for lane in lanes:
        command += ["--torch", lane]
    for lane in _fell_back:
        command += ["--fell-back-from", lane]
    hold_run(session, layout)
    session.run(sys.executable, *command, env=SESSION_ENV, external=True)


@nox.session(
    venv_backend="none",
    requires=[
        stage_session(stage, LANE) for stage in STAGES if not any(stage.name in other.needs for other in STAGES)
    ],
    tags=["build"],
)
def pipeline(session: nox.Session) -> None:
    """The whole build in one lane, from the first stage of the run to its report."""
    report(session, OTHER_LANE if _fell_back else LANE)


@nox.session(
    venv_backend="none",
    requires=[
        *(environment.session for environment in BUILD_ENVIRONMENTS),
        *(stage.name for stage in STAGES if not stage.per_lane),
    ],
    tags=["build"],
    default=False,
)
def matrix(session: nox.Session) -> None:
    """Export, convert and verify in every lane, and compare them."""
    # A loop, not `requires`: a lane that fails must be shown in the comparison, not end it.
    for lane in LANES:
        run_lane(session, lane)
    report(session, *LANES)


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
}


@nox.session(
    venv_backend="none",
    requires=[TRAIN.session, CONVERT[PRIMARY_LANE].session],
    tags=["upkeep"],
    default=False,
)
def bench(session: nox.Session) -> None:
    """Run a benchmark (training, conversion, mil, llamacpp, huggingface_readers): `nox -s bench -- NAME …`."""
    if not session.posargs or session.posargs[0] not in BENCHMARKS:
        session.error(f"expected one of {', '.join(BENCHMARKS)}: nox -s bench -- {next(iter(BENCHMARKS))}")
    name, *arguments = session.posargs
    python = str(installed(ROOT)[BENCHMARKS[name]].python)
    session.run(python, f"benchmarks/{name}.py", *arguments, env=SESSION_ENV, external=True)
