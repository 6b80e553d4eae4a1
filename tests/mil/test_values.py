"""Element types and how their values are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.optimize import _utils as optimize_utils
from hypothesis import given
from hypothesis import strategies as st

from coremill.mil.values import (
    BY_NAME,
    ELEMENT_TYPES,
    FP16,
    FP32,
    INT32,
    Numerics,
    TensorType,
    tensor_from_bytes,
    tensor_from_numbers,
    unpack_bits,
)


@pytest.mark.parametrize("element", [each for each in ELEMENT_TYPES.values() if each.is_integer])
def test_storage_holds_every_value(element):
    info = torch.iinfo(element.storage)
    assert info.min <= element.low < element.high <= info.max
    assert element.high - element.low == 2**element.bits - 1


SUB_BYTE = [each for each in BY_NAME.values() if each.is_integer and each.bits < 8]


@pytest.mark.parametrize("element", SUB_BYTE, ids=lambda each: each.name)
@given(data=st.data())
def test_packed_elements_read_as_coremltools_reads_them(element, data):
    values = np.array(data.draw(st.lists(st.integers(element.low, element.high), min_size=1, max_size=40)))
    packed = optimize_utils.pack_elements_into_bits(
        values.astype(np.int8 if element.low < 0 else np.uint8), element.bits
    )
    found = unpack_bits(packed, element, len(values))
    np.testing.assert_array_equal(found, values)
    theirs = optimize_utils.restore_elements_from_packed_bits(packed, element.bits, len(values), element.low < 0)
    np.testing.assert_array_equal(found, theirs)
    assert tensor_from_bytes(packed.tobytes(), element, (len(values),)).tolist() == values.tolist()


def test_bytes_of_whole_elements():
    halves = np.array([[1.5, -2.0]], "<f2")
    assert tensor_from_bytes(halves.tobytes(), FP16, (1, 2)).tolist() == [[1.5, -2.0]]
    large = np.array([4_000_000_000], "<u4")
    assert tensor_from_bytes(large.tobytes(), BY_NAME["uint32"], (1,)).tolist() == [4_000_000_000]
    bf16 = np.array([0x3FC0], "<u2")
    assert tensor_from_bytes(bf16.tobytes(), BY_NAME["bf16"], ()).item() == 1.5


def test_wrong_number_of_bytes_is_rejected():
    with pytest.raises(ValueError, match="4 bytes for 3 elements of fp16"):
        tensor_from_bytes(b"abcd", FP16, (3,))
    with pytest.raises(ValueError, match="1 bytes for 3 elements of int4, which need 2"):
        tensor_from_bytes(b"a", BY_NAME["int4"], (3,))
    with pytest.raises(RuntimeError, match="invalid for input of size 2"):
        tensor_from_numbers([1, 2], INT32, (3,))


def test_oracle_stores_half_types_in_fp32():
    assert Numerics.ORACLE.storage(FP16) is torch.float32
    assert Numerics.DECLARED.storage(FP16) is torch.float16
    assert {Numerics(mode).storage(FP32) for mode in ("oracle", "declared")} == {torch.float32}
    assert Numerics.ORACLE.storage(INT32) is torch.int32


def test_wide_oracle_stores_floats_in_fp64():
    wide = Numerics.ORACLE_FP64
    assert [wide.storage(each) for each in (FP16, FP32, BY_NAME["bf16"], BY_NAME["fp64"])] == [torch.float64] * 4
    assert [wide.storage(each) for each in (INT32, BY_NAME["bool"])] == [torch.int32, torch.bool]


def test_types_in_messages():
    assert str(TensorType(FP16, (1, None, 64))) == "fp16[1, ?, 64]"
