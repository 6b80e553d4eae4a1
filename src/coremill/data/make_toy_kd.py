"""Write a toy distillation dataset: training rows, held-out rows, their tokenizer and the answer key.

Rows are JSON lines; the fields are those of `coremill.data.rows.Row`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress

from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import DatasetConfig, DistilledRun
from coremill.core.documents import write_json
from coremill.core.layout import answer_key_file, dataset_file, heldout_file, tokenizer_file
from coremill.core.publish import check_replaceable
from coremill.core.stage import Figures, StageContext
from coremill.data import magic_8_ball, toy
from coremill.data.grammar import Side, generate_rows
from coremill.data.kinds import KINDS
from coremill.data.lines import write_lines
from coremill.data.rows import Row
from coremill.text.student_tokenizer import TOOL_CALL, Tokenizer

TOKENIZER_ROWS = (256, 16_384)
"""The least and the most training rows that the tokenizer learns from: enough for a vocabulary even with a smaller
dataset, and a bound of the memory that a larger one takes."""

_PROGRESS_FROM_ROWS = 20_000
_ROWS_PER_UPDATE = 1_000

Watch = Callable[[Iterable[Row], str, int], Iterable[Row]]
"""Passes rows through, given their name and number, so that a command can show progress."""


class DatasetFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The paths of a dataset's files."""

    train: Path
    heldout: Path
    tokenizer: Path

    @property
    def answers(self) -> Path:
        """The answer key, next to the held-out rows."""
        return answer_key_file(self.heldout.parent)


def make_dataset(config: DatasetConfig, files: DatasetFiles, *, watch: Watch | None = None) -> Figures:
    """Write the dataset that `config` describes to `files`, each of them atomically.

    Returns:
        The numbers of rows and the SHA-256 of each file; the share of tool calls and the tokens per row (of prompt
        and answer, with special tokens) over the first `sampled_rows` rows, from which the tokenizer learned.

    Raises:
        TokenizerError: the rows do not yield a vocabulary of that size.
        OutputError: a file cannot be written.
    """
    kind = KINDS[config.kind]
    grammar = kind.grammar()

    def rows(side: Side, n: int) -> Iterable[Row]:
        generated = generate_rows(grammar, side=side, n=n, seed=config.seed)
        return generated if watch is None else watch(generated, f"{side} rows", n)

    for path in (files.train, files.heldout, files.tokenizer, files.answers):
        check_replaceable(path)
    # The tokenizer is trained first, so that an error leaves all files unchanged.
    fewest, most = TOKENIZER_ROWS
    sample_size = max(fewest, min(config.n, most))
    sample = list(generate_rows(grammar, side="train", n=sample_size, seed=config.seed))
    tokenizer = _train_tokenizer(sample, grammar.answers(), config.vocab_size)
    train_digest = write_lines(files.train, rows("train", config.n))
    heldout_digest = write_lines(files.heldout, rows("heldout", config.heldout_n))
    tokenizer.save(files.tokenizer)
    write_json(files.answers, kind.answer_key())
    lengths = [
        len(tokenizer.encode_prompt(row.prompt)) + len(tokenizer.encode_answer(row.teacher_text)) for row in sample
    ]
    return {
        "rows": config.n,
        "heldout_rows": config.heldout_n,
        "vocab_size": tokenizer.vocab_size,
        "sampled_rows": sample_size,
        "tool_call_share": sum(row.teacher_text.startswith(TOOL_CALL) for row in sample) / sample_size,
        "longest_row_tokens": max(lengths),
        "mean_row_tokens": sum(lengths) / sample_size,
        "train_sha256": train_digest.removeprefix("sha256:"),
        "heldout_sha256": heldout_digest.removeprefix("sha256:"),
        "tokenizer_sha256": tokenizer.digest.removeprefix("sha256:"),
    }


