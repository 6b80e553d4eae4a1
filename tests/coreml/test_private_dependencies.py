"""Each private dependency of the package is as the code expects; see docs/private-dependencies.md."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import torch
from coremltools import _deps, libmilstoragepython
from torch import nn

from coremill.coreml.converter import ct, decoder_passes
from coremill.coreml.exported import _SOURCE_METADATA, export_main
from coremill.coreml.graph import as_input, trace
from coremill.coreml.multifunction import _ACCESS

ADVICE = "{} changed; docs/private-dependencies.md explains what to do"


class Model(nn.Module):
    def forward(self, input_ids):
        return (input_ids.float() * torch.arange(3.0).reshape(3, 1, 1), input_ids.float())


def test_coremltools_deps_compares_the_version_of_torch(caplog):
    advice = ADVICE.format("coremltools._deps")
    check = getattr(_deps, "_warn_if_above_max_supported_version", None)
    newest = getattr(_deps, "_TORCH_MAX_VERSION", None)
    assert check is not None, advice
    assert newest is not None, advice
    check("Torch", "999.0.0", newest)
    assert "999.0.0 has not been tested with coremltools" in caplog.text, advice


def test_weight_files_are_written_and_read_by_dtype(tmp_path):
    advice = ADVICE.format("coremltools.libmilstoragepython")
    path = str(tmp_path / "weight.bin")
    values = {}
    for kind in _ACCESS.values():
        dtype = {"fp16": np.uint16, "float": np.float32}.get(kind, kind)
        values[kind] = np.arange(5).astype(dtype)
    writer = libmilstoragepython._BlobStorageWriter(path)
    for kind in values:
        assert hasattr(writer, f"write_{kind}_data"), f"_BlobStorageWriter: {advice}"
    offsets = {kind: getattr(writer, f"write_{kind}_data")(data) for kind, data in values.items()}
    del writer  # completes the file
    reader = libmilstoragepython._BlobStorageReader(path)
    for kind, data in values.items():
        found = getattr(reader, f"read_{kind}_data")(offsets[kind])
        assert np.array_equal(np.asarray(found), data), f"_BlobStorageReader, {kind}: {advice}"


def test_every_chosen_pass_is_in_the_default_pipeline():
    missing = set(decoder_passes().passes) - set(ct.PassPipeline.DEFAULT.passes)
    assert not missing, ADVICE.format(f"coremltools.PassPipeline.DEFAULT (it lacks {', '.join(sorted(missing))})")


def test_the_description_of_a_function_has_the_known_fields():
    """FunctionJoiner copies them one by one."""
    found = set(ct.proto.Model_pb2.FunctionDescription.DESCRIPTOR.fields_by_name)
    known = {"name", "input", "output", "state", "predictedFeatureName", "predictedProbabilitiesName"}
    assert found == known, ADVICE.format("coremltools.proto.Model_pb2.FunctionDescription")


def test_coremltools_writes_the_manifest_in_the_same_layout(build):
    path = build.package / "Manifest.json"
    ours = path.read_bytes()
    ct.models.MLModel(str(build.package), skip_model_load=True)
    advice = ADVICE.format("the layout of coremltools' Manifest.json")
    assert json.loads(path.read_bytes()) == json.loads(ours), advice
    assert path.read_bytes() == ours, advice


def test_a_torchscript_archive_has_the_known_members_and_names():
    program = trace(Model(), [1, 2, 3], ["first", "second"])
    buffer = io.BytesIO()
    torch.jit.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        names = archive.namelist()
    for end in ("/constants.pkl", ".debug_pkl", "/.data/serialization_id"):
        assert any(name.endswith(end) for name in names), ADVICE.format(f"TorchScript's archive member {end}")
    buffer.seek(0)
    (result,) = torch.jit.load(buffer).graph.outputs()
    found = [value.debugName() for value in result.node().inputs()]
    assert found == ["first.1", "second.1"] or found == ["first", "second"], ADVICE.format("torch._C.Value")


def test_a_torch_export_archive_has_the_known_members_and_metadata():
    exported = torch.export.export(Model(), (as_input([1, 2, 3]),))
    metadata = set().union(*(node.meta for node in exported.graph.nodes))
    assert "stack_trace" in metadata, ADVICE.format("the metadata of torch.export's nodes")
    assert metadata & set(_SOURCE_METADATA) >= {"stack_trace", "nn_module_stack"}
    data = export_main(Model(), as_input([1, 2, 3]), 8, ["first", "second"])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
    assert any(name.endswith("/models/model.json") for name in names), ADVICE.format("torch.export's archive")
    program = torch.export.load(io.BytesIO(data))
    assert list(program.call_spec.out_spec.context) == ["first", "second"], ADVICE.format("call_spec")
