"""Each private dependency of the package is as the code expects; see docs/private-dependencies.md."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import coremltools as ct
import coremltools.models.utils as coremltools_utils
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import testing_utils
from coremltools.converters.mil.frontend.milproto.load import load
from coremltools.libmilstoragepython import _BlobStorageWriter as BlobWriter

from coremill.core.errors import PackageError
from coremill.mil.commands.selftest import BUNDLE
from coremill.mil.coremltools_quietly import FeatureTypes_pb2, MIL_pb2, Model_pb2
from coremill.mil.graph import _IOS_VERSION
from coremill.mil.ops.linear import _onednn_linear
from coremill.mil.values import ELEMENT_TYPES, FP32
from coremill.mil.weights import _BLOB_TYPES, WeightStore

IN_THE_FILE = {"fp16": "FLOAT16", "fp32": "FLOAT32", "fp64": "FLOAT64", "bf16": "BFLOAT16"}

FIELDS = {
    MIL_pb2.Function: "inputs opset block_specializations",
    MIL_pb2.Block: "outputs operations",
    MIL_pb2.Operation: "type inputs outputs blocks attributes",
    MIL_pb2.Argument.Binding: "name value",
    MIL_pb2.NamedValueType: "name type",
    MIL_pb2.ValueType: "tensorType listType stateType",
    MIL_pb2.TensorType: "dataType dimensions",
    MIL_pb2.Value: "type immediateValue blobFileValue",
    MIL_pb2.Value.BlobFileValue: "fileName offset",
    Model_pb2.ModelDescription: "functions defaultFunctionName input output state",
    FeatureTypes_pb2.FeatureType: (
        "multiArrayType imageType stringType int64Type dictionaryType stateType isOptional"
    ),
    FeatureTypes_pb2.ArrayFeatureType: "shape dataType enumeratedShapes shapeRange",
    FeatureTypes_pb2.ImageFeatureType: "width height enumeratedSizes imageSizeRange colorSpace",
}


def advice(dependency: str) -> str:
    return f"{dependency} changed: docs/private-dependencies.md explains what to do"


@pytest.mark.parametrize("message", FIELDS, ids=lambda message: message.DESCRIPTOR.full_name)
def test_messages_have_the_fields_that_are_read(message):
    missing = set(FIELDS[message].split()) - set(message.DESCRIPTOR.fields_by_name)
    assert not missing, advice(f"coremltools.proto ({message.DESCRIPTOR.full_name} lacks {sorted(missing)})")


@pytest.mark.parametrize(("number", "element"), ELEMENT_TYPES.items(), ids=lambda each: str(each))
def test_element_types_have_the_numbers_of_the_file_format(number, element):
    name = IN_THE_FILE.get(element.name, element.name.upper())
    assert MIL_pb2.DataType.Value(name) == number, advice(f"coremltools.proto.MIL_pb2.DataType.{name}")


def test_operation_sets_are_those_of_coremltools():
    assert set(_IOS_VERSION) >= set(ct._OPSET.values()) - {"CoreML3", "CoreML4"}, advice("coremltools._OPSET")


def test_weight_files_have_the_known_layout(tmp_path):
    (tmp_path / "weights").mkdir()
    writer = BlobWriter(str(tmp_path / "weights" / "weight.bin"))
    for name in set(_BLOB_TYPES.values()) - {"bf16"}:  # which coremltools does not write
        method = f"write_{'float' if name == 'fp32' else name}_data"
        assert hasattr(writer, method), advice(f"coremltools.libmilstoragepython._BlobStorageWriter.{method}")
    offset = writer.write_float_data(np.float32([1, 2]))
    del writer  # completes the file
    try:
        tensor = WeightStore(tmp_path).tensor("@model_path/weights/weight.bin", offset, FP32, (2,))
    except PackageError as error:
        pytest.fail(f"{advice('the layout of weight files')} ({error})")
    assert tensor.tolist() == [1, 2]


def test_missing_libraries_are_reported_in_the_words_that_are_filtered():
    """In a new interpreter no line about Core ML's missing libraries is printed, and later lines are."""
    script = (
        "import logging, sys\n"
        "from coremill.mil import MLModel\n"
        f"MLModel({str(BUNDLE / 'int8.mlpackage')!r})\n"
        "logging.getLogger('coremltools').warning('Failed to load _MLModelProxy: said later')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    lines = [line for line in (run.stdout + run.stderr).splitlines() if "Failed to load" in line]
    assert lines == ["Failed to load _MLModelProxy: said later"], advice("the notices of coremltools' import")


def test_the_callers_device_can_be_set_aside():
    assert torch._C._len_torch_function_stack() == 0, advice("torch._C._len_torch_function_stack")
    with torch.device("meta"):
        assert torch._C._len_torch_function_stack() == 1, advice("torch._C._len_torch_function_stack")
        with torch._C.DisableTorchFunction():
            assert torch.zeros(()).device.type == "cpu", advice("torch._C.DisableTorchFunction")


def test_onednn_has_its_linear_layer():
    if not torch.backends.mkldnn.is_available():
        return  # F.linear is used where torch is built without oneDNN
    assert _onednn_linear is not None, advice("torch.ops.mkldnn._linear_pointwise")
    x, weight = torch.ones(2, 3), torch.arange(12.0).reshape(4, 3)
    found = _onednn_linear(x, weight, None, "none", [], "")
    assert found.equal(F.linear(x, weight)), advice("torch.ops.mkldnn._linear_pointwise")


def test_the_reader_of_coremltools_has_the_known_parameters():
    found = list(inspect.signature(load).parameters)[:3]
    assert found == ["model_spec", "specification_version", "file_weights_dir"], advice(
        "coremltools' milproto.load"
    )


def test_the_operation_tests_of_coremltools_have_the_known_hooks():
    for module, name in (
        (testing_utils, "_IS_MACOS"),
        (testing_utils, "compare_backend"),
        (coremltools_utils, "_macos_version"),
    ):
        assert hasattr(module, name), advice(f"{module.__name__}.{name}")
