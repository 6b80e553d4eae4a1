"""`coremill agree`: the table of a finished run, its exit codes, and what it says of a run that is not finished."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from coremill.core import layout
from coremill.core.command import exit_on_error
from coremill.core.config import read_config
from coremill.core.contract import read_contract
from coremill.core.documents import read_json
from coremill.core.errors import GATES_FAILED
from coremill.core.matrix import FORMATS, AgreementMatrix
from coremill.verification.agree import main

CONFIG = """
schema_version = "1.0"
name = "tiny-llama"
model_type = "llama"

[weights]
source = "models/tiny-llama"

[texts]
min_characters = 1000
max_characters = 4000

[shapes]
primary = 24
all = [16, 24, 40]

[export]
stateful = true

[convert]

[verify]
min_sqnr_db = 40.0
max_kl_nats = 1e-3
argmax_margin = 0.05
max_excluded_share = 0.1
max_perplexity_change = 0.005
decoded_tokens = 20
"""


class Project(msgspec.Struct, frozen=True):
    """A working directory with a finished run."""

    root: Path
    lane: str

    @property
    def run(self) -> layout.RunLayout:
        return layout.RunLayout(build=self.root / "build", run="tiny-llama")

    @property
    def config(self) -> Path:
        return self.root / "configs" / "tiny-llama.toml"

    @property
    def package(self) -> Path:
        return layout.package_dir(self.run.stage("convert", self.lane), "tiny-llama")


@pytest.fixture
def project(pristine_imported, exports, tmp_path, monkeypatch) -> Project:
    lane = read_contract(pristine_imported.contract).toolchain.packages["torch"].partition("+")[0]
    made = Project(tmp_path, lane)
    for stage in pristine_imported.stages:
        per_lane = lane if stage in ("export", "convert") else None
        shutil.copytree(pristine_imported.root / stage, made.run.stage(stage, per_lane))
    written = exports[pristine_imported.config.name]
    shutil.copytree(written.hf, made.run.stage("hf"))
    shutil.copytree(next(iter(written.gguf.values())).parent, made.run.stage("gguf"))
    made.config.parent.mkdir()
    made.config.write_text(CONFIG)
    assert read_config(made.config) == pristine_imported.config
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return made


def agree(*options: str) -> int:
    return exit_on_error(lambda: main(["--run", "tiny-llama", *options]))


def test_the_table_of_a_good_run(project, capsys):
    assert agree("--out", "out/agreement.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"tiny-llama, lane {project.lane}: 1 sequence at T24"
    assert lines[1].split() == ["format", "max", "abs", "SQNR", "dB", "KL", "nats", "top-1", "ties", "perplexity"]
    table = {cells[0]: cells[1:] for cells in (line.split() for line in lines[3 : 3 + len(FORMATS)])}
    assert list(table) == list(FORMATS)
    matrix = read_json(project.root / "out" / "agreement.json", AgreementMatrix)
    row = {each.format: each for each in matrix.rows}["mil-reference"]
    change = row.perplexity.measured / row.perplexity.reference - 1
    assert table["mil-reference"] == [
        f"{row.max_abs_err:.2g}",
        f"{row.sqnr_db:.1f}",
        f"{row.kl_nats:.2g}",
        "100.00%",
        str(row.excluded),
        f"{row.perplexity.measured:.4g}",
        f"{change:+.2%}",
        "passed",
    ]
    text = " ".join(" ".join(lines).split())
    assert "SQNR dB ≥ 90 mil-float32 float32 rounding; both sides have the same rounded weights" in text
    assert "perplexity ≤ 0.5 % every row except GGUF max_perplexity_change in [verify]" in text
    assert "mil-float32: against the checkpoint in float32, its weights rounded as the package's" in text
    assert (
        "top-1 of 24 positions, except ties, where the reference's best leads by no more than 0.05 logits" in text
    )


def test_a_format_beyond_its_tolerance_is_named_and_the_exit_code_is_3(project, capsys):
    strict = CONFIG.replace("min_sqnr_db = 40.0", "min_sqnr_db = 80.0").replace("1e-3", "1e-9")
    project.config.write_text(strict)
    assert agree("--out", "agreement.json") == GATES_FAILED
    text = " ".join(capsys.readouterr().out.split())
    assert "failed: mil-reference: SQNR dB, KL nats outside its tolerance" in text
    assert not read_json(project.root / "agreement.json", AgreementMatrix).within


def test_formats_and_shape_are_chosen(project, capsys):
    assert agree("--formats", "eager,torchscript", "--shape", "40") == 0
    out = capsys.readouterr().out
    assert "at T40\n" in out
    assert "not_run: mil-reference: not selected by --formats\n" in out
    assert not (project.root / "agreement.json").exists()


def test_what_a_format_does_not_read_need_not_be_there(project):
    shutil.rmtree(project.package)
    assert agree("--formats", "torch-export") == 0


@pytest.mark.parametrize("missing", ["checkpoint", "tokenizer", "contract", "program", "package"])
def test_what_is_missing_is_named_with_the_command_that_makes_it(project, capsys, missing):
    export = project.run.stage("export", project.lane)
    path = {
        "checkpoint": layout.checkpoint_file(project.run.stage("import"), "tiny-llama"),
        "tokenizer": layout.tokenizer_file(project.run.stage("import")),
        "contract": layout.contract_file(export, "tiny-llama"),
        "program": layout.program_file(export, "tiny-llama", "torchscript"),
        "package": project.package,
    }[missing]
    path.rename(project.root / "elsewhere")
    assert agree("--out", "agreement.json") == 51
    assert capsys.readouterr().err == (
        f"stage error: {path} does not exist\n"
        f"  expected: the finished run tiny-llama, lane {project.lane}\n"
        f"  run: nox -s pipeline -- --config configs/tiny-llama.toml --torch {project.lane}\n"
    )
    assert not (project.root / "agreement.json").exists()


def test_a_lane_that_was_not_built(project, capsys):
    assert agree("--torch", "2.5.0") == 51
    contract = layout.contract_file(project.run.stage("export", "2.5.0"), "tiny-llama")
    assert capsys.readouterr().err.startswith(f"stage error: {contract} does not exist\n")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ["--formats", "eager,gguf"],
            10,
            f"configuration error: --formats gguf: no such format\n  expected: some of {','.join(FORMATS)}\n",
        ),
        (
            ["--shape", "17"],
            10,
            "configuration error: the graph does not run at T17\n  expected: one of T16, T24, T40\n",
        ),
        (
            ["--run", "other", "--config", "configs/tiny-llama.toml"],
            10,
            "configuration error: configs/tiny-llama.toml configures the run 'tiny-llama'\n"
            "  expected: the configuration of 'other'\n",
        ),
        (
            ["--run", "other"],
            10,
            "configuration error: cannot read configs/other.toml: No such file or directory\n"
            "  expected: a readable file\n",
        ),
        (
            ["--out", "configs/tiny-llama.toml"],
            52,
            "output error: configs/tiny-llama.toml is read and would be overwritten\n"
            "  expected: an output path that is not an input\n",
        ),
    ],
)
def test_bad_options_have_their_own_exit_code(project, capsys, options, code, message):
    assert agree(*options) == code
    assert capsys.readouterr().err == message
    assert project.config.read_text() == CONFIG


def test_formats_that_are_switched_off_need_not_be_there(project, capsys):
    off = CONFIG.replace('model_type = "llama"\n', 'model_type = "llama"\nformats = []\n')
    project.config.write_text(off)
    for stage in ("hf", "gguf"):
        shutil.rmtree(project.run.stage(stage))
    assert agree() == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "not_run: transformers: the configuration's `formats` do not include it" in text
    assert "gguf-f32: the configuration's `formats` or [gguf] types do not include it" in text
