"""How a Hugging Face directory was found to compute what its checkpoint computes: the document beside it."""

from __future__ import annotations

from typing import Literal

from coremill.core.contract import Toolchain
from coremill.core.documents import Document, Record
from coremill.core.gates import Gate


class Tie(Record):
    """A token that transformers chose and the checkpoint has within rounding of its own choice."""

    prompt: int
    """Number of the prompt, from 0."""
    token: int
    """Number of the token in the answer, from 0."""
    chosen: int
    """Its id in transformers' answer."""
    expected: int
    """The checkpoint's best."""
    gap: float
    """By how much the checkpoint prefers its own, in logits."""


class HuggingFaceParity(Document):
    """Figures with their bounds, and the files that they are about."""

    kind: Literal["huggingface"] = "huggingface"
    checkpoint_digest: str
    dtype: str
    """Of the tensors; the checkpoint was rounded alike for the comparison, which was computed in float32."""
    files: dict[str, str]
    """Each file of the directory but this one, with its digest."""
    gates: tuple[Gate, ...]
    logits_max_abs: float
    """The largest difference of logits as it is; its gate is relative to the largest logit."""
    ties: tuple[Tie, ...]
    toolchain: Toolchain
