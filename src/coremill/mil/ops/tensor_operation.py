"""Operations that build, join, split, order or fill tensors.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.tensor_operation`, and of the same name
`iOS16` (`fill_like`, `topk` without indices) and `iOS17` (the type of `topk`'s indices, another layout of
`non_maximum_suppression`). What it gives where no box passes is from coremltools' own operation test.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coremill.mil.ops.axes import axis_of
from coremill.mil.ops.registry import Ints, OperationError, Tensors, op
from coremill.mil.values import INT32, ElementType


@op("identity", native=True)
def identity(x: Tensor) -> Tensor:
    """identity: return x."""
    return x


@op("shape", native=True)
def shape(x: Tensor) -> Tensor:
    """shape: x's shape, (rank,) int32."""
    return torch.tensor(x.shape, dtype=torch.int32)


@op("concat", native=True)
def concat(values: Tensors, *, axis: int, interleave: bool = False) -> Tensor:
    """concat: concatenate the values along the axis; with interleave, one element of each in turn."""
    if interleave:
        position = axis_of(values[0].dim(), axis)
        return torch.stack(values, position + 1).flatten(position, position + 1)
    # Scalars are concatenated as tensors of one element.
    return torch.cat([value.reshape(1) if value.dim() == 0 else value for value in values], axis)


@op("stack", native=True)
def stack(values: Tensors, *, axis: int) -> Tensor:
    """stack: stack the values along a new axis."""
    return torch.stack(values, axis)


