"""A run whose GGUF files cannot be written: its report has what was verified; the format can be switched off."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from coremill.core import layout as names
from coremill.core.documents import read_json
from coremill.core.gates import Outcome
from coremill.core.layout import RunLayout
from coremill.core.reports import RunSummary
from coremill.pipeline.environments import PRIMARY_LANE, TRAIN, installed

ROOT = Path(__file__).parents[2]

# A BPE with a token for each byte, as Llama 2 has. Rows of 64 are too short for q4_k, whose blocks have 256 values.
MODEL = """
import sys
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\\u2581", *"abcdefghijklmnopqrstuvwxyz"]
vocab = {word: i for i, word in enumerate(words)}
tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\\u2581"), normalizers.Replace(" ", "\\u2581")])
tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("\\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:3]])
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
).save_pretrained(sys.argv[1])
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
)).save_pretrained(sys.argv[1])
"""
CONFIG = """
schema_version = "1.0"
name = "bytes"
model_type = "llama"
FORMATS
[weights]
source = "MODEL"
[texts]
min_characters = 1000
max_characters = 2000
[shapes]
primary = 64
all = [64]
[convert]
[gguf]
types = ["q4_k"]
[verify]
max_excluded_share = 0.5
decoded_tokens = 4
"""


@pytest.fixture(scope="module")
def built(nox_build, tmp_path_factory):
    """Return a function that builds the run with a line in its configuration; it returns the summary too."""
    tmp = tmp_path_factory.mktemp("bytes")
    python = installed(ROOT)[TRAIN.name].python
    subprocess.run([python, "-c", MODEL, tmp / "model"], check=True, capture_output=True)
    layout = RunLayout(build=tmp / "build", run="bytes")

    def build(formats):
        config = tmp / "bytes.toml"
        config.write_text(CONFIG.replace("MODEL", str(tmp / "model")).replace("FORMATS", formats))
        ended = nox_build("pipeline", layout.build, "--config", str(config))
        return ended, read_json(names.summary_file(layout.stage("report")), RunSummary)

    return build


def outcomes(summary):
    return {row.stage: row.outcome for row in summary.stages}


def test_format_that_cannot_be_written_fails_the_build_after_the_report(built):
    ended, summary = built("")
    assert ended.returncode == 1
    expected = dict.fromkeys(("texts", "import", "hf", "export", "convert", "verify"), Outcome.PASSED)
    assert outcomes(summary) == {**expected, "gguf": Outcome.FAILED}
    (lane,) = summary.verified
    assert (lane.lane, lane.gates_ok, summary.gates_ok) == (PRIMARY_LANE, True, False)
    reason = next(row.reason for row in summary.stages if row.stage == "gguf")
    assert "q4_k" in reason
    assert "gates_ok: false; stages: gguf (failed)\n" in ended.stdout
    assert "gguf          | failed with exit code 49\n" in ended.stdout
    assert reason[:40] in " ".join(ended.stdout.split())


def test_format_that_is_switched_off_is_not_missing(built):
    ended, summary = built('formats = ["hf"]')
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert set(outcomes(summary).values()) == {Outcome.PASSED}
    assert (summary.switched_off, summary.gates_ok) == (("gguf",), True)
    assert "gates_ok: true\n" in ended.stdout
    assert "gguf          |" not in ended.stdout
