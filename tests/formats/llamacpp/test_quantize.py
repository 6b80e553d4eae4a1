"""llama.cpp's quantiser: bytes equal those of the gguf package, and values are near the matrix."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from coremill.formats.llamacpp.quantize import quantize

Kind = gguf.GGMLQuantizationType


def a_matrix(rows: int = 33, columns: int = 512) -> np.ndarray:
    """A matrix whose rows differ in magnitude; one is zero."""
    values = np.random.default_rng(4).standard_normal((rows, columns)) * np.logspace(-3, 2, rows)[:, None]
    values[1] = 0
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0])
def test_bytes_equal_those_of_the_gguf_package(kind: Kind) -> None:
    matrix = a_matrix()
    assert np.array_equal(quantize(matrix, kind), gguf.quants.quantize(matrix, kind))


@pytest.mark.parametrize(
    ("kind", "relative"),
    [(Kind.Q8_0, 6e-3), (Kind.Q4_0, 0.1), (Kind.Q4_K, 0.08), (Kind.Q5_K, 0.04), (Kind.Q6_K, 0.025)],
)
def test_values_are_within_the_types_rounding(kind: Kind, relative: float) -> None:
    matrix = a_matrix()
    values = gguf.quants.dequantize(quantize(matrix, kind), kind)
    assert not values[1].any()
    rows = np.linalg.norm(matrix, axis=1) > 0
    error = np.linalg.norm(values - matrix, axis=1)[rows] / np.linalg.norm(matrix, axis=1)[rows]
    assert relative / 4 < error.max() < relative


def test_a_matrix_may_be_a_view() -> None:
    matrix = a_matrix()
    assert np.array_equal(quantize(matrix.T.copy().T[::2], Kind.Q6_K), quantize(matrix, Kind.Q6_K)[::2])


@pytest.mark.parametrize(
    ("matrix", "found"),
    [
        (np.zeros((2, 128), np.float32), r"float32 of shape \(2, 128\), Q4_K has blocks of 256"),
        (np.zeros(256, np.float32), r"float32 of shape \(256,\), Q4_K has blocks of 256"),
        (np.zeros((2, 256)), r"float64 of shape \(2, 256\), Q4_K has blocks of 256"),
    ],
)
def test_a_matrix_of_another_shape_or_type_is_rejected(matrix: np.ndarray, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        quantize(matrix, Kind.Q4_K)
