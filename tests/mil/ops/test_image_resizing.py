"""Resizing and resampling, against torch in float64, scipy.ndimage and values published by coremltools."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.core.errors import PredictionInputError
from coremill.mil import MLModel

RNG = np.random.default_rng(31)
X = RNG.standard_normal((2, 3, 5, 7)).astype(np.float32)
PAIR = np.float32([[[0, 1]]])
PAIR_GRIDS = {  # the documentation's examples: an interval of 2 sampled at 5 and 6 points
    "UNALIGN_CORNERS": ([0, 0.1, 0.5, 0.9, 1], [0, 0, 1 / 3, 2 / 3, 1, 1]),
    "STRICT_ALIGN_CORNERS": ([0, 0.25, 0.5, 0.75, 1], [0, 0.2, 0.4, 0.6, 0.8, 1]),
    "ALIGN_CORNERS": ([0, 0.25, 0.5, 0.75, 1], [0, 0.2, 0.4, 0.6, 0.8, 1]),
    "DEFAULT": ([0, 0.4, 0.8, 1, 1], [0, 1 / 3, 2 / 3, 1, 1, 1]),
    "OFFSET_CORNERS": ([0.1, 0.3, 0.5, 0.7, 0.9], [1 / 12, 0.25, 5 / 12, 7 / 12, 0.75, 11 / 12]),
}


def _double(array):
    return torch.from_numpy(array).double()


def _assert_all_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def _interpolated(x, size, mode, **options):
    return F.interpolate(_double(x), size, mode=mode, **options).numpy()


@pytest.mark.parametrize("mode", PAIR_GRIDS)
def test_documented_sampling_grids(evaluate, mode):
    five, six, one, linear = evaluate(
        {"x": PAIR},
        lambda x: (
            mb.resize_bilinear(x=x, target_size_height=1, target_size_width=5, sampling_mode=mode),
            mb.resize_bilinear(x=x, target_size_height=1, target_size_width=6, sampling_mode=mode),
            mb.resize_bilinear(x=x, target_size_height=1, target_size_width=1, sampling_mode=mode),
            mb.resize(x=x, shape=[6], resized_dims=np.uint32(1), sampling_mode=mode),
        ),
        ios=17,
    )
    middle = mode in ("ALIGN_CORNERS", "UNALIGN_CORNERS", "OFFSET_CORNERS")
    grids = PAIR_GRIDS[mode]
    _assert_all_close([five[0, 0], six[0, 0], one[0, 0], linear[0, 0]], [*grids, [0.5 if middle else 0], grids[1]])


def test_resize_bilinear_matches_torch(evaluate):
    sizes = [(9, 4), (2, 14)]
    found = evaluate(
        {"x": X},
        lambda x: tuple(
            mb.resize_bilinear(x=x, target_size_height=height, target_size_width=width, sampling_mode=mode)
            for mode in ("STRICT_ALIGN_CORNERS", "UNALIGN_CORNERS", "DEFAULT")
            for height, width in sizes
        ),
        ios=15,
    )
    expected = [
        _interpolated(X, size, "bilinear", align_corners=align) for align in (True, False) for size in sizes
    ]
    for height, width in sizes:
        rows, columns = np.arange(height) * 5 / height, np.arange(width) * 7 / width
        expected.append(_at(X, rows, columns, "nearest"))
    _assert_all_close(found, expected)


def _at(x, rows, columns, outside, fill=0.0):
    """Return x at every row and column, interpolated by scipy."""
    grid = np.meshgrid(rows, columns, indexing="ij")
    planes = x.astype(np.float64).reshape(-1, *x.shape[-2:])
    found = [
        scipy.ndimage.map_coordinates(plane, grid, order=1, mode=outside, cval=fill, prefilter=False)
        for plane in planes
    ]
    return np.reshape(found, (*x.shape[:-2], len(rows), len(columns)))


def test_resize_of_several_dimensions(evaluate):
    """Sizes count from the end of `shape`; 0 keeps a size; nearest neighbours use half-pixel centres."""
    x = X[0]
    pair = np.float32([[-6.174, 9.371]]).T
    found = evaluate(
        {"x": x, "pair": pair, "size": np.int32([9, 4, 0, 10])},
        lambda x, pair, size: (
            mb.resize(x=x, shape=[4, 8, 6], resized_dims=np.uint32(3), sampling_mode="UNALIGN_CORNERS"),
            mb.resize(
                x=mb.expand_dims(x=x, axes=[0]),
                shape=size,
                resized_dims=np.uint32(2),
                sampling_mode="STRICT_ALIGN_CORNERS",
            ),
            mb.resize(x=pair, shape=[3, 2], resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR"),
            mb.resize(
                x=pair,
                shape=[4, 1],
                resized_dims=np.uint32(2),
                interpolation_mode="NEAREST_NEIGHBOR",
                sampling_mode="STRICT_ALIGN_CORNERS",
            ),
            mb.resize(x=x, shape=[8, 3], resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR"),
        ),
        ios=17,
    )
    low, high = pair[:, 0]
    _assert_all_close(
        found,
        [
            _interpolated(x[None, None], (4, 8, 6), "trilinear", align_corners=False)[0, 0],
            _interpolated(x[None], (5, 10), "bilinear", align_corners=True),
            [[low, low], [high, high], [high, high]],  # expected by coremltools' test
            [[low], [low], [high], [high]],
            _interpolated(x[None], (8, 3), "nearest-exact")[0],
        ],
    )


def test_resize_of_integers(evaluate):
    (found,) = evaluate(
        {"x": np.int32([[0, 10], [20, 1 << 30]])},
        lambda x: mb.resize(x=x, shape=[4], resized_dims=np.uint32(1), sampling_mode="STRICT_ALIGN_CORNERS"),
    )
    assert found.dtype == np.int32
    whole = 1 << 30
    expected = [[0, 3, 6, 10], [20, (2 * 20 + whole) // 3, (20 + 2 * whole) // 3, whole]]
    np.testing.assert_array_equal(found, expected)


def test_nearest_neighbours(evaluate):
    found = evaluate(
        {"x": X},
        lambda x: (
            mb.resize_nearest_neighbor(x=x, target_size_height=8, target_size_width=3),
            mb.resize_nearest_neighbor(x=x, target_size_height=5, target_size_width=21),
            mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
            mb.upsample_nearest_neighbor(x=x, scale_factor_height=1.7, scale_factor_width=0.6),
        ),
        ios=15,
    )
    expected = [_interpolated(X, size, "nearest-exact") for size in [(8, 3), (5, 21)]]
    expected += [_interpolated(X, size, "nearest") for size in [(10, 21), (8, 4)]]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_size_is_scaled_in_fp32(evaluate):
    """0.7 in fp32 is below 0.7, but its product with 10 in fp32 is 7: the size that coremltools declares."""
    x = np.arange(10, dtype=np.float32).reshape(1, 1, 10)
    found = evaluate(
        {"x": x},
        lambda x: (
            mb.upsample_nearest_neighbor(x=x, scale_factor_width=0.7),
            mb.upsample_bilinear(x=x, scale_factor_width=0.7),
        ),
    )
    assert [each.shape for each in found] == [(1, 1, 7), (1, 1, 7)]


def test_upsample_bilinear_matches_torch(evaluate):
    factors = [(2, 3), (1.5, 0.6)]
    found = evaluate(
        {"x": X},
        lambda x: tuple(
            mb.upsample_bilinear(x=x, scale_factor_height=h, scale_factor_width=w, align_corners=align)
            for h, w in factors
            for align in (True, False)
        ),
        ios=15,
    )
    sizes = [(10, 21), (7, 4)]
    _assert_all_close(
        found,
        [_interpolated(X, size, "bilinear", align_corners=align) for size in sizes for align in (True, False)],
    )


def test_upsample_bilinear_with_half_pixel_centers(evaluate, build):
    options = {"scale_factor_height": 1, "scale_factor_width": 3}
    found = evaluate(
        {"x": PAIR},
        lambda x: tuple(
            mb.upsample_bilinear(x=x, align_corners=align, half_pixel_centers=half, **options)
            for align, half in [(True, False), (False, True), (False, None), (False, False)]
        ),
        ios=16,
    )
    grids = [PAIR_GRIDS[mode][1] for mode in ("STRICT_ALIGN_CORNERS", *["UNALIGN_CORNERS"] * 2, "DEFAULT")]
    _assert_all_close([each[0, 0] for each in found], grids)
    body = lambda x: mb.upsample_bilinear(x=x, align_corners=True, half_pixel_centers=True, name="up")  # noqa: E731
    with pytest.raises(PredictionInputError) as caught:
        MLModel(build({"x": PAIR}, body, ios=16)).predict({"x": PAIR})
    assert str(caught.value) == (
        "operation 'up' (upsample_bilinear): align_corners and half_pixel_centers are both true, "
        "expected at most one"
    )


def test_infinities_are_kept_at_the_same_size(evaluate):
    x = np.float32([[[np.inf, 1], [2, -np.inf]]])
    found = evaluate(
        {"x": x},
        lambda x: (
            mb.resize(x=x, shape=[2, 2], resized_dims=np.uint32(2)),
            mb.resize(x=x, shape=[2], resized_dims=np.uint32(0)),
            mb.upsample_bilinear(x=x, scale_factor_height=1, scale_factor_width=1),
        ),
    )
    for each in found:
        np.testing.assert_array_equal(each, x)


def test_resizing_halves_is_rounded_once(evaluate):
    x = X.astype(np.float16)
    (found,) = evaluate(
        {"x": x},
        lambda x: mb.resize_bilinear(
            x=x, target_size_height=8, target_size_width=9, sampling_mode="UNALIGN_CORNERS"
        ),
    )
    expected = _interpolated(x, (8, 9), "bilinear", align_corners=False)
    np.testing.assert_allclose(found, expected.astype(np.float16), rtol=1e-3, atol=1e-6)
    assert (found == expected.astype(np.float16)).mean() > 0.99


def test_crop(evaluate, build):
    (found,) = evaluate({"x": X}, lambda x: mb.crop(x=x, crop_height=[1, 2], crop_width=[0, 3]))
    np.testing.assert_array_equal(found, X[:, :, 1:3, :4])
    body = lambda x: mb.crop(x=x, crop_height=[2, 2], crop_width=[0, 0], name="cut")  # noqa: E731
    model = MLModel(build({"x": ((1, (1, 6), 4), np.float32)}, body))
    with pytest.raises(PredictionInputError) as caught:
        model.predict({"x": np.ones((1, 3, 4), np.float32)})
    assert str(caught.value) == (
        "operation 'cut' (crop): crop_height [2, 2] of 3 elements, expected two that leave some"
    )


SQUARE = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)


def test_crop_resize_matches_published_values(evaluate):
    """coremltools' tests expect these values of Core ML."""
    rois = {
        "corners": np.float32([1, 1, 2, 2]).reshape(1, 1, 4, 1, 1),
        "normalized": np.float32([0, 0, 0, 1 / 3, 1 / 3]).reshape(1, 1, 5, 1, 1),
        "inverted": np.float32([2, 2, 1, 1]).reshape(1, 1, 4, 1, 1),
    }
    options = {"target_height": 2, "target_width": 2, "sampling_mode": "ALIGN_CORNERS"}
    found = evaluate(
        {"x": SQUARE},
        lambda x: (
            mb.crop_resize(x=x, roi=rois["corners"], **options),
            mb.crop_resize(x=x, roi=rois["corners"], sampling_mode="ALIGN_CORNERS"),
            mb.crop_resize(x=x, roi=rois["normalized"], normalized_coordinates=True, **options),
            mb.crop_resize(x=x, roi=rois["inverted"], **options),
            mb.crop_resize(
                x=x,
                roi=rois["inverted"],
                normalized_coordinates=True,
                **options | {"sampling_mode": "UNALIGN_CORNERS"},
            ),
        ),
        ios=15,
    )
    assert found[0].shape == (1, 1, 1, 2, 2)
    _assert_all_close(
        [each.ravel() for each in found],
        [[6, 7, 10, 11], [8.5], [1, 2, 5, 6], [11, 10, 7, 6], [3.5, 5.5, 11.5, 13.5]],
    )


