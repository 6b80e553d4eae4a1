"""Shapes, slices and rearrangements, against numpy, torch and coremltools' value inference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from hypothesis import given
from hypothesis import strategies as st

from coremill.core.errors import PackageError, PredictionInputError
from coremill.mil import MLModel
from coremill.mil.ops.registry import OperationError, find

X = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)


def kernel(name, ios=18):
    definition = find(name, ios)
    assert definition is not None
    return definition.kernel


def _rank(draw):
    return draw(st.integers(1, 4))


@st.composite
def slices(draw):
    """Draw a shape and arguments of slice_by_index; no slice is empty, as Core ML has no empty tensors."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    begin, end, stride, begin_mask, end_mask, squeeze_mask = [], [], [], [], [], []
    for size in shape:
        step = draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        masked_begin, masked_end = draw(st.booleans()), draw(st.booleans())
        squeezed = draw(st.integers(0, 4)) == 0 and not (masked_begin and step < 0)
        start = draw(st.integers(-size, size - 1))
        stop = draw(st.integers(-size, size))
        picked = range(*slice(None if masked_begin else start, None if masked_end else stop, step).indices(size))
        if not squeezed and len(picked) == 0:
            masked_begin = masked_end = True
        begin.append(start)
        end.append(stop)
        stride.append(step)
        begin_mask.append(masked_begin)
        end_mask.append(masked_end)
        squeeze_mask.append(squeezed)
    return shape, {
        "begin": tuple(begin),
        "end": tuple(end),
        "stride": tuple(stride),
        "begin_mask": tuple(begin_mask),
        "end_mask": tuple(end_mask),
        "squeeze_mask": tuple(squeeze_mask),
    }


def numpy_index(arguments):
    index = []
    for begin, end, stride, begin_mask, end_mask, squeezed in zip(*arguments.values(), strict=True):
        if squeezed:
            index.append(0 if begin_mask else begin)
        else:
            index.append(slice(None if begin_mask else begin, None if end_mask else end, stride))
    return tuple(index)


@given(slices())
def test_slice_by_index_matches_numpy(case):
    shape, arguments = case
    x = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    found = kernel("slice_by_index")(torch.from_numpy(x), **arguments)
    np.testing.assert_array_equal(found.numpy(), x[numpy_index(arguments)])


@given(slices())
def test_slice_update_matches_numpy(case):
    shape, arguments = case
    x = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    expected = x.copy()
    part = expected[numpy_index(arguments)]
    update = -1 - np.arange(part.size, dtype=np.int32).reshape(part.shape)
    expected[numpy_index(arguments)] = update
    given_tensor = torch.from_numpy(x.copy())
    found = kernel("slice_update")(given_tensor, torch.from_numpy(np.array(update)), **arguments)
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(given_tensor.numpy(), x)  # a kernel never writes to its inputs


SLICES = [
    {"begin": [0, 0, 1, 2], "end": [2, 3, 3, 5]},
    {
        "begin": [0, 1, 0, 0],
        "end": [0, 0, 4, 5],
        "begin_mask": [True, False] * 2,
        "end_mask": [True, True, False, False],
    },
    {"begin": [1, -1, 0, 0], "end": [0, 0, 4, 5], "squeeze_mask": [True, True, False, False]},
    {"begin": [0, 0, 0, 4], "end": [2, 3, 4, 0], "stride": [1, 1, 2, -2]},
    {
        "begin": [-1, 0, 0, 0],
        "end": [0, 0, 0, 0],
        "stride": [-1] * 4,
        "begin_mask": [True] * 4,
        "end_mask": [True] * 4,
    },
]


def test_slice_by_index_matches_value_inference(evaluate, inferred):
    body = lambda x: tuple(mb.slice_by_index(x=x, **each) for each in SLICES)  # noqa: E731
    expected = inferred({"x": X}, body)
    for found, value in zip(evaluate({"x": X}, body), expected, strict=True):
        np.testing.assert_array_equal(found, value)


