"""The source files of a stage: those that it imports or starts by name, and no others."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import coremill
from coremill.pipeline.sources import source_digest, source_files
from coremill.pipeline.stages import EVERY_STAGE

ROOT = Path(coremill.__file__).parent


def names(module):
    return {path.relative_to(ROOT).as_posix() for path in source_files(module)}


def test_dataset_stage_depends_only_on_light_packages():
    found = names("coremill.data.make_toy_kd")
    assert {
        "__init__.py",
        "data/__init__.py",
        "text/student_tokenizer.py",
        "core/errors.py",
        "core/stage.py",
    } <= found
    assert not {
        name
        for name in found
        if name.split("/")[0]
        in ("training", "conversion", "coreml", "formats", "model", "mil", "pipeline", "verification")
    }


CORPORA = {
    "data/corpora/__init__.py",
    "data/corpora/sources.toml",
    "data/corpora/chat_prompts.toml",
    "data/corpora/king-james-bible.txt",
}
WORK = {
    "dataset": {"data/make_toy_kd.py"},
    "training": {"training/run_toy_distill.py"},
    "texts": {"data/write_texts.py", *CORPORA},
    "import": {"training/import_model.py", *CORPORA},
    "export": {"conversion/export_pytorch.py", "coreml/export.py"},
    "convert": {"conversion/convert_coreml.py", "coreml/convert.py"},
    "verify": {"conversion/verify_contract.py", "verification/verify.py"},
    "hf": {"conversion/export_hf.py", "formats/huggingface/export.py"},
    "gguf": {"conversion/export_gguf.py", "formats/gguf/export.py"},
}


@pytest.mark.parametrize("stage", EVERY_STAGE, ids=lambda stage: stage.name)
def test_closure_contains_no_other_stage(stage):
    assert names(stage.module) & set().union(*WORK.values()) == WORK[stage.name]


def test_digest_covers_imports_in_functions_and_data_files(tmp_path):
    tree = tmp_path / "coremill"
    shutil.copytree(ROOT / "core", tree / "core")
    (tree / "__init__.py").write_text("")
    shutil.copytree(ROOT / "pipeline", tree / "pipeline")
    (tree / "late.py").write_text("def f():\n    from coremill.core import digest\n    return digest\n")
    (tree / "data.toml").write_text("x = 1")
    (tree / "text.txt").write_text("one")
    script = "from coremill.pipeline.sources import *; print(source_digest('coremill.late'))"

    def run():
        command = [sys.executable, "-c", script]
        return subprocess.run(
            command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, check=True
        )

    before = run().stdout
    assert before.startswith(b"sha256:")
    (tree / "core" / "digest.py").write_text((tree / "core" / "digest.py").read_text() + "\n")
    after = run().stdout
    assert after != before
    (tree / "data.toml").write_text("x = 2")
    other_data = run().stdout
    (tree / "text.txt").write_text("two")
    assert len({before, after, other_data, run().stdout}) == 4


@pytest.mark.parametrize("worker", ["formats/llamacpp/worker.py", "formats/llamacpp/template.py"])
def test_closure_contains_modules_run_in_another_process(worker):
    assert worker in names("coremill.conversion.export_gguf")


COMPUTED = None
"""A module whose name is not a literal, so that the code does not contain it."""
BY_NAME = {"import_module", "__import__", "run_module"}
OTHERWISE = {"run_path", "exec", "system", "popen"}
PROCESS_LIBRARIES = {"subprocess", "os", "asyncio"}


def literal(node):
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else COMPUTED


def started_modules(code):
    """Yield the name of each module that the code loads or runs by name, or COMPUTED."""
    for node in ast.walk(ast.parse(code)):
        is_call = isinstance(node, ast.Call)
        elements = node.args if is_call else getattr(node, "elts", [])
        for index, flag in enumerate(map(literal, elements), start=1):
            if flag == "-m":
                yield literal(elements[index]) if index < len(elements) else COMPUTED
            elif flag == "-c":
                yield COMPUTED
        if is_call:
            library, _, function = ast.unparse(node.func).rpartition(".")
            if function in BY_NAME:
                yield literal(elements[0]) if elements else COMPUTED
            elif function in OTHERWISE or (
                library in PROCESS_LIBRARIES and any(map(is_other_start, ast.walk(node)))
            ):
                yield COMPUTED


def is_other_start(node):
    """Return whether an argument starts coremill without `-m`: by its command, a script or a shell."""
    if isinstance(node, (ast.List, ast.Tuple)):
        return bool(node.elts) and literal(node.elts[0]) == "coremill"
    text = literal(node) or ""
    return text.endswith(".py") or ("coremill" in text and not re.fullmatch(r"coremill(\.\w+)*", text))


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("subprocess.run([sys.executable, '-m', 'coremill.mil.cli'])", ["coremill.mil.cli"]),
        ("command = (python, '-m', 'coremill.data'); start(command)", ["coremill.data"]),
        ("os.execl(python, python, '-m', 'coremill.data')", ["coremill.data"]),
        ("importlib.import_module('coremill.data')", ["coremill.data"]),
        ("runpy.run_module('coremill.data')", ["coremill.data"]),
        ("command = [python, '-m', name]", [COMPUTED]),
        ("command = [python, '-m', f'coremill.{name}']", [COMPUTED]),
        ("command = [python, '-m', 'coremill.' + name]", [COMPUTED]),
        ("command = [python, '-m', *rest]", [COMPUTED]),
        ("command = [python, '-m'] + rest", [COMPUTED]),
        ("import_module(name)", [COMPUTED]),
        ("command = [python, '-c', 'import coremill.data']", [COMPUTED]),
        ("subprocess.run([python, 'worker.py'])", [COMPUTED]),
        ("subprocess.run([python, '-mcoremill.data'])", [COMPUTED]),
        ("subprocess.run(f'{python} -m coremill.data', shell=True)", [COMPUTED]),
        ("subprocess.run(['coremill', 'mil'])", [COMPUTED]),
        ("os.system('coremill mil')", [COMPUTED]),
        ("subprocess.run(['ollama', 'list']); run = 'python -m coremill.data'", []),
    ],
)
def test_started_modules_finds_modules_started_by_name(code, modules):
    assert list(started_modules(code)) == modules


def test_closure_covers_every_module_started_by_name():
    of_stages = set().union(*(source_files(stage.module) for stage in EVERY_STAGE))
    started = 0
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        covered = source_files(".".join(parts).removesuffix(".__init__"))
        for module in started_modules(path.read_text()):
            if module is COMPUTED:
                assert path not in of_stages, f"{path} starts a module whose name is not a literal"
            elif module.partition(".")[0] == "coremill":
                started += 1
                file = ROOT.parent.joinpath(*module.split("."))
                options = (file / "__main__.py", file / "__init__.py", file.with_suffix(".py"))
                assert next(option for option in options if option.is_file()) in covered, (
                    f"{path} starts {module}, which is not among its source files"
                )
    assert started >= 3  # the search itself works


def test_equal_sources_give_equal_digests():
    assert source_digest("coremill.data.make_toy_kd") == source_digest("coremill.data.make_toy_kd")
    assert source_digest("coremill.data.make_toy_kd") != source_digest("coremill.core.digest")


@pytest.mark.parametrize("stage", EVERY_STAGE, ids=lambda stage: stage.name)
def test_a_toys_answers_are_sources_of_the_dataset_stage_alone(stage):
    """Rewording an answer changes the dataset, and so what is built from it, but nothing of another run."""
    toys = {"data/magic_8_ball.py", "data/toy.py", "data/kinds.py"} & names(stage.module)
    assert bool(toys) == (stage.name == "dataset")
