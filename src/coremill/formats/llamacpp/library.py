"""llama.cpp's C API, of the shared library that the `xllamacpp` package carries and that exports all of it.

The structs are those of llama.h, of the build that requirements/ pins; the defaults that llama.cpp itself gives
them tell whether they still are.

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
from typing import Any

from coremill.core.errors import MachineError

_RELEASE = "2026.10.11549"
"""The release of xllamacpp whose llama.h is declared here: another may have other fields of the same size."""
_EXPECTED = "the release of xllamacpp in requirements/train.txt"
_INSTALL = "pip install -r requirements/train.txt"

_RESERVE = 32
"""Words behind each struct: one that grew at its end is not written beyond what is ours, and goes back as it came.
As an argument a struct of this size lies in memory, by the ABIs of x86-64 and of AArch64: where it is longer than
llama.cpp's, its end is not read."""


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
    """Tokens to read. Without `pos` and `seq_id` they come after what was read, all in one sequence."""

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

_FUNCTIONS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
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
"""Name: what it returns, and its arguments."""

_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1, "n_threads": 4,
    "n_threads_batch": 4, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1,
    "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0, "type_k": 1, "type_v": 1, "offload_kqv": True, "no_perf": True, "op_offload": True,
    "swa_full": True,
}  # fmt: skip
_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
"""Those that are not 0."""


@functools.cache
def library() -> ctypes.CDLL:
    """The library, its functions declared.

    Raises:
        MachineError: there is none, or it is not of the build that is declared here.
    """
    path = library_path()
    if (release := importlib.metadata.version("xllamacpp")) != _RELEASE:
        raise MachineError(
            f"xllamacpp is {release}, and what is declared here is {_RELEASE}", expected=_EXPECTED, run=_INSTALL
        )
    try:
        found = ctypes.CDLL(path)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as failure:
        raise MachineError(
            f"{path} is no library of llama.cpp: {failure}", expected=_EXPECTED, run=_INSTALL
        ) from failure
    _check_layout(found)
    return found


def library_path() -> str:
    """The path of xllamacpp's extension module; found, not imported.

    Raises:
        MachineError: it is not installed.
    """
    package = importlib.util.find_spec("xllamacpp")
    folders = list(package.submodule_search_locations or ()) if package is not None else []
    module = PathFinder.find_spec("xllamacpp", folders)
    if not folders or module is None or module.origin is None:
        raise MachineError(
            "llama.cpp is not installed here: there is no xllamacpp", expected=_EXPECTED, run=_INSTALL
        )
    return module.origin


def _check_layout(found: ctypes.CDLL) -> None:
    """Check that llama.cpp's own structs have the fields of ours, by values that it fills in itself."""
    tokens = (c_int32 * 3)()
    one = found.llama_batch_get_one(tokens, 3)
    address = ctypes.cast(one.token, c_void_p).value
    odd = [
        *_odd_fields(found.llama_model_default_params(), _MODEL_DEFAULTS),
        *_odd_fields(found.llama_context_default_params(), _CONTEXT_DEFAULTS),
        *_odd_fields(one, {"n_tokens": 3, "token": address}),
    ]
    if odd or address != ctypes.addressof(tokens):
        raise MachineError(
            f"xllamacpp is of another build of llama.cpp: {(odd or ['Batch.token is another'])[0]}",
            expected=_EXPECTED,
            run=_INSTALL,
        )


def _odd_fields(struct: Structure, expected: Mapping[str, Any]) -> list[str]:
    """The fields of `struct` that are not as expected, in words; 0 is expected where nothing else is."""
    odd = []
    for name in (field[0] for field in struct._fields_ if field[0] != "reserve"):
        value = getattr(struct, name)
        if isinstance(value, ctypes._Pointer):
            value = ctypes.cast(value, c_void_p).value
        if (value or 0) != expected.get(name, 0):
            odd.append(f"{type(struct).__name__}.{name} is {value}, not {expected.get(name, 0)}")
    return odd