BOXES = np.float32([[0.1, 0.3, 1.3, 1], [0.5, 1.8, 1, 0.3], [0, 0.4, 0.6, 0.7]])
BOX_VALUES = [3.1, 5.2, -9, -9, -9, 7.9, -9, 13.9, 2.2, 3.1, 9.4, 10.3]


def test_crop_resize_outside_the_image(evaluate):
    options = {
        "target_height": 2,
        "target_width": 2,
        "normalized_coordinates": True,
        "sampling_mode": "ALIGN_CORNERS",
        "pad_value": -9.0,
    }
    roi = np.concatenate([np.zeros((3, 1), np.float32), BOXES], 1).reshape(3, 1, 5, 1, 1)
    (old,) = evaluate({"x": SQUARE}, lambda x: mb.crop_resize(x=x, roi=roi, **options), ios=16)
    (new,) = evaluate(
        {"x": SQUARE},
        lambda x: mb.crop_resize(x=x, boxes=BOXES, box_indices=np.int32([0, 0, 0]), **options),
        ios=17,
    )
    assert (old.shape, new.shape) == ((3, 1, 1, 2, 2), (3, 1, 2, 2))
    _assert_all_close([old.ravel(), new.ravel()], [BOX_VALUES] * 2)


def test_crop_resize_up_to_the_border(evaluate):
    """In fp32, 0.07 + (4 - 0.07) is above 4, the last row, but the point must not count as outside."""
    boxes = np.float32([[0.07, 0, 4, 6]])
    options = {"target_height": 2, "target_width": 7, "sampling_mode": "ALIGN_CORNERS", "pad_value": -9.0}
    (found,) = evaluate({"x": X[:1]}, lambda x: mb.crop_resize(x=x, boxes=boxes, **options))
    np.testing.assert_allclose(found[0, :, 1], X[0, :, 4], rtol=1e-5)


