"""The stage tables of both kinds of run, and the settings and files of their stages."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coremill.core.config import ExportConfig, TextsConfig, WeightsConfig, read_config
from coremill.core.errors import StageError
from coremill.core.manifest import read_manifest
from coremill.core.stage import StageContext
from coremill.pipeline import status
from coremill.pipeline.freshness import fingerprint, freshness
from coremill.pipeline.runner import main, run_stage
from coremill.pipeline.stages import DISTILLED, EVERY_STAGE, IMPORTED, find_stage, stages_of, switched_off

CONFIGS = Path(__file__).parents[2] / "configs"
DISTILLED_RUN = read_config(CONFIGS / "magic-8-ball.toml")
IMPORTED_RUN = read_config(CONFIGS / "smollm2-135m.toml")


LANE, FORMATS = ["export", "convert", "verify"], ["hf", "gguf"]


def test_kind_of_run_determines_its_stages():
    assert stages_of(DISTILLED_RUN) == DISTILLED
    assert stages_of(IMPORTED_RUN) == IMPORTED
    assert [stage.name for stage in DISTILLED] == ["dataset", "training", *LANE, *FORMATS]
    assert [stage.name for stage in IMPORTED] == ["texts", "import", *LANE, *FORMATS]
    assert [stage.name for stage in EVERY_STAGE] == [
        "dataset", "training", *LANE, *FORMATS, "texts", "import",
    ]  # fmt: skip


@pytest.mark.parametrize("stages", [DISTILLED, IMPORTED], ids=["distilled", "imported"])
def test_stages_need_only_earlier_stages_and_existing_settings(stages):
    config = DISTILLED_RUN if stages is DISTILLED else IMPORTED_RUN
    for number, stage in enumerate(stages):
        assert set(stage.needs) <= {earlier.name for earlier in stages[:number]}
        assert stage.config_slice(config).keys() == set(stage.reads)


def test_stage_of_another_kind_of_run_is_rejected(capsys):
    with pytest.raises(StageError) as caught:
        find_stage("dataset", IMPORTED)
    assert str(caught.value) == (
        "there is no stage 'dataset'\n"
        "  expected: one of texts, import, export, convert, verify, hf, gguf\n"
        "  run: coremill status"
    )
    with pytest.raises(StageError, match="there is no stage 'texts'"):
        main(["texts", "--config", str(CONFIGS / "magic-8-ball.toml")])


@pytest.mark.parametrize(
    ("config", "model", "tokenizer", "prompts"),
    [(DISTILLED_RUN, "training", "dataset", "dataset"), (IMPORTED_RUN, "import", "import", "texts")],
    ids=["distilled", "imported"],
)
@pytest.mark.parametrize("name", ["export", "verify"])
def test_directories_of_model_tokenizer_and_prompts(name, config, model, tokenizer, prompts, tmp_path):
    stage = find_stage(name, stages_of(config))
    inputs = {need: tmp_path / need for need in stage.needs}
    context = StageContext(config=config, lane="2.9.1", inputs=inputs, out=tmp_path / "out")
    found = (context.model_dir, context.tokenizer_dir, context.prompts_dir)
    assert found == (tmp_path / model, tmp_path / tokenizer, tmp_path / prompts)


def test_format_that_is_switched_off_has_no_stage(capsys, tmp_path, monkeypatch):
    off = msgspec.structs.replace(IMPORTED_RUN, formats=("hf",))
    assert [stage.name for stage in stages_of(off)] == ["texts", "import", *LANE, "hf"]
    assert (switched_off(off), switched_off(IMPORTED_RUN)) == (("gguf",), ())
    with pytest.raises(StageError) as caught:
        find_stage("gguf", stages_of(off))
    assert str(caught.value) == (
        "the configuration switches stage 'gguf' off\n  expected: `formats` with 'gguf'\n  run: coremill status"
    )
    # The others do not read it, so that they stay fresh.
    assert not any("formats" in stage.reads for stage in IMPORTED)


def test_status_lists_a_format_that_is_switched_off(tmp_path, capsys):
    text = (CONFIGS / "smollm2-135m.toml").read_text()
    (tmp_path / "off.toml").write_text(text.replace('"llama"\n', '"llama"\nformats = ["gguf"]\n', 1))
    assert status.main(["--config", str(tmp_path / "off.toml"), "--build-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("│ hf")]
    assert [cell.strip() for cell in line.split("│")[1:5]] == ["hf", "", "switched off", ""]
    assert any(line.startswith("│ gguf") and "stale" in line for line in lines)


def test_changed_frontend_makes_export_and_verify_stale(toolset):
    other = msgspec.structs.replace(IMPORTED_RUN, export=ExportConfig(frontend="torch-export"))
    stale = {
        stage.name
        for stage in IMPORTED
        if fingerprint(stage, other, toolset, {}) != fingerprint(stage, IMPORTED_RUN, toolset, {})
    }
    assert stale == {"export", "verify"}


def test_files_of_a_stage_are_those_in_its_settings():
    config = msgspec.structs.replace(
        IMPORTED_RUN,
        weights=WeightsConfig(source="models/mine"),
        texts=TextsConfig(files=("a.txt", "b.txt")),
    )
    assert {stage.name: stage.files(config) for stage in IMPORTED if stage.files(config)} == {
        "texts": (Path("a.txt"), Path("b.txt")),
        "import": (Path("models/mine"),),
    }
    assert not any(stage.files(IMPORTED_RUN) for stage in IMPORTED)  # a file in a package is covered by the lock


def test_changed_user_file_makes_its_stage_stale(tmp_path, layout, toolset):
    """Runs the texts stage with a text outside the build."""
    text = tmp_path / "mine.txt"
    text.write_text("word " * 8)
    texts = TextsConfig(files=(str(text),), min_characters=10)
    config = msgspec.structs.replace(IMPORTED_RUN, texts=texts)
    stage = find_stage("texts", IMPORTED)
    run_stage(stage, config, layout, toolset, None, stages=IMPORTED)

    def reasons():
        return freshness(stage, config, layout, toolset, None, IMPORTED).reasons

    assert reasons() == ()
    assert read_manifest(layout.stage("texts")).fingerprint.files.keys() == {str(text)}
    text.write_text("other " * 8)
    assert reasons() == (f"file {text} changed",)
    run_stage(stage, config, layout, toolset, None, stages=IMPORTED)
    assert reasons() == ()
    text.unlink()
    assert reasons() == (f"file {text} changed",)
