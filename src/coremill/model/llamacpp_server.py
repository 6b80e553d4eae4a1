"""The process that :class:`coremill.model.llamacpp.LlamaCpp` talks to: llama.cpp's server with one file.

    python -m coremill.model.llamacpp_server

It reads its settings, a JSON object, from a line of its standard input, loads the file, prints the server's address
and stays until the input ends. Where the file does not load it ends, and llama.cpp's errors are on standard error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import xllamacpp


def parameters(settings: dict[str, Any]) -> xllamacpp.CommonParams:
    """llama.cpp's parameters: all that changes what is computed, and nothing that it does for speed alone."""
    flash = xllamacpp.llama_flash_attn_type
    cache = {"f32": xllamacpp.ggml_type.GGML_TYPE_F32, "f16": xllamacpp.ggml_type.GGML_TYPE_F16}
    params = xllamacpp.CommonParams()
    params.model.path = settings["path"]
    params.n_ctx = settings["context"]
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.n_gpu_layers = 0
    params.flash_attn_type = (
        flash.LLAMA_FLASH_ATTN_TYPE_ENABLED if settings["flash_attention"] else flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.cache_type_k = params.cache_type_v = cache[settings["cache_dtype"]]
    params.fit_params = False  # it changes the context to what it thinks fits the memory
    params.cache_ram_mib = 0  # no copies of the cache for prompts of before
    params.warmup = False
    params.verbosity = 1  # errors alone
    params.api_keys = [settings["key"]]
    params.ui = False
    return params


def main() -> int:
    settings = json.loads(sys.stdin.buffer.readline())
    try:
        server = xllamacpp.Server(parameters(settings))
    except RuntimeError as failure:  # llama.cpp's log says why, if anything does
        sys.stderr.write(f"{failure}\n")
        return 1
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()
    os._exit(0)  # without waiting for a request that nobody reads any more


if __name__ == "__main__":
    sys.exit(main())
