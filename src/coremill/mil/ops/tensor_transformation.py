"""Operations that change a tensor's shape or select a part of it; values do not change.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.tensor_transformation`, and of the same name
`iOS16` (`reshape_like`, `pixel_unshuffle`), `iOS17` (more types, a 0 in `reshape`'s shape) and `iOS18`
(`slice_update`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from coremill.mil.ops.axes import axes_of, axis_of
from coremill.mil.ops.registry import Bools, IntPairs, Ints, OperationError, Overwritten, Tensors, op


@op("expand_dims", native=True)
def expand_dims(x: Tensor, *, axes: Ints) -> Tensor:
    """expand_dims: insert a dimension of 1 at each of `axes` of the result."""
    for axis in axes_of(x.dim() + len(axes), axes):
        x = x.unsqueeze(axis)
    return x


@op("squeeze", native=True)
def squeeze(x: Tensor, *, axes: Ints | None = None) -> Tensor:
    """squeeze: remove the dimensions of 1 among `axes` (by default all); others stay."""
    return torch.squeeze(x) if axes is None else torch.squeeze(x, axes)


@op("reshape", native=True, fixed={"any_rank": False})
@op("reshape", since=17, native=True, fixed={"any_rank": True})
def reshape(x: Tensor, *, shape: Ints, any_rank: bool) -> Tensor:
    """reshape: to `shape`, where -1 is inferred, and 0 keeps the size of x if the ranks are equal.

    From iOS17 on the ranks may differ: sizes are matched from the last one; a 0 before the first size of x is a 1.
    """
    if 0 in shape and x.numel():
        if len(shape) != x.dim() and not any_rank:
            raise OperationError(f"shape {list(shape)} has a 0 and another rank than {list(x.shape)}")
        sizes = (1,) * (len(shape) - x.dim()) + tuple(x.shape)[max(0, x.dim() - len(shape)) :]
        shape = tuple(size or own for size, own in zip(shape, sizes, strict=True))
    return x.reshape(shape)


@op("reshape_like", since=16, native=True)
def reshape_like(x: Tensor, ref_tensors: Tensors, *, begins: Ints, ends: Ints, end_masks: Bools) -> Tensor:
    """reshape_like: to the dimensions begin to end of each reference tensor's shape, concatenated."""
    shape: list[int] = []
    for reference, begin, end, to_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += reference.shape[begin:] if to_end else reference.shape[begin:end]
    return x.reshape(shape)


@op("transpose", native=True)
def transpose(x: Tensor, *, perm: Ints) -> Tensor:
    """transpose: axis i of the result is axis perm[i] of x."""
    return x.permute(perm)


@op("reverse", native=True)
def reverse(x: Tensor, *, axes: Ints | None = None) -> Tensor:
    """reverse: reverse the order along `axes` (by default all)."""
    return torch.flip(x, tuple(range(x.dim())) if axes is None else axes)


