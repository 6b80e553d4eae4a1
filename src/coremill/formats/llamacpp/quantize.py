"""Quantisation of matrices into the blocks of GGUF, by llama.cpp's own function.

The `gguf` package, which is in Python, has no K-quants. For the types that both have, the bytes are equal.

    size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst,
                               int64_t start, int64_t nrows, int64_t n_per_row, const float * imatrix);

https://github.com/ggml-org/llama.cpp/blob/master/ggml/include/ggml.h
"""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

from coremill.formats.llamacpp.library import library


def quantize(matrix: npt.NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """Return the blocks of `matrix`, without an importance matrix.

    Args:
        matrix: (R, C) float32, finite; C a multiple of the type's block.

    Returns:
        (R, bytes of a row) uint8.

    Raises:
        MachineError: llama.cpp is not installed.
        ValueError: `matrix` is not such a matrix, for which llama.cpp would end the process.
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
