"""Convolutions, against torch.nn in float64 and scipy."""

from __future__ import annotations

import coremltools as ct
import numpy as np
import pytest
import scipy.signal
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.core.errors import CoremillError, PredictionInputError
from coremill.mil import MLModel

RNG = np.random.default_rng(23)
SIZES = (9, 8, 7)
KERNEL = (3, 2, 4)
CONV = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}
CONV_TRANSPOSE = {1: torch.nn.ConvTranspose1d, 2: torch.nn.ConvTranspose2d, 3: torch.nn.ConvTranspose3d}


def _random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def _reference(module, x):
    """Return a torch module's output in float64, and its weight and bias as float32."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.float())
        expected = module(torch.from_numpy(x).double()).numpy()
    weight = module.weight.detach().float().numpy()
    return expected, weight, None if module.bias is None else module.bias.detach().float().numpy()


CONFIGURATIONS = [  # strides, dilations, groups, whether there is a bias
    ((1, 1, 1), (1, 1, 1), 1, False),
    ((2, 3, 1), (1, 1, 1), 2, True),
    ((1, 2, 1), (2, 1, 2), 4, True),
]


def _configured(modules, rank, padding, x):
    """Yield the expected outputs and the operation's options for each configuration."""
    expected, options = [], []
    for strides, dilations, groups, has_bias in CONFIGURATIONS:
        module = modules[rank](
            4,
            8,
            KERNEL[:rank],
            strides[:rank],
            padding[:rank],
            dilation=dilations[:rank],
            groups=groups,
            bias=has_bias,
            dtype=torch.float64,
        )
        output, weight, bias = _reference(module, x)
        expected.append(output)
        options.append(
            {
                "weight": weight,
                "strides": strides[:rank],
                "dilations": dilations[:rank],
                "groups": groups,
                "pad_type": "custom",
                "pad": np.repeat(padding[:rank], 2),
            }
            | ({} if bias is None else {"bias": bias})
        )
    return expected, options


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv_with_equal_padding(evaluate, rank):
    x = _random(2, 4, *SIZES[:rank])
    expected, options = _configured(CONV, rank, (1, 2, 3), x)
    found = evaluate({"x": x}, lambda x: tuple(mb.conv(x=x, **each) for each in options), ios=15)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_conv_without_options(evaluate):
    x = _random(1, 2, 5, 6)
    weight = _random(3, 2, 2, 3)
    (found,) = evaluate({"x": x}, lambda x: mb.conv(x=x, weight=weight))
    expected = [sum(scipy.signal.correlate2d(x[0, c], kernel[c], "valid") for c in range(2)) for kernel in weight]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


def test_conv_with_unequal_padding(evaluate):
    x, weight = _random(1, 1, 4, 5), _random(1, 1, 3, 3)
    (found,) = evaluate({"x": x}, lambda x: mb.conv(x=x, weight=weight, pad_type="custom", pad=[2, 0, 1, 3]))
    around = np.pad(x[0, 0], ((2, 0), (1, 3)))
    np.testing.assert_allclose(found[0, 0], scipy.signal.correlate2d(around, weight[0, 0], "valid"), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # a warning of torch
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv_keeps_the_size_with_same_padding(evaluate, rank):
    x = _random(2, 4, *SIZES[:rank])
    dilations = (1, 2, 1)[:rank]
    module = CONV[rank](4, 2, KERNEL[:rank], padding="same", dilation=dilations, bias=False, dtype=torch.float64)
    expected, weight, _ = _reference(module, x)
    (found,) = evaluate({"x": x}, lambda x: mb.conv(x=x, weight=weight, pad_type="same", dilations=dilations))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pad_type", "expected"),
    # Windows of 3 with stride 2 on 4 elements: one element of padding, after or before.
    [("same", [0 + 1 + 2, 2 + 3]), ("same_lower", [0 + 1, 1 + 2 + 3])],
)
def test_conv_with_same_padding_and_strides(evaluate, pad_type, expected):
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
    ones = np.ones((1, 1, 3), np.float32)
    (found,) = evaluate(
        {"x": x}, lambda x: mb.conv(x=x, weight=ones, pad_type=pad_type, strides=[2], pad=[9, 9]), ios=16
    )
    np.testing.assert_array_equal(found, [[expected]])


