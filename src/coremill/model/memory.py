"""A check, before the work starts, that there is enough memory to run a model at a sequence length.

Legend: T sequence length, V vocabulary.
"""

from __future__ import annotations

from coremill.core.contract import shape_key
from coremill.core.machine import check_memory
from coremill.model.checkpoint import Checkpoint

_FLOAT32_BYTES = 4


def check_shape_memory(ckpt: Checkpoint, seq_len: int, *, models: int, logits: int, work: str) -> None:
    """Check that there is memory to run the checkpoint's model at `seq_len`.

    Args:
        models: number of copies of its weights in float32 that are in memory at a time.
        logits: number of (T, V) tensors of float32 that are.
        work: the verb in the message, such as "verify".

    Raises:
        MachineError: there is not enough memory; states the length and both figures.
    """
    parameters = sum(tensor.numel() for tensor in ckpt.state_dict.values())
    needed = _FLOAT32_BYTES * (models * parameters + logits * seq_len * ckpt.config.vocab_size)
    check_memory(needed, why=f"to {work} {parameters:,} parameters at {shape_key(seq_len)}")
