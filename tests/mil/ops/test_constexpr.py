"""Compressed weights, against coremltools' own decompression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as ios16
from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as ios18

from coremill.core.errors import PackageError
from coremill.mil.loader import Package, open_package
from coremill.mil.ops.registry import OperationError, find
from coremill.mil.plan import Target
from coremill.mil.program import Program
from coremill.mil.values import Numerics

RNG = np.random.default_rng(23)
ONE = {"x": np.zeros((1,), np.float32)}


def _beside(weights):
    """An operation on an input, so that the program has one, and the weights as a second output."""
    return lambda x: (mb.relu(x=x), mb.identity(x=weights()))


@pytest.fixture
def weights_of(evaluate):
    return lambda weights, ios=18: evaluate(ONE, _beside(weights), ios=ios)[1]


@pytest.mark.parametrize("signed", [False, True])
def test_affine_dequantize(weights_of, signed):
    data = (
        RNG.integers(-100, 100, (4, 6)).astype(np.int8) if signed else RNG.integers(0, 255, (4, 6)).astype(np.uint8)
    )
    zero_point = np.arange(4).astype(data.dtype)
    scale = np.array([0.5, 0.25, 2.0, 1.0], np.float16)
    found = weights_of(
        lambda: mb.constexpr_affine_dequantize(
            quantized_data=data, zero_point=zero_point, scale=scale, axis=np.int32(0)
        ),
        ios=16,
    )
    expected = ios16.constexpr_affine_dequantize.decompress(data, zero_point, scale, 0)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("entries", [2, 4, 16, 64, 256])
def test_lut_of_ios16(weights_of, entries):
    bits = int(np.log2(entries))
    shape = np.array([3, 7], np.uint32)
    numbers = RNG.integers(0, entries, 21)
    spread = ((numbers[:, None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(-1)
    indices = np.packbits(spread, bitorder="little")
    lut = RNG.standard_normal(entries).astype(np.float32)
    found = weights_of(lambda: mb.constexpr_lut_to_dense(indices=indices, lut=lut, shape=shape), ios=16)
    np.testing.assert_array_equal(found, lut[numbers].reshape(3, 7))
    np.testing.assert_array_equal(found, ios16.constexpr_lut_to_dense.decompress(lut, indices, shape))


def test_sparse_of_ios16(weights_of):
    mask = np.array([0b10100101, 0b00000010], np.uint8)
    data = np.array([1, 2, 3, 4, 5], np.float16)
    shape = np.array([2, 5], np.uint32)
    found = weights_of(lambda: mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask, shape=shape), ios=16)
    np.testing.assert_array_equal(found, [[1, 0, 2, 0, 0], [3, 0, 4, 0, 5]])


def _kernel(name, ios):
    return find(f"constexpr_{name}", ios).kernel


BYTES = torch.full((4,), 0b0101, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("indices", "entries", "shape", "message"),
    [
        (BYTES, 32, (8,), r"a table of shape \[32\], expected one axis of 2, 4, 16, 64, 256 entries"),
        (BYTES, 16, (9,), r"shape \[9\]: 4 bytes for 9 elements of uint4, which need 5"),
        (BYTES, 16, (6,), r"shape \[6\]: 4 bytes for 6 elements of uint4, which need 3"),
        (BYTES[:0], 16, (1,), "0 bytes for 1 elements"),
        (BYTES, 16, (2**31 - 1, 2**31 - 1), "4 bytes for 4611686014132420609 elements"),
        (BYTES, 16, (-2, -4), r"shape \[-2, -4\], expected sizes of at least 0"),
        (BYTES.int(), 16, (8,), "packed elements of torch.int32, expected uint8"),
    ],
)
def test_a_broken_lut_of_ios16(indices, entries, shape, message):
    with pytest.raises(OperationError, match=message):
        _kernel("lut_to_dense", 16)(indices, torch.zeros(entries), shape=shape)


@pytest.mark.parametrize(
    ("values", "shape", "message"),
    [
        (8, (33,), r"shape \[33\]: 4 bytes for 33 elements of uint1, which need 5"),
        (8, (2**31 - 1, 2**31 - 1), "which need 576460751766552577"),
        (1, (32,), r"data of shape \[1\] for a mask with 8 ones"),
        (9, (32,), r"data of shape \[9\] for a mask with 8 ones"),
    ],
)
def test_a_broken_mask_of_ios16(values, shape, message):
    with pytest.raises(OperationError, match=message):
        _kernel("sparse_to_dense", 16)(torch.ones(values), BYTES, shape=shape)


def test_a_broken_lut_is_found_on_opening(build):
    """In a package: the error is one of the package's, and names the operation."""
    lut, indices = np.zeros(16, np.float32), np.zeros(16, np.uint8)
    shape = np.array([32], np.uint32)
    weights = lambda: mb.constexpr_lut_to_dense(indices=indices, lut=lut, shape=shape, name="table")  # noqa: E731
    model = build(ONE, _beside(weights), ios=16)
    package = Package("toy", model.get_spec(), open_package(model).weights)
    block = package.spec.mlProgram.functions["main"].block_specializations["CoreML6"]
    table = next(each for each in block.operations if each.type == "constexpr_lut_to_dense").attributes["lut"]
    table.type.tensorType.dimensions[0].constant.size = 32
    table.immediateValue.tensor.floats.values[:] = [0.0] * 32
    with pytest.raises(
        PackageError, match=r"^operation 'table' \(constexpr_lut_to_dense\), whose inputs are .*\[32\]"
    ):
        Program(package, "main").plan(Target(Numerics.DECLARED))


