"""Quantisation of matrices as llama.cpp itself does it, in the blocks of GGUF.

The functions are those of the shared library that the `xllamacpp` package carries, which exports all of ggml: the
`gguf` package, in Python, has no K-quants. Of the types that both have, the bytes are the same.

    size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst,
                               int64_t start, int64_t nrows, int64_t n_per_row, const float * imatrix);

https://github.com/ggml-org/llama.cpp/blob/master/ggml/include/ggml.h
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from importlib.machinery import PathFinder
from typing import Any

import gguf
import numpy as np

from coremill.core.errors import MachineError

_QUANTIZE = "ggml_quantize_chunk"


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
    written = _function()(int(kind), source.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    assert written == out.nbytes, (written, out.nbytes)
    return out


def check_quantiser() -> None:
    """Check that there is a llama.cpp to quantise with.

    Raises:
        MachineError: there is none.
    """
    _function()


@functools.cache
def _function() -> Any:
    path = _library()
    try:
        function = getattr(ctypes.CDLL(path), _QUANTIZE)
    except (OSError, AttributeError) as failure:
        raise MachineError(
            f"{path} has no {_QUANTIZE}: {failure}",
            expected="an xllamacpp whose library exports ggml",
            run="pip install -r requirements/train.txt",
        ) from failure
    function.restype = ctypes.c_size_t
    function.argtypes = (
        ctypes.c_int,  # type
        ctypes.c_void_p,  # src
        ctypes.c_void_p,  # dst
        ctypes.c_int64,  # start, in elements
        ctypes.c_int64,  # nrows
        ctypes.c_int64,  # n_per_row
        ctypes.c_void_p,  # imatrix
    )
    return function


def _library() -> str:
    """The path of xllamacpp's extension module; found, not imported."""
    package = importlib.util.find_spec("xllamacpp")
    folders = list(package.submodule_search_locations or ()) if package is not None else []
    module = PathFinder.find_spec("xllamacpp", folders)
    if not folders or module is None or module.origin is None:
        raise MachineError(
            "llama.cpp is not installed here: there is no xllamacpp",
            expected="xllamacpp, whose library quantises",
            run="pip install -r requirements/train.txt",
        )
    return module.origin