def test_slice_with_computed_bounds(evaluate):
    """begin and end are computed from an input."""
    inputs = {"x": X, "begin": np.array([0, 1, 0, 2], np.int32), "end": np.array([1, 3, 4, 4], np.int32)}
    (found,) = evaluate(inputs, lambda x, begin, end: mb.slice_by_index(x=x, begin=begin, end=end))
    np.testing.assert_array_equal(found, X[0:1, 1:3, :, 2:4])


def test_index_past_the_end_is_rejected(build):
    inputs = {"x": X, "begin": np.array([0, 3, 0, 0], np.int32)}
    mask = [False, True, False, False]
    model = MLModel(
        build(
            inputs,
            lambda x, begin: mb.slice_by_index(x=x, begin=begin, end=[2, 0, 4, 5], squeeze_mask=mask, name="row"),
        )
    )
    with pytest.raises(PredictionInputError) as caught:
        model.predict(inputs)
    assert str(caught.value) == "operation 'row' (slice_by_index): index 3 of axis 1, which has 3 elements"


@given(st.data())
def test_reshape_keeps_the_order(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    flat = math.prod(shape)
    divisor = data.draw(st.sampled_from([size for size in range(1, flat + 1) if flat % size == 0]))
    target = data.draw(st.sampled_from([(divisor, -1), (-1, divisor), (-1,), (1, divisor, flat // divisor)]))
    x = np.arange(flat, dtype=np.int32).reshape(shape)
    found = kernel("reshape")(torch.from_numpy(x), shape=target)
    np.testing.assert_array_equal(found.numpy(), x.reshape(target))


@pytest.mark.parametrize("ios", [15, 16, 17])
def test_reshape_inherits_sizes_at_zero(ios):
    found = kernel("reshape", ios)(torch.from_numpy(X), shape=(0, -1, 0, 5))
    assert tuple(found.shape) == (2, 3, 4, 5)


def test_reshape_before_ios17_inherits_only_at_the_same_rank():
    with pytest.raises(OperationError, match=r"shape \[0, -1\] has a 0 and another rank than \[2, 3, 4, 5\]"):
        kernel("reshape", 16)(torch.from_numpy(X), shape=(0, -1))


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (X[0, 0], [1, 0, -1, 0]),
        (X[0, 0], [0, 0, 0, 0, -1]),
        (X[0], [0, 4, -1, 0]),
        (X[0], [-1, 0]),
        (X, [0, -1, 0]),
        (X, [0, 2, 0, -1, 0]),
    ],
)
def test_reshape_in_ios17_inherits_from_the_last_size(evaluate, inferred, x, shape):
    (expected,) = inferred({"x": x}, lambda x: mb.reshape(x=x, shape=shape), ios=17)
    (found,) = evaluate({"x": x}, lambda x: mb.reshape(x=x, shape=shape), ios=17)
    np.testing.assert_array_equal(found, expected)
    assert found.shape == expected.shape


def test_reshape_of_a_transposed_tensor(evaluate):
    (found,) = evaluate({"x": X}, lambda x: mb.reshape(x=mb.transpose(x=x, perm=[0, 2, 1, -1]), shape=[2, 4, -1]))
    np.testing.assert_array_equal(found, X.transpose(0, 2, 1, 3).reshape(2, 4, 15))


def test_invalid_reshape_error_names_operation_and_shapes(build):
    inputs = {"x": X, "shape": np.array([7, 7], np.int32)}
    model = MLModel(build(inputs, lambda x, shape: mb.reshape(x=x, shape=shape, name="square")))
    with pytest.raises(PackageError, match=r"^operation 'square' \(reshape\) fails on float32\[2, 3, 4, 5\]"):
        model.predict(inputs)


INFERRED = {
    "expand_dims": lambda x: mb.expand_dims(x=mb.reshape(x=x, shape=[6, 20]), axes=[0, -1, 2]),
    "squeeze": lambda x: mb.squeeze(x=mb.reshape(x=x, shape=[2, 1, 60, 1]), axes=[-1, 1]),
    "squeeze of all": lambda x: mb.squeeze(x=mb.reshape(x=x, shape=[2, 1, 60, 1])),
    "transpose": lambda x: mb.transpose(x=x, perm=[3, 1, 0, 2]),
    "reverse": lambda x: mb.reverse(x=x, axes=[1, -1]),
    "reverse of all": lambda x: mb.reverse(x=x),
    "slice_by_size": lambda x: mb.slice_by_size(x=x, begin=[0, -2, 1, 0], size=[1, 2, -1, 3]),
    "flatten2d": lambda x: mb.flatten2d(x=x, axis=-1),
}


def test_others_match_value_inference(evaluate, inferred):
    found = evaluate({"x": X}, lambda x: tuple(body(x) for body in INFERRED.values()))
    expected = [inferred({"x": X}, body)[0] for body in INFERRED.values()]
    for name, mine, theirs in zip(INFERRED, found, expected, strict=True):
        assert mine.shape == theirs.shape, name
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def test_squeeze_keeps_sizes_above_one(evaluate):
    (found,) = evaluate({"x": X[:, :1]}, lambda x: mb.squeeze(x=x, axes=[0, 1]))
    assert found.shape == (2, 4, 5)


def test_pixel_shuffle_and_space_to_depth(evaluate):
    x = np.arange(2 * 8 * 4 * 6, dtype=np.float32).reshape(2, 8, 4, 6)
    shuffled, unshuffled, to_space, there_and_back = evaluate(
        {"x": x},
        lambda x: (
            mb.pixel_shuffle(x=x, upscale_factor=2),
            mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
            mb.depth_to_space(x=x, block_size=2),
            mb.space_to_depth(x=mb.depth_to_space(x=x, block_size=2), block_size=2),
        ),
    )
    tensor = torch.from_numpy(x)
    np.testing.assert_array_equal(shuffled, torch.nn.functional.pixel_shuffle(tensor, 2).numpy())
    np.testing.assert_array_equal(unshuffled, torch.nn.functional.pixel_unshuffle(tensor, 2).numpy())
    # TensorFlow's depth_to_space: the block's row and column come before the channel in depth.
    expected = x.reshape(2, 2, 2, 2, 4, 6).transpose(0, 3, 4, 1, 5, 2).reshape(2, 2, 8, 12)
    np.testing.assert_array_equal(to_space, expected)
    np.testing.assert_array_equal(there_and_back, x)


# Examples from TensorFlow's documentation of tf.space_to_batch, channels last: input (N, H, W), block sizes,
# paddings, result.
TENSORFLOW_BLOCKS = {
    "one block": ([[[1, 2], [3, 4]]], [2, 2], [[0, 0], [0, 0]], [[[1]], [[2]], [[3]], [[4]]]),
    "four blocks": (
        [[[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]],
        [2, 2],
        [[0, 0], [0, 0]],
        [[[1, 3], [9, 11]], [[2, 4], [10, 12]], [[5, 7], [13, 15]], [[6, 8], [14, 16]]],
    ),
    "padding": (
        [[[1, 2, 3, 4], [5, 6, 7, 8]], [[9, 10, 11, 12], [13, 14, 15, 16]]],
        [2, 2],
        [[0, 0], [2, 0]],
        [
            [[0, 1, 3]], [[0, 9, 11]], [[0, 2, 4]], [[0, 10, 12]],
            [[0, 5, 7]], [[0, 13, 15]], [[0, 6, 8]], [[0, 14, 16]],
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORFLOW_BLOCKS)
def test_blocks_match_tensorflow(evaluate, name):
    x, blocks, borders, expected = TENSORFLOW_BLOCKS[name]
    x, expected = (np.array(each, np.float32)[:, None] for each in (x, expected))
    (batches,) = evaluate({"x": x}, lambda x: mb.space_to_batch(x=x, block_shape=blocks, paddings=borders))
    np.testing.assert_array_equal(batches, expected)
    (back,) = evaluate({"x": expected}, lambda x: mb.batch_to_space(x=x, block_shape=blocks, crops=borders))
    np.testing.assert_array_equal(back, x)


def test_uneven_blocks_round_trip(evaluate):
    def body(x):
        batches = mb.space_to_batch(x=x, block_shape=[3, 2], paddings=[[1, 1], [1, 2]])
        return batches, mb.batch_to_space(x=batches, block_shape=[3, 2], crops=[[1, 1], [1, 2]])

    batches, back = evaluate({"x": X}, body)
    padded = np.pad(X, [(0, 0), (0, 0), (1, 1), (1, 2)])
    # The element at (row, column) of a block of sample n is in sample (row * 2 + column) * 2 + n.
    expected = [padded[n, :, row::3, column::2] for row in range(3) for column in range(2) for n in range(2)]
    np.testing.assert_array_equal(batches, expected)
    np.testing.assert_array_equal(back, X)


def test_invalid_blocks_are_rejected():
    x, none = torch.from_numpy(X), ((0, 0), (0, 0))
    with pytest.raises(OperationError, match="4 x 5 elements with their padding in blocks of 2 x 2"):
        kernel("space_to_batch")(x, block_shape=(2, 2), paddings=none)
    with pytest.raises(OperationError, match="2 samples for blocks of 2 x 2"):
        kernel("batch_to_space")(x, block_shape=(2, 2), crops=none)
    with pytest.raises(OperationError, match="a tensor of rank 3, 2 block sizes and 2 pairs of crops; a tensor of"):
        kernel("batch_to_space")(x[0], block_shape=(2, 2), crops=none)
    with pytest.raises(OperationError, match=r"block_shape \[2, 1\] and paddings \[\[0, -1\], \[0, 0\]\]"):
        kernel("space_to_batch")(x, block_shape=(2, 1), paddings=((0, -1), (0, 0)))


def test_sliding_windows(evaluate):
    (found,) = evaluate({"x": X}, lambda x: mb.sliding_windows(x=x, axis=2, size=2, stride=2))
    expected = np.lib.stride_tricks.sliding_window_view(X, 2, axis=2)[:, :, ::2]  # window last
    np.testing.assert_array_equal(found, np.moveaxis(expected, -1, 3))


def test_reverse_sequence(evaluate):
    inputs = {"x": X, "lengths": np.array([2, 0, 3], np.int32)}
    (found,) = evaluate(
        inputs, lambda x, lengths: mb.reverse_sequence(x=x, lengths=lengths, seq_axis=2, batch_axis=1)
    )
    expected = X.copy()
    for row, length in enumerate([2, 0, 3]):
        expected[:, row, :length] = X[:, row, :length][:, ::-1]
    np.testing.assert_array_equal(found, expected)


def test_reshape_like(evaluate):
    (found,) = evaluate(
        {"x": X, "a": np.zeros((2, 3, 7), np.float32), "b": np.zeros((9, 4, 5), np.float32)},
        lambda x, a, b: mb.reshape_like(
            x=x, ref_tensors=(a, b), begins=(0, 1), ends=(2, 0), end_masks=(False, True)
        ),
    )
    np.testing.assert_array_equal(found, X)


@pytest.mark.parametrize(("begin", "size"), [((0,), (1,)), ((0, 0, 0), (1, 1, 1)), ((0, 0), (1,))])
def test_slice_by_size_of_a_different_rank_is_rejected(begin, size):
    with pytest.raises(OperationError, match="for a tensor of rank 2"):
        find("slice_by_size", 18).kernel(torch.zeros(2, 3), begin=begin, size=size)
