"""Packages on disk, whole and broken, and models in memory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.models import datatypes
from coremltools.models.neural_network import NeuralNetworkBuilder
from coremltools.models.pipeline import PipelineClassifier
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coremill.core.errors import CoremillError, PackageError
from coremill.mil import MLModel

X = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
WEIGHT = np.arange(256, dtype=np.float32).reshape(16, 16) / 256


@pytest.fixture(scope="module")
def in_memory(build):
    """One matrix product, whose weight is large enough for the weight file."""
    return build({"x": X}, lambda x: mb.linear(x=x, weight=WEIGHT, name="y"))


@pytest.fixture
def package(in_memory, tmp_path):
    path = tmp_path / "model.mlpackage"
    in_memory.save(str(path))
    return path


def test_a_package_and_the_model_in_memory_agree(in_memory, package):
    found = MLModel(package).predict({"x": X})["y"]
    np.testing.assert_allclose(found, X @ WEIGHT.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(MLModel(in_memory).predict({"x": X})["y"], found)
    np.testing.assert_array_equal(MLModel(str(package)).predict({"x": X})["y"], found)


def _parts(package):
    model = package / "Data" / "com.apple.CoreML"
    return package / "Manifest.json", model / "model.mlmodel", model / "weights" / "weight.bin"


def _refusal(package):
    with pytest.raises(PackageError) as caught:
        MLModel(package)
    return str(caught.value)


def test_missing_package_is_rejected(tmp_path):
    missing = tmp_path / "none.mlpackage"
    assert _refusal(missing).startswith(f"{missing}: no such package\n  expected: an .mlpackage directory")


def test_file_is_rejected(tmp_path):
    path = tmp_path / "model.mlpackage"
    path.write_text("not a directory")
    assert _refusal(path).startswith(f"{path}: a file\n  expected: an .mlpackage directory")


def test_missing_manifest_is_rejected(package):
    _parts(package)[0].unlink()
    assert _refusal(package).startswith(f"{package}: Manifest.json is missing")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{"])
def test_a_manifest_that_is_not_json(package, content):
    _parts(package)[0].write_bytes(content)
    assert "Manifest.json: not readable as JSON" in _refusal(package)


@pytest.mark.parametrize("content", [{}, [], {"rootModelIdentifier": "a", "itemInfoEntries": {}}, None])
def test_a_manifest_without_a_root_model(package, content):
    _parts(package)[0].write_text(json.dumps(content))
    assert "Manifest.json: names no root model" in _refusal(package)


def _name_root_model(package, name):
    manifest_path = _parts(package)[0]
    manifest = json.loads(manifest_path.read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = name
    manifest_path.write_text(json.dumps(manifest))


def test_a_root_model_outside_the_package(package, tmp_path):
    """Also where the path comes back in, or a model lies at its end."""
    outside = tmp_path / "elsewhere.mlmodel"
    shutil.copy(_parts(package)[1], outside)
    for name in ("../../elsewhere.mlmodel", str(outside), "../Data/com.apple.CoreML/model.mlmodel"):
        _name_root_model(package, name)
        assert f"the root model's path {name!r} leaves the package" in _refusal(package)


@pytest.mark.parametrize("name", ["", "com.apple.CoreML", "a\0b", "a" * 5000, "\ud800"])
def test_root_model_that_is_not_a_file_is_rejected(package, name):
    _name_root_model(package, name)
    assert "not a Core ML model (" in _refusal(package)


def test_symbolic_links_are_followed(package, tmp_path):
    """As in a download cache, whose snapshots link each file to where its content lies."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    expected = MLModel(package).predict({"x": X})["y"]
    for position, part in enumerate(_parts(package)):
        shutil.move(part, blobs / str(position))
        part.symlink_to(os.path.relpath(blobs / str(position), part.parent))
    linked = tmp_path / "linked.mlpackage"
    linked.symlink_to(package)
    for path in (package, linked):
        np.testing.assert_array_equal(MLModel(path).predict({"x": X})["y"], expected)


def test_missing_model_file_is_rejected(package):
    model = _parts(package)[1]
    model.unlink()
    assert _refusal(package).startswith(f"{model}: the root model is missing")


