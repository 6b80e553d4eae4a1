"""The classifier operation.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.classify`.
"""

from __future__ import annotations

from torch import Tensor

from coremill.mil.ops.registry import OperationError, Symbols, op


@op("classify", native=True)
def classify(probabilities: Tensor, *, classes: Symbols) -> tuple[int | str, dict[int | str, float]]:
    """classify: the most probable label (the first one in a tie) and the probability of each label."""
    if probabilities.numel() != len(classes) or not classes:
        raise OperationError(f"{probabilities.numel()} probabilities for {len(classes)} classes")
    flat = probabilities.flatten()
    return classes[int(flat.argmax())], dict(zip(classes, flat.tolist(), strict=True))
