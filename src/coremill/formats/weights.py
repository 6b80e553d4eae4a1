"""Opens the weights of an existing model in any format that coremill reads.

Opening a source reads only its headers: configuration, names and shapes. Whatever can be rejected is rejected then;
:meth:`WeightsSource.read` reads the tensors.
"""

from __future__ import annotations

from pathlib import Path

from coremill.core.errors import CheckpointUnreadableError
from coremill.formats.gguf.reader import GgufWeights
from coremill.formats.huggingface.reader import HuggingFaceWeights
from coremill.formats.source import WeightsSource

__all__ = ["GgufWeights", "HuggingFaceWeights", "WeightsSource", "open_weights"]


def open_weights(path: Path) -> GgufWeights | HuggingFaceWeights:
    """Open the Hugging Face directory or the GGUF file at `path`; raises as :class:`WeightsSource` does."""
    if not path.exists():
        raise CheckpointUnreadableError(
            f"there is no {path}", expected="a Hugging Face directory with safetensors, or a GGUF file"
        )
    return HuggingFaceWeights(path) if path.is_dir() else GgufWeights(path)
