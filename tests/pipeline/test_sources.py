"""The source closure: what a stage imports counts, what it does not import does not."""

from __future__ import annotations

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


def test_the_dataset_stage_covers_its_own_packages_and_no_other():
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


WORK = {
    "dataset": {"data/make_toy_kd.py"},
    "training": {"training/run_toy_distill.py"},
    "texts": {
        "data/corpora/__init__.py",
        "data/corpora/sources.toml",
        "data/corpora/chat_prompts.toml",
        "data/corpora/king-james-bible.txt",
    },
    "import": {"training/import_model.py"},
    "export": {"conversion/export_pytorch.py", "coreml/export.py"},
    "convert": {"conversion/convert_coreml.py", "coreml/convert.py"},
    "verify": {"conversion/verify_contract.py", "verification/verify.py"},
    "hf": {"conversion/export_hf.py"},
    "gguf": {"conversion/export_gguf.py"},
}


@pytest.mark.parametrize("stage", EVERY_STAGE, ids=lambda stage: stage.name)
def test_the_closure_holds_the_stages_own_work_and_no_other_stages(stage):
    assert names(stage.module) & set().union(*WORK.values()) == WORK[stage.name]


def test_imports_inside_functions_and_data_files_count(tmp_path):
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


def test_equal_sources_give_equal_digests():
    assert source_digest("coremill.data.make_toy_kd") == source_digest("coremill.data.make_toy_kd")
    assert source_digest("coremill.data.make_toy_kd") != source_digest("coremill.core.digest")
