"""Check a checkpoint.

The exit code is 0 if every check that ran passed, otherwise that of the first failed check's error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from coremill.core.command import command_parser, exit_on_error
from coremill.core.errors import CheckpointContentError
from coremill.core.layout import tokenizer_file
from coremill.model.checkpoint import Checkpoint, build_student, check_vocabulary, load_checkpoint
from coremill.model.student import output_names
from coremill.text.model_tokenizer import TextTokenizer
from coremill.text.student_tokenizer import Tokenizer

_TRIED_IDS = 128


def check_checkpoint(path: Path, tokenizer: Path | None) -> Iterator[str]:
    """Check the checkpoint at `path`; yields one line of findings per check.

    Raises:
        CoremillError: a check failed; each has its own kind.
    """
    ckpt = load_checkpoint(path)
    yield f"structure: {ckpt.model_type}, {len(ckpt.state_dict)} tensors, all finite, with the shapes of its config"
    flags = ", ".join(f"{name} {getattr(ckpt.model_arch, name)}" for name in ckpt.model_arch.__struct_fields__)
    yield f"model_arch: {flags}"
    if ckpt.step == 0 and not ckpt.imported:
        raise CheckpointContentError(
            f"{path}: `step` is 0",
            expected="a trained model",
            run="python -m coremill.training.run_toy_distill --help",
        )
    yield f"step: {ckpt.step}" if not ckpt.imported else "step: 0, imported"
    if tokenizer is None:
        yield f"vocabulary: not_run, there is no tokenizer.json for {path.name}; give one with --tokenizer"
    else:
        check_vocabulary(ckpt, (TextTokenizer if ckpt.imported else Tokenizer).load(tokenizer))
        yield f"vocabulary: {ckpt.tokenizer.vocab_size} tokens, the same as in {tokenizer}"
    yield _check_forward(ckpt, path)


def _check_forward(ckpt: Checkpoint, path: Path) -> str:
    """Run a forward pass on ids from the whole vocabulary, and check that all outputs are finite."""
    student = build_student(ckpt)
    n_ids = min(_TRIED_IDS, ckpt.config.max_seq_len, ckpt.config.vocab_size)
    ids = torch.linspace(0, ckpt.config.vocab_size - 1, n_ids).to(torch.int32).unsqueeze(0)  # (1, T)
    names = output_names(ckpt.config)
    with torch.no_grad():
        outputs = dict(zip(names, student(ids), strict=True))
    expected = {"logits": (1, n_ids, ckpt.config.vocab_size), "halt_logits": (1, n_ids, 2)}
    for name, values in outputs.items():
        if tuple(values.shape) != expected[name] or not bool(torch.isfinite(values).all()):
            raise CheckpointContentError(
                f"{path}: `{name}` of a forward pass is {tuple(values.shape)} with "
                f"{int((~torch.isfinite(values)).sum())} values that are not finite",
                expected=f"finite values of shape {expected[name]}",
                run="python -m coremill.training.run_toy_distill --help",
            )
    return "forward: " + ", ".join(f"{name} {expected[name]}" for name in names) + ", finite"


def _find_tokenizer(checkpoint: Path) -> Path | None:
    """The tokenizer next to a checkpoint or, in a build, that of the dataset stage; None if there is none."""
    folder = checkpoint.resolve().parent
    candidates = (tokenizer_file(folder), tokenizer_file(folder.parent / "dataset"))
    return next((path for path in candidates if path.exists()), None)


def main(argv: list[str] | None = None) -> int:
    """Run the command, which prints each check as it passes."""
    parser = command_parser(
        "check-checkpoint",
        "Check a checkpoint's structure, arch flags, step, vocabulary and a forward pass.",
        example="magic_8_ball.ckpt",
    )
    parser.add_argument("checkpoint", type=Path, help="the checkpoint, *.ckpt")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="the tokenizer (default: tokenizer.json next to the checkpoint or, in a build, in dataset/)",
    )
    args = parser.parse_args(argv)
    for line in check_checkpoint(args.checkpoint, args.tokenizer or _find_tokenizer(args.checkpoint)):
        sys.stdout.write(f"{line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