def test_crop_resize_sampling_modes(evaluate):
    """A box with its corners at pixels, (2, 1) and (4, 5) of 5 × 7, is the resized crop."""
    boxes = np.float32([[2, 1, 4, 5]])
    low = np.float32([[2, 1, 2.5, 5]])
    modes = list(PAIR_GRIDS)
    *found, lowest = evaluate(
        {"x": X[:1]},
        lambda x: (
            *(
                mb.crop_resize(x=x, boxes=boxes, target_height=4, target_width=2, sampling_mode=mode)
                for mode in modes
            ),
            mb.crop_resize(x=x, boxes=low, target_height=2, target_width=2, sampling_mode="OFFSET_CORNERS"),
        ),
    )
    cut = X[:1, :, 2:5, 1:6]
    strict = _interpolated(cut, (4, 2), "bilinear", align_corners=True)
    expected = {
        "UNALIGN_CORNERS": _interpolated(cut, (4, 2), "bilinear", align_corners=False),
        "STRICT_ALIGN_CORNERS": strict,
        "ALIGN_CORNERS": strict,
        "DEFAULT": _at(cut, np.arange(4) * 3 / 4, np.arange(2) * 5 / 2, "nearest"),
        "OFFSET_CORNERS": _at(cut, (np.arange(4) + 0.5) / 2, [1, 3], "nearest"),  # centres of RoI Align's bins
    }
    _assert_all_close(found, [expected[mode] for mode in modes])
    # A box smaller than one pixel has the bins of one pixel, but no point is outside the box.
    _assert_all_close([lowest], [_at(X[:1], [2.25, 2.5], [2, 4], "nearest")])