@op("split", native=True)
def split(x: Tensor, *, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None) -> Tensors:
    """split: parts of the given sizes along the axis, or `num_splits` equal ones."""
    total = x.shape[axis]
    if split_sizes is None:
        if num_splits is None or total % num_splits:
            raise OperationError(f"{total} elements along axis {axis} in {num_splits} equal parts")
        split_sizes = (total // num_splits,) * num_splits
    return tuple(torch.split(x, list(split_sizes), axis))


@op("tile", native=True)
def tile(x: Tensor, *, reps: Ints) -> Tensor:
    """tile: x repeated reps[i] times along each axis i."""
    return x.repeat(reps) if any(count != 1 for count in reps) else x


@op("fill", native=True)
def fill(value: Tensor | None = None, *, shape: Ints) -> Tensor:
    """fill: a tensor of `shape`, every element `value` (by default 0 of fp32)."""
    return (torch.zeros((), dtype=torch.float32) if value is None else value).reshape(()).expand(shape)


@op("fill_like", since=16, native=True)
def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    """fill_like: a tensor of the reference's shape, every element `value` (by default 0 of fp32)."""
    return fill(value, shape=tuple(ref_tensor.shape))


@op("range_1d", data_dependent_shape=True)
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """range_1d: start, start + step, … up to but not including end; (M,) of their type."""
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@op("band_part", native=True)
def band_part(x: Tensor, *, lower: int = -1, upper: int = -1) -> Tensor:
    """band_part: zero outside `lower` diagonals below and `upper` above the main one; negative keeps all."""
    rows = torch.arange(x.shape[-2])[:, None]
    columns = torch.arange(x.shape[-1])[None, :]
    inside = torch.ones(x.shape[-2:], dtype=torch.bool)
    if lower >= 0:
        inside &= rows - columns <= lower
    if upper >= 0:
        inside &= columns - rows <= upper
    return torch.where(inside, x, torch.zeros((), dtype=x.dtype))


@op("cumsum")
def cumsum(x: Tensor, *, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """cumsum: the sum up to each element along the axis, without it if exclusive, from the end if reversed."""
    if reverse:
        x = x.flip(axis)
    total = torch.cumsum(x, axis, dtype=x.dtype)
    if exclusive:
        first = torch.zeros_like(total.narrow(axis, 0, min(1, total.shape[axis])))
        total = torch.cat((first, total), axis).narrow(axis, 0, total.shape[axis])
    return total.flip(axis) if reverse else total


@op("non_zero", native=True, data_dependent_shape=True)
def non_zero(x: Tensor) -> Tensor:
    """non_zero: the indices of the elements that are not 0, (N, rank) int32."""
    return torch.nonzero(x).to(torch.int32)


@op("one_hot", native=True)
def one_hot(
    indices: Tensor,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
    *,
    one_hot_vector_size: int,
    axis: int = -1,
) -> Tensor:
    """one_hot: on_value at each index along a new axis, off_value elsewhere; all off_value if out of range.

    The defaults are int32 1 and 0.
    """
    on = torch.ones((), dtype=torch.int32) if on_value is None else on_value
    off = torch.zeros((), dtype=on.dtype) if off_value is None else off_value
    hot = indices.unsqueeze(-1) == torch.arange(one_hot_vector_size, dtype=indices.dtype)
    return torch.where(hot, on, off).movedim(-1, axis)


@op("pad", native=True)
def pad(x: Tensor, constant_val: Tensor | None = None, *, pad: Ints, mode: str = "constant") -> Tensor:
    """pad: pad[2i] elements before and pad[2i + 1] after each of the last len(pad) / 2 axes."""
    # torch lists the last axis first.
    pairs = [pad[at : at + 2] for at in range(0, len(pad), 2)]
    widths = [width for pair in reversed(pairs) for width in pair]
    if mode == "constant":
        value = 0 if constant_val is None else constant_val.item()
        return F.pad(x, widths, value=value)
    if mode not in ("reflect", "replicate"):
        raise OperationError(f"mode {mode!r}, expected one of constant, reflect, replicate")
    for back, (before, after) in enumerate(reversed(pairs), start=1):
        x = _pad_axis(x, x.dim() - back, before, after, reflect=mode == "reflect")
    return x


def _pad_axis(x: Tensor, axis: int, before: int, after: int, *, reflect: bool) -> Tensor:
    """Reflect or repeat the ends of an axis: torch's own modes do not support the leading axes."""
    size = x.shape[axis]
    position = torch.arange(-before, size + after)
    if reflect:
        if max(before, after) >= size:
            raise OperationError(f"reflecting {max(before, after)} elements of axis {axis}, which has {size}")
        position = position.abs()
        position = torch.where(position >= size, 2 * (size - 1) - position, position)
    return x.index_select(axis, position.clamp(0, size - 1))


@op("argsort", native=True)
def argsort(x: Tensor, *, axis: int = -1, ascending: bool = False) -> Tensor:
    """argsort: indices that sort x along the axis, descending by default; int32. The sort is stable."""
    return torch.sort(x, dim=axis, descending=not ascending, stable=True).indices.to(torch.int32)


@op("topk", native=True, fixed={"sort": True, "return_indices": True, "output_indices_dtype": INT32})
@op("topk", since=16, native=True, fixed={"output_indices_dtype": INT32})
@op("topk", since=17, native=True)
def topk(
    x: Tensor,
    *,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: ElementType = INT32,
) -> Tensor | Tensors:
    """topk: the k largest (with `ascending` the smallest) along the axis, and their indices; k of -1 takes all.

    The result is always sorted, equal elements in their order; the documentation promises no order without `sort`.
    """
    order = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    count = x.shape[axis] if k == -1 else k
    if count > x.shape[axis]:
        raise OperationError(f"{count} largest of {x.shape[axis]} elements along axis {axis}")
    values = order.values.narrow(axis, 0, count)
    if not return_indices:
        return values
    return values, order.indices.narrow(axis, 0, count).to(output_indices_dtype.storage)


@op("non_maximum_suppression", native=True)
def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float,
    score_threshold: float,
    max_boxes: int,
    per_class_suppression: bool = False,
) -> Tensors:
    """non_maximum_suppression: boxes by descending score, less those that overlap an earlier one.

    A box's score is its highest one, and its class that score's class; per class, boxes of other classes are not
    suppressed. Boxes below the score threshold are dropped, but if none passes, the best one is kept.

    Args:
        boxes: (N, B, 4), each the centre's x and y, width and height.
        scores: (N, B, K) for K classes.

    Returns:
        Boxes (N, max_boxes, 4), scores (N, max_boxes, K) and indices (N, max_boxes) of those chosen, padded with
        0 and -1, and their number (N,).
    """
    if boxes.dim() != 3 or boxes.shape[2] != 4 or scores.dim() != 3 or scores.shape[:2] != boxes.shape[:2]:
        raise OperationError(
            f"boxes of shape {list(boxes.shape)} and scores of shape {list(scores.shape)}; "
            "up to iOS16 they are (N, B, 4) and (N, B, K)"
        )
    best, classes = scores.max(-1)  # (N, B)
    rows = []
    for each_boxes, each_best, each_classes in zip(boxes, best, classes, strict=True):
        passing = each_best >= score_threshold
        passing[each_best.argmax()] |= ~passing.any()
        groups = each_classes if per_class_suppression else torch.zeros_like(each_classes)
        rows.append(_chosen_boxes(each_boxes, each_best, passing, groups, iou_threshold, max_boxes))
    indices = torch.stack(rows)  # (N, max_boxes)
    taken = indices.clamp(min=0).unsqueeze(-1)
    is_padding = (indices < 0).unsqueeze(-1)
    return (
        boxes.take_along_dim(taken, 1).masked_fill(is_padding, 0),
        scores.take_along_dim(taken, 1).masked_fill(is_padding, 0),
        indices.to(torch.int32),
        (indices >= 0).sum(-1).to(torch.int32),
    )


@op("non_maximum_suppression", since=17, native=True)
def suppress_boxes_last(
    boxes: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float,
    max_boxes: int,
    per_class_suppression: bool = False,
) -> Tensors:
    """non_maximum_suppression of iOS17: the boxes are the last axis, every score passes, and no number is given.

    boxes (N, 4, B), scores (N, K, B). Returns (N, 4, max_boxes), (N, K, max_boxes) and (N, max_boxes).
    """
    if boxes.dim() != 3 or boxes.shape[1] != 4 or scores.dim() != 3 or scores.shape[::2] != boxes.shape[::2]:
        raise OperationError(
            f"boxes of shape {list(boxes.shape)} and scores of shape {list(scores.shape)}; "
            "from iOS17 on they are (N, 4, B) and (N, K, B)"
        )
    chosen_boxes, chosen_scores, indices, _ = non_maximum_suppression(
        boxes.mT,
        scores.mT,
        iou_threshold=iou_threshold,
        score_threshold=-torch.inf,
        max_boxes=max_boxes,
        per_class_suppression=per_class_suppression,
    )
    return chosen_boxes.mT, chosen_scores.mT, indices


def _chosen_boxes(
    boxes: Tensor, scores: Tensor, passing: Tensor, groups: Tensor, iou_threshold: float, max_boxes: int
) -> Tensor:
    """The indices of the boxes to keep, by descending score, then -1: (max_boxes,).

    boxes (B, 4), scores, passing and groups (B,); boxes suppress those of their group.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    left = order[passing[order]]
    # In fp16 the areas of boxes of a few hundred pixels would overflow.
    centre, extent = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).split(2, -1)
    low, high, area = centre - extent / 2, centre + extent / 2, extent.prod(-1)
    chosen = torch.full((max_boxes,), -1)
    for position in range(max_boxes):
        if not len(left):
            break
        first, left = left[0], left[1:]
        chosen[position] = first
        sides = torch.minimum(high[first], high[left]) - torch.maximum(low[first], low[left])
        shared = sides.clamp(min=0).prod(-1)
        # Boxes without area give NaN, which counts as no overlap.
        overlap = shared / (area[first] + area[left] - shared)
        left = left[~((overlap > iou_threshold) & (groups[left] == groups[first]))]
    return chosen
