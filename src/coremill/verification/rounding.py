"""Whether a package matches the checkpoint's model exactly, once both have the same rounded weights.

A package in float16 is some 60 dB from its checkpoint, and a bug as small as that hides there: a weight scaled by a
hundredth, an epsilon of 1e-3 where 1e-5 is meant. What is rounding and what is not can be told apart. The package's
weights are the checkpoint's, rounded; with its arithmetic in float32, and the checkpoint's weights rounded as well,
nothing is left between the two but the order of sums.

Legend: T sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from coremill.core.config import ConvertConfig
from coremill.core.contract import Contract
from coremill.core.reports import Backend
from coremill.data.prompts import Prompts
from coremill.measures import Float32Array, sqnr_db
from coremill.mil import MLModel
from coremill.model.checkpoint import Checkpoint
from coremill.model.reference import Reference
from coremill.verification.backends import Runner, StatefulRunner, wide_stateful_runner

MIN_SQNR_DB = 90.0
"""Only float32 rounding remains: one rounding (2⁻²⁴) is 144 dB, a few hundred in sequence leave over 100 dB."""


_DECODED = 2
"""Tokens decoded after a prompt."""


def rounding_aside_db(
    package: Path, contract: Contract, checkpoint: Checkpoint, prompts: Prompts, settings: ConvertConfig
) -> float:
    """Return the worst SQNR of the package at its shortest length, including `prefill` and `decode`.

    Raises:
        CoremillError, RuntimeError: the package does not run.
    """
    (ids,) = prompts.packed(min(contract.working_lengths), 1)
    expected = rounded_reference(checkpoint, settings).run(ids)
    found = wide_runner(package, contract).run(ids)
    ratios = [sqnr_db(expected[name], found[name]) for name in expected]
    if contract.functions:
        runner = wide_stateful_runner(package, contract, pad_id=prompts.pad_id)
        ratios += _cached_ratios(runner, ids, expected)
    return float(np.min(ratios))  # unlike Python's min, NaN if there is one


def _cached_ratios(runner: StatefulRunner, ids: Sequence[int], expected: Mapping[str, Float32Array]) -> list[float]:
    """Return the ratios for the first half of `ids` as a prompt, and for the tokens that follow."""
    n = max(1, len(ids) // 2)
    said = {n - 1: runner.prefill(ids[:n])}
    said |= {place: runner.decode(ids[place]) for place in range(n, min(n + _DECODED, len(ids)))}
    return [sqnr_db(expected[name][place], found[name]) for place, found in said.items() for name in found]


def wide_runner(package: Path, contract: Contract) -> Runner:
    """Load `main` of a package with `coremill.mil`, with constants as saved and all arithmetic in float32.

    Raises:
        PackageError, UnsupportedOperationError: as `backends.reference_runner`.
    """
    return Runner(MLModel(package, mode="oracle"), Backend.MIL_REFERENCE, contract)


def rounded_reference(checkpoint: Checkpoint, settings: ConvertConfig) -> Reference:
    """Return the checkpoint's model with the weights and tables rounded as the conversion rounds them."""
    rounded_to = torch.float16 if are_rounded(checkpoint, settings) else None
    return Reference(checkpoint.config, checkpoint.state_dict, rounded_to=rounded_to)


def are_rounded(checkpoint: Checkpoint, settings: ConvertConfig) -> bool:
    """Return whether the conversion rounds the model's weights to float16.

    It rounds none of them where one is beyond float16's range; see `converter.prepared`.
    """
    largest = torch.finfo(torch.float16).max
    return settings.compute_precision == "float16" and all(
        float(weight.abs().max()) <= largest for weight in checkpoint.state_dict.values() if weight.numel()
    )
