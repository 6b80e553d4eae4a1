"""Train a toy student: reads rows, a tokenizer and a recipe, and writes a checkpoint and metrics."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import TOY_MODEL_TYPES, DistilledRun, read_distilled_config
from coremill.core.contract import TokenizerRef
from coremill.core.digest import file_digest
from coremill.core.errors import ConfigError, TrainingError, VocabularyMismatchError
from coremill.core.layout import checkpoint_file, dataset_file, heldout_file, metrics_file, tokenizer_file
from coremill.core.outputs import check_writable
from coremill.core.publish import check_apart, check_replaceable
from coremill.core.stage import Figures, StageContext
from coremill.data.rows import Row, read_rows
from coremill.model.checkpoint import checkpoint_of, save_checkpoint
from coremill.text.student_tokenizer import Tokenizer
from coremill.training.batches import encode_rows
from coremill.training.distill import Distilled, Watch, distill
from coremill.training.metrics import Metrics, RunMetrics, StepMetrics, write_metrics
from coremill.training.recipe import Recipe, default_recipe, recipe_of

log = logging.getLogger(__name__)

HELDOUT_ROWS = 256
"""Held-out rows for the evaluation after each epoch; verification uses more of them, and decodes answers."""

_LOG_LINES = 10
"""Number of log lines of a run if stderr is not a terminal."""


@dataclass(frozen=True, kw_only=True)
class TrainingFiles:
    """The files that training reads and writes."""

    train: Path
    heldout: Path | None
    tokenizer: Path
    checkpoint: Path
    metrics: Path


def train(
    make_recipe: Callable[[Tokenizer], Recipe], files: TrainingFiles, *, watch: Watch | None = None
) -> Figures:
    """Distil a student from `files.train`, and write its checkpoint and its metrics.

    Nothing is written if training fails.

    Returns:
        The number of parameters, rows and steps, the ends of the loss curve, and the distance from the teacher.

    Raises:
        DatasetError, TokenizerError: an input is unreadable.
        VocabularyMismatchError: the recipe's vocabulary size is not the tokenizer's.
        TrainingError: rows are too long or of another kind, held-out rows are among the training rows, or the loss
            diverged.
        OutputError: an output cannot be written.
    """
    for path in (files.checkpoint, files.metrics):
        check_writable(path.parent)
        check_replaceable(path)
    tokenizer = Tokenizer.load(files.tokenizer)
    recipe = make_recipe(tokenizer)
    if tokenizer.vocab_size != recipe.model.vocab_size:
        raise VocabularyMismatchError(
            f"{files.tokenizer} has {tokenizer.vocab_size} tokens, the model {recipe.model.vocab_size}",
            expected="the tokenizer's `vocab_size` in the configuration",
        )
    rows = list(read_rows(files.train))
    _check_kind(rows, files.train, recipe.model_type)
    heldout = list(islice(read_rows(files.heldout), HELDOUT_ROWS)) if files.heldout else []
    if shared := {row.prompt for row in rows} & {row.prompt for row in heldout}:
        raise TrainingError(
            f"{len(shared)} of the questions in {files.heldout} are among the training rows: {min(shared)!r}",
            expected="held-out rows that are not among the training rows",
            run="python -m coremill.data.make_toy_kd --help",
        )
    distilled = distill(
        encode_rows(rows, tokenizer, max_seq_len=recipe.model.max_seq_len),
        encode_rows(heldout, tokenizer, max_seq_len=recipe.model.max_seq_len),
        model=recipe.model,
        recipe=recipe.training,
        pad_id=tokenizer.pad_id,
        watch=watch,
    )
    save_checkpoint(
        files.checkpoint,
        checkpoint_of(
            distilled.student,
            model_type=recipe.model_type,
            step=distilled.steps,
            tokenizer=TokenizerRef(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest),
            training={
                "dataset_digest": file_digest(files.train),
                "rows": len(rows),
                "steps": distilled.steps,
                "seed": recipe.training.seed,
                "recipe": msgspec.to_builtins(recipe.training),
                "loss": _loss_ends(distilled),
                "heldout": msgspec.to_builtins(distilled.heldout),
            },
        ),
    )
    write_metrics(files.metrics, distilled.metrics)
    return _figures(distilled, n_rows=len(rows))


def _check_kind(rows: Iterable[Row], path: Path, model_type: str) -> None:
    """Check that rows of one of coremill's kinds are for a model of that kind, whose rules judge its answers.

    Rows of other kinds are not checked.

    Raises:
        TrainingError: the rows are of another of coremill's kinds.
    """
    kinds = {row.metadata["kind"] for row in rows if row.metadata.get("kind") in TOY_MODEL_TYPES}
    if wrong := sorted(kinds - {model_type}):
        raise TrainingError(
            f"{path} contains rows of kind {wrong[0]!r}, but the model_type is {model_type!r}",
            expected="rows of the same kind as the model_type",
            run="python -m coremill.training.run_toy_distill --help, for --magic-8-ball",
        )


def _loss_ends(distilled: Distilled) -> dict[str, float]:
    losses = distilled.losses
    return {"first": losses[0], "last": losses[-1], "best": min(losses)}


def _figures(distilled: Distilled, *, n_rows: int) -> Figures:
    figures: Figures = {
        "parameters": distilled.student.n_parameters,
        "rows": n_rows,
        "steps": distilled.steps,
        **{f"loss_{end}": loss for end, loss in _loss_ends(distilled).items()},
    }
    if (heldout := distilled.heldout) is not None:
        figures |= {
            "heldout_rows": heldout.rows,
            "heldout_kl_nats": heldout.kl_nats,
            "heldout_cross_entropy_nats": heldout.cross_entropy_nats,
            "teacher_entropy_nats": heldout.teacher_entropy_nats,
        }
        if heldout.halt_accuracy is not None:
            figures["heldout_halt_accuracy"] = heldout.halt_accuracy
    return figures


def run_stage(context: StageContext[DistilledRun]) -> Figures:
    """Train on the files of the dataset stage, and write the checkpoint and metrics to `context.out`."""
    config, dataset = context.config, context.inputs["dataset"]
    files = TrainingFiles(
        train=dataset_file(dataset),
        heldout=heldout_file(dataset),
        tokenizer=tokenizer_file(dataset),
        checkpoint=checkpoint_file(context.out, config.name),
        metrics=metrics_file(context.out),
    )
    with _progress() as watch:
        return train(lambda _: recipe_of(config), files, watch=watch)


def main(argv: list[str] | None = None) -> int:
    """Run the command, which trains and prints one figure per line."""
    args = _parser().parse_args(argv)
    files = TrainingFiles(
        train=args.rows,
        heldout=_heldout(args),
        tokenizer=args.tokenizer or args.rows.with_name("tokenizer.json"),
        checkpoint=args.out,
        metrics=args.metrics_out or metrics_file(args.out.parent),
    )
    check_apart([files.checkpoint, files.metrics], [files.train, files.heldout, files.tokenizer, args.config])
    with _progress() as watch:
        figures = train(_recipe_maker(args), files, watch=watch)
    for name, value in figures.items():
        sys.stdout.write(f"{name}  {value:.6g}\n" if isinstance(value, float) else f"{name}  {value}\n")
    sys.stdout.write(f"{file_digest(files.checkpoint).removeprefix('sha256:')}  {files.checkpoint}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "train",
        "Train a toy student from a dataset that make_toy_kd wrote.",
        example="--in magic_8_ball.jsonl --out magic_8_ball.ckpt --epochs 2 --magic-8-ball",
    )
    parser.add_argument(
        "--in", dest="rows", type=Path, required=True, help="the training rows, one JSON object per line"
    )
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint")
    parser.add_argument("--epochs", type=int, help="passes over the rows (default: that of the recipe)")
    parser.add_argument(
        "--magic-8-ball", action="store_true", help='set the model_type "magic-8-ball" instead of "toy"'
    )
    parser.add_argument("--config", type=Path, help="a run's configuration; its recipe is used")
    parser.add_argument("--tokenizer", type=Path, help="the tokenizer (default: tokenizer.json next to --in)")
    parser.add_argument("--heldout", type=Path, help="held-out rows (default: <stem>.heldout.jsonl next to --in)")
    parser.add_argument("--metrics-out", type=Path, help="the metrics (default: metrics.jsonl next to --out)")
    return parser


def _heldout(args: argparse.Namespace) -> Path | None:
    if args.heldout is not None:
        return Path(args.heldout)
    default = Path(args.rows).with_name(f"{args.rows.stem}.heldout.jsonl")
    if default.exists():
        return default
    log.warning("there is no %s: the student is not evaluated on held-out rows", default)
    return None


def _recipe_maker(args: argparse.Namespace) -> Callable[[Tokenizer], Recipe]:
    """A function that returns the recipe given by the options; the default one depends on the tokenizer."""
    model_type = "magic-8-ball" if args.magic_8_ball else "toy"
    configured = recipe_of(read_distilled_config(args.config)) if args.config is not None else None
    if configured is not None and args.magic_8_ball and configured.model_type != model_type:
        raise ConfigError(
            f"--magic-8-ball with {args.config}, whose model_type is {configured.model_type!r}",
            expected="a configuration with the model_type 'magic-8-ball', or no --magic-8-ball",
        )

    def make(tokenizer: Tokenizer) -> Recipe:
        recipe = configured or default_recipe(model_type, vocab_size=tokenizer.vocab_size)
        if args.epochs is None:
            return recipe
        try:
            training = msgspec.structs.replace(recipe.training, epochs=args.epochs)
        except ValueError as failure:
            raise ConfigError(f"--epochs {args.epochs}: {failure}", expected="a positive number") from failure
        return msgspec.structs.replace(recipe, training=training)

    return make


@contextlib.contextmanager
def _progress() -> Iterator[Watch]:
    """A progress bar with loss and speed if stderr is a terminal, otherwise a few log lines."""
    if not sys.stderr.isatty():
        yield _log_lines()
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[tokens_per_s]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=None, loss=float("nan"), tokens_per_s=0.0)

        def watch(record: Metrics) -> None:
            if isinstance(record, RunMetrics):
                bar.update(task, total=record.steps)
            elif isinstance(record, StepMetrics):
                bar.update(task, completed=record.step, loss=record.loss, tokens_per_s=record.tokens_per_s)

        yield watch


def _log_lines() -> Watch:
    n_steps = 0

    def watch(record: Metrics) -> None:
        nonlocal n_steps
        if isinstance(record, RunMetrics):
            n_steps = record.steps
        elif isinstance(record, StepMetrics):
            if record.step % max(1, n_steps // _LOG_LINES) == 0:
                log.info(
                    "step %d of %d: loss %.4f, %.0f tokens/s",
                    record.step,
                    n_steps,
                    record.loss,
                    record.tokens_per_s,
                )
        else:
            log.info("held-out rows after step %d: KL %.4f nats per answer token", record.step, record.kl_nats)

    return watch


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
