"""The whole build of the toy: dataset, training, export, conversion, verification, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

from coremill.core import layout as names
from coremill.core.config import read_config
from coremill.core.contract import read_contract
from coremill.core.documents import read_json
from coremill.core.gates import Outcome, Severity
from coremill.core.layout import RunLayout
from coremill.core.manifest import check_outputs, read_manifest
from coremill.core.parity import GgufParity
from coremill.core.reports import RunSummary, ShapeMeasured, VerificationReport
from coremill.pipeline.environments import PRIMARY_LANE, TRAIN, installed

ROOT = Path(__file__).parents[2]
RUN = "magic-8-ball"
STAGES = [
    ("dataset", None),
    ("training", None),
    ("hf", None),
    ("gguf", None),
    *((name, PRIMARY_LANE) for name in ("export", "convert", "verify")),
]


def test_magic_8_ball_pipeline_e2e(nox_build, tmp_path):
    layout = RunLayout(build=tmp_path / "build", run=RUN)

    built = nox_build("pipeline", layout.build)
    assert built.returncode == 0, built.stdout[-4000:]
    check_stages(layout)
    check_contract(layout)
    check_verification(layout)
    check_answers_of_llama_cpp(layout)
    check_huggingface_directory(layout)
    check_report(layout, built.stdout)

    again = nox_build("pipeline", layout.build)
    assert again.returncode == 0
    assert again.stdout.count("| fresh\n") == len(STAGES)


def check_stages(layout):
    """Every stage ran in its own interpreter, and its outputs match its manifest."""
    for name, lane in STAGES:
        folder = layout.stage(name, lane)
        manifest = read_manifest(folder)
        check_outputs(folder, manifest)
        python = Version(manifest.toolchain.python)
        assert (python.major, python.minor) == ((3, 13) if lane is None else (3, 11)), name
        assert manifest.toolchain.packages.get("torch") == PRIMARY_LANE
        assert ("coremltools" in manifest.toolchain.packages) == (lane is not None)
    rows = names.dataset_file(layout.stage("dataset")).read_text().splitlines()
    heldout = names.heldout_file(layout.stage("dataset")).read_text().splitlines()
    prompts, heldout_prompts = ({json.loads(row)["prompt"] for row in each} for each in (rows, heldout))
    config = read_config(ROOT / "configs" / f"{RUN}.toml").dataset
    assert len(prompts) == len(rows) == config.n
    assert len(heldout_prompts) == len(heldout) == config.heldout_n
    assert not prompts & heldout_prompts


def check_contract(layout):
    contract = read_contract(names.contract_file(layout.stage("export", PRIMARY_LANE), RUN))
    assert contract.model_type == RUN
    assert contract.model_arch.use_halt_head
    assert [spec.name for spec in contract.outputs] == ["logits", "halt_logits"]
    assert {key: value.__struct_config__.tag for key, value in contract.shape_validation.items()} == {
        "T64": "ok",
        "T128": "ok",
        "T256": "ok",
    }
    package = names.package_dir(layout.stage("convert", PRIMARY_LANE), RUN)
    assert package.is_dir()
    assert (package / "Manifest.json").is_file()


def check_verification(layout):
    report = read_json(names.verification_report(layout.stage("verify", PRIMARY_LANE)), VerificationReport)
    assert report.primary == "T128"
    assert sorted(report.shapes) == ["T128", "T256", "T64"]
    for name, shape in report.shapes.items():
        assert isinstance(shape, ShapeMeasured), (name, shape)
        assert shape.sqnr_db >= 40, name
        assert shape.top1_agreement == 1.0, name
        assert shape.excluded <= 0.02 * shape.positions, name
    assert report.gates_ok
    core_ml = next(gate for gate in report.gates if gate.name == "Core ML loads and predicts")
    assert core_ml.outcome is (Outcome.PASSED if sys.platform == "darwin" else Outcome.NOT_RUN)
    assert not [
        gate for gate in report.gates if gate.severity is Severity.MUST and gate.outcome is not Outcome.PASSED
    ]
    heldout = report.heldout
    assert heldout is not None
    assert heldout.asked == heldout.exact == 64
    assert heldout.right_mood >= 0.95 * heldout.with_mood
    assert heldout.with_tool_call > 0
    assert heldout.out_of_vocabulary == 0
    assert heldout.teacher_kl_nats <= 0.02
    assert len({answer.answer for answer in report.sampled}) >= 10


ANSWER = """
import json, sys
from pathlib import Path
from coremill.data.judge import judge, read_answer_key
from coremill.data.rows import read_rows
from coremill.text.student_tokenizer import Tokenizer
from coremill.formats.llamacpp.process import LlamaCpp

file, tokenizer, heldout, answers, count = sys.argv[1:]
tokenizer = Tokenizer.load(Path(tokenizer))
key = read_answer_key(Path(answers))
rows = [row for row, _ in zip(read_rows(Path(heldout)), range(int(count)))]
with LlamaCpp(Path(file), context=256) as model:
    ids = [model.generate(tokenizer.encode_prompt(row.prompt), 96, {tokenizer.end_id}) for row in rows]
texts = [tokenizer.decode_answer(each) for each in ids]
ended = [each[-1] == tokenizer.end_id for each in ids]
print(json.dumps([judge(row, text, key).exact and end for row, text, end in zip(rows, texts, ended)]))
"""


def check_answers_of_llama_cpp(layout):
    """The files exist, and with them llama.cpp answers held-out questions exactly."""
    folder, dataset = layout.stage("gguf"), layout.stage("dataset")
    kinds = read_config(ROOT / "configs" / f"{RUN}.toml").gguf.types
    assert {"f32", "f16", "q8_0", "q4_0"} == set(kinds)
    for kind in kinds:
        assert names.gguf_file(folder, RUN, kind).read_bytes()[:4] == b"GGUF"
    assert names.halt_head_file(folder, RUN).is_file()
    measured = read_json(names.parity_report(folder), GgufParity).files
    assert {file.positions for file in measured.values()} == {2052}
    assert measured["f32"].figure("max_abs_err").measured <= 1e-4
    assert measured["f16"].figure("max_abs_err").measured <= 5e-2
    assert measured["q8_0"].figure("kl_nats").measured <= 5e-3
    assert measured["f32"].figure("heldout_exact").measured == measured["f16"].figure("heldout_exact").measured == 1
    python = str(installed(ROOT)[TRAIN.name].python)
    files = (
        names.gguf_file(folder, RUN, "f16"),
        *(name(dataset) for name in (names.tokenizer_file, names.heldout_file, names.answer_key_file)),
    )
    answered = subprocess.run(
        [python, "-c", ANSWER, *map(str, files), "64"], capture_output=True, text=True, check=False
    )
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout) == [True] * 64
    assert names.modelfile(folder).read_text().splitlines()[0] == f"FROM ./{files[0].name}"


def check_huggingface_directory(layout):
    """The files exist; the stage itself runs the directory with transformers."""
    folder = layout.stage("hf")
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["vocab_size"]) == (["LlamaForCausalLM"], 512)
    assert names.halt_head_file(folder, RUN).is_file()
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "README.md",
    ):
        assert (folder / name).is_file(), name


def check_report(layout, printed):
    folder = layout.stage("report")
    summary = read_json(names.summary_file(folder), RunSummary)
    assert summary.gates_ok
    assert [(stage.stage, stage.lane) for stage in summary.stages] == STAGES
    status = names.status_file(folder).read_text()
    assert summary.created_at[:10] in status
    for answer in summary.sampled:
        assert answer.answer in printed
    assert "gates_ok: true" in printed