def test_cast(weights_of):
    source = np.array([0.1, 65504.0], np.float16)
    found = weights_of(lambda: mb.constexpr_cast(source_val=source, output_dtype="fp32"), ios=16)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, source.astype(np.float32))


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        RNG.integers(-8, 8, (4, 64)).astype(types.np_int4_dtype),
        RNG.integers(0, 16, (4, 64)).astype(types.np_uint4_dtype),
        RNG.integers(-128, 128, (4, 64)).astype(np.int8),
    ],
    ids=["int4", "uint4", "int8"],
)
def test_blockwise_shift_scale(weights_of, data, with_offset):
    scale = RNG.uniform(0.5, 2, (4, 2)).astype(np.float16)
    offset = RNG.integers(0, 7, (4, 2)).astype(data.dtype) if with_offset else None
    found = weights_of(lambda: mb.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=offset))
    # coremltools computes in fp16 and rounds twice; the reference in fp32 and once.
    steps = data.astype(np.float64) - (0 if offset is None else np.repeat(offset.astype(np.float64), 32, 1))
    np.testing.assert_array_equal(found, (np.repeat(scale.astype(np.float64), 32, 1) * steps).astype(np.float16))
    theirs = ios18.constexpr_blockwise_shift_scale.decompress(data, scale, offset)
    np.testing.assert_allclose(found, theirs, rtol=2e-3)


@pytest.mark.parametrize(("vector_size", "vector_axis"), [(1, None), (3, 0), (3, 1)])
def test_lut_of_ios18(evaluate, vector_size, vector_axis):
    """Indices of every width, in one program."""
    axis = {} if vector_axis is None else {"vector_axis": np.int32(vector_axis)}
    tables = []
    for bits in (1, 2, 3, 4, 6, 8):
        dtype = np.uint8 if bits == 8 else getattr(types, f"np_uint{bits}_dtype")
        indices = RNG.integers(0, 2**bits, (6, 4)).astype(dtype)
        tables.append((indices, RNG.standard_normal((2, 1, 2**bits, vector_size)).astype(np.float16)))

    def body(x):
        dense = [mb.constexpr_lut_to_dense(indices=indices, lut=lut, **axis) for indices, lut in tables]
        return mb.relu(x=x), *(mb.identity(x=each) for each in dense)

    for found, (indices, lut) in zip(evaluate(ONE, body)[1:], tables, strict=True):
        expected = ios18.constexpr_lut_to_dense.decompress(indices, lut, vector_axis)
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


def test_sparse_of_ios18(weights_of):
    mask = RNG.integers(0, 2, (5, 9)).astype(types.np_uint1_dtype)
    data = np.arange(1, mask.astype(np.int32).sum() + 1).astype(np.float16)
    found = weights_of(lambda: mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask))
    np.testing.assert_array_equal(found, ios18.constexpr_sparse_to_dense.decompress(data, mask))


# The example of coremltools' documentation of constexpr_lut_to_sparse.
MASK = np.array([[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]])
INDICES = np.array([0, 1, 1, 0, 1, 1, 0, 0, 1])


@pytest.fixture
def sparse_of(evaluate):
    """Mask and values of a sparse operation, and the dense weights that they make."""

    def run(weights):
        def body(x):
            mask, values = weights()
            dense = mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)
            return mb.relu(x=x), mb.identity(x=values), mb.identity(x=dense)

        return evaluate(ONE, body)[1:]

    return run