def test_crop_resize_box_coordinates(evaluate):
    """One box in every convention, on both images and only on the second; the scale multiplies it."""
    box = {
        "CORNERS_HEIGHT_FIRST": [1, 2, 3, 5],
        "CORNERS_WIDTH_FIRST": [2, 1, 5, 3],
        "CENTER_SIZE_HEIGHT_FIRST": [2, 3.5, 2, 3],
        "CENTER_SIZE_WIDTH_FIRST": [3.5, 2, 3, 2],
    }
    options = {"target_height": 3, "target_width": 4, "sampling_mode": "STRICT_ALIGN_CORNERS"}
    inputs = {"x": X} | {name.lower(): np.float32([values]) for name, values in box.items()}

    def old(x, roi, mode):
        return mb.crop_resize(x=x, roi=roi, box_coordinate_mode=mode, spatial_scale=0.5, **options)

    def body(x, *rois):
        four = [mb.reshape(x=mb.mul(x=roi, y=np.float32(2)), shape=[1, 1, 4, 1, 1]) for roi in rois]
        image = np.float32([1]).reshape(1, 1, 1, 1, 1)
        five = mb.concat(values=[image, four[0]], axis=2)
        low = np.float32([0, 0, 4, 6]).reshape(1, 1, 4, 1, 1)
        two = mb.concat(values=[four[0], low], axis=0)
        return (*map(old, [x] * 4, four, box), *(old(x, roi, "CORNERS_HEIGHT_FIRST") for roi in (five, two)))

    *every, second, both = evaluate(inputs, body, ios=15)
    cut = X[:, :, 1:4, 2:6]
    for found in every:
        np.testing.assert_allclose(found, cut[None], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second, cut[None, 1:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both, [cut, X[:, :, :3, :4]], rtol=1e-5, atol=1e-6)


def test_crop_resize_box_types(evaluate, build):
    """Boxes of integers, an image index for each box, and an invalid image index."""
    boxes, image = np.array([[1, 2, 3, 5], [0, 0, 2, 3]], np.int32), np.int32([1, 0])
    options = {"target_height": 3, "target_width": 4, "sampling_mode": "STRICT_ALIGN_CORNERS", "name": "crops"}

    def body(x, image):
        return mb.crop_resize(x=x, boxes=mb.cast(x=boxes, dtype="uint16"), box_indices=image, **options)

    model = MLModel(build({"x": X, "image": image}, body, ios=17))
    (found,) = model.predict({"x": X, "image": image}).values()
    np.testing.assert_array_equal(found, [X[1, :, 1:4, 2:6], X[0, :, :3, :4]])
    with pytest.raises(PredictionInputError) as caught:
        model.predict({"x": X, "image": np.int32([0, 2])})
    assert str(caught.value) == "operation 'crops' (crop_resize): boxes on images 0 to 2, expected 0 to 1"
    (found,) = evaluate(
        {"x": X, "boxes": boxes.astype(np.float32)}, lambda x, boxes: mb.crop_resize(x=x, boxes=boxes, **options)
    )
    np.testing.assert_array_equal(found, [X[0, :, 1:4, 2:6], X[1, :, :3, :4]])


COORDINATES = RNG.uniform(-2.5, 2.5, (2, 6, 4, 2)).astype(np.float32)


@pytest.mark.parametrize("align_corners", [True, False])
def test_resample_matches_grid_sample(evaluate, align_corners):
    paddings = {
        "constant": "zeros",
        "border": "border",
        "reflection" if align_corners else "symmetric": "reflection",
    }
    samplings = ["bilinear", "nearest"]
    found = evaluate(
        {"x": X, "coordinates": COORDINATES},
        lambda x, coordinates: tuple(
            mb.resample(
                x=x,
                coordinates=coordinates,
                sampling_mode=sampling,
                padding_mode=padding,
                padding_value=0.0,
                coordinates_mode="normalized_minus_one_to_one",
                align_corners=align_corners,
            )
            for sampling in samplings
            for padding in paddings
        ),
        ios=15,
    )
    _assert_all_close(
        found,
        [
            F.grid_sample(_double(X), _double(COORDINATES), sampling, padding, align_corners).numpy()
            for sampling in samplings
            for padding in paddings.values()
        ],
    )


def test_resample_at_elements_matches_scipy(evaluate):
    """Every padding mode, with coordinates in elements and in 0 … 1, where 1 is the last element."""
    modes = {"constant": "grid-constant", "border": "nearest", "reflection": "mirror", "symmetric": "reflect"}
    places = RNG.uniform(-9, 15, (2, 3, 4, 2)).astype(np.float32)
    found = evaluate(
        {"x": X, "coordinates": places},
        lambda x, coordinates: tuple(
            mb.resample(
                x=x,
                coordinates=mb.real_div(x=coordinates, y=np.float32([6, 4])) if unit else coordinates,
                sampling_mode="bilinear",
                padding_mode=mode,
                padding_value=6.17,
                coordinates_mode="normalized_zero_to_one" if unit else "unnormalized",
                align_corners=True,
            )
            for mode in modes
            for unit in (False, True)
        ),
        ios=16,
    )
    for index, mode in enumerate(modes.values()):
        expected = [
            [
                scipy.ndimage.map_coordinates(
                    plane, places[batch].T.swapaxes(1, 2)[::-1], order=1, mode=mode, cval=6.17
                )
                for plane in X[batch].astype(np.float64)
            ]
            for batch in range(2)
        ]
        np.testing.assert_allclose(found[2 * index], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[2 * index + 1], expected, rtol=1e-3, atol=1e-4)


def test_resample_matches_published_values(evaluate):
    """coremltools' tests expect these values of Core ML: a constant, and 0 … 1 at the edges of pixels."""
    x = np.float32([11, 22, 33, 44]).reshape(1, 1, 2, 2)
    coordinates = np.float32([-1, -2, -3.7, -1, 0, 0, 3.5, 1.2]).reshape(1, 2, 2, 2)
    options = {"x": x, "padding_value": 6.17}
    found = evaluate(
        {"coordinates": coordinates},
        lambda coordinates: (
            mb.resample(
                coordinates=coordinates,
                sampling_mode="bilinear",
                padding_mode="constant",
                coordinates_mode="normalized_minus_one_to_one",
                align_corners=True,
                **options,
            ),
            mb.resample(
                coordinates=coordinates,
                sampling_mode="nearest",
                padding_mode="border",
                coordinates_mode="unnormalized",
                align_corners=False,
                **options,
            ),
            mb.resample(
                coordinates=coordinates,
                sampling_mode="nearest",
                padding_mode="symmetric",
                coordinates_mode="normalized_zero_to_one",
                align_corners=False,
                **options,
            ),
        ),
    )
    _assert_all_close(
        [each.ravel() for each in found],
        [[8.585, 6.17, 27.5, 6.17], [11, 11, 11, 44], [22, 33, 11, 33]],
    )


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "fp16"])
def test_resample_coordinate_types(evaluate, dtype):
    places = np.int32([[[[6, 4], [0, 3]]], [[[2, 2], [1, 0]]]])
    (found,) = evaluate(
        {"x": X, "places": places},
        lambda x, places: mb.resample(
            x=x,
            coordinates=mb.cast(x=places, dtype=dtype),
            sampling_mode="nearest",
            padding_mode="constant",
            padding_value=0.0,
            coordinates_mode="unnormalized",
            align_corners=True,
        ),
        ios=17,
    )
    np.testing.assert_array_equal(found[:, :, 0], [X[0, :, [4, 3], [6, 0]].T, X[1, :, [2, 0], [2, 1]].T])


