"""llama.cpp's C API, from the shared library in the `xllamacpp` package, which exports all of it.

The structs are those of llama.h in the release that requirements/ pins. They are checked when the library is
loaded, by the defaults that llama.cpp writes into them.

https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from importlib.machinery import PathFinder

from coremill.core.errors import MachineError

_RELEASE = "2026.10.11549"
"""The release of xllamacpp whose llama.h is declared here. Another may have other fields of the same size."""
EXPECTED_RELEASE = "the release of xllamacpp in requirements/train.txt"
INSTALL = "pip install -r requirements/train.txt"

_RESERVE = 32
"""Words after each struct. If llama.cpp's struct has grown at its end, it still fits this memory, and is passed
back unchanged. The ABIs of x86-64 and AArch64 pass a struct of this size in memory, so that llama.cpp does not read
the end of one that is longer than its own."""


class ModelParams(Structure):
    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("reserve", c_uint64 * _RESERVE),
    )


class ContextParams(Structure):
    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        ("reserve", c_uint64 * _RESERVE),
    )


class Batch(Structure):
    """Tokens to read. Without `pos` and `seq_id` they continue the one sequence."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
        ("reserve", c_uint64 * _RESERVE),
    )


LogCallback = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)
"""(level, text, user data)."""
LOG_ERROR = 4
"""`GGML_LOG_LEVEL_ERROR`."""

_FUNCTIONS: Mapping[str, tuple[type[ctypes._CData] | None, tuple[type[ctypes._CData], ...]]] = {
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, c_void_p, c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, c_void_p),
    ),
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (LogCallback, c_void_p)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (ctypes.c_char_p, ModelParams)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_bos": (c_int32, (c_void_p,)),
    "llama_vocab_get_add_bos": (c_bool, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_vocab_is_control": (c_bool, (c_void_p, c_int32)),
    "llama_model_chat_template": (ctypes.c_char_p, (c_void_p, ctypes.c_char_p)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_batch_get_one": (Batch, (POINTER(c_int32), c_int32)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_tokenize": (
        c_int32,
        (c_void_p, ctypes.c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    ),
}
"""By name: the types of the result and of the arguments."""

_CONTEXT_DEFAULTS: Mapping[str, float] = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1, "n_threads": 4,
    "n_threads_batch": 4, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1,
    "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0, "type_k": 1, "type_v": 1, "offload_kqv": True, "no_perf": True, "op_offload": True,
    "swa_full": True,
}  # fmt: skip
_MODEL_DEFAULTS: Mapping[str, float] = {
    "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True,
}  # fmt: skip
"""The defaults other than 0."""


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library, with the types of its functions set.

    Raises:
        MachineError: it is not installed, or is not of the release that is declared here.
    """
    path = library_path()
    if (release := importlib.metadata.version("xllamacpp")) != _RELEASE:
        raise MachineError(
            f"xllamacpp is {release}, coremill declares the structs of {_RELEASE}",
            expected=EXPECTED_RELEASE,
            run=INSTALL,
        )
    try:
        found = ctypes.CDLL(path)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as failure:
        raise MachineError(
            f"{path} is not a library of llama.cpp: {failure}", expected=EXPECTED_RELEASE, run=INSTALL
        ) from failure
    _check_layout(found)
    return found


def library_path() -> str:
    """Return the path of xllamacpp's extension module, without importing it.

    Raises:
        MachineError: it is not installed.
    """
    package = importlib.util.find_spec("xllamacpp")
    directories = list(package.submodule_search_locations or ()) if package is not None else []
    module = PathFinder.find_spec("xllamacpp", directories)
    if not directories or module is None or module.origin is None:
        raise MachineError(
            "xllamacpp, which contains llama.cpp, is not installed", expected=EXPECTED_RELEASE, run=INSTALL
        )
    return module.origin


def _check_layout(found: ctypes.CDLL) -> None:
    """Check that llama.cpp's structs have the declared fields, by the values that it writes into them."""
    tokens = (c_int32 * 3)()
    one = found.llama_batch_get_one(tokens, 3)
    wrong = [
        *_wrong_fields(found.llama_model_default_params(), _MODEL_DEFAULTS),
        *_wrong_fields(found.llama_context_default_params(), _CONTEXT_DEFAULTS),
        *_wrong_fields(one, {"n_tokens": 3, "token": ctypes.addressof(tokens)}),
    ]
    if wrong:
        raise MachineError(
            f"xllamacpp is of another build of llama.cpp: {wrong[0]}", expected=EXPECTED_RELEASE, run=INSTALL
        )


def _wrong_fields(struct: Structure, expected: Mapping[str, float]) -> list[str]:
    """The fields of `struct` whose values are not the expected ones, with both; 0 is the default expectation."""
    wrong = []
    for name in (field[0] for field in struct._fields_ if field[0] != "reserve"):
        value = getattr(struct, name)
        if isinstance(value, ctypes._Pointer):
            value = ctypes.cast(value, c_void_p).value
        if (value or 0) != expected.get(name, 0):
            wrong.append(f"{type(struct).__name__}.{name} is {value}, not {expected.get(name, 0)}")
    return wrong