@pytest.mark.parametrize(
    ("entries", "vector_axis"),
    [([[2.0], [3.0]], None), ([[2.0, 2.5], [3.0, 3.5]], 0), ([[2.0, 2.5], [3.0, 3.5]], -1)],
)
def test_lut_to_sparse(sparse_of, entries, vector_axis):
    lut = np.array(entries, np.float16)[None, None]
    axis = {} if vector_axis is None else {"vector_axis": np.int32(vector_axis)}
    mask, indices = (each.astype(types.np_uint1_dtype) for each in (MASK, INDICES))
    values, dense = sparse_of(
        lambda: mb.constexpr_lut_to_sparse(indices_mask=mask, indices_nonzero_data=indices, lut=lut, **axis)
    )
    their_mask, their_values = ios18.constexpr_lut_to_sparse.decompress(mask, indices, lut, vector_axis)
    np.testing.assert_array_equal(values, their_values)
    np.testing.assert_array_equal(dense, ios18.constexpr_sparse_to_dense.decompress(their_values, their_mask))
    if vector_axis is None:
        assert values.tolist() == [2.0, 3.0, 3.0, 2.0, 3.0, 3.0, 2.0, 2.0, 3.0]  # As documented.


def test_lut_to_sparse_of_one_row(sparse_of):
    """An axis of one element becomes as long as the vectors."""
    lut = np.array([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]], np.float16)
    mask, indices = (np.array(each, types.np_uint1_dtype) for each in ([[1, 0, 1]], [1, 0]))
    _, dense = sparse_of(
        lambda: mb.constexpr_lut_to_sparse(
            indices_mask=mask, indices_nonzero_data=indices, lut=lut, vector_axis=np.int32(0)
        )
    )
    assert dense.tolist() == [[4.0, 0.0, 1.0], [5.0, 0.0, 2.0], [6.0, 0.0, 3.0]]


def test_sparse_blockwise_shift_scale(sparse_of):
    """The example of coremltools' documentation: a scale and an offset a column."""
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]).astype(types.np_uint1_dtype)
    data = np.array([10, 11, 3, 4, 5, 6, 7, 8, 9], np.int8)
    scale, offset = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32), np.array([[1, 2, 3, 4]], np.int8)
    values, dense = sparse_of(
        lambda: mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask, nonzero_data=data, scale=scale, offset=offset
        )
    )
    np.testing.assert_allclose(values, [0.9, 1.8, 0.2, 0.4, 0.6, 0.9, 1.2, 0.7, 1.4], rtol=1e-6)
    assert (dense == 0).tolist() == (mask == 0).tolist()
    _, theirs = ios18.constexpr_sparse_blockwise_shift_scale.decompress(mask, data, scale, offset)
    np.testing.assert_allclose(values, theirs, rtol=1e-6)


@pytest.mark.parametrize("with_offset", [False, True])
def test_sparse_blocks_of_int4(sparse_of, with_offset):
    mask = RNG.integers(0, 2, (4, 64)).astype(types.np_uint1_dtype)
    data = RNG.integers(-8, 8, int((mask != 0).sum())).astype(types.np_int4_dtype)
    scale = RNG.uniform(0.5, 2, (2, 4)).astype(np.float16)
    offset = RNG.integers(0, 7, (2, 4)).astype(types.np_int4_dtype) if with_offset else None
    values, _ = sparse_of(
        lambda: mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask, nonzero_data=data, scale=scale, offset=offset
        )
    )
    _, theirs = ios18.constexpr_sparse_blockwise_shift_scale.decompress(mask, data, scale, offset)
    assert values.dtype == np.float16
    np.testing.assert_allclose(values, theirs, rtol=2e-3)


def test_quantize_and_dequantize(evaluate):
    x = np.array([[-10.0, 0.24, 0.26], [3.0, 1000.0, -1000.0]], np.float32)
    scale, zero_point = np.array([0.5, 4.0], np.float32), np.array([1, -2], np.int8)

    def body(x):
        steps = mb.quantize(input=x, scale=scale, zero_point=zero_point, axis=0, output_dtype="int8")
        return mb.cast(x=steps, dtype="int32"), mb.dequantize(
            input=steps, scale=scale, zero_point=zero_point, axis=0
        )

    steps, back = evaluate({"x": x}, body)
    assert steps.tolist() == [[-19, 1, 2], [-1, 127, -128]]
    assert back.tolist() == [[-10.0, 0.0, 0.5], [4.0, 516.0, -504.0]]
