"""Weight files written by coremltools' own writer, and broken ones."""

from __future__ import annotations

import mmap
import re

import numpy as np
import pytest
import torch
from coremltools.libmilstoragepython import _BlobStorageWriter as BlobWriter

from coremill.core.errors import PackageError
from coremill.mil.values import BY_NAME
from coremill.mil.weights import WeightStore

NAME = "@model_path/weights/weight.bin"
RNG = np.random.default_rng(2)

ARRAYS = {
    "fp16": RNG.standard_normal(12).astype(np.float16),
    "fp32": RNG.standard_normal(12).astype(np.float32),
    "int8": RNG.integers(-128, 128, 12).astype(np.int8),
    "uint8": RNG.integers(0, 256, 12).astype(np.uint8),
    "int16": RNG.integers(-(2**15), 2**15, 12).astype(np.int16),
    "uint16": RNG.integers(0, 2**16, 12).astype(np.uint16),
    "int32": RNG.integers(-(2**31), 2**31, 12).astype(np.int32),
    "uint32": RNG.integers(0, 2**32, 12).astype(np.uint32),
    "int4": RNG.integers(-8, 8, 12).astype(np.int8),
    "uint1": RNG.integers(0, 2, 12).astype(np.uint8),
    "uint2": RNG.integers(0, 4, 12).astype(np.uint8),
    "uint3": RNG.integers(0, 8, 12).astype(np.uint8),
    "uint4": RNG.integers(0, 16, 12).astype(np.uint8),
    "uint6": RNG.integers(0, 64, 12).astype(np.uint8),
}


def _write(writer, name, array):
    if name == "fp16":
        return writer.write_fp16_data(array.view(np.uint16))
    if name == "fp32":
        return writer.write_float_data(array)
    return getattr(writer, f"write_{name}_data")(array)


@pytest.fixture
def stored(tmp_path):
    """A store of all ARRAYS, and their offsets."""
    (tmp_path / "weights").mkdir()
    writer = BlobWriter(str(tmp_path / "weights" / "weight.bin"))
    offsets = {name: _write(writer, name, array) for name, array in ARRAYS.items()}
    del writer
    return tmp_path, offsets


@pytest.mark.parametrize("name", ARRAYS)
def test_reads_what_coremltools_writes(stored, name):
    root, offsets = stored
    tensor = WeightStore(root).tensor(NAME, offsets[name], BY_NAME[name], (3, 4))
    assert tensor.dtype == BY_NAME[name].storage
    assert tensor.flatten().tolist() == ARRAYS[name].tolist()


@pytest.mark.parametrize("name", ["fp16", "fp32", "int8", "uint8", "int16", "int32"])
def test_shares_the_files_memory(stored, name, monkeypatch):
    """The tensor lies in the mapped file: at the blob's distance from another's."""
    root, offsets = stored
    mapped = []
    original = mmap.mmap
    monkeypatch.setattr(
        mmap, "mmap", lambda *args, **options: mapped.append(original(*args, **options)) or mapped[-1]
    )
    tensor = WeightStore(root).tensor(NAME, offsets[name], BY_NAME[name], (12,))
    whole = torch.frombuffer(mapped[0], dtype=torch.uint8)
    inside = tensor.data_ptr() - whole.data_ptr()
    assert offsets[name] < inside < len(mapped[0])


def test_each_call_returns_the_same_tensor(stored):
    root, offsets = stored
    store = WeightStore(root)
    first, second = (store.tensor(NAME, offsets["fp16"], BY_NAME["fp16"], (12,)) for _ in range(2))
    assert first is second


def test_writing_to_a_tensor_does_not_reach_the_file(stored):
    root, offsets = stored
    before = (root / "weights" / "weight.bin").read_bytes()
    WeightStore(root).tensor(NAME, offsets["fp32"], BY_NAME["fp32"], (12,)).zero_()
    assert (root / "weights" / "weight.bin").read_bytes() == before


def _read(root, offset, name="fp32", shape=(12,), file=NAME):
    return WeightStore(root).tensor(file, offset, BY_NAME[name], shape)


def test_missing_file_is_rejected(tmp_path):
    path = tmp_path / "weights" / "weight.bin"
    with pytest.raises(PackageError, match=f"^{re.escape(str(path))}: the weight file is missing"):
        _read(tmp_path, 64)


@pytest.mark.parametrize("size", [0, 10])
def test_file_without_header_is_rejected(stored, size):
    root, _ = stored
    path = root / "weights" / "weight.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(PackageError, match=r"cannot be read|the weight file has 10 bytes"):
        _read(root, 64)


def test_truncated_file_is_rejected(stored):
    root, offsets = stored
    path = root / "weights" / "weight.bin"
    content = path.read_bytes()
    path.write_bytes(content[: offsets["uint6"] + 70])
    with pytest.raises(
        PackageError, match=rf"the blob at offset {offsets['uint6']} ends at byte \d+; the file has"
    ):
        _read(root, offsets["uint6"], "uint6")
    path.write_bytes(content[: offsets["uint6"] + 20])
    with pytest.raises(PackageError, match=rf"reads a blob at offset {offsets['uint6']}; the file has \d+ bytes"):
        _read(root, offsets["uint6"], "uint6")


def test_malformed_weight_file_is_rejected(stored):
    root, offsets = stored
    with pytest.raises(PackageError, match="no blob starts at offset 80"):
        _read(root, 80)
    with pytest.raises(PackageError, match="reads a blob at offset 1000000000"):
        _read(root, 10**9)
    with pytest.raises(PackageError, match=rf"the blob at offset {offsets['fp16']} holds fp16"):
        _read(root, offsets["fp16"])
    with pytest.raises(PackageError, match="holds 48 bytes\n  expected: 80 bytes, for fp32 of shape \\[4, 5\\]"):
        _read(root, offsets["fp32"], shape=(4, 5))
    (root / "weights" / "weight.bin").write_bytes(b"\0" * 200)
    with pytest.raises(PackageError, match="not a weight file of version 2"):
        _read(root, 64)


def test_a_symbolic_link_is_followed(stored):
    root, offsets = stored
    path = root / "weights" / "weight.bin"
    path.rename(root / "blob")
    path.symlink_to("../blob")
    assert _read(root, offsets["fp32"]).tolist() == ARRAYS["fp32"].tolist()


@pytest.mark.parametrize("name", ["@model_path/../weight.bin", "/etc/passwd", "weight.bin", "@model_path"])
def test_name_outside_the_package_is_rejected(stored, name):
    root, _ = stored
    with pytest.raises(PackageError) as caught:
        _read(root, 64, file=name)
    assert str(caught.value) == (
        f"the program names the weight file {name!r}\n  expected: a path inside the package, @model_path/…"
    )
