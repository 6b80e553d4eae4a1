"""Resizing, cropping and resampling of images: the last two dimensions of x, or more for `resize`.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.image_resizing`, and of the same name
`iOS16` (`half_pixel_centers`, `pad_value`) and `iOS17` (`resize`, `crop_resize` with boxes). Where those are
silent, a kernel names what decided: results that coremltools' tests expect, or a TensorFlow operation that it
converts.

Positions are coordinates of elements: 0 is the centre of the first, size - 1 that of the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from coremill.mil.ops.axes import axis_of
from coremill.mil.ops.registry import Ints, OperationError, op

_SAMPLING_MODES = ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS")
_BOX_MODES = (
    "CORNERS_HEIGHT_FIRST",
    "CORNERS_WIDTH_FIRST",
    "CENTER_SIZE_HEIGHT_FIRST",
    "CENTER_SIZE_WIDTH_FIRST",
)


def _one_of(name: str, value: str, admitted: Sequence[str]) -> str:
    if value not in admitted:
        raise OperationError(f"{name} {value!r}, expected one of {', '.join(admitted)}")
    return value


def _grid(mode: str, extent: Tensor, count: int) -> Tensor:
    """Positions at which a sampling mode takes `count` samples from an interval.

    Args:
        extent: (…) sizes of intervals in elements; an interval reaches from position 0 to size - 1.

    Returns:
        (…, count) positions within the interval.
    """
    index = torch.arange(count, dtype=extent.dtype)
    size = extent.unsqueeze(-1)
    last = size - 1
    if _one_of("sampling mode", mode, _SAMPLING_MODES) == "UNALIGN_CORNERS":
        points = (index + 0.5) * size / count - 0.5
    elif mode == "OFFSET_CORNERS":
        points = (index + 0.5) * last.clamp(min=1) / count
    elif mode == "DEFAULT":
        points = index * size / count
    elif count > 1:
        points = index * last / (count - 1)
    else:
        points = index + (last / 2 if mode == "ALIGN_CORNERS" else 0)
    return torch.minimum(points.clamp(min=0), last)


def _linear(x: Tensor, axis: int, mode: str, count: int) -> Tensor:
    """Interpolate x to `count` elements along an axis."""
    size = x.shape[axis]
    # In fp64: the positions depend only on sizes, and their rounding must not affect the result.
    points = _grid(mode, torch.tensor(size, dtype=torch.float64), count)
    low = points.floor()
    weight = points - low
    if count == size and not weight.any():
        return x.clone()  # The products below would turn an infinity into NaN.
    before = low.long()
    after = (before + 1).clamp(max=size - 1)
    position = axis_of(x.dim(), axis)
    shape = [-1 if each == position else 1 for each in range(x.dim())]
    weight = weight.to(x.dtype).reshape(shape)
    return x.index_select(axis, before) * (1 - weight) + x.index_select(axis, after) * weight


def _bilinear(x: Tensor, mode: str, height: int, width: int) -> Tensor:
    return _linear(_linear(x, -2, mode, height), -1, mode, width)


def _scaled(size: int, factor: float) -> int:
    """floor(size · factor) with the product rounded to fp32, as coremltools infers a shape from an fp32 factor."""
    return int((torch.tensor(factor, dtype=torch.float32) * size).floor())


@op("upsample_nearest_neighbor", native=True)
def upsample_nearest_neighbor(
    x: Tensor, *, scale_factor_height: float = 1, scale_factor_width: float = 1
) -> Tensor:
    """upsample_nearest_neighbor: element floor(i · size / new size), where the new size is floor(size · factor)."""
    for axis, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        size, count = x.shape[axis], _scaled(x.shape[axis], factor)
        x = x.index_select(axis, torch.arange(count) * size // max(count, 1))
    return x


def _nearest(x: Tensor, axis: int, count: int) -> Tensor:
    """Resize x along an axis: take the element that contains the centre of each new element."""
    size = x.shape[axis]
    return x.index_select(axis, (2 * torch.arange(count) + 1) * size // (2 * count))


@op("resize_nearest_neighbor", native=True)
def resize_nearest_neighbor(x: Tensor, *, target_size_height: int, target_size_width: int) -> Tensor:
    """resize_nearest_neighbor: element floor((i + 0.5) · size / new size).

    With half-pixel centres, unlike upsample_nearest_neighbor: coremltools converts TensorFlow's
    `ResizeNearestNeighbor(half_pixel_centers=True)` to it, and compares the two on sizes at which they differ.
    """
    return _nearest(_nearest(x, -2, target_size_height), -1, target_size_width)


@op("upsample_bilinear", since=16)
@op("upsample_bilinear", since=15, fixed={"half_pixel_centers": None})
def upsample_bilinear(
    x: Tensor,
    *,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """upsample_bilinear: to floor(size · factor), interpolated for that new size, not for the factor.

    Corners or half-pixel centres are aligned, by default the latter unless the former, or neither (DEFAULT).
    """
    if half_pixel_centers is None:
        half_pixel_centers = not align_corners
    if align_corners and half_pixel_centers:
        raise OperationError("align_corners and half_pixel_centers are both true, expected at most one")
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half_pixel_centers else "DEFAULT"
    height = _scaled(x.shape[-2], scale_factor_height)
    return _bilinear(x, mode, height, _scaled(x.shape[-1], scale_factor_width))


@op("resize_bilinear")
def resize_bilinear(
    x: Tensor, *, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    """resize_bilinear: interpolate at the positions that the sampling mode gives."""
    return _bilinear(x, sampling_mode, target_size_height, target_size_width)


@op("resize", since=17)
def resize(
    x: Tensor,
    *,
    shape: Ints,
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """resize: resize the last `resized_dims` dimensions to the last sizes of `shape`; 0 keeps the size of x.

    NEAREST_NEIGHBOR with DEFAULT is as resize_nearest_neighbor: coremltools' tests expect so (2 elements to 3, and
    20 to 60 by its TensorFlow converter); with another mode the element nearest to its position, the upper one of
    two. Whole numbers are interpolated in fp64 and lose their fraction.
    """
    _one_of("interpolation mode", interpolation_mode, ("LINEAR", "NEAREST_NEIGHBOR"))
    _one_of("sampling mode", sampling_mode, _SAMPLING_MODES)
    if not resized_dims <= len(shape) <= x.dim():
        raise OperationError(f"{resized_dims} sizes of shape {list(shape)} for x of shape {list(x.shape)}")
    result = x if x.is_floating_point() or interpolation_mode != "LINEAR" else x.double()
    for axis, size in zip(range(-resized_dims, 0), shape[len(shape) - resized_dims :], strict=True):
        count = size or x.shape[axis]
        if interpolation_mode == "LINEAR":
            result = _linear(result, axis, sampling_mode, count)
        elif sampling_mode in ("DEFAULT", "UNALIGN_CORNERS"):
            result = _nearest(result, axis, count)
        else:
            points = _grid(sampling_mode, torch.tensor(x.shape[axis], dtype=torch.float64), count)
            result = result.index_select(axis, (points + 0.5).floor().long())
    return result.to(x.dtype, copy=result is x)


@op("crop", native=True)
def crop(x: Tensor, *, crop_height: Ints, crop_width: Ints) -> Tensor:
    """crop: remove the given numbers of rows at the top and bottom and of columns at the left and right."""
    for axis, name, amounts in ((-2, "crop_height", crop_height), (-1, "crop_width", crop_width)):
        size = x.shape[axis]
        if len(amounts) != 2 or min(amounts) < 0 or sum(amounts) > size:
            raise OperationError(f"{name} {list(amounts)} of {size} elements, expected two that leave some")
        x = x.narrow(axis, amounts[0], size - sum(amounts))
    return x


def _gather(x: Tensor, image: Tensor, row: Tensor, column: Tensor, fill: float | None) -> Tensor:
    """Gather the elements x[image, :, row, column]; outside of x use `fill`, or the nearest element if it is None.

    Args:
        x: (B, C, H, W).
        image: (N,) whole numbers.
        row: (N, h, w) positions without fraction.
        column: (N, h, w).

    Returns:
        (N, C, h, w).
    """
    height, width = x.shape[-2:]
    # A NaN has no position; it selects any element here, and its weight makes the result NaN.
    row_inside = row.clamp(0, height - 1)
    column_inside = column.clamp(0, width - 1)
    at = tuple(each.nan_to_num(0).long() for each in (row_inside, column_inside))
    found = x[image[:, None, None], :, at[0], at[1]]  # (N, h, w, C)
    if fill is not None:
        outside = (row != row_inside) | (column != column_inside)
        found = found.masked_fill(outside.unsqueeze(-1), fill)
    return found.permute(0, 3, 1, 2)


def _sample(x: Tensor, image: Tensor, row: Tensor, column: Tensor, fill: float | None) -> Tensor:
    """Interpolate x at fractional positions; otherwise like _gather."""
    top, left = row.floor(), column.floor()
    below, right = (row - top).unsqueeze(1), (column - left).unsqueeze(1)  # (N, 1, h, w) weights
    upper = _gather(x, image, top, left, fill) * (1 - right) + _gather(x, image, top, left + 1, fill) * right
    lower = (
        _gather(x, image, top + 1, left, fill) * (1 - right) + _gather(x, image, top + 1, left + 1, fill) * right
    )
    return upper * (1 - below) + lower * below


def _mirrored(points: Tensor, first: float, last: float) -> Tensor:
    """Reflect positions outside first … last at both ends until they are inside."""
    if last <= first:
        return torch.full_like(points, first)
    span = last - first
    turned = torch.remainder(points - first, 2 * span)
    return first + torch.minimum(turned, 2 * span - turned)


def _box_corners(boxes: Tensor, mode: str, extents: Tensor) -> tuple[Tensor, Tensor]:
    """First and last corners (N, 2) of boxes (N, 4), height before width, in elements."""
    _one_of("box coordinate mode", mode, _BOX_MODES)
    one, other = boxes[:, :2], boxes[:, 2:]
    if mode.endswith("WIDTH_FIRST"):
        one, other = one.flip(1), other.flip(1)
    if mode.startswith("CENTER_SIZE"):
        one, other = one - other / 2, one + other / 2
    return one * extents, other * extents


def _crops(
    x: Tensor,
    boxes: Tensor,
    image: Tensor,
    *,
    target_height: int,
    target_width: int,
    normalized_coordinates: bool,
    spatial_scale: float,
    box_coordinate_mode: str,
    sampling_mode: str,
    pad_value: float,
) -> Tensor:
    """Crop each box (N, 4) from its image (N,) to (N, C, target_height, target_width).

    A sampling mode places its grid between a box's corners, which may come in either order. A point outside of the
    image is `pad_value`, as of TensorFlow's `CropAndResize`; with UNALIGN_CORNERS it is mirrored at the border,
    which is not documented, but the one result that coremltools' tests expect for a box outside of the image.
    """
    if image.numel() and not 0 <= int(image.min()) <= int(image.max()) < x.shape[0]:
        found = f"boxes on images {int(image.min())} to {int(image.max())}"
        raise OperationError(f"{found}, expected 0 to {x.shape[0] - 1}")
    sizes = x.shape[-2:]
    extents = torch.tensor([size - 1 if normalized_coordinates else 1 for size in sizes], dtype=x.dtype)
    first, last = _box_corners(boxes.to(x.dtype), box_coordinate_mode, extents * spatial_scale)
    points = []
    for axis, count in enumerate((target_height, target_width)):
        start, end = first[:, axis, None], last[:, axis, None]  # (N, 1)
        grid = _grid(sampling_mode, (end - start).abs().squeeze(1) + 1, count)  # (N, count)
        point = torch.where(end < start, start - grid, start + grid)
        # Rounding of the sum must not move a point out of the box, and so out of the image.
        point = torch.minimum(torch.maximum(point, torch.minimum(start, end)), torch.maximum(start, end))
        points.append(_mirrored(point, 0, sizes[axis] - 1) if sampling_mode == "UNALIGN_CORNERS" else point)
    row = points[0][:, :, None].expand(-1, -1, target_width)
    column = points[1][:, None, :].expand(-1, target_height, -1)
    crops = _sample(x, image, row, column, None)
    outside = (row < 0) | (row > sizes[0] - 1) | (column < 0) | (column > sizes[1] - 1)
    return crops.masked_fill(outside.unsqueeze(1), pad_value)


@op("crop_resize", since=16)
@op("crop_resize", since=15, fixed={"pad_value": 0.0})
def crop_resize(
    x: Tensor,
    roi: Tensor,
    *,
    target_height: int = 1,
    target_width: int = 1,
    normalized_coordinates: bool = False,
    spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: float = 0.0,
) -> Tensor:
    """crop_resize up to iOS16: crop the boxes `roi` of x (B, C, H, W) and resize them.

    (N, 1, 4, 1, 1) takes every box of every image and gives (N, B, C, h, w); in (N, 1, 5, 1, 1) an image's number
    comes before the coordinates, and (N, 1, C, h, w) come out.
    """
    count, columns = roi.shape[0], roi.shape[2]
    if roi.shape[1:] not in ((1, 4, 1, 1), (1, 5, 1, 1)):
        raise OperationError(f"roi is of shape {list(roi.shape)}, expected (N, 1, 4, 1, 1) or (N, 1, 5, 1, 1)")
    boxes = roi.reshape(count, columns)
    if columns == 5:
        image, boxes = boxes[:, 0].long(), boxes[:, 1:]
    else:
        image = torch.arange(x.shape[0]).repeat(count)
        boxes = boxes.repeat_interleave(x.shape[0], 0)
    crops = _crops(
        x,
        boxes,
        image,
        target_height=target_height,
        target_width=target_width,
        normalized_coordinates=normalized_coordinates,
        spatial_scale=spatial_scale,
        box_coordinate_mode=box_coordinate_mode,
        sampling_mode=sampling_mode,
        pad_value=pad_value,
    )
    unflattened: Tensor = crops.unflatten(0, (count, 1 if columns == 5 else x.shape[0]))
    return unflattened


@op("crop_resize", since=17)
def crop_resize_boxes(
    x: Tensor,
    boxes: Tensor,
    box_indices: Tensor | None = None,
    *,
    target_height: int = 1,
    target_width: int = 1,
    normalized_coordinates: bool = False,
    spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: float = 0.0,
) -> Tensor:
    """crop_resize since iOS17: boxes (N, 4), each on image box_indices[i] (by default on image i)."""
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise OperationError(f"boxes are of shape {list(boxes.shape)}, expected (N, 4)")
    return _crops(
        x,
        boxes,
        torch.arange(boxes.shape[0]) if box_indices is None else box_indices.long(),
        target_height=target_height,
        target_width=target_width,
        normalized_coordinates=normalized_coordinates,
        spatial_scale=spatial_scale,
        box_coordinate_mode=box_coordinate_mode,
        sampling_mode=sampling_mode,
        pad_value=pad_value,
    )


def _in_elements(coordinates: Tensor, mode: str, size: int, align_corners: bool) -> Tensor:
    """Convert coordinates of a coordinates mode to positions."""
    if mode == "unnormalized":
        return coordinates
    unit = (coordinates + 1) / 2 if mode == "normalized_minus_one_to_one" else coordinates
    return unit * (size - 1) if align_corners else unit * size - 0.5


def _padded(points: Tensor, mode: str, size: int) -> Tensor:
    """Map positions outside of an image to the positions inside that the padding mode selects."""
    if mode == "reflection":
        points = _mirrored(points, 0, size - 1)
    elif mode == "symmetric":
        points = _mirrored(points, -0.5, size - 0.5)
    return points if mode == "constant" else points.clamp(0, size - 1)


@op("resample")
def resample(
    x: Tensor,
    coordinates: Tensor,
    *,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """resample: x (B, C, H, W) at coordinates (B, h, w, 2), each (x, y), to (B, C, h, w).

    As torch.nn.functional.grid_sample, which has the same padding modes (`symmetric` is its reflection at the edges
    of pixels), but for a `constant` other than 0; a point between two is nearest to the even one.
    """
    sampling_mode = _one_of("sampling mode", sampling_mode.lower(), ("bilinear", "nearest"))
    padding_mode = _one_of("padding mode", padding_mode.lower(), ("constant", "border", "reflection", "symmetric"))
    coordinates_mode = _one_of(
        "coordinates mode",
        coordinates_mode.lower(),
        ("unnormalized", "normalized_minus_one_to_one", "normalized_zero_to_one"),
    )
    if coordinates.dim() != 4 or coordinates.shape[0] != x.shape[0] or coordinates.shape[3] != 2:
        raise OperationError(
            f"coordinates are of shape {list(coordinates.shape)}, expected ({x.shape[0]}, h, w, 2)"
        )
    height, width = x.shape[-2:]
    column, row = (
        _padded(_in_elements(points, coordinates_mode, size, align_corners), padding_mode, size)
        for points, size in zip(coordinates.to(x.dtype).unbind(-1), (width, height), strict=True)
    )
    fill = padding_value if padding_mode == "constant" else None
    image = torch.arange(x.shape[0])
    if sampling_mode == "nearest":
        return _gather(x, image, row.round(), column.round(), fill)
    return _sample(x, image, row, column, fill)


@op("affine")
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    *,
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """affine: x at the output coordinates transformed by (B or 1, 6) matrices [[a0, a1, a2], [b0, b1, b2]].

    Both in -1 … 1; a dimension of one pixel has its coordinate 0. Other modes than those below are not documented.
    """
    _one_of("sampling mode", sampling_mode.lower(), ("bilinear",))
    _one_of("padding mode", padding_mode.lower(), ("constant",))
    _one_of("coordinates mode", coordinates_mode.lower(), ("normalized_minus_one_to_one",))
    images, channels = x.shape[:2]
    matrices = transform_matrix.to(x.dtype).expand(images, 6).reshape(images, 2, 3)
    coordinates = F.affine_grid(matrices, [images, channels, output_height, output_width], align_corners)
    return resample(
        x,
        coordinates,
        sampling_mode=sampling_mode,
        padding_mode=padding_mode,
        padding_value=padding_value,
        coordinates_mode=coordinates_mode,
        align_corners=align_corners,
    )
