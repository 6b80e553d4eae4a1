"""llama.cpp's library: another build is rejected before it is used."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coremill.core.errors import MachineError
from coremill.formats.llamacpp import library as llama_library
from coremill.formats.llamacpp.library import ContextParams, ModelParams, library

REMAKE = (
    "\n  expected: the release of xllamacpp in requirements/train.txt\n  run: pip install -r requirements/train.txt"
)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Without the cached library, before and after the test."""
    library.cache_clear()
    yield monkeypatch
    library.cache_clear()


def test_another_library_is_rejected(fresh: pytest.MonkeyPatch) -> None:
    import _ctypes

    fresh.setattr(llama_library, "library_path", lambda: _ctypes.__file__)
    with pytest.raises(MachineError) as caught:
        library()
    found = str(caught.value)
    assert found.startswith(f"{_ctypes.__file__} is not a library of llama.cpp: ")
    assert found.endswith(REMAKE)


@pytest.mark.parametrize("field", ["n_batch", "n_threads", "flash_attn_type", "type_v", "kv_unified"])
def test_a_field_at_another_offset_is_rejected(fresh: pytest.MonkeyPatch, field: str) -> None:
    """One field more moves all the fields after it."""
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


def test_a_struct_with_a_new_field_in_the_middle_is_rejected(fresh: pytest.MonkeyPatch) -> None:
    fields = [field for field in ModelParams._fields_ if field[0] not in ("use_extra_bufts", "no_host")]
    shorter = type("ModelParams", (ctypes.Structure,), {"_fields_": tuple(fields)})
    functions = dict(llama_library._FUNCTIONS) | {"llama_model_default_params": (shorter, ())}
    fresh.setattr(llama_library, "_FUNCTIONS", functions)
    with pytest.raises(MachineError, match=r"^xllamacpp is of another build of llama\.cpp: ModelParams\."):
        library()


def test_another_release_is_rejected(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr("importlib.metadata.version", lambda _: "2026.11.1")
    with pytest.raises(MachineError) as caught:
        library()
    assert str(caught.value) == "xllamacpp is 2026.11.1, coremill declares the structs of 2026.10.11549" + REMAKE


def test_a_missing_package_is_reported(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
