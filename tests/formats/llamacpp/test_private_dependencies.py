"""Each private dependency of the package is as the code expects; see docs/private-dependencies.md."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

from coremill.core.errors import MachineError
from coremill.formats.llamacpp import library as llama
from coremill.formats.llamacpp.library import Batch, ContextParams, ModelParams

ADVICE = "{} changed; docs/private-dependencies.md explains what to do"
PARAMS = (
    "n_ctx",
    "n_parallel",
    "n_gpu_layers",
    "fit_params",
    "warmup",
    "ui",
    "cache_ram_mib",
    "verbosity",
    "api_keys",
)


def test_the_release_of_xllamacpp_is_the_declared_one() -> None:
    assert importlib.metadata.version("xllamacpp") == llama._RELEASE, ADVICE.format("the release of xllamacpp")


def test_the_structs_of_llama_h_have_the_declared_sizes_and_fields() -> None:
    advice = ADVICE.format("llama.h of xllamacpp")
    sizes = (ModelParams.reserve.offset, ContextParams.reserve.offset, Batch.reserve.offset)
    assert sizes == (80, 168, 56), f"{advice} (these are the sizes that a C compiler gives)"
    try:
        params = llama.library().llama_context_default_params()
    except MachineError as failure:
        raise AssertionError(f"{advice}: {failure.found}") from failure
    assert (params.n_ctx, params.n_batch, params.n_ubatch, params.type_k, params.type_v) == (512, 2048, 512, 1, 1)
    assert (params.flash_attn_type, params.offload_kqv, params.kv_unified) == (-1, True, False), advice


def test_the_server_of_xllamacpp_has_the_attributes_that_are_used() -> None:
    """In a process of its own, since the module loads the whole server."""
    code = (
        "import sys, xllamacpp; params = xllamacpp.CommonParams(); params.model.path; "
        "xllamacpp.Server.listening_address; "
        "print(*[name for name in sys.argv[1:] if not hasattr(params, name)])"
    )
    done = subprocess.run([sys.executable, "-c", code, *PARAMS], capture_output=True, text=True, check=False)
    advice = ADVICE.format("xllamacpp.CommonParams or xllamacpp.Server")
    assert (done.returncode, done.stdout) == (0, "\n"), f"{advice}: {done.stdout}{done.stderr}"
