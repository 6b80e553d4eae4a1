"""Measure the results of training.

    python benchmarks/training.py seed
    python benchmarks/training.py config

`seed` trains with the settings of the pipeline that coremill was developed from, 128 rows in batches of 4 for 64
steps, at several learning rates. That pipeline published a loss that falls from 3.2 to 1.8, but its model could see
the next token (it had no causal mask), and its teacher always preferred three tokens.

`config` runs a configuration's dataset and training, and has the trained model answer 1,000 held-out questions.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coremill.core.answer_key import AnswerKey
from coremill.core.command import exit_on_error
from coremill.core.config import DatasetConfig, read_distilled_config
from coremill.data.judge import judge
from coremill.data.kinds import KINDS
from coremill.data.make_toy_kd import DatasetFiles, make_dataset
from coremill.data.rows import Row, read_rows
from coremill.model.decoding import generate, greedy
from coremill.model.student import Student
from coremill.text.student_tokenizer import Tokenizer
from coremill.training.batches import encode_rows
from coremill.training.distill import Distilled, distill, evaluate
from coremill.training.metrics import HeldoutMetrics, StepMetrics
from coremill.training.recipe import Recipe, default_recipe, recipe_of

PUBLISHED_LOSS = 1.8
"""The loss at the 64th step, from the seed pipeline's status page."""

LEARNING_RATES = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3)
ASKED = 1000
MAX_NEW_TOKENS = 64


def make(config: DatasetConfig, folder: Path) -> tuple[Tokenizer, list[Row], list[Row]]:
    files = DatasetFiles(
        train=folder / "train.jsonl", heldout=folder / "heldout.jsonl", tokenizer=folder / "tokenizer.json"
    )
    make_dataset(config, files)
    return Tokenizer.load(files.tokenizer), list(read_rows(files.train)), list(read_rows(files.heldout))


def train(recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], heldout: Sequence[Row]) -> Distilled:
    max_seq_len = recipe.model.max_seq_len
    return distill(
        encode_rows(rows, tokenizer, max_seq_len=max_seq_len),
        encode_rows(heldout, tokenizer, max_seq_len=max_seq_len),
        model=recipe.model,
        recipe=recipe.training,
        pad_id=tokenizer.pad_id,
    )


def seed_settings(folder: Path, seed: int) -> None:
    """128 rows, batches of 4, 64 steps: the best answer-token cross entropy of several learning rates."""
    tokenizer, rows, heldout = make(DatasetConfig(kind="magic-8-ball", n=128, heldout_n=256, seed=seed), folder)
    recipe = default_recipe("magic-8-ball", vocab_size=tokenizer.vocab_size)
    print(f"{len(rows)} rows, batches of {recipe.training.batch_size}, {recipe.training.epochs} epochs, T = 1")
    print(
        "nats per answer token; CE is with the teacher's distribution, its lower bound is the teacher's entropy\n"
    )
    print("learning rate   training CE   held-out CE   best step's CE with the sampled answers   bound")
    best = float("inf")
    floor = 0.0
    for rate in LEARNING_RATES:
        training = msgspec.structs.replace(recipe.training, learning_rate=rate)
        run = train(msgspec.structs.replace(recipe, training=training), tokenizer, rows, heldout)
        seen = evaluate(
            run.student,
            encode_rows(rows, tokenizer, max_seq_len=recipe.model.max_seq_len),
            step=run.steps,
            pad_id=tokenizer.pad_id,
        )
        unseen = min(
            (record for record in run.metrics if isinstance(record, HeldoutMetrics)),
            key=lambda record: record.cross_entropy_nats,
        )
        step_ce = min(record.ce for record in run.metrics if isinstance(record, StepMetrics))
        best, floor = min(best, unseen.cross_entropy_nats), unseen.teacher_entropy_nats
        print(
            f"{rate:13g}   {seen.cross_entropy_nats:11.3f}   {unseen.cross_entropy_nats:11.3f}   "
            f"{step_ce:39.3f}   {floor:5.3f}"
        )
    print(
        f"\nbest held-out CE {best:.3f}, the teacher's entropy {floor:.3f}, the seed's published {PUBLISHED_LOSS}"
    )


def configured(folder: Path, config_file: Path) -> None:
    """The held-out figures of a configuration's model in torch eager."""
    config = read_distilled_config(config_file)
    tokenizer, rows, heldout = make(config.dataset, folder)
    start, start_cpu = time.perf_counter(), _cpu_s()
    run = train(recipe_of(config), tokenizer, rows, heldout[:256])
    print(f"{config_file.name}: {run.student.n_parameters:,} parameters, {len(rows)} rows, {run.steps} steps")
    print(
        f"training: {time.perf_counter() - start:.1f} s, {_cpu_s() - start_cpu:.1f} s of CPU; 1-minute load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    result = evaluate(
        run.student,
        encode_rows(heldout, tokenizer, max_seq_len=config.model.max_seq_len),
        step=run.steps,
        pad_id=tokenizer.pad_id,
    )
    print(
        f"held-out rows: {result.rows}; nats per answer token: KL {result.kl_nats:.5f}, cross entropy "
        f"{result.cross_entropy_nats:.5f}, teacher's entropy {result.teacher_entropy_nats:.5f}"
    )
    print(f"halt head: {result.halt_accuracy}")
    answer(run.student, tokenizer, heldout[:ASKED], KINDS[config.dataset.kind].answer_key())


def answer(student: Student, tokenizer: Tokenizer, rows: Sequence[Row], key: AnswerKey) -> None:
    """Answer each row's question greedily, and print how many answers are exact and how many right."""

    def next_logits(tokens: list[int]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            logits: Tensor = student(torch.tensor([tokens], dtype=torch.int32))[0]
        return logits[0, -1].numpy()

    exact = right_mood = with_mood = right_call = with_call = 0
    wrong: list[tuple[str, str]] = []
    for row in rows:
        new = generate(
            next_logits,
            tokenizer.encode_prompt(row.prompt),
            stop_ids=(tokenizer.end_id,),
            max_new_tokens=MAX_NEW_TOKENS,
            sampler=greedy,
        )
        verdict = judge(row, tokenizer.decode_answer(new), key)
        exact += verdict.exact
        if row.mood is None:
            with_call += 1
            right_call += verdict.right
        else:
            with_mood += 1
            right_mood += verdict.right
        if not (verdict.exact and verdict.right):
            wrong.append((row.prompt, tokenizer.decode_answer(new)))
    print(
        f"asked {len(rows)}: exact {exact}; right mood {right_mood} of {with_mood}; "
        f"right tool call {right_call} of {with_call}"
    )
    for prompt, answer in wrong[:10]:
        print(f"  wrong: {prompt!r} -> {answer!r}")


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    seed = kinds.add_parser("seed", help="the seed pipeline's settings at several learning rates")
    seed.add_argument("--seed", type=int, default=8, help="the random seed of the dataset (default: %(default)s)")
    config = kinds.add_parser("config", help="the held-out figures of a configuration")
    config.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "magic-8-ball.toml")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.kind == "seed":
            seed_settings(Path(folder), args.seed)
        else:
            configured(Path(folder), args.config)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
