"""Image inputs and outputs, against what Pillow says of the same images."""

from __future__ import annotations

import sys

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import get_new_symbol, types
from coremltools.proto import FeatureTypes_pb2
from PIL import Image, ImageChops

from coremill.core.errors import MachineError, PackageError, PredictionInputError
from coremill.mil import ColorSpace, ImageSpec, MLModel, TensorSpec
from coremill.mil.description import describe_function
from coremill.mil.graph import read_function
from coremill.mil.images import image_from_array
from coremill.mil.loader import Package, open_package

WIDTH, HEIGHT = 5, 3
RNG = np.random.default_rng(6)
COLORS = Image.fromarray(RNG.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
GRAYS = Image.fromarray(RNG.integers(0, 256, (HEIGHT, WIDTH), np.uint8))
FLOATS = Image.fromarray(RNG.standard_normal((HEIGHT, WIDTH)).astype(np.float32))
LAYOUTS = {
    "RGB": (ct.colorlayout.RGB, 3, types.fp32),
    "BGR": (ct.colorlayout.BGR, 3, types.fp32),
    "GRAYSCALE": (ct.colorlayout.GRAYSCALE, 1, types.fp32),
    "GRAYSCALE_FLOAT16": (ct.colorlayout.GRAYSCALE_FLOAT16, 1, types.fp16),
}


def _convert(program, inputs=None, output=None):
    if output is not None:
        program.functions["main"].set_output_types([ct.ImageType(color_layout=output)])
    return ct.convert(
        program,
        inputs=inputs,
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS17,
        skip_model_load=True,
    )


def _taking(layout, sizes=(HEIGHT, WIDTH), shape=None, **options):
    """A model that gives an image as the tensor that the program gets."""
    color_layout, channels, dtype = LAYOUTS[layout]
    symbolic = tuple(size if isinstance(size, int) else get_new_symbol() for size in sizes)

    @mb.program(input_specs=[mb.TensorSpec((1, channels, *symbolic), dtype=dtype)], opset_version=ct.target.iOS17)
    def program(image):
        return mb.identity(x=image, name="y")

    image = ct.ImageType(
        "image", shape or (1, channels, *sizes), color_layout=color_layout, channel_first=True, **options
    )
    return _convert(program, [image])


def _giving(layout):
    """A model that gives a tensor as an image."""
    color_layout, channels, _ = LAYOUTS[layout]

    @mb.program(input_specs=[mb.TensorSpec((1, channels, HEIGHT, WIDTH))], opset_version=ct.target.iOS17)
    def program(x):
        return mb.identity(x=x, name="y")

    return _convert(program, output=color_layout)


def _channels(image):
    return np.stack([np.asarray(each) for each in image.split()])


@pytest.mark.parametrize(
    ("layout", "image", "planes"),
    [
        ("RGB", COLORS, _channels(COLORS)),
        ("BGR", COLORS, _channels(COLORS)[::-1]),
        ("GRAYSCALE", GRAYS, _channels(GRAYS)),
        ("GRAYSCALE_FLOAT16", FLOATS, _channels(FLOATS).astype(np.float16)),
    ],
)
@pytest.mark.parametrize("mode", ["declared", "oracle"])
def test_an_image_becomes_a_tensor(layout, image, planes, mode):
    found = MLModel(_taking(layout), mode=mode).predict({"image": image})["y"]
    np.testing.assert_array_equal(found, planes[None])


def test_scale_and_bias_are_applied_by_the_program():
    """They are given on conversion for the channels as the program has them."""
    scale, bias = 1 / 127.5, [-0.5, -1.0, -1.5]
    found = MLModel(_taking("BGR", scale=scale, bias=bias)).predict({"image": COLORS})["y"]
    expected = np.stack([np.asarray(COLORS.getchannel(each)) * scale for each in "BGR"])
    np.testing.assert_allclose(found[0], expected + np.reshape(bias, (3, 1, 1)), rtol=1e-6, atol=1e-6)


def test_a_grayscale_image_in_uint8():
    @mb.program(
        input_specs=[mb.TensorSpec((1, 1, HEIGHT, WIDTH), dtype=types.uint8)], opset_version=ct.target.iOS17
    )
    def program(image):
        return mb.cast(x=image, dtype="fp32", name="y")

    image = ct.ImageType(
        "image", (1, 1, HEIGHT, WIDTH), color_layout="G", channel_first=True, grayscale_use_uint8=True
    )
    model = MLModel(_convert(program, [image]))
    assert model.inputs[0].tensor.dtype == "uint8"
    np.testing.assert_array_equal(model.predict({"image": GRAYS})["y"][0, 0], np.asarray(GRAYS))


@pytest.mark.parametrize(
    ("layout", "given", "expected"),
    [
        ("RGB", _channels(COLORS), COLORS),
        ("BGR", _channels(COLORS)[::-1], COLORS),
        ("GRAYSCALE", _channels(GRAYS), GRAYS),
    ],
)
def test_a_tensor_becomes_an_image(layout, given, expected):
    model = MLModel(_giving(layout))
    image = model.predict({"x": given[None].astype(np.float32)})["y"]
    color = layout != "GRAYSCALE"
    assert (image.mode, image.size) == ("RGBA" if color else "L", (WIDTH, HEIGHT))
    assert ImageChops.difference(image.convert("RGB") if color else image, expected).getbbox() is None
    if color:
        assert image.getextrema()[3] == (255, 255)


@pytest.mark.parametrize("mode", ["declared", "oracle"])
def test_an_image_of_fp16(mode):
    """In declared mode its pixels are of fp16; oracle mode rounds nothing that the program computed."""

    @mb.program(input_specs=[mb.TensorSpec((1, 1, HEIGHT, WIDTH), dtype=types.fp16)], opset_version=ct.target.iOS17)
    def program(x):
        return mb.mul(x=x, y=np.float16(1 / 3), name="y")

    model = MLModel(_convert(program, output=ct.colorlayout.GRAYSCALE_FLOAT16), mode=mode)
    x = np.asarray(FLOATS).astype(np.float16)
    image = model.predict({"x": x[None, None]})["y"]
    assert (image.mode, image.size) == ("F", (WIDTH, HEIGHT))
    product = x.astype(np.float32) * np.float32(np.float16(1 / 3))
    expected = product.astype(np.float16) if mode == "declared" else product
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_values_outside_pixels_are_rounded_and_clamped():
    values = np.float32([-3, -0.4, 0.5, 1.5, 1.6, 254.4, 255.5, 1e9, np.inf, -np.inf, np.nan, 7, 0, 0, 0])
    image = MLModel(_giving("GRAYSCALE")).predict({"x": values.reshape(1, 1, HEIGHT, WIDTH)})["y"]
    assert list(image.tobytes()) == [0, 0, 0, 2, 2, 254, 255, 255, 255, 0, 0, 7, 0, 0, 0]


def test_image_input_and_output():
    """Of color space BGR in and RGB out, with 255 - x between: Pillow's inversion."""

    @mb.program(input_specs=[mb.TensorSpec((1, 3, HEIGHT, WIDTH))], opset_version=ct.target.iOS17)
    def program(image):
        red_first = mb.reverse(x=image, axes=[1])
        return mb.sub(x=np.float32(255), y=red_first, name="y")

    given = ct.ImageType("image", (1, 3, HEIGHT, WIDTH), color_layout=ct.colorlayout.BGR, channel_first=True)
    model = MLModel(_convert(program, [given], ct.colorlayout.RGB))
    found = model.predict({"image": COLORS})["y"].convert("RGB")
    assert ImageChops.difference(found, ImageChops.invert(COLORS)).getbbox() is None


def test_the_interface():
    model = MLModel(_taking("BGR"))
    tensor = TensorSpec("image", "float32", (1, 3, HEIGHT, WIDTH))
    assert model.inputs == (ImageSpec(ColorSpace.BGR, tensor),)
    assert model.inputs[0].name == "image"
    assert model.supported_shapes("image") == [(1, 3, HEIGHT, WIDTH)]
    tensor = TensorSpec("y", "float32", (1, 1, HEIGHT, WIDTH))
    assert MLModel(_giving("GRAYSCALE")).outputs == (ImageSpec(ColorSpace.GRAYSCALE, tensor),)


@pytest.mark.parametrize(
    ("layout", "given", "found", "expected"),
    [
        ("RGB", GRAYS, "an image of mode 'L'", "mode 'RGB', for color space RGB"),
        ("BGR", COLORS.convert("RGBA"), "an image of mode 'RGBA'", "mode 'RGB', for color space BGR"),
        ("GRAYSCALE", COLORS, "an image of mode 'RGB'", "mode 'L', for color space GRAYSCALE"),
        ("GRAYSCALE_FLOAT16", GRAYS, "an image of mode 'L'", "mode 'F', for color space GRAYSCALE_FLOAT16"),
        ("RGB", np.asarray(COLORS), "a ndarray", "a PIL image of mode 'RGB'"),
        ("RGB", None, "a NoneType", "a PIL image of mode 'RGB'"),
        ("RGB", COLORS.rotate(90, expand=True), "an image of 3 x 5", "5 x 3, width first"),
    ],
)
def test_wrong_image_is_rejected(layout, given, found, expected):
    with pytest.raises(PredictionInputError) as caught:
        MLModel(_taking(layout)).predict({"image": given})
    assert str(caught.value) == f"input 'image' is {found}\n  expected: {expected}"


def test_array_input_next_to_image_input():
    with pytest.raises(
        PredictionInputError, match=r"^inputs missing \['image'\]\n  expected: exactly \['image'\]$"
    ):
        MLModel(_taking("RGB")).predict({})


def _sized(width, height):
    return Image.new("L", (width, height), 9)


def test_enumerated_sizes():
    shapes = ct.EnumeratedShapes([(1, 1, 4, 6), (1, 1, 6, 4), (1, 1, 8, 8)], default=(1, 1, 6, 4))
    model = MLModel(_taking("GRAYSCALE", (None, None), shape=shapes))
    assert sorted(model.supported_shapes("image")) == [(1, 1, 4, 6), (1, 1, 6, 4), (1, 1, 8, 8)]
    assert model.supported_shapes("image")[0] == (1, 1, 6, 4)
    for width, height in ((6, 4), (4, 6), (8, 8)):
        assert model.predict({"image": _sized(width, height)})["y"].shape == (1, 1, height, width)
    for width, height in ((8, 6), (4, 4)):
        with pytest.raises(PredictionInputError) as caught:
            model.predict({"image": _sized(width, height)})
        assert caught.value.found == f"input 'image' is an image of {width} x {height}"
        assert caught.value.expected.startswith("one of 4 x 6, ")


def test_ranges_of_sizes():
    shape = ct.Shape((1, 1, ct.RangeDim(2, 5, default=3), 7))
    model = MLModel(_taking("GRAYSCALE", (None, 7), shape=shape))
    assert model.supported_shapes("image") is None
    assert model.inputs[0].tensor.size_ranges == ((1, 1), (1, 1), (2, 5), (7, 7))
    for height in (2, 5):
        assert model.predict({"image": _sized(7, height)})["y"].shape == (1, 1, height, 7)
    for width, height in ((7, 1), (7, 6), (6, 3)):
        with pytest.raises(PredictionInputError) as caught:
            model.predict({"image": _sized(width, height)})
        assert caught.value.found == f"input 'image' is an image of {width} x {height}"
        assert caught.value.expected == "width 7, height 2 to 5"


def test_image_output_of_computed_size():
    """The package says nothing of the size, but that it varies."""

    @mb.program(input_specs=[mb.TensorSpec((1, 1, get_new_symbol(), 4))], opset_version=ct.target.iOS17)
    def program(x):
        return mb.add(x=x, y=np.float32(1), name="y")

    given = ct.TensorType("x", ct.Shape((1, 1, ct.RangeDim(1, 9), 4)))
    model = MLModel(_convert(program, [given], ct.colorlayout.GRAYSCALE))
    assert model.outputs[0].tensor.shape == (1, 1, None, None)
    for height in (9, 2):
        image = model.predict({"x": np.full((1, 1, height, 4), 8, np.float32)})["y"]
        assert (image.size, image.getextrema()) == ((4, height), (9, 9))


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    spec = ImageSpec(ColorSpace.GRAYSCALE, TensorSpec("y", "float32", (1, 1, 2, 2)))
    with pytest.raises(MachineError) as caught:
        image_from_array(spec, np.zeros((1, 1, 2, 2), np.float32))
    assert str(caught.value) == "output 'y' is an image, and Pillow is not installed\n  run: pip install pillow"


@pytest.fixture(scope="module")
def taking():
    return _taking("RGB")


@pytest.fixture
def package(taking):
    return Package("toy", taking.get_spec(), open_package(taking).weights)


def _package_error(package):
    with pytest.raises(PackageError) as caught:
        describe_function(package, "main", read_function(package, "main"))
    return str(caught.value)


def test_descriptions_that_differ_from_the_program_are_rejected(package):
    image = package.spec.description.input[0].type.imageType
    image.colorSpace = FeatureTypes_pb2.ImageFeatureType.GRAYSCALE
    assert _package_error(package) == (
        "toy, function 'main': describes 'image' as an image of color space GRAYSCALE\n"
        "  expected: fp16, fp32 or uint8 [1, 1, height, width]; the program has fp32[1, 3, 3, 5]"
    )
    image.colorSpace = 0
    assert _package_error(package) == "toy, function 'main': 'image' is of color space number 0"