def _train_tokenizer(sample: Iterable[Row], answers: Iterable[str], vocab_size: int) -> Tokenizer:
    def texts() -> Iterator[str]:
        # The marker of a tool call is a special token, so merges of its bytes would be wasted.
        for row in sample:
            yield row.prompt
            yield row.teacher_text.removeprefix(TOOL_CALL)
        for answer in answers:
            yield answer.removeprefix(TOOL_CALL)

    return Tokenizer.train(texts(), vocab_size)


def run_stage(context: StageContext[DistilledRun]) -> Figures:
    """Run the dataset stage of a pipeline: write the files into `context.out`."""
    files = DatasetFiles(
        train=dataset_file(context.out),
        heldout=heldout_file(context.out),
        tokenizer=tokenizer_file(context.out),
    )
    return make_dataset(context.config.dataset, files)


def main(argv: list[str] | None = None) -> int:
    """Run the command: write a dataset, and print the digests of the rows and the tokenizer as `sha256sum` does."""
    config, files = _parse_args(argv)
    console = Console(stderr=True)
    is_long = config.n + config.heldout_n >= _PROGRESS_FROM_ROWS
    with Progress(console=console, disable=not (is_long and console.is_terminal), transient=True) as progress:
        figures = make_dataset(config, files, watch=_watched(progress))
    for name in DatasetFiles.__struct_fields__:
        sys.stdout.write(f"{figures[f'{name}_sha256']}  {getattr(files, name)}\n")
    return 0


def _parse_args(argv: list[str] | None) -> tuple[DatasetConfig, DatasetFiles]:
    parser = command_parser(
        "dataset",
        "Write a toy distillation dataset, with held-out rows, a tokenizer and an answer key.",
        example="--out magic_8_ball.jsonl --n 128 --magic-8-ball",
    )
    parser.add_argument("--out", type=Path, required=True, help="the training rows, as JSON lines")
    parser.add_argument("--n", type=int, required=True, help="number of training rows")
    parser.add_argument(
        "--magic-8-ball", action="store_true", help="write the Magic 8 Ball (default: the plain toy of actions)"
    )
    parser.add_argument("--heldout-out", type=Path, help="the held-out rows (default: <stem>.heldout.jsonl)")
    parser.add_argument(
        "--heldout-n", type=int, help="number of held-out rows (default: a tenth of --n, at least 64)"
    )
    parser.add_argument("--tokenizer-out", type=Path, help="the tokenizer (default: tokenizer.json next to --out)")
    parser.add_argument("--seed", type=int, default=8, help="same seed, same bytes (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=512, help="size of the tokenizer's vocabulary (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    files = DatasetFiles(
        train=args.out,
        heldout=args.heldout_out or args.out.with_name(f"{args.out.stem}.heldout.jsonl"),
        tokenizer=args.tokenizer_out or args.out.with_name("tokenizer.json"),
    )
    if len({path.resolve() for path in (files.train, files.heldout, files.tokenizer, files.answers)}) < 4:
        parser.error(f"--out, --heldout-out, --tokenizer-out and {files.answers.name} must be different files")
    try:
        config = DatasetConfig(
            kind=magic_8_ball.KIND if args.magic_8_ball else toy.KIND,
            n=args.n,
            heldout_n=max(args.n // 10, 64) if args.heldout_n is None else args.heldout_n,
            seed=args.seed,
            vocab_size=args.vocab_size,
        )
    except ValueError as failure:
        parser.error(str(failure))
    return config, files


def _watched(progress: Progress) -> Watch:
    """Return a `Watch` that shows a bar on `progress` for each set of rows.

    The caller closes `progress`. If this generator closed it, as `rich.progress.track` does, rows abandoned after
    an error would close it when the interpreter exits, and wait forever for a thread that no longer exists.
    """

    def watch(rows: Iterable[Row], what: str, n: int) -> Iterator[Row]:
        bar = progress.add_task(what, total=n)
        for number, row in enumerate(rows, start=1):
            yield row
            if number % _ROWS_PER_UPDATE == 0:
                progress.update(bar, completed=number)

    return watch


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
