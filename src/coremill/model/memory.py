"""How much memory a stage needs for a model, checked before the work starts.

Weights stay mapped from their files, which needs no memory of a process; counted are those that a stage widens or
copies, the logits of the longest sequence, and the libraries. `nox -s bench -- scale` compares the estimates with
measured peaks.

Legend: T sequence length, V vocabulary.
"""

from __future__ import annotations

from coremill.core.contract import shape_key
from coremill.core.machine import check_memory
from coremill.model.checkpoint import Checkpoint

_FLOAT32_BYTES = 4


def check_model_memory(
    ckpt: Checkpoint,
    *,
    bytes_per_parameter: float = 0,
    base_bytes: int,
    seq_len: int = 0,
    logits: float = 0,
    work: str,
) -> int:
    """Check that there is memory for work on the checkpoint's model, and return how much it needs, in bytes.

    Args:
        bytes_per_parameter: what the work holds of the weights at its peak.
        base_bytes: what it needs for a tiny model: the libraries.
        seq_len: the longest sequence, T.
        logits: (T, V) tensors of float32 that are in memory at a time, or parts of them.
        work: the verb in the message, such as "verify".

    Raises:
        MachineError: there is not enough memory; states the length and both figures.
    """
    parameters = sum(tensor.numel() for tensor in ckpt.state_dict.values())
    logits_bytes = logits * _FLOAT32_BYTES * seq_len * ckpt.config.vocab_size
    needed = base_bytes + int(bytes_per_parameter * parameters + logits_bytes)
    at = f" at {shape_key(seq_len)}" if seq_len else ""
    check_memory(needed, why=f"to {work} {parameters:,} parameters{at}")
    return needed