def test_conv_with_a_computed_weight(evaluate):
    x, weight = _random(1, 2, 6), _random(3, 2, 2)
    (found,) = evaluate({"x": x, "weight": weight}, lambda x, weight: mb.conv(x=x, weight=weight))
    expected = torch.conv1d(torch.from_numpy(x).double(), torch.from_numpy(weight).double())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtypes", [(np.float16, np.float16), (np.float16, np.float32), (np.float32, np.float16)])
def test_conv_of_halves_is_rounded_once(evaluate, dtypes):
    x_type, weight_type = dtypes
    x, weight, bias = _random(1, 64, 7).astype(x_type), _random(4, 64, 3), _random(4)
    weight, bias = weight.astype(weight_type), bias.astype(weight_type)
    (found,) = evaluate({"x": x}, lambda x: mb.conv(x=x, weight=weight, bias=bias), ios=17)
    expected = torch.conv1d(*(torch.from_numpy(each).double() for each in (x, weight, bias))).numpy()
    assert found.dtype == x_type
    if x_type == np.float16:
        np.testing.assert_array_max_ulp(found, expected.astype(np.float16), maxulp=1)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rank", "ios"), [(1, 15), (2, 15), (3, 17)])
def test_conv_transpose(evaluate, rank, ios):
    x = _random(2, 4, *(size // 2 for size in SIZES[:rank]))
    expected, options = _configured(CONV_TRANSPOSE, rank, (1, 0, 2), x)
    found = evaluate({"x": x}, lambda x: tuple(mb.conv_transpose(x=x, **each) for each in options), ios=ios)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_conv_transpose_to_an_output_shape(evaluate):
    """An output shape adds elements at the end that may contain only the bias, as torch's output padding does."""
    x = _random(1, 2, 4, 3)
    module = torch.nn.ConvTranspose2d(2, 3, (2, 3), 3, (0, 1), (2, 1), dtype=torch.float64)
    expected, weight, bias = _reference(module, x)
    (found,) = evaluate(
        {"x": x},
        lambda x: mb.conv_transpose(
            x=x,
            weight=weight,
            bias=bias,
            strides=[3, 3],
            pad_type="custom",
            pad=[0, 0, 1, 1],
            output_shape=expected.shape,
        ),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad_type", ["same", "valid"])
def test_conv_transpose_is_the_transpose_of_conv(evaluate, pad_type):
    """The inner product of conv(x) with y equals that of x with conv_transpose(y)."""
    x = _random(1, 1, 6)
    options = [
        {"weight": _random(1, 1, kernel), "strides": [stride], "pad_type": pad_type}
        for stride, kernel in [(2, 3), (2, 4), (1, 2), (3, 2), (4, 3)]
    ]
    forward = evaluate({"x": x}, lambda x: tuple(mb.conv(x=x, **each) for each in options))
    ys = {f"y{index}": _random(*each.shape) for index, each in enumerate(forward)}
    back = evaluate(
        ys,
        lambda *ys: tuple(
            mb.conv_transpose(x=y, output_shape=x.shape, **each) for y, each in zip(ys, options, strict=True)
        ),
    )
    for one, y, other in zip(forward, ys.values(), back, strict=True):
        np.testing.assert_allclose(np.vdot(one, y), np.vdot(x, other), rtol=1e-4, atol=1e-5)


def test_conv_transpose_with_same_padding(evaluate):
    x = np.array([[[1, 10]]], np.float32)
    weight = np.array([[[1, 2, 3, 4]]], np.float32)
    (found,) = evaluate({"x": x}, lambda x: mb.conv_transpose(x=x, weight=weight, strides=[2], pad_type="same"))
    np.testing.assert_array_equal(
        found, [[[2, 3 + 10, 4 + 20, 30]]]
    )  # 1 2 13 24 30 40 without its first and last element


@pytest.mark.parametrize("per_channel", [False, True])
def test_conv_quantized(evaluate, per_channel):
    x = _random(1, 3, 6, 5)
    codes = RNG.integers(0, 16, (2, 3, 2, 2)).astype(np.uint8)
    scale = np.array([0.5, 0.25] if per_channel else [0.5], np.float32)
    offset = np.array([-1, 2] if per_channel else [-1], np.float32)
    (found,) = evaluate(
        {"x": x},
        lambda x: mb.conv_quantized(
            x=x,
            weight=codes,
            bias=np.array([1, 200], np.uint8),
            quantization_type="linear",
            nbits=4,
            quant_scale=scale,
            quant_bias=offset,
            strides=[2, 1],
        ),
        ios=15,
    )
    weight = codes * scale.reshape(-1, 1, 1, 1).astype(np.float64) + offset.reshape(-1, 1, 1, 1)
    bias = torch.tensor([1.0, 200.0], dtype=torch.float64)
    expected = torch.conv2d(torch.from_numpy(x).double(), torch.from_numpy(weight), bias, (2, 1))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


def _changed(build, body, inputs, parameter, value):
    """Return a model in which a constant parameter has a value that coremltools rejects."""
    model = build(inputs, body)
    operations = model._spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations
    operation = next(each for each in operations if each.type != "const")
    name = operation.inputs[parameter].arguments[0].name
    constant = next(each for each in operations if each.outputs[0].name == name)
    tensor = constant.attributes["val"].immediateValue.tensor
    if isinstance(value, str):
        tensor.strings.values[0] = value
    else:
        del tensor.ints.values[:]
        tensor.ints.values.extend(value)
        constant.attributes["val"].type.tensorType.dimensions[0].constant.size = len(value)
        constant.outputs[0].type.tensorType.dimensions[0].constant.size = len(value)
    return MLModel(ct.models.MLModel(model._spec, weights_dir=model.weights_dir, skip_model_load=True))


X = np.ones((1, 1, 4), np.float32)
ONES = np.ones((1, 1, 2), np.float32)


@pytest.mark.parametrize(
    ("body", "parameter", "value", "message"),
    [
        (
            lambda x: mb.conv(x=x, weight=ONES, pad_type="same"),
            "pad_type",
            "full",
            "(conv): pad type 'full', expected one of valid, same, same_lower, custom",
        ),
        (
            lambda x: mb.conv(x=x, weight=ONES, pad_type="custom", pad=[1, 1]),
            "pad",
            [1],
            "(conv): pad [1], expected 2 values",
        ),
        (
            lambda x: mb.conv(x=x, weight=ONES, strides=[1]),
            "strides",
            [1, 2],
            "(conv): strides [1, 2], expected 1 values",
        ),
        (
            lambda x: mb.conv_transpose(x=x, weight=ONES, pad_type="same"),
            "pad_type",
            "same_lower",
            "(conv_transpose): pad type 'same_lower', expected one of valid, same, custom",
        ),
    ],
)
def test_invalid_parameter_values_are_rejected(build, body, parameter, value, message):
    with pytest.raises(CoremillError) as caught:
        _changed(build, body, {"x": X}, parameter, value).predict({"x": X})
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization_type": "lut"}, "quantization type 'lut', expected 'linear', as no input gives a table"),
        ({"quantization_type": "linear", "nbits": 9}, "weights of 9 bits, expected 1 to 8"),
    ],
)
def test_undefined_conv_quantized_is_rejected(build, options, message):
    codes, one = np.ones((1, 1, 2), np.uint8), np.float32([1])
    body = lambda x: mb.conv_quantized(x=x, weight=codes, quant_scale=one, quant_bias=one, name="q", **options)  # noqa: E731
    model = MLModel(build({"x": X}, body, ios=15))
    with pytest.raises(PredictionInputError) as caught:
        model.predict({"x": X})
    assert str(caught.value) == f"operation 'q' (conv_quantized): {message}"
