"""Operations that change a tensor's shape or pick a part of it; values stay as they are.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.tensor_transformation`, and of the same name
`iOS16` (`reshape_like`, `pixel_unshuffle`), `iOS17` (more types) and `iOS18` (`slice_update`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from coremill.mil.ops.registry import Bools, Ints, OperationError, Tensors, op


@op("expand_dims", native=True)
def expand_dims(x: Tensor, *, axes: Ints) -> Tensor:
    """expand_dims: a dimension of 1 at each of `axes`, which count in the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("squeeze", native=True)
def squeeze(x: Tensor, *, axes: Ints | None = None) -> Tensor:
    """squeeze: without the dimensions of 1 among `axes` (of all, by default); others stay."""
    return torch.squeeze(x) if axes is None else torch.squeeze(x, axes)


@op("reshape", native=True)
def reshape(x: Tensor, *, shape: Ints) -> Tensor:
    """reshape: to `shape`, in which -1 is what remains, and 0 keeps x's size there if the ranks are equal."""
    if 0 in shape and x.numel():
        if len(shape) != x.dim():
            raise OperationError(f"shape {list(shape)} has a 0 and another rank than {list(x.shape)}")
        shape = tuple(size or own for size, own in zip(shape, x.shape, strict=True))
    return x.reshape(shape)


@op("reshape_like", since=16, native=True)
def reshape_like(x: Tensor, ref_tensors: Tensors, *, begins: Ints, ends: Ints, end_masks: Bools) -> Tensor:
    """reshape_like: to the dimensions begin to end of each reference tensor's shape, one after the other."""
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
    """reverse: the order along `axes` (along all, by default)."""
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
    """What numpy would index by: a slice for each axis, an index where squeeze_mask says so."""
    rank = len(sizes)
    if len(begin) != rank or len(end) != rank:
        raise OperationError(f"begin {list(begin)} and end {list(end)} for a tensor of rank {rank}")
    index: list[slice | int] = []
    for axis, size in enumerate(sizes):
        step = 1 if stride is None else stride[axis]
        start = None if begin_mask is not None and begin_mask[axis] else begin[axis]
        if squeeze_mask is not None and squeeze_mask[axis]:
            # A begin that is masked means position 0, whatever the stride.
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
            # torch has no negative strides: pick the same elements in ascending order, then turn them round.
            picked = range(*each.indices(x.shape[axis]))
            rising = slice(picked[-1], picked[0] + 1, -each.step) if len(picked) else slice(0, 0, 1)
            x = x[(slice(None),) * axis + (rising,)].flip(axis)
            index[axis] = slice(None)
    return x[tuple(index)]


@op("slice_by_size", native=True)
def slice_by_size(x: Tensor, *, begin: Ints, size: Ints) -> Tensor:
    """slice_by_size: `size` elements from `begin` on along each axis; a size of -1 takes what remains."""
    index = []
    for axis, (start, length) in enumerate(zip(begin, size, strict=True)):
        total = x.shape[axis]
        first = start + total if start < 0 else start
        last = total if length == -1 else first + length
        if not 0 <= first <= last <= total:
            raise OperationError(f"{length} elements from {start} on along axis {axis}, which has {total}")
        index.append(slice(first, last))
    return x[tuple(index)]


@op("slice_update", since=18, native=True)
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
    """slice_update: a copy of x in which the part that slice_by_index would give is `update`."""
    index = _slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    for axis, each in enumerate(index):
        if isinstance(each, slice):
            picked = range(*each.indices(x.shape[axis]))
            if each.step < 0:
                dropped = sum(isinstance(earlier, int) for earlier in index[:axis])
                update = update.flip(axis - dropped)
                picked = picked[::-1]
            index[axis] = slice(picked[0], picked[-1] + 1, abs(each.step)) if len(picked) else slice(0, 0)
    result = x.clone()
    part = result[tuple(index)]
    if part.shape != update.shape:
        raise OperationError(f"an update of shape {list(update.shape)} for a slice of shape {list(part.shape)}")
    part.copy_(update)
    return result


@op("depth_to_space", native=True)
def depth_to_space(x: Tensor, *, block_size: int) -> Tensor:
    """depth_to_space: (N, C, H, W) to (N, C / b², H · b, W · b), the block's position outermost in depth.

    As TensorFlow's operation of the name, which it converts; `pixel_shuffle` has it innermost.
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
    position = axis % x.dim()
    return x.unfold(position, size, stride).movedim(-1, position + 1)


@op("flatten2d", native=True)
def flatten2d(x: Tensor, *, axis: int = 1) -> Tensor:
    """flatten2d: (product of the dimensions before the axis, product of those from it on)."""
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
