"""Each private dependency of the package is as the code expects; see docs/private-dependencies.md."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from coremltools import _deps, libmilstoragepython
from torch import nn

from coremill.core.digest import digest
from coremill.coreml.converter import ct, decoder_passes
from coremill.coreml.exported import capture_main, load_main, write_exported
from coremill.coreml.graph import as_input, trace
from coremill.coreml.multifunction import _ACCESS

IDS = [1, 2, 3]


class Model(nn.Module):
    def forward(self, input_ids):
        return input_ids.float(), input_ids.half()


def advice(dependency: str) -> str:
    return f"{dependency} changed: docs/private-dependencies.md explains what to do"


def test_coremltools_deps_compares_the_version_of_torch(caplog):
    for name in ("_warn_if_above_max_supported_version", "_TORCH_MAX_VERSION"):
        assert hasattr(_deps, name), advice(f"coremltools._deps.{name}")
    _deps._warn_if_above_max_supported_version("Torch", "999.0.0", _deps._TORCH_MAX_VERSION)
    assert "999.0.0 has not been tested with coremltools" in caplog.text, advice("coremltools._deps")


@pytest.mark.parametrize("kind", _ACCESS.values())
def test_weight_files_are_written_and_read_by_dtype(tmp_path, kind):
    data = np.arange(5).astype({"fp16": "uint16", "float": "float32"}.get(kind, kind))
    writer = libmilstoragepython._BlobStorageWriter(str(tmp_path / "weight.bin"))
    assert hasattr(writer, f"write_{kind}_data"), advice(f"coremltools' _BlobStorageWriter.write_{kind}_data")
    offset = getattr(writer, f"write_{kind}_data")(data)
    del writer  # completes the file
    reader = libmilstoragepython._BlobStorageReader(str(tmp_path / "weight.bin"))
    assert hasattr(reader, f"read_{kind}_data"), advice(f"coremltools' _BlobStorageReader.read_{kind}_data")
    found = np.asarray(getattr(reader, f"read_{kind}_data")(offset))
    assert found.tolist() == data.tolist(), advice("coremltools.libmilstoragepython")


def test_the_passes_are_less_than_a_third_of_the_default_ones_in_their_order():
    default, chosen = ct.PassPipeline.DEFAULT.passes, decoder_passes().passes
    rest = iter(default)
    for name in chosen:  # each is searched for after the one before
        assert name in rest, advice(f"coremltools.PassPipeline.DEFAULT ({name} is missing or is earlier)")
    assert 20 < len(chosen) < len(default) / 3


def test_the_description_of_a_function_has_the_known_fields():
    found = ct.proto.Model_pb2.FunctionDescription.DESCRIPTOR.fields_by_name
    known = {"name", "input", "output", "state", "predictedFeatureName", "predictedProbabilitiesName"}
    assert set(found) == known, advice("coremltools.proto.Model_pb2.FunctionDescription")


def test_coremltools_opens_a_package_without_changing_it(build):
    before = digest(build.package)
    ct.models.MLModel(str(build.package), skip_model_load=True)  # this rewrites Manifest.json
    assert digest(build.package) == before, advice("the layout of coremltools' Manifest.json")


def test_a_torchscript_archive_has_the_known_members_and_names():
    buffer = io.BytesIO()
    torch.jit.save(trace(Model(), IDS, ["first", "second"]), buffer)
    with zipfile.ZipFile(buffer) as archive:
        names = archive.namelist()
    for member in ("/constants.pkl", ".debug_pkl", "/.data/serialization_id"):
        assert any(name.endswith(member) for name in names), advice(f"the member {member} of TorchScript archives")
    buffer.seek(0)
    (result,) = torch.jit.load(buffer).graph.outputs()
    found = [value.debugName() for value in result.node().inputs()]
    assert found == ["first.1", "second.1"], advice("torch._C.Value.setDebugName")


def test_a_torch_export_archive_has_the_known_members_and_names(tmp_path):
    path = tmp_path / "model.pt2"
    with path.open("wb") as file:
        write_exported(capture_main(Model(), as_input(IDS), 8, ["first", "second"]), (), file)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert not any(b"site-packages" in archive.read(name) for name in names), advice("torch.export's metadata")
    assert any(name.endswith("/models/model.json") for name in names), advice("torch.export's archive")
    assert load_main(path).output_names == ["first", "second"], advice("ExportedProgram.call_spec")
