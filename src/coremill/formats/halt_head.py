"""Writes the halt head to a file of its own, for formats that cannot contain it.

Neither GGUF nor the classes of transformers have a second head, and their readers ignore the file. It is in
safetensors format and has one tensor, `halt_head.weight`: (2, C), as in the checkpoint. Like the unembedding, it
multiplies the output of the last norm: `x @ weight.T` is (…, 2), the logits of [continue, halt].
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from coremill.core.errors import CheckpointContentError
from coremill.core.publish import write_atomic
from coremill.model.checkpoint import Checkpoint

HALT_HEAD = "halt_head.weight"
"""The student's tensor that other formats cannot contain."""


def save_halt_head(path: Path, checkpoint: Checkpoint) -> None:
    """Write the halt head of `checkpoint` to `path` atomically; equal heads give equal bytes.

    Raises:
        CheckpointContentError: the model has none.
        OutputError: `path` cannot be written.
    """
    if not checkpoint.model_arch.use_halt_head:
        raise CheckpointContentError("the checkpoint has no halt head", expected="a model with `use_halt_head`")
    # Only one key of metadata: the library writes several in an order that varies between runs.
    write_atomic(path, save({HALT_HEAD: checkpoint.state_dict[HALT_HEAD].contiguous()}, {"format": "pt"}))
