"""How much memory work on a model takes at a sequence length, asked before the work starts.

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
        models: how many sets of its weights are held in float32 at a time.
        logits: how many (T, V) tensors of float32 are.
        work: what is done, for the message.

    Raises:
        MachineError: there is less; names the length and both figures.
    """
    parameters = sum(tensor.numel() for tensor in ckpt.state_dict.values())
    needed = _FLOAT32_BYTES * (models * parameters + logits * seq_len * ckpt.config.vocab_size)
    check_memory(needed, why=f"to {work} {parameters:,} parameters at {shape_key(seq_len)}")