@op("reverse_sequence", native=True)
def reverse_sequence(x: Tensor, lengths: Tensor, *, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """reverse_sequence: of each sample along batch_axis, the first lengths[i] elements along seq_axis reversed."""
    moved = x.movedim((batch_axis, seq_axis), (0, 1))  # (B, S, …)
    rows = torch.arange(moved.shape[0])[:, None]
    position = torch.arange(moved.shape[1])[None, :]
    length = lengths.long()[:, None]
    source = torch.where(position < length, length - 1 - position, position)  # (B, S)
    return moved[rows, source].movedim((0, 1), (batch_axis, seq_axis))


def _slices(
    sizes: torch.Size,
    begin: Ints,
    end: Ints,
    stride: Ints | None,
    begin_mask: Bools | None,
    end_mask: Bools | None,
    squeeze_mask: Bools | None,
) -> list[slice | int]:
    """The numpy index: a slice for each axis, or an integer where squeeze_mask is set."""
    rank = len(sizes)
    if len(begin) != rank or len(end) != rank:
        raise OperationError(f"begin {list(begin)} and end {list(end)} for a tensor of rank {rank}")
    index: list[slice | int] = []
    for axis, size in enumerate(sizes):
        step = 1 if stride is None else stride[axis]
        start = None if begin_mask is not None and begin_mask[axis] else begin[axis]
        if squeeze_mask is not None and squeeze_mask[axis]:
            # A masked begin means index 0, whatever the stride.
            position = 0 if start is None else start
            if not -size <= position < size:
                raise OperationError(f"index {position} of axis {axis}, which has {size} elements")
            index.append(position % size)
        else:
            stop = None if end_mask is not None and end_mask[axis] else end[axis]
            index.append(slice(start, stop, step))
    return index


@op("slice_by_index", native=True)
def slice_by_index(
    x: Tensor,
    *,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """slice_by_index: numpy's x[begin:end:stride, …].

    A mask ignores begin (from the first element; with a negative stride from the last) or end on an axis; a
    squeeze mask takes the element at begin and drops the axis. Negative strides as numpy has them.
    """
    index = _slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    for axis, each in enumerate(index):
        if isinstance(each, slice) and each.step < 0:
            # torch has no negative strides: select the same elements in ascending order, then reverse them.
            picked = range(*each.indices(x.shape[axis]))
            rising = slice(picked[-1], picked[0] + 1, -each.step) if len(picked) else slice(0, 0, 1)
            x = x[(slice(None),) * axis + (rising,)].flip(axis)
            index[axis] = slice(None)
    return x[tuple(index)]


@op("slice_by_size", native=True)
def slice_by_size(x: Tensor, *, begin: Ints, size: Ints) -> Tensor:
    """slice_by_size: `size` elements from `begin` on along each axis; a size of -1 takes what remains."""
    if len(begin) != x.dim() or len(size) != x.dim():
        raise OperationError(f"begin {list(begin)} and size {list(size)} for a tensor of rank {x.dim()}")
    index = []
    for axis, (start, length, total) in enumerate(zip(begin, size, x.shape, strict=True)):
        first = start + total if start < 0 else start
        last = total if length == -1 else first + length
        if not 0 <= first <= last <= total:
            raise OperationError(f"{length} elements from {start} on along axis {axis}, which has {total}")
        index.append(slice(first, last))
    return x[tuple(index)]


def _overwrite_slice(
    x: Tensor,
    update: Tensor,
    *,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Overwritten:
    """Write `update` to the part of x that slice_by_index would return."""
    index = _slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    for axis, each in enumerate(index):
        if isinstance(each, slice):
            picked = range(*each.indices(x.shape[axis]))
            if each.step < 0:
                dropped = sum(isinstance(earlier, int) for earlier in index[:axis])
                update = update.flip(axis - dropped)
                picked = picked[::-1]
            index[axis] = slice(picked[0], picked[-1] + 1, abs(each.step)) if len(picked) else slice(0, 0)
    part = x[tuple(index)]
    if part.shape != update.shape:
        raise OperationError(f"an update of shape {list(update.shape)} for a slice of shape {list(part.shape)}")
    before = part.clone()
    part.copy_(update)
    return Overwritten(x, part, before)


@op("slice_update", since=18, native=True, in_place=_overwrite_slice)
def slice_update(
    x: Tensor,
    update: Tensor,
    *,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """slice_update: a copy of x in which the part that slice_by_index would return is `update`."""
    return _overwrite_slice(
        x.clone(),
        update,
        begin=begin,
        end=end,
        stride=stride,
        begin_mask=begin_mask,
        end_mask=end_mask,
        squeeze_mask=squeeze_mask,
    ).result


@op("depth_to_space", native=True)
def depth_to_space(x: Tensor, *, block_size: int) -> Tensor:
    """depth_to_space: (N, C, H, W) to (N, C / b², H · b, W · b), with the position in the block outermost in depth.

    Like TensorFlow's operation of the same name, which it converts; in `pixel_shuffle` it is innermost.
    """
    n, c, h, w = x.shape
    split = x.reshape(n, block_size, block_size, c // block_size**2, h, w)
    return split.permute(0, 3, 4, 1, 5, 2).reshape(n, c // block_size**2, h * block_size, w * block_size)


@op("space_to_depth", native=True)
def space_to_depth(x: Tensor, *, block_size: int) -> Tensor:
    """space_to_depth: the inverse of depth_to_space."""
    n, c, h, w = x.shape
    split = x.reshape(n, c, h // block_size, block_size, w // block_size, block_size)
    return split.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block_size**2, h // block_size, w // block_size)


@op("space_to_batch", native=True)
def space_to_batch(x: Tensor, *, block_shape: Ints, paddings: IntPairs) -> Tensor:
    """space_to_batch: (N, C, H, W), padded with zeros, to (N · bh · bw, C, H / bh, W / bw).

    Like TensorFlow's operation of the same name, which it converts: the position in the block is outermost in N.

    Args:
        paddings: before and after H, before and after W.
    """
    _check_blocks(x, block_shape, paddings, "paddings")
    (top, bottom), (left, right) = paddings
    x = F.pad(x, (left, right, top, bottom))
    n, c, h, w = x.shape
    block_h, block_w = block_shape
    if h % block_h or w % block_w:
        raise OperationError(f"{h} x {w} elements with their padding in blocks of {block_h} x {block_w}")
    split = x.reshape(n, c, h // block_h, block_h, w // block_w, block_w)
    return split.permute(3, 5, 0, 1, 2, 4).reshape(-1, c, h // block_h, w // block_w)


@op("batch_to_space", native=True)
def batch_to_space(x: Tensor, *, block_shape: Ints, crops: IntPairs) -> Tensor:
    """batch_to_space: the inverse of space_to_batch; `crops` are removed where that operation pads."""
    _check_blocks(x, block_shape, crops, "crops")
    n, c, h, w = x.shape
    block_h, block_w = block_shape
    if n % (block_h * block_w):
        raise OperationError(f"{n} samples for blocks of {block_h} x {block_w}")
    split = x.reshape(block_h, block_w, -1, c, h, w)
    joined = split.permute(2, 3, 4, 0, 5, 1).reshape(-1, c, h * block_h, w * block_w)
    (top, bottom), (left, right) = crops
    return joined[:, :, top : h * block_h - bottom, left : w * block_w - right]


def _check_blocks(x: Tensor, block_shape: Ints, borders: IntPairs, name: str) -> None:
    if x.dim() != 4 or len(block_shape) != 2 or len(borders) != 2:
        raise OperationError(
            f"a tensor of rank {x.dim()}, {len(block_shape)} block sizes and {len(borders)} pairs of {name}; a "
            "tensor of rank 4, 2 and 2 are admitted"
        )
    if min(block_shape) < 1 or min(width for pair in borders for width in pair) < 0:
        raise OperationError(f"block_shape {list(block_shape)} and {name} {list(map(list, borders))}")


@op("pixel_shuffle", native=True)
def pixel_shuffle(x: Tensor, *, upscale_factor: int) -> Tensor:
    """pixel_shuffle: as torch.nn.PixelShuffle."""
    return F.pixel_shuffle(x, upscale_factor)


@op("pixel_unshuffle", since=16, native=True)
def pixel_unshuffle(x: Tensor, *, downscale_factor: int) -> Tensor:
    """pixel_unshuffle: as torch.nn.PixelUnshuffle."""
    return F.pixel_unshuffle(x, downscale_factor)


@op("sliding_windows", native=True)
def sliding_windows(x: Tensor, *, axis: int, size: int, stride: int = 1) -> Tensor:
    """sliding_windows: windows of `size` elements along the axis, `stride` apart; the new axis follows it."""
    position = axis_of(x.dim(), axis)
    return x.unfold(position, size, stride).movedim(-1, position + 1)


@op("flatten2d", native=True)
def flatten2d(x: Tensor, *, axis: int = 1) -> Tensor:
    """flatten2d: (product of the dimensions before the axis, product of those from it on)."""
    if not -x.dim() <= axis <= x.dim():
        raise OperationError(f"axis {axis} of a tensor of rank {x.dim()}, expected {-x.dim()} to {x.dim()}")
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
