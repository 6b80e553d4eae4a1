"""Compare every format of a run's model with its checkpoint on the same text, in one table.

The exit code is 0 if every format that ran is within its tolerances, and 3 if one is not or failed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.version import Version

from coremill.core import layout
from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import RunConfig, read_config
from coremill.core.documents import write_json
from coremill.core.errors import GATES_FAILED, OK, ConfigError, StageError
from coremill.core.matrix import (
    AT_LEAST,
    FORMATS,
    GGUF,
    TRANSFORMERS,
    AgreementMatrix,
    FormatFailed,
    FormatMeasured,
    FormatNotRun,
    FormatRow,
    Measure,
    Tolerance,
)
from coremill.core.publish import check_apart
from coremill.core.stage import StageContext
from coremill.infra.version_gate import check_installed

# This module imports nothing heavy, so that missing files are reported by name before an import fails.

log = logging.getLogger(__name__)

NEEDS = ("torch", "coremltools", "numpy", "tokenizers", "transformers", "xllamacpp")

_COLUMNS = {
    Measure.MAX_ABS_ERR: "max abs",
    Measure.SQNR_DB: "SQNR dB",
    Measure.KL_NATS: "KL nats",
    Measure.TOP1_AGREEMENT: "top-1",
    Measure.EXCLUDED_SHARE: "ties",
    Measure.PERPLEXITY_CHANGE: "perplexity",
}


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, FORMATS))
    formats = "\n".join(f"  {name:<{width}}  {form.purpose}" for name, form in FORMATS.items())
    parser = command_parser("agree", f"{__doc__}\nformats:\n{formats}", example="--run magic-8-ball")
    parser.add_argument("--run", required=True, metavar="NAME", help="a finished run: build/NAME")
    parser.add_argument("--config", type=Path, help="the run's configuration (default: configs/NAME.toml)")
    parser.add_argument(
        "--build-dir", type=Path, default=Path("build"), help="where runs are built (default: %(default)s)"
    )
    parser.add_argument("--torch", metavar="LANE", help="the lane (default: the running torch's)")
    parser.add_argument("--shape", type=int, metavar="T", help="the sequence length (default: the primary shape)")
    parser.add_argument("--formats", metavar="NAME,…", help="run only these (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the matrix as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    chosen = _chosen(options.formats)
    path: Path = options.config or Path("configs") / f"{options.run}.toml"
    config = read_config(path)
    if config.name != options.run:
        raise ConfigError(
            f"{path} configures the run {config.name!r}", expected=f"the configuration of {options.run!r}"
        )
    check_installed(*NEEDS)
    context = _context(options, config, options.torch or _running_torch())
    _check_there(context, chosen, path)
    if options.out is not None:
        check_apart([options.out], [path, *_artifacts(context, chosen)])
    import coremill.coreml.converter  # noqa: F401  # first: it imports coremltools without its messages
    from coremill.core.outputs import check_writable
    from coremill.verification.matrix import Subject, agreement_matrix

    if options.out is not None:
        check_writable(options.out.parent)
    subject = Subject(
        run=config.name,
        checkpoint=layout.checkpoint_file(context.model_dir, config.name),
        tokenizer=layout.tokenizer_file(context.tokenizer_dir),
        prompts=context.prompts_dir,
        contract=layout.contract_file(context.inputs["export"], config.name),
        package=layout.package_dir(context.inputs["convert"], config.name),
        hf=context.inputs["hf"] if "hf" in config.formats else None,
        hf_dtype=config.hf.dtype,
        gguf={kind: layout.gguf_file(context.inputs["gguf"], config.name, kind) for kind in config.gguf_types},
    )
    matrix = agreement_matrix(subject, config.verify, config.convert, seq_len=options.shape, chosen=chosen)
    if options.out is not None:
        write_json(options.out, matrix)
        log.info("wrote %s", options.out)
    _print(matrix)
    return OK if matrix.within else GATES_FAILED


def _chosen(names: str | None) -> tuple[str, ...]:
    chosen = tuple(FORMATS) if names is None else tuple(names.split(","))
    if unknown := [name for name in chosen if name not in FORMATS]:
        raise ConfigError(f"--formats {','.join(unknown)}: no such format", expected=f"some of {','.join(FORMATS)}")
    return chosen


def _running_torch() -> str:
    """Return the lane of this process without importing torch."""
    from importlib.metadata import version

    return Version(version("torch")).public


def _context(options: argparse.Namespace, config: RunConfig, lane: str) -> StageContext[RunConfig]:
    """Return the run's directories as a stage of the lane receives them."""
    run = layout.RunLayout(build=options.build_dir.resolve(), run=config.name)
    shared = {name: run.stage(name) for name in ("dataset", "training", "texts", "import", "hf", "gguf")}
    of_lane = {name: run.stage(name, lane) for name in ("export", "convert")}
    return StageContext(config=config, lane=lane, inputs={**shared, **of_lane}, out=run.root)


