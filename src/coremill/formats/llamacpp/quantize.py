"""Quantisation of matrices as llama.cpp itself does it, in the blocks of GGUF.

The function is of the shared library that the `xllamacpp` package carries: the `gguf` package, in Python, has no
K-quants. Of the types that both have, the bytes are the same.

    size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst,
                               int64_t start, int64_t nrows, int64_t n_per_row, const float * imatrix);

https://github.com/ggml-org/llama.cpp/blob/master/ggml/include/ggml.h
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np

from coremill.formats.llamacpp.library import library


def quantize(matrix: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """The blocks of `matrix`, each by itself: no importance matrix weighs one value against another.

    Args:
        matrix: (R, C) float32, finite; C a multiple of the type's block.

    Returns:
        (R, bytes of a row) uint8.

    Raises:
        MachineError: there is no llama.cpp to ask.
        ValueError: `matrix` is no such matrix. llama.cpp would end the process.
    """
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if matrix.ndim != 2 or matrix.dtype != np.float32 or matrix.shape[1] % block_elements:
        raise ValueError(f"{matrix.dtype} of shape {matrix.shape}, {kind.name} has blocks of {block_elements}")
    source = np.ascontiguousarray(matrix)
    rows, columns = source.shape
    out = np.empty((rows, columns // block_elements * block_bytes), np.uint8)
    written = library().ggml_quantize_chunk(int(kind), source.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    assert written == out.nbytes, (written, out.nbytes)
    return out
