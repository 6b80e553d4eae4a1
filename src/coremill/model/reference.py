"""The reference model: what every exported format of a model is compared with.

Legend: N tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from coremill.model.student import Student, output_names

Array = npt.NDArray[np.float32]


class Reference:
    """The checkpoint's model, run eagerly in float32.

    Args:
        student: the model; it is not changed.
    """

    def __init__(self, student: Student) -> None:
        self._student = student
        self.names = output_names(student.config)

    def run(self, ids: Sequence[int]) -> dict[str, Array]:
        """Return the outputs by name for `ids` (N,), without the batch dimension: (N, V) and (N, 2)."""
        with torch.no_grad():
            outputs = self._student(torch.tensor([list(ids)], dtype=torch.int32))
        return {name: tensor[0].numpy() for name, tensor in zip(self.names, outputs, strict=True)}

    def logits(self, ids: Sequence[int]) -> Array:
        """Return the logits (N, V) for `ids` (N,)."""
        return self.run(ids)[self.names[0]]

    def next_logits(self, ids: list[int]) -> Array:
        """Return the logits (V,) of the token after `ids`."""
        last: Array = self.logits(ids)[-1]
        return last
