"""The halt head in a file of its own, beside a model in a format that has no place for it.

GGUF and Hugging Face's Llama know no second head, and their readers pass the file over. It is safetensors with one
tensor, `halt_head.weight`: (2, C), as the checkpoint has it. What it multiplies is what the unembedding does, the
output of the last norm: `x @ weight.T` is (…, 2), the logits of [continue, halt].
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from coremill.core.errors import CheckpointContentError
from coremill.core.publish import write_atomic
from coremill.model.checkpoint import Checkpoint

HALT_HEAD = "halt_head.weight"
"""The student's tensor that other programs' formats and classes have no place for."""


def save_halt_head(path: Path, checkpoint: Checkpoint) -> None:
    """Write the halt head of `checkpoint` to `path`, whole or not at all; equal heads give equal bytes.

    Raises:
        CheckpointContentError: the model has none.
        OutputError: `path` cannot be written.
    """
    if not checkpoint.model_arch.use_halt_head:
        raise CheckpointContentError("the checkpoint has no halt head", expected="a model with `use_halt_head`")
    # One key: the library writes several in an order that changes from run to run.
    write_atomic(path, save({HALT_HEAD: checkpoint.state_dict[HALT_HEAD].contiguous()}, {"format": "pt"}))