def test_resample_at_nan_and_infinity(evaluate):
    """NaN coordinates return NaN, infinite coordinates the padding; neither is used as an index."""
    places = np.float32([np.nan, 0, np.inf, 0, -np.inf, 0, 1e30, 0]).reshape(1, 1, 4, 2)
    found = evaluate(
        {"places": places},
        lambda places: tuple(
            mb.resample(
                x=SQUARE,
                coordinates=places,
                sampling_mode=sampling,
                padding_mode="constant",
                padding_value=-5.0,
                coordinates_mode="unnormalized",
                align_corners=True,
            )
            for sampling in ("bilinear", "nearest")
        ),
    )
    np.testing.assert_array_equal(found[0].ravel()[[0, 3]], [np.nan, -5])
    np.testing.assert_array_equal(found[1].ravel()[1:], [-5, -5, -5])


def _affine(x, matrix, height, width, align_corners=True):
    return mb.affine(
        x=x,
        transform_matrix=matrix,
        output_height=height,
        output_width=width,
        sampling_mode="bilinear",
        padding_mode="constant",
        padding_value=0.0,
        coordinates_mode="normalized_minus_one_to_one",
        align_corners=align_corners,
    )


def test_affine(evaluate):
    """Compare with published values, then with torch for one matrix per image."""
    square = np.float32([11, 22, 33, 44]).reshape(1, 1, 2, 2)
    matrices = np.float32([[0.5, 0.2, 0.1, -0.3, 0.7, 0.2], [1.1, 0, -0.4, 0.1, 0.9, 0]])
    wide, tall, aligned, edges = evaluate(
        {"square": square, "matrix": np.float32([[-1, -2, -3.7, -1, 3.5, 1.2]]), "x": X, "matrices": matrices},
        lambda square, matrix, x, matrices: (
            _affine(square, matrix, 3, 3),
            _affine(square, matrix, 2, 5),
            _affine(x, matrices, 6, 4),
            _affine(x, matrices, 6, 4, align_corners=False),
        ),
        ios=15,
    )
    theta = _double(matrices).reshape(2, 2, 3)
    expected = [
        F.grid_sample(_double(X), F.affine_grid(theta, [2, 3, 6, 4], align), align_corners=align).numpy()
        for align in (True, False)
    ]
    _assert_all_close(
        [wide.ravel(), tall.ravel(), aligned, edges],
        [
            [10.7525, 2.5025, 0, 1.98, 0, 0, 0, 0, 0],
            [10.7525, 5.94, 2.5025, 0.44, 0, 0, 0, 0, 0, 0],
            *expected,
        ],
    )


