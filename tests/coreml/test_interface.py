"""The interface of a saved specification, and each difference from the contract."""

from __future__ import annotations

import pytest

from coremill.core.errors import PackageError
from coremill.coreml.graph import describe
from coremill.coreml.interface import differences, package_interfaces
from coremill.coreml.package import read_spec


def test_the_saved_specification_has_the_contracts_interface(pristine):
    (found,) = package_interfaces(read_spec(pristine.package))
    assert describe(found.inputs) == "input_ids int32 (1, T)"
    assert describe(found.outputs) == "logits float32 (1, T, 512), halt_logits float32 (1, T, 2)"
    assert (found.lengths, found.default) == ((80, 96, 128), 96)
    assert differences(pristine.read_contract().package_functions, (found,)) == ()


def test_the_lengths_are_enumerated_shapes(pristine):
    (feature,) = read_spec(pristine.package).description.input
    array = feature.type.multiArrayType
    assert array.WhichOneof("ShapeFlexibility") == "enumeratedShapes"
    assert sorted(tuple(shape.shape) for shape in array.enumeratedShapes.shapes) == [(1, 80), (1, 96), (1, 128)]


def _float16_logits(surgery, spec):
    spec.description.output[0].type.multiArrayType.dataType = 65552  # ArrayFeatureType.FLOAT16


def _other_default(surgery, spec):
    spec.description.input[0].type.multiArrayType.shape[-1] = 128


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda surgery, spec: surgery.rename_output(spec, "logits", "var_292"),
            "outputs: the contract has logits float32 (1, T, 512), halt_logits float32 (1, T, 2); "
            "the package has var_292 float32 (1, T, 512), halt_logits float32 (1, T, 2)",
        ),
        (
            lambda surgery, spec: surgery.swap_outputs(spec),
            "outputs: the contract has logits float32 (1, T, 512), halt_logits float32 (1, T, 2); "
            "the package has halt_logits float32 (1, T, 512), logits float32 (1, T, 2)",
        ),
        (
            _float16_logits,
            "outputs: the contract has logits float32 (1, T, 512), halt_logits float32 (1, T, 2); "
            "the package has logits float16 (1, T, 512), halt_logits float32 (1, T, 2)",
        ),
        (
            lambda surgery, spec: surgery.drop_length(spec, 80),
            "lengths: the contract has [80, 96, 128]; the package has [96, 128]",
        ),
        (_other_default, "default length: the contract has 96; the package has 128"),
    ],
)
def test_each_difference_is_described(pristine, surgery, change, difference):
    spec = read_spec(pristine.package)
    change(surgery, spec)
    assert differences(pristine.read_contract().package_functions, package_interfaces(spec)) == (difference,)


def test_a_fixed_shape_has_one_length(pristine):
    spec = read_spec(pristine.package)
    spec.description.input[0].type.multiArrayType.ClearField("enumeratedShapes")
    (found,) = package_interfaces(spec)
    assert (found.lengths, found.default, found.inputs[0].shape) == ((96,), 96, (1, 96))


def test_another_type_of_model_and_a_range_of_shapes_are_errors(pristine):
    spec = read_spec(pristine.package)
    ranges = spec.description.input[0].type.multiArrayType.shapeRange.sizeRanges
    ranges.add(lowerBound=1, upperBound=1)
    ranges.add(lowerBound=1, upperBound=128)
    with pytest.raises(PackageError, match=r"^input `input_ids` accepts a range of shapes"):
        package_interfaces(spec)
    spec.neuralNetwork.SetInParent()
    with pytest.raises(PackageError, match=r"^the model is not an ML Program with a function `main`"):
        package_interfaces(spec)
