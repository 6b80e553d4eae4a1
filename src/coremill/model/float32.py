"""How exactly float32 computes a model: the bound of what two right programs may differ by.

Most models lose some 1e-6 of the largest logit to float32. A model with attention scores in the thousands, or with
large sums that cancel, may lose a hundred times as much; two programs that sum in different orders then differ by
as much, though both are right. That is measured only where a difference exceeds the bound of every other model.

The rounding errors of one program say little: at the position that decides, they may cancel. Several programs are
therefore compared with float64, each the same model with its channels in another order.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from coremill.core.parity import MAX_RELATIVE_ERR, MOST_RELATIVE_ERR, RelativeBound, relative_bound
from coremill.model.reference import Reference, Scores

log = logging.getLogger(__name__)

_ORDERS = 3
"""Orders of the channels besides the reference's own. With one, transformers and llama.cpp differed from the
reference by up to 11.7 times the error that was found; with two, by 3.5 times; with three, by 1.9 times."""


class Float32Bounds:
    """The bounds of a model's outputs for some sequences, relative to the largest output of a sequence.

    Args:
        reference: the model, in float32.
        sequences: token ids, (N,) each.
        angles: the type in which the programs that are compared compute the rotary angles. transformers and
            llama.cpp use float32, whose error grows with the position; an exported program has the reference's own
            tables.
    """

    def __init__(
        self,
        reference: Reference,
        sequences: Sequence[Sequence[int]],
        *,
        angles: torch.dtype = torch.float32,
    ) -> None:
        self._reference, self._sequences, self._angles = reference, sequences, angles

    def bound(self, name: str, relative_err: float) -> RelativeBound:
        """Return the bound for an output that differs by `relative_err`.

        float32's own error is only measured if it decides, because it takes the time of six runs: not if
        `relative_err` is within `MAX_RELATIVE_ERR`, or beyond the largest bound there is.
        """
        decides = MAX_RELATIVE_ERR < relative_err <= MOST_RELATIVE_ERR
        return relative_bound(self.own_err[name] if decides else 0.0)

    @functools.cached_property
    def own_err(self) -> Mapping[str, float]:
        """The largest difference of a run from float64 by output, relative to the largest output of the sequence.

        NaN if a value is.
        """
        exact = self._reference.in_float64().score_all(self._sequences)
        worst = dict.fromkeys(self._reference.names, 0.0)
        for seed in range(_ORDERS + 1):
            run = self._reference.reordered(seed, angles=self._angles) if seed else self._reference
            for wanted, found in zip(exact, run.score_all(self._sequences), strict=True):
                for name, err in _relative_errs(wanted, found).items():
                    worst[name] = float(np.maximum(worst[name], err))  # NaN if one is
        shown = ", ".join(f"{err:.2g} of the largest {name}" for name, err in worst.items())
        log.warning("float32's own error in this model: %s", shown)
        return worst


def _relative_errs(exact: Scores, found: Scores) -> dict[str, float]:
    errs, largest = dict.fromkeys(exact.names, 0.0), dict.fromkeys(exact.names, 0.0)
    for (_, wanted), (_, outputs) in zip(exact.chunks(), found.chunks(), strict=True):
        for name in exact.names:
            errs[name] = float(np.maximum(errs[name], np.abs(outputs[name] - wanted[name]).max()))
            largest[name] = float(np.maximum(largest[name], np.abs(wanted[name]).max()))
    return {name: errs[name] / largest[name] if largest[name] else 0.0 for name in errs}