@pytest.mark.parametrize(
    ("body", "old", "new", "message"),
    [
        (
            lambda x: mb.resize_bilinear(x=x, target_size_height=2, sampling_mode="DEFAULT"),
            "DEFAULT",
            "CENTRES",
            "(resize_bilinear): sampling mode 'CENTRES', expected one of STRICT_ALIGN_CORNERS, ALIGN_CORNERS, "
            "DEFAULT, OFFSET_CORNERS, UNALIGN_CORNERS",
        ),
        (
            lambda x: mb.resize(x=x, shape=[2], resized_dims=np.uint32(1), interpolation_mode="LINEAR"),
            "LINEAR",
            "CUBIC",
            "(resize): interpolation mode 'CUBIC', expected one of LINEAR, NEAREST_NEIGHBOR",
        ),
        (
            lambda x: mb.crop_resize(x=x, boxes=BOXES[:2]),
            "CORNERS_HEIGHT_FIRST",
            "EDGES",
            "(crop_resize): box coordinate mode 'EDGES', expected one of CORNERS_HEIGHT_FIRST, "
            "CORNERS_WIDTH_FIRST, CENTER_SIZE_HEIGHT_FIRST, CENTER_SIZE_WIDTH_FIRST",
        ),
        (
            lambda x: _affine(x, BOXES[:1, [0, 1, 2, 3, 0, 1]], 2, 2),
            "bilinear",
            "nearest",
            "(affine): sampling mode 'nearest', expected one of bilinear",
        ),
    ],
)
def test_invalid_modes_are_rejected(build, body, old, new, message):
    """coremltools' builder rejects these modes too."""
    model = build({"x": X}, body)
    for operation in model._spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations:
        strings = (
            operation.attributes["val"].immediateValue.tensor.strings.values if operation.type == "const" else []
        )
        if list(strings) == [old]:
            strings[0] = new
    with pytest.raises(PredictionInputError) as caught:
        MLModel(model).predict({"x": X})
    assert str(caught.value).endswith(message)
