"""Whether a package computes the checkpoint's model to the letter, once both have the same rounded weights.

A package in float16 is some 60 dB from its checkpoint, and a bug as small as that hides there: a weight scaled by a
hundredth, an epsilon of 1e-3 where 1e-5 is meant. What is rounding and what is not can be told apart. The package's
weights are the checkpoint's, rounded; with its arithmetic in float32, and the checkpoint's weights rounded as well,
nothing is left between the two but the order of sums.

Legend: T sequence length.
"""

from __future__ import annotations

from pathlib import Path

import torch

from coremill.conversion.backends import Runner
from coremill.core.config import ConvertConfig
from coremill.core.contract import Contract
from coremill.core.reports import Backend
from coremill.mil import MLModel
from coremill.model.student import Student

MIN_SQNR_DB = 90.0
"""What remains is float32's: 2⁻²⁴ a rounding is 144 dB, and a few hundred of them in a row leave more than 100."""


def wide_runner(package: Path, contract: Contract) -> Runner:
    """`main` of a package under `coremill.mil`, with its constants as they are saved and all arithmetic in float32.

    Raises:
        PackageError, UnsupportedOperationError: as `backends.reference_runner`.
    """
    return Runner(MLModel(package, mode="oracle"), Backend.MIL_REFERENCE, contract)


def are_rounded(student: Student, settings: ConvertConfig) -> bool:
    """Whether the conversion rounds the model's weights to float16.

    It rounds none of them where one is beyond float16's range; see `converter.prepared`.
    """
    largest = torch.finfo(torch.float16).max
    return settings.compute_precision == "float16" and all(
        float(weight.abs().max()) <= largest for weight in student.state_dict().values() if weight.numel()
    )


def round_weights(student: Student) -> Student:
    """Round the model's weights and tables to float16, in float32 as they are; the model given is changed."""
    rounded: Student = student.half().float()
    return rounded
