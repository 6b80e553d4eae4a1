"""What a package says of a function, and where that contradicts its program."""

from __future__ import annotations

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.proto import FeatureTypes_pb2

from coremill.core.errors import PackageError, UnsupportedOperationError
from coremill.mil.description import (
    DefaultValue,
    FunctionDescription,
    TensorSpec,
    choose_function,
    describe_function,
)
from coremill.mil.graph import read_function
from coremill.mil.loader import Package, open_package
from coremill.mil.values import STRING


@pytest.fixture(scope="module")
def model(build):
    return build({"x": np.ones((2, 3), np.float32)}, lambda x: mb.square(x=x, name="y"))


@pytest.fixture
def package(model):
    return Package("toy", model.get_spec(), open_package(model).weights)


def _describe(package) -> FunctionDescription:
    return describe_function(package, "main", read_function(package, "main"))


def _package_error(package):
    with pytest.raises(PackageError) as caught:
        _describe(package)
    return str(caught.value)


def test_an_interface(package):
    assert _describe(package) == FunctionDescription(
        "main", (TensorSpec("x", "float32", (2, 3)),), (TensorSpec("y", "float32", (2, 3)),), ()
    )
    assert choose_function(package, None) == "main"


def test_different_name_is_rejected(package):
    package.spec.description.input[0].name = "z"
    assert _package_error(package) == (
        "toy, function 'main': describes the inputs ['z']\n  expected: those of its program, ['x']"
    )


def test_undefined_output_is_rejected(package):
    package.spec.description.output[0].name = "z"
    assert _package_error(package) == "toy, function 'main': its program has no 'z'\n  expected: one of ['y']"


def test_different_type_is_rejected(package):
    array = package.spec.description.input[0].type.multiArrayType
    array.dataType = FeatureTypes_pb2.ArrayFeatureType.INT32
    assert _package_error(package) == (
        "toy, function 'main': describes 'x' as int32 of shape [2, 3]\n"
        "  expected: fp32[2, 3], as its program declares it"
    )
    array.dataType = 7
    assert _package_error(package) == "toy, function 'main': 'x' is of data type number 7"


def test_different_sizes_are_rejected(build, package):
    """Where both fix a size it must be the same; the description may leave one open."""
    array = package.spec.description.input[0].type.multiArrayType
    array.shape[:] = [7, 3]
    assert _package_error(package) == (
        "toy, function 'main': describes 'x' as float32 of shape [7, 3]\n"
        "  expected: fp32[2, 3], as its program declares it"
    )
    array.shape[:] = [2, 3, 1]
    assert "describes 'x' as float32 of shape [2, 3, 1]" in _package_error(package)
    del array.shape[:]
    for least, greatest in ((2, 2), (4, 4)):
        array.shapeRange.sizeRanges.add(lowerBound=least, upperBound=greatest)
    assert "describes 'x' as float32 of shape [2, 4]" in _package_error(package)
    array.shapeRange.sizeRanges[1].lowerBound = 1
    assert _describe(package).inputs[0].shape == (2, None)
    package.spec.description.output[0].type.multiArrayType.shape[:] = [2, 9]
    assert "describes 'y' as float32 of shape [2, 9]" in _package_error(package)


def test_a_state_is_described_as_one(package):
    (feature,) = package.spec.description.input
    state = package.spec.description.state.add(name="x")
    state.type.stateType.arrayType.CopyFrom(feature.type.multiArrayType)
    assert _package_error(package) == (
        "toy, function 'main': describes the states ['x']\n  expected: those of its program, []"
    )
    del package.spec.description.input[:]
    assert "describes the inputs []\n  expected: those of its program, ['x']" in _package_error(package)


def test_input_that_is_not_a_tensor_is_rejected(package):
    package.spec.mlProgram.functions["main"].inputs.add(name="text").type.tensorType.dataType = STRING
    assert _package_error(package) == (
        "toy, function 'main': an input of its program is neither a tensor nor a state"
    )


def test_shapes_of_different_ranks_are_rejected(package):
    array = package.spec.description.input[0].type.multiArrayType
    for shape in ((2, 3), (2, 3, 4)):
        array.enumeratedShapes.shapes.add().shape.extend(shape)
    assert _package_error(package) == "toy, function 'main': the shapes of input 'x' are of different ranks"


@pytest.mark.parametrize(
    ("features", "expected"),
    [("input", "a multi-array or an image"), ("output", "a multi-array, an image, or an output of a classifier")],
)
def test_unsupported_feature_type_is_rejected(package, features, expected):
    (feature,) = getattr(package.spec.description, features)
    feature.type.sequenceType.SetInParent()
    with pytest.raises(UnsupportedOperationError) as caught:
        _describe(package)
    assert str(caught.value) == (
        f"toy, function 'main': {feature.name!r} is of type sequenceType\n  expected: {expected}"
    )


def test_an_optional_input(package):
    """Its default is a number for all elements; its shape without another word is the described or the least."""
    feature = package.spec.description.input[0]
    feature.type.isOptional = True
    array = feature.type.multiArrayType
    assert _describe(package).inputs[0].default is None
    for kind, value in (("intDefaultValue", 2), ("floatDefaultValue", -0.5), ("doubleDefaultValue", 0.0)):
        setattr(array, kind, value)
        assert _describe(package).inputs[0].default == DefaultValue((2, 3), value)
    for least, greatest in ((2, 2), (1, 3)):
        array.shapeRange.sizeRanges.add(lowerBound=least, upperBound=greatest)
    assert _describe(package).inputs[0].default == DefaultValue((2, 3), 0.0)
    del array.shape[:]
    assert _describe(package).inputs[0].default == DefaultValue((2, 1), 0.0)
    feature.type.isOptional = False
    assert _describe(package).inputs[0].default is None


def test_a_scalar(build):
    """Core ML knows no scalars, and the description of an output says nothing of its shape."""
    model = build({"x": np.ones(2, np.float32)}, lambda x: mb.reduce_sum(x=x, name="y"))
    package = Package("toy", model.get_spec(), open_package(model).weights)
    assert list(package.spec.description.output[0].type.multiArrayType.shape) == []
    assert _describe(package).outputs == (TensorSpec("y", "float32", (1,)),)


@pytest.mark.parametrize(
    ("spec", "admitted", "refused", "text"),
    [
        (TensorSpec("x", "int32", (2, 3)), [(2, 3)], [(3, 2), (2, 3, 1), ()], "[2, 3]"),
        (
            TensorSpec("x", "int32", (1, None), enumerated_shapes=((1, 8), (1, 4))),
            [(1, 4), (1, 8)],
            [(1, 6), (2, 4)],
            "one of [1, 8], [1, 4]",
        ),
        (
            TensorSpec("x", "int32", (1, None), size_ranges=((1, 1), (2, None))),
            [(1, 2), (1, 9000)],
            [(1, 1), (2, 2), (2,)],
            "rank 2 with sizes [1, at least 2]",
        ),
    ],
    ids=["fixed", "enumerated", "ranges"],
)
def test_shapes_that_are_admitted(spec, admitted, refused, text):
    assert all(spec.admits(shape) for shape in admitted)
    assert not any(spec.admits(shape) for shape in refused)
    assert spec.describe_shapes() == text
