"""RunConfig: the checked-in configurations read, and impossible ones are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from coremill.core.config import read_config
from coremill.core.errors import ConfigError, SchemaVersionError

CONFIGS = Path(__file__).parents[2] / "configs"
TEXT = (CONFIGS / "magic-8-ball.toml").read_text()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_checked_in_configurations_read_and_are_named_after_their_file(path):
    assert read_config(path).name == path.stem


def test_the_toy_is_what_it_is_said_to_be():
    config = read_config(CONFIGS / "magic-8-ball.toml")
    assert config.is_toy
    assert (config.shapes.primary, config.shapes.all) == (128, (64, 128, 256))
    assert config.verify.min_sqnr_db == 40
    assert (config.verify.argmax_margin, config.verify.max_excluded_share) == (0.05, 0.02)


def refusal(tmp_path, old, new):
    assert old in TEXT
    path = tmp_path / "magic-8-ball.toml"
    path.write_text(TEXT.replace(old, new))
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
        ("[64, 128, 256]", "[64, 128, 512]", "F: shape 512 is beyond the model's max_seq_len 256 at `$`"),
        ("n_kv_heads = 2", "n_kv_heads = 3", "F: d_model 128, n_heads 4 and n_kv_heads 3 must each divide"),
        ('"float16"', '"int8"', "F: Invalid enum value 'int8' at `$.convert.compute_precision`"),
        ("seed = 8\n\n[shapes]", 'seed = "8"\n\n[shapes]', "F: Expected `int`, got `str` at `$.training.seed`"),
        ('name = "magic-8-ball"', 'name = "../x"', "F: `name` must be lower case letters, digits, '-' and '.'"),
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
            "F: `min_right_mood` must lie between 0 and 1",
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
def test_an_impossible_configuration_is_refused_by_name(tmp_path, old, new, text):
    assert refusal(tmp_path, old, new).startswith(text)


def test_different_vocabularies_are_refused(tmp_path):
    found = refusal(tmp_path, "[model]\nvocab_size = 512", "[model]\nvocab_size = 640")
    assert found.startswith("F: the tokenizer's vocab_size 512 is not the model's 640 at `$`")


def test_an_unknown_major_version(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(TEXT.replace('schema_version = "1.0"', 'schema_version = "2.0"'))
    with pytest.raises(SchemaVersionError, match=r"schema_version '2\.0'"):
        read_config(path)
