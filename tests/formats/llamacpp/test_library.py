"""The C API of llama.cpp: its structs are ours, and another build is refused before it is used."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coremill.core.errors import MachineError
from coremill.formats.llamacpp import library as llama_library
from coremill.formats.llamacpp.library import Batch, ContextParams, ModelParams, library

REMAKE = (
    "\n  expected: the release of xllamacpp in requirements/train.txt\n  run: pip install -r requirements/train.txt"
)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The library is looked for again, and forgotten."""
    library.cache_clear()
    yield monkeypatch
    library.cache_clear()


def test_the_structs_are_as_long_as_llama_cpp_s() -> None:
    """The sizes are those of the structs of llama.h, as a compiler of C lays them out."""
    assert (ModelParams.reserve.offset, ContextParams.reserve.offset, Batch.reserve.offset) == (80, 168, 56)


def test_the_defaults_are_those_that_llama_h_documents() -> None:
    params = library().llama_context_default_params()
    assert (params.n_ctx, params.n_batch, params.n_ubatch, params.type_k, params.type_v) == (512, 2048, 512, 1, 1)
    assert (params.flash_attn_type, params.offload_kqv, params.kv_unified) == (-1, True, False)


def test_a_library_that_is_not_llama_cpp_s(fresh: pytest.MonkeyPatch) -> None:
    import _ctypes

    fresh.setattr(llama_library, "library_path", lambda: _ctypes.__file__)
    with pytest.raises(MachineError) as caught:
        library()
    found = str(caught.value)
    assert found.startswith(f"{_ctypes.__file__} is not a library of llama.cpp: ")
    assert found.endswith(REMAKE)


@pytest.mark.parametrize("field", ["n_batch", "n_threads", "flash_attn_type", "type_v", "kv_unified"])
def test_a_field_that_is_elsewhere_is_another_build(fresh: pytest.MonkeyPatch, field: str) -> None:
    """A field more before it moves all that come after."""
    names = [name for name, *_ in ContextParams._fields_]
    fields = list(ContextParams._fields_)
    fields.insert(names.index(field), ("new", ctypes.c_uint32))
    moved = type("ContextParams", (ctypes.Structure,), {"_fields_": tuple(fields)})
    functions = dict(llama_library._FUNCTIONS) | {"llama_context_default_params": (moved, ())}
    fresh.setattr(llama_library, "_FUNCTIONS", functions)
    with pytest.raises(MachineError) as caught:
        library()
    found = str(caught.value)
    assert found.startswith("xllamacpp is of another build of llama.cpp: ContextParams.")
    assert found.endswith(REMAKE)


def test_a_struct_that_grew_within_is_another_build(fresh: pytest.MonkeyPatch) -> None:
    fields = [field for field in ModelParams._fields_ if field[0] not in ("use_extra_bufts", "no_host")]
    shorter = type("ModelParams", (ctypes.Structure,), {"_fields_": tuple(fields)})
    functions = dict(llama_library._FUNCTIONS) | {"llama_model_default_params": (shorter, ())}
    fresh.setattr(llama_library, "_FUNCTIONS", functions)
    with pytest.raises(MachineError, match=r"^xllamacpp is of another build of llama\.cpp: ModelParams\."):
        library()


def test_another_release(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr("importlib.metadata.version", lambda _: "2026.11.1")
    with pytest.raises(MachineError) as caught:
        library()
    assert str(caught.value) == "xllamacpp is 2026.11.1, coremill declares the structs of 2026.10.11549" + REMAKE


def test_no_library(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(sys, "path", [str(tmp_path)])
    fresh.delitem(sys.modules, "xllamacpp", raising=False)
    with pytest.raises(MachineError) as caught:
        library()
    assert str(caught.value) == "xllamacpp, which contains llama.cpp, is not installed" + REMAKE


def test_the_package_itself_is_not_imported() -> None:
    code = (
        "import sys; from coremill.formats.llamacpp.library import library; library(); "
        "sys.exit('xllamacpp' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
