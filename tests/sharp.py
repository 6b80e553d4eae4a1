"""Models that are right, and that float32 computes less exactly than most."""

from __future__ import annotations

from dataclasses import replace

from coremill.model.checkpoint import Checkpoint


def sharpened(checkpoint: Checkpoint, factor: float) -> Checkpoint:
    """Return the model with all attention scores `factor` times as large.

    Scores in the hundreds have larger rounding errors, and the softmax of a score depends on its absolute error. A
    norm of queries and keys undoes the factor of a projection, and has its own.
    """
    names = (".q_proj.", ".k_proj.", ".q_norm.", ".k_norm.")
    return replace(
        checkpoint,
        state_dict={
            name: value * factor**0.5 if any(each in name for each in names) else value
            for name, value in checkpoint.state_dict.items()
        },
    )