def _artifacts(context: StageContext[RunConfig], chosen: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files that are read, in the order in which a build writes them."""
    name, export = context.config.name, context.inputs["export"]
    yield layout.checkpoint_file(context.model_dir, name)
    yield layout.tokenizer_file(context.tokenizer_dir)
    yield layout.contract_file(export, name)
    yield layout.program_file(export, name, context.config.export.frontend)
    if any(FORMATS[each].reads == "package" for each in chosen):
        yield layout.package_dir(context.inputs["convert"], name)
    if TRANSFORMERS in chosen and "hf" in context.config.formats:
        yield layout.parity_report(context.inputs["hf"])
    for format_name, kind in GGUF.items():
        if format_name in chosen and kind in context.config.gguf_types:
            yield layout.parity_report(context.inputs["gguf"])
            yield layout.gguf_file(context.inputs["gguf"], name, kind)


def _check_there(context: StageContext[RunConfig], chosen: tuple[str, ...], config: Path) -> None:
    for path in _artifacts(context, chosen):
        if not path.exists():
            raise StageError(
                f"{path} does not exist",
                expected=f"the finished run {context.config.name}, lane {context.lane}",
                run=f"nox -s pipeline -- --config {config} --torch {context.lane}",
            )


# The table


def _print(matrix: AgreementMatrix) -> None:
    from coremill.mil.commands.output import console, table, title

    to = console()
    sequences = f"{matrix.sequences} sequence{'s' if matrix.sequences > 1 else ''}"
    to.print(title(f"{matrix.run}, lane {matrix.lane}: {sequences} at {matrix.shape}"), soft_wrap=True)
    to.print(table(["format", *(f">{text}" for text in _COLUMNS.values()), ""], map(_cells, matrix.rows)))
    to.print()
    to.print(table(["tolerance", "of", "from"], map(_tolerance_cells, matrix.tolerances)))
    for note in _notes(matrix):
        to.print(note, markup=False)


def _cells(row: FormatRow) -> list[str]:
    if isinstance(row, FormatMeasured):
        outcome = "failed" if row.outside else "passed"
        return [row.format, *(_figure(row, measure) for measure in _COLUMNS), outcome]
    outcome = "failed" if isinstance(row, FormatFailed) else "not_run"
    return [row.format, *["–"] * len(_COLUMNS), outcome]


def _figure(row: FormatMeasured, measure: Measure) -> str:
    from coremill.mil.commands.output import decibels

    value = row.value(measure)
    if value is None:
        return "–"
    match measure:
        case Measure.SQNR_DB:
            return decibels(value)
        case Measure.TOP1_AGREEMENT:
            return f"{value:.2%}"
        case Measure.EXCLUDED_SHARE:
            return str(row.excluded)
        case Measure.PERPLEXITY_CHANGE:
            assert row.perplexity is not None  # row.value() would have been None
            signed = row.perplexity.measured / row.perplexity.reference - 1
            return f"{row.perplexity.measured:.4g} {signed:+.2%}"
    return f"{value:.2g}"


def _tolerance_cells(tolerance: Tolerance) -> list[str]:
    sign = "≥" if tolerance.measure in AT_LEAST else "≤"
    shares = (Measure.TOP1_AGREEMENT, Measure.EXCLUDED_SHARE, Measure.PERPLEXITY_CHANGE)
    bound = f"{tolerance.bound:.4g}" if tolerance.measure not in shares else f"{100 * tolerance.bound:.4g} %"
    every = set(tolerance.rows) == FORMATS.keys() - GGUF.keys()
    of = "every row except GGUF" if every else ", ".join(tolerance.rows)
    return [f"{_COLUMNS[tolerance.measure]} {sign} {bound}", of, tolerance.source]


def _notes(matrix: AgreementMatrix) -> Iterator[str]:
    """Yield what does not fit a cell: the references, and the reasons of rows that did not pass."""
    yield ""
    measured = [row for row in matrix.rows if isinstance(row, FormatMeasured)]
    for reference in dict.fromkeys(row.reference for row in measured):
        yield f"{', '.join(row.format for row in measured if row.reference == reference)}: against {reference}"
    for judged in dict.fromkeys(row.judged for row in measured):
        yield (
            f"top-1 of {judged} positions, except ties, where the reference's best leads by no more than "
            f"{matrix.argmax_margin:g} logits"
        )
    for row in matrix.rows:
        if isinstance(row, FormatNotRun):
            yield f"not_run: {row.format}: {row.reason}"
        elif isinstance(row, FormatFailed):
            yield f"failed: {row.format}: {row.error}"
        elif row.outside:
            yield f"failed: {row.format}: {', '.join(_COLUMNS[each] for each in row.outside)} outside its tolerance"


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
