"""Axes outside a tensor's rank are errors in every operation that has an axis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.core.errors import PredictionInputError
from coremill.mil.loader import Package, open_package
from coremill.mil.ops.axes import axes_of, axis_of
from coremill.mil.ops.registry import OperationError, definitions, find
from coremill.mil.plan import KERNEL_FAILURES, Target
from coremill.mil.program import Program
from coremill.mil.values import FP32, Numerics

X = torch.arange(24.0).reshape(2, 3, 4)
AT = torch.zeros((2, 3, 4), dtype=torch.int32)
LIST = torch.zeros(2, dtype=torch.int32)

ONE_AXIS = {
    "argsort": [X],
    "concat": [(X, X)],
    "cumsum": [X],
    "flatten2d": [X],
    "gather": [X, LIST],
    "gather_along_axis": [X, AT],
    "one_hot": [AT],
    "quantize": [X, torch.ones(3)],
    "dequantize": [AT, torch.ones(3)],
    "reduce_argmax": [X],
    "reduce_argmin": [X],
    "scatter": [X, LIST, X],
    "scatter_along_axis": [X, AT, X],
    "sliding_windows": [X],
    "softmax": [X],
    "split": [X],
    "stack": [(X, X)],
    "topk": [X],
}
OTHERS = {
    "quantize": {"output_dtype": FP32},
    "sliding_windows": {"size": 1},
    "split": {"num_splits": 1},
    "one_hot": {"one_hot_vector_size": 4},
}
SEVERAL_AXES = [
    "expand_dims",
    "layer_norm",
    "reduce_l1_norm",
    "reduce_l2_norm",
    "reduce_log_sum",
    "reduce_log_sum_exp",
    "reduce_max",
    "reduce_mean",
    "reduce_min",
    "reduce_prod",
    "reduce_sum",
    "reduce_sum_square",
    "reverse",
    "squeeze",
]


def test_negative_axes_count_from_the_end():
    assert [axis_of(3, axis) for axis in (0, 2, -1, -3)] == [0, 2, 2, 0]
    assert axes_of(3, (-1, 0)) == (0, 2)


@pytest.mark.parametrize("axis", [3, -4, 7])
def test_axis_outside_the_rank_is_rejected(axis):
    with pytest.raises(OperationError, match=f"^axis {axis} of a tensor of rank 3, whose axes are -3 to 2$"):
        axis_of(3, axis)


def test_repeated_axis_is_rejected():
    with pytest.raises(OperationError, match=r"^axes \[1, -2\] of a tensor of rank 3, expected each at most once$"):
        axes_of(3, (1, -2))


@pytest.mark.parametrize("axis", [5, -6])
@pytest.mark.parametrize("op_type", ONE_AXIS)
def test_every_operation_rejects_an_invalid_axis(op_type, axis):
    definition = find(op_type, 18)
    with pytest.raises(KERNEL_FAILURES, match=r"axis -?\d|out of range|index out of"):
        definition.kernel(*ONE_AXIS[op_type], axis=axis, **OTHERS.get(op_type, {}))


@pytest.mark.parametrize("axes", [(0, 6), (-6,), (1, 1)], ids=str)
@pytest.mark.parametrize("op_type", SEVERAL_AXES)
def test_every_operation_rejects_invalid_axes(op_type, axes):
    with pytest.raises(KERNEL_FAILURES, match=r"ax[ei]s -?\[?\d|out of range|multiple times"):
        find(op_type, 18).kernel(X, axes=axes)


def test_interleaved_concat_and_lookup_tables_reject_an_invalid_axis():
    with pytest.raises(OperationError, match="axis 3 of a tensor of rank 3"):
        find("concat", 18).kernel((X, X), axis=3, interleave=True)
    with pytest.raises(OperationError, match="axis 2 of a tensor of rank 2"):
        find("constexpr_lut_to_dense", 18).kernel(AT[0], torch.zeros(1, 1, 4, 2), vector_axis=2)


def test_every_operation_with_an_axis_is_listed():
    """Operations with two axes or with an axis of a weight have their own tests."""
    known = {*ONE_AXIS, *SEVERAL_AXES, "constexpr_affine_dequantize"}
    assert {each.op_type for each in definitions() if {"axis", "axes"} & set(each.attributes)} == known


def test_error_names_the_operation(build):
    model = build({"x": X.numpy()}, lambda x: mb.gather(x=x, indices=np.int32([0]), axis=1, name="embed"))
    package = Package("toy", model.get_spec(), open_package(model).weights)
    block = package.spec.mlProgram.functions["main"].block_specializations["CoreML8"]
    gather = next(each for each in block.operations if each.type == "gather")
    (axis,) = gather.inputs["axis"].arguments
    constant = next(each for each in block.operations if each.outputs[0].name == axis.name)
    constant.attributes["val"].immediateValue.tensor.ints.values[:] = [7]
    program = Program(package, "main")
    with pytest.raises(PredictionInputError, match=r"^operation 'embed' \(gather\): axis 7 of a tensor of rank 3"):
        program.run([X], Target(Numerics.DECLARED))