def test_missing_weight_file_is_rejected(package):
    weights = _parts(package)[2]
    weights.unlink()
    assert _refusal(package) == f"{weights}: the weight file is missing\n  expected: the package as it was saved"


def test_a_truncated_weight_file(package):
    weights = _parts(package)[2]
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert f"{weights}: the blob at offset 64 ends at byte" in _refusal(package)


def test_malformed_model_file_is_rejected(package):
    model = _parts(package)[1]
    model.write_bytes(b"\x07" * 1000)
    assert _refusal(package).startswith(f"{model}: not a Core ML model")


def test_an_empty_model_file(package):
    _parts(package)[1].write_bytes(b"")
    assert "the model is of type none\n  expected: an ML Program" in _refusal(package)


def test_other_model_types_are_rejected(tmp_path):
    spec = ct.proto.Model_pb2.Model()
    spec.specificationVersion = 4
    spec.neuralNetwork.SetInParent()
    package = tmp_path / "network.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Data" / "network.mlmodel").write_bytes(spec.SerializeToString())
    entries = {"id": {"path": "network.mlmodel"}}
    (package / "Manifest.json").write_text(json.dumps({"rootModelIdentifier": "id", "itemInfoEntries": entries}))
    assert _refusal(package).startswith(f"{package}: a neural network (neuralNetwork)\n  expected: ")


def _network(source, result):
    arrays = ([(source, datatypes.Array(3))], [(result, datatypes.Array(3))])
    builder = NeuralNetworkBuilder(*arrays)
    builder.add_activation("relu", "RELU", source, result)
    return ct.models.MLModel(builder.spec, skip_model_load=True)


def test_a_neural_network_in_memory_is_rejected():
    assert _refusal(_network("x", "y")) == (
        "the coremltools model: a neural network (neuralNetwork)\n"
        "  expected: an ML Program: convert the original model again, by "
        "coremltools.convert(…, convert_to='mlprogram')"
    )


def test_a_pipeline_in_memory_is_rejected():
    models = [_network("x", "y"), _network("y", "z")]
    expected = (
        "of 2 models: neuralNetwork, neuralNetwork\n"
        "  expected: one ML Program: open the models one by one, each made by "
        "coremltools.convert(…, convert_to='mlprogram')"
    )
    pipeline = ct.utils.make_pipeline(*models)
    assert _refusal(pipeline) == f"the coremltools model: a pipeline (pipeline) {expected}"
    classifier = PipelineClassifier([("x", datatypes.Array(3))], ["a", "b"])
    for model in models:
        classifier.add_model(model.get_spec())
    refused = ct.models.MLModel(classifier.spec, skip_model_load=True)
    assert _refusal(refused) == f"the coremltools model: a pipeline (pipelineClassifier) {expected}"


def test_unknown_function_is_rejected(package):
    with pytest.raises(PackageError) as caught:
        MLModel(package, function_name="decode")
    assert str(caught.value) == f"{package}: no function 'decode'\n  expected: one of ['main']"


@given(data=st.data())
@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_damaged_package_raises_or_runs(package, tmp_path, data):
    """Cut or overwrite part of any file: an error of ours that says so, or a program that runs. Nothing else."""
    damaged = tmp_path / "damaged.mlpackage"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(package, damaged)
    part = data.draw(st.sampled_from(_parts(damaged)))
    content = bytearray(part.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    part.write_bytes(content)
    with contextlib.suppress(CoremillError):
        MLModel(damaged).predict({"x": X})


def test_weight_file_truncated_after_opening_is_rejected(package):
    """Reading what is no longer there would kill the interpreter."""
    model, other = MLModel(package), MLModel(package)
    (weights,) = package.rglob("weight.bin")
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(64)
    data = {spec.name: np.zeros(spec.supported_shapes[0], spec.dtype) for spec in model.inputs}
    with pytest.raises(PackageError) as caught:
        model.predict(data)
    assert caught.value.found == f"{weights}: the weight file has 64 bytes; it had {size} when it was opened"
    with weights.open("r+b") as file:
        file.truncate(size)  # zeros now, and no longer a danger
    weights.unlink()
    assert other.predict(data)


def test_model_imports_without_rich_and_msgspec():
    script = "import sys; sys.modules.update(msgspec=None, rich=None); from coremill.mil import MLModel"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
