"""Classifiers: the label and the dictionary of probabilities that Core ML returns."""

from __future__ import annotations

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.core.errors import PackageError, PredictionInputError
from coremill.mil import LabelSpec, MLModel, ProbabilitiesSpec, TensorSpec
from coremill.mil.description import describe_function
from coremill.mil.graph import read_function
from coremill.mil.loader import Package, open_package

X = np.random.default_rng(3).standard_normal((1, 6)).astype(np.float32)
LABELS = {"string": ["ant", "bée", "cat", "7"], "int64": [10, 2**40, -3, 0]}


@pytest.fixture(scope="module")
def product():
    torch.manual_seed(2)
    return torch.nn.Linear(6, 4)


def _convert(product, config, *, precision=ct.precision.FLOAT32, with_logits=True):
    """Six features to the probabilities of four classes, and the logits beside them."""
    weight, bias = (each.detach().numpy() for each in (product.weight, product.bias))

    @mb.program(input_specs=[mb.TensorSpec(X.shape)], opset_version=ct.target.iOS17)
    def program(x):
        logits = mb.linear(x=x, weight=weight, bias=bias, name="logits")
        probabilities = mb.softmax(x=logits, axis=-1, name="probabilities")
        return (probabilities, logits) if with_logits else probabilities

    return ct.convert(
        program,
        classifier_config=config,
        compute_precision=precision,
        minimum_deployment_target=ct.target.iOS17,
        skip_model_load=True,
    )


@pytest.fixture(scope="module", params=["string", "int64"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def converted(product, kind):
    return _convert(product, ct.ClassifierConfig(LABELS[kind], "kind", "probabilities"))


def _expected(product, kind):
    with torch.no_grad():
        logits = product(torch.from_numpy(X))
    return dict(zip(LABELS[kind], torch.softmax(logits, -1)[0].tolist(), strict=True)), logits.numpy()


@pytest.mark.parametrize("mode", ["declared", "oracle", "oracle-fp64"])
def test_classifier_returns_label_and_probabilities(converted, product, kind, mode):
    probabilities, logits = _expected(product, kind)
    outputs = MLModel(converted, mode=mode).predict({"x": X})
    assert outputs["kind"] == max(probabilities, key=probabilities.__getitem__)
    assert type(outputs["kind"]) is (str if kind == "string" else int)
    assert list(outputs["kind_probs"]) == LABELS[kind]
    assert {type(each) for each in outputs["kind_probs"].values()} == {float}
    assert outputs["kind_probs"] == pytest.approx(probabilities, rel=1e-5)
    np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-5)


def test_the_interface(converted, kind):
    model = MLModel(converted)
    assert model.outputs == (
        LabelSpec("kind", kind),
        ProbabilitiesSpec("kind_probs", kind),
        TensorSpec("logits", "float32", (1, 4)),
    )


def test_names_by_default_and_probabilities_of_fp16(product):
    """Without a name the program's last operation gives the probabilities."""
    config = ct.ClassifierConfig(LABELS["string"])
    model = MLModel(_convert(product, config, precision=ct.precision.FLOAT16, with_logits=False))
    probabilities, _ = _expected(product, "string")
    outputs = model.predict({"x": X})
    assert list(outputs) == ["classLabel", "classLabel_probs"]
    assert outputs["classLabel"] == max(probabilities, key=probabilities.__getitem__)
    assert outputs["classLabel_probs"] == pytest.approx(probabilities, abs=2e-3)


def test_ties_return_the_first_label_and_nan_is_kept():
    program = mb.program(input_specs=[mb.TensorSpec((3,))], opset_version=ct.target.iOS17)(
        lambda x: mb.softmax(x=x, axis=-1)
    )
    model = MLModel(
        ct.convert(
            program,
            classifier_config=ct.ClassifierConfig(["one", "two", "three"]),
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
        )
    )
    assert model.predict({"x": np.float32([1, 2, 2])})["classLabel"] == "two"
    probabilities = model.predict({"x": np.float32([1, np.nan, 2])})["classLabel_probs"]
    assert all(np.isnan(each) for each in probabilities.values())


def test_returned_probabilities_are_a_copy():
    """Even where it is computed once, as its probabilities are constants."""

    @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=ct.target.iOS17)
    def program(x):
        return mb.const(val=np.float32([0.25, 0.75]), name="probabilities"), mb.identity(x=x)

    config = ct.ClassifierConfig(["no", "yes"], predicted_probabilities_output="probabilities")
    model = MLModel(
        ct.convert(
            program,
            classifier_config=config,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
        )
    )
    for _ in range(2):
        found = model.predict({"x": np.zeros(1, np.float32)})
        assert (found["classLabel"], found["classLabel_probs"]) == ("yes", {"no": 0.25, "yes": 0.75})
        found["classLabel_probs"].clear()


@pytest.fixture
def package(converted):
    return Package("toy", converted.get_spec(), open_package(converted).weights)


def _classify(package):
    operations = package.spec.mlProgram.functions["main"].block_specializations["CoreML7"].operations
    return next(each for each in operations if each.type == "classify")


def test_fewer_labels_than_probabilities_are_rejected(package, converted):
    del _classify(package).inputs["classes"].arguments[0].value.immediateValue.list.values[0]
    broken = ct.models.MLModel(package.spec, weights_dir=converted.weights_dir, skip_model_load=True)
    with pytest.raises(PredictionInputError, match=r"\(classify\): 4 probabilities for 3 classes$"):
        MLModel(broken).predict({"x": X})


def test_described_classifier_without_classify_is_rejected(package):
    package.spec.description.output[2].type.stringType.SetInParent()
    with pytest.raises(PackageError) as caught:
        describe_function(package, "main", read_function(package, "main"))
    assert str(caught.value) == (
        "toy, function 'main': 'logits' is of type stringType\n  expected: an output of a classify operation"
    )


def test_classifier_described_as_array_is_rejected(package):
    package.spec.description.output[1].type.CopyFrom(package.spec.description.output[2].type)
    with pytest.raises(PackageError) as caught:
        describe_function(package, "main", read_function(package, "main"))
    assert str(caught.value) == (
        "toy, function 'main': describes 'kind_probs' as float32 of shape [1, 4]\n"
        "  expected: an output of a classifier, as its program declares it"
    )
