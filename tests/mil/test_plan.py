"""Lowering: folding, liveness, sharing, what follows from shapes alone."""

from __future__ import annotations

import functools
import weakref

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.core.errors import PackageError
from coremill.mil import MLModel, plan
from coremill.mil.graph import read_function
from coremill.mil.loader import Package, open_package
from coremill.mil.ops import linear
from coremill.mil.plan import Plan, Target
from coremill.mil.program import Program
from coremill.mil.values import FP16, Numerics


@pytest.fixture
def plan_of(build):
    def make(inputs, body, numerics=Numerics.DECLARED, ios=18):
        return Plan(read_function(open_package(build(inputs, body, ios=ios)), "main"), Target(numerics))

    return make


def _types(section):
    return [step.node.op_type for step in section.steps]


def test_operations_on_constants_are_computed_once(plan_of):
    table = np.arange(6, dtype=np.float32)

    def body(x):
        # As the converter leaves it: coremltools folds what its own inference knows, decompression it does not.
        weights = mb.constexpr_affine_dequantize(
            quantized_data=np.arange(6, dtype=np.int8),
            zero_point=np.int8(1),
            scale=np.float32(0.5),
            axis=np.int32(0),
        )
        return mb.mul(x=mb.add(x=x, y=mb.square(x=weights)), y=table)

    plan = plan_of({"x": table}, body)
    assert _types(plan.general) == ["add", "mul"]
    (found,) = plan.run([torch.ones(6)])
    np.testing.assert_array_equal(found, (1 + (0.5 * (table - 1)) ** 2) * table)


def test_dead_operations_are_dropped(plan_of):
    def body(x):
        mb.exp(x=mb.sin(x=x))
        return mb.cos(x=x)

    assert _types(plan_of({"x": np.ones(3, np.float32)}, body).general) == ["cos"]


def _chain(x):
    for _ in range(6):
        x = mb.add(x=mb.sin(x=x), y=x)
    return x


def test_values_are_freed_after_their_last_use(plan_of):
    """A chain of any length holds two values and the one being computed, and the freed ones really go."""
    plan = plan_of({"x": np.ones(1000, np.float32)}, _chain)
    constants = sum(value is not None for value in plan.general.template)
    references, live, alive = [], [], []

    def observe(step, values):
        live.append(sum(value is not None for value in values) - constants)
        references.append(weakref.ref(values[step.outputs[0]]))
        alive.append(sum(reference() is not None for reference in references))

    x = torch.ones(1000)
    plan.run([x], observe)
    assert len(live) == 12
    assert max(live) == 3
    assert max(alive) <= 3


def test_each_value_is_freed_once_and_never_used_again(plan_of):
    plan = plan_of({"x": np.ones(8, np.float32)}, _chain)
    freed: set[int] = set()
    for step in plan.general.steps:
        assert not freed.intersection(step.inputs)
        assert not freed.intersection(step.frees)
        freed.update(step.frees)
    produced = {slot for step in plan.general.steps for slot in step.outputs}
    assert freed == (produced | set(plan.graph.inputs)) - set(plan.graph.outputs)


def test_two_plans_share_constants(build):
    weight = np.eye(64, dtype=np.float16)
    model = MLModel(build({"x": np.ones((1, 64), np.float16)}, lambda x: mb.matmul(x=x, y=weight)))
    declared, oracle = (model.program.plan(Target(each)).general for each in (Numerics.DECLARED, Numerics.ORACLE))

    def wide_weights(section):
        return {
            value.data_ptr()
            for value in section.template
            if isinstance(value, torch.Tensor) and value.shape == (64, 64) and value.dtype == torch.float32
        }

    assert len(wide_weights(declared)) == 1
    assert wide_weights(declared) == wide_weights(oracle)
    assert model.program.plan(Target(Numerics.DECLARED)) is model.program.plan(Target(Numerics.DECLARED))


def test_a_weight_used_twice_is_widened_once(plan_of):
    weight = np.eye(64, dtype=np.float16)

    def body(x):
        shared = mb.const(val=weight)
        return mb.matmul(x=mb.matmul(x=x, y=shared), y=shared)

    section = plan_of({"x": np.ones((1, 64), np.float16)}, body).general
    wide = [each for each in section.template if isinstance(each, torch.Tensor) and each.dtype == torch.float32]
    assert sum(each.shape == (64, 64) for each in wide) == 1


def test_large_weights_are_widened_at_each_use(plan_of, monkeypatch):
    inputs = {"x": np.linspace(-1, 1, 64, dtype=np.float16).reshape(1, 64)}
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    body = lambda x: mb.matmul(x=x, y=weight)  # noqa: E731
    x = [torch.from_numpy(inputs["x"])]
    kept = plan_of(inputs, body)
    monkeypatch.setattr(plan, "WIDE_CONSTANT_BYTES", 1000)
    not_kept = plan_of(inputs, body)
    assert not any(
        isinstance(each, torch.Tensor) and each.shape == (64, 64) and each.dtype == torch.float32
        for each in not_kept.general.template
    )
    assert torch.equal(kept.run(x)[0], not_kept.run(x)[0])


TABLE = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float16)


def _selected(i, *, also=None):
    """Rows, elements of rows, and elements of one table; `also` reads all of it."""
    table = mb.const(val=TABLE)
    rows = mb.gather(x=table, indices=i, axis=0)
    along = mb.gather_along_axis(x=table, indices=mb.expand_dims(x=mb.tile(x=i, reps=[4]), axes=[0]), axis=0)
    elements = mb.gather_nd(x=table, indices=mb.expand_dims(x=i, axes=[1]))
    fixed = mb.gather(x=table, indices=np.array([3], np.int32), axis=0)
    found = [mb.mul(x=each, y=np.float16(3)) for each in (rows, along, elements, fixed)]
    return [*found, also(table)] if also else found


@pytest.mark.parametrize(
    ("numerics", "wide"), [(Numerics.ORACLE, torch.float32), (Numerics.ORACLE_FP64, torch.float64)]
)
@pytest.mark.parametrize("also", [None, lambda table: mb.relu(x=table)], ids=["selected", "read as well"])
def test_large_table_is_widened_after_its_rows_are_selected(plan_of, monkeypatch, numerics, wide, also):
    """An operation that reads all of it widens it once, when the plan is made."""
    monkeypatch.setattr(plan, "WIDE_CONSTANT_BYTES", 1000)
    compiled = plan_of({"i": ((2,), np.int32)}, functools.partial(_selected, also=also), numerics)
    tables = [
        each for each in compiled.general.template if isinstance(each, torch.Tensor) and each.shape == (64, 8)
    ]
    # the operation on the constant alone is computed
    assert [each.dtype for each in tables] == ([torch.float16] if also is None else [wide, wide])
    i = torch.tensor([5, 63], dtype=torch.int32)
    table = torch.from_numpy(TABLE).to(wide)
    rows = table[[5, 63]]
    expected = [rows, torch.stack([table[i[at % 2], at] for at in range(8)])[None], rows, table[[3]]]
    for _ in range(3):  # the later runs are of a section compiled for the shape
        found = compiled.run([i])
        for value, right in zip(found, expected, strict=False):
            assert value.dtype is wide
            assert torch.equal(value, right * 3)


@pytest.mark.parametrize(
    ("numerics", "wide"), [(Numerics.ORACLE, torch.float32), (Numerics.ORACLE_FP64, torch.float64)]
)
def test_large_weight_of_a_linear_layer_is_widened_in_pieces(plan_of, monkeypatch, numerics, wide):
    """The embedding of a tied model is one constant, which a gather and a linear layer read."""
    monkeypatch.setattr(plan, "WIDE_CONSTANT_BYTES", 1000)
    monkeypatch.setattr(linear, "_PIECE_ELEMENTS", 100)

    def body(i):
        table = mb.const(val=TABLE)
        return mb.linear(x=mb.gather(x=table, indices=i, axis=0), weight=table)

    compiled = plan_of({"i": ((8,), np.int32)}, body, numerics)
    tables = [
        each for each in compiled.general.template if isinstance(each, torch.Tensor) and each.shape == (64, 8)
    ]
    assert [each.dtype for each in tables] == [torch.float16]
    i = torch.arange(8, dtype=torch.int32)
    (found,) = compiled.run([i])
    table = torch.from_numpy(TABLE).double()
    assert found.dtype is wide
    torch.testing.assert_close(found.double(), table[:8] @ table.T, rtol=0, atol=20 * torch.finfo(wide).eps)


def test_small_table_is_widened_when_the_plan_is_made(plan_of):
    compiled = plan_of({"i": ((2,), np.int32)}, _selected, Numerics.ORACLE)
    tables = [
        each for each in compiled.general.template if isinstance(each, torch.Tensor) and each.shape == (64, 8)
    ]
    assert [each.dtype for each in tables] == [torch.float32]


def _masked(x):
    """A triangle cut to x's length, as a decoder has it: everything about it follows from x's shape."""
    table = np.triu(np.full((32, 32), -np.inf, np.float32), 1)
    size = mb.slice_by_index(x=mb.shape(x=x), begin=[1], end=[2])
    length = mb.concat(values=[size, size], axis=0)
    mask = mb.slice_by_index(x=table, begin=[0, 0], end=length)
    return mb.softmax(x=mb.add(x=mb.matmul(x=x, y=x, transpose_y=True), y=mask), name="weights")


FLEXIBLE = {"x": ((1, (1, 32), 4), np.float32)}


def test_shape_only_values_are_kept_for_each_shape(plan_of):
    plan = plan_of(FLEXIBLE, _masked)
    assert "shape" in _types(plan.general)
    rng = np.random.default_rng(1)
    for length in (3, 5, 3, 5, 3):
        x = rng.standard_normal((1, length, 4)).astype(np.float32)
        (found,) = plan.run([torch.from_numpy(x)])
        scores = np.where(np.tril(np.ones((length, length), np.bool_)), x @ x.swapaxes(1, 2), -np.inf)
        expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert [_types(section) for section in plan._at_shapes.values()] == [["matmul", "add", "softmax"]] * 2


def test_values_that_depend_on_data_are_not_kept(plan_of):
    """The length to cut to comes from the values of an input: a kept one would be wrong for the next."""
    table = np.arange(10, dtype=np.float32)

    def body(length):
        end = mb.shape(x=mb.slice_by_index(x=table, begin=[0], end=length))
        return mb.mul(x=end, y=length)

    plan = plan_of({"length": np.array([3], np.int32)}, body)
    assert [plan.run([torch.tensor([n], dtype=torch.int32)])[0].tolist() for n in (3, 7, 3)] == [[9], [49], [9]]
    found = plan_of({"x": np.array([0, 1, 1], np.int32)}, lambda x: mb.shape(x=mb.non_zero(x=x)))
    assert [found.run([torch.tensor(x, dtype=torch.int32)])[0].tolist() for x in ([0, 1, 1], [1, 1, 1])] == [
        [2, 1],
        [3, 1],
    ]


def _storages(section, shape):
    """Addresses of the section's constants of a shape."""
    return {
        value.untyped_storage().data_ptr()
        for value in section.template
        if isinstance(value, torch.Tensor) and value.shape == shape
    }


@pytest.mark.parametrize("numerics", [Numerics.DECLARED, Numerics.ORACLE, Numerics.ORACLE_FP64])
def test_sections_for_shapes_share_constants(plan_of, numerics):
    """A weight that is decompressed and one that a mode widens; both as the general section has them."""
    codes = np.random.default_rng(2).integers(-8, 8, (48, 4)).astype(np.int8)
    weight = np.random.default_rng(2).standard_normal((4, 48)).astype(np.float16)

    def body(x):
        decompressed = mb.constexpr_affine_dequantize(
            quantized_data=codes, zero_point=np.int8(0), scale=np.float16(0.1), axis=np.int32(0)
        )
        mask = mb.cast(x=mb.shape(x=x), dtype="fp16")
        y = mb.matmul(x=mb.linear(x=x, weight=decompressed), y=weight, transpose_y=True)
        return mb.mul(x=y, y=mb.reduce_sum(x=mask, keep_dims=False))

    made = plan_of({"x": ((1, (1, 32), 4), np.float16)}, body, numerics, ios=16)
    for length in (2, 3, 5, 2, 3, 5):
        made.run([torch.ones(1, length, 4, dtype=numerics.storage(FP16))])
    sections = [made.general, *made._at_shapes.values()]
    assert len(sections) == 4
    for shape in ((48, 4), (4, 48)):
        found = {frozenset(_storages(section, shape)) for section in sections}
        assert len(found) == 1
        assert found != {frozenset()}


def test_dropped_shapes_free_their_copies(plan_of):
    table = np.random.default_rng(4).standard_normal((64, 4)).astype(np.float16)

    def body(x):
        length = mb.slice_by_index(x=mb.shape(x=x), begin=[1], end=[2])
        part = mb.slice_by_index(x=table, begin=[0, 0], end=mb.concat(values=[length, np.int32([4])], axis=0))
        return mb.matmul(x=x, y=part, transpose_y=True)

    made = plan_of({"x": ((1, (1, 64), 4), np.float16)}, body)
    sizes = []
    for _ in range(3):
        for length in range(1, 21):
            for _ in range(2):
                made.run([torch.ones(1, length, 4, dtype=torch.float16)])
        sizes.append(len(made._lasting.constants._copies))
    assert sizes[0] == sizes[1] == sizes[2]


def test_shape_used_once_is_not_compiled(plan_of):
    """As in decoding, where each token makes the cache longer."""
    plan = plan_of(FLEXIBLE, _masked)
    for length in range(2, 6):
        plan.run([torch.ones(1, length, 4)])
    assert list(plan._at_shapes.values()) == [None] * 4


def test_number_of_kept_shapes_is_limited(plan_of):
    plan = plan_of(FLEXIBLE, _masked)
    for length in range(2, 22):
        plan.run([torch.ones(1, length, 4)])
        plan.run([torch.ones(1, length, 4)])
    assert len(plan._at_shapes) == 8
    assert None not in plan._at_shapes.values()


def test_every_value_has_its_declared_type(plan_of):
    """Kernels of all families on fp16: what each step leaves is of the type that the program declares."""

    def body(x):
        y = mb.layer_norm(x=x, axes=[-1])
        y = mb.gelu(x=mb.linear(x=y, weight=np.ones((8, 8), np.float16)))
        y = mb.reduce_mean(x=y, axes=[-1], keep_dims=True)
        y = mb.rsqrt(x=mb.add(x=mb.square(x=y), y=np.float16(1)))
        y = mb.matmul(x=x, y=mb.mul(x=x, y=y), transpose_y=True)
        return mb.softmax(x=y), mb.cast(x=mb.reduce_argmax(x=y, axis=-1), dtype="fp32")

    plan = plan_of({"x": np.ones((1, 4, 8), np.float16)}, body)
    seen = []

    def observe(step, values):
        for slot in step.outputs:
            declared = plan.graph.types[slot]
            assert values[slot].dtype == declared.element.storage, step.node
            assert tuple(values[slot].shape) == declared.shape, step.node
            seen.append(step.node.op_type)

    plan.run([torch.rand(1, 4, 8, dtype=torch.float16)], observe)
    assert len(seen) == 12


def test_invalid_constant_is_rejected(build):
    model = build(
        {"x": np.ones(2, np.float32)}, lambda x: mb.real_div(x=mb.cast(x=x, dtype="int32"), y=np.int32(2))
    )
    spec = model.get_spec()
    block = spec.mlProgram.functions["main"].block_specializations["CoreML8"]
    division = next(each for each in block.operations if each.type == "real_div")
    division.inputs["x"].arguments[0].name = division.inputs["y"].arguments[0].name
    for each in block.operations:
        if each.type == "const" and each.outputs[0].type.tensorType.dataType == 23:
            each.attributes["val"].immediateValue.tensor.ints.values[0] = 0
    package = open_package(model)
    graph = read_function(type(package)(package.name, spec, package.weights), "main")
    with pytest.raises(PackageError, match=r"\(real_div\), whose inputs are constants: integer division by zero"):
        Plan(graph, Target(Numerics.DECLARED))


def test_attribute_of_wrong_kind_is_rejected(build):
    model = build({"x": np.ones((2, 2), np.float32)}, lambda x: mb.softmax(x=x, axis=1, name="share"))
    package = open_package(model)
    spec = model.get_spec()
    block = spec.mlProgram.functions["main"].block_specializations["CoreML8"]
    axis = next(each for each in block.operations if each.type == "const")
    value = axis.attributes["val"]
    value.type.tensorType.rank = 1
    value.type.tensorType.dimensions.add().constant.size = 2
    value.immediateValue.tensor.ints.values.append(0)
    graph = read_function(type(package)(package.name, spec, package.weights), "main")
    with pytest.raises(PackageError) as caught:
        Plan(graph, Target(Numerics.DECLARED))
    assert str(caught.value) == "operation 'share' (softmax): input 'axis': [1, 0] is not one int"


def test_unknown_element_type_is_rejected(build):
    model = build({"x": np.ones(2, np.float32)}, lambda x: mb.cast(x=x, dtype="int32", name="whole"))
    package = open_package(model)
    spec = model.get_spec()
    block = spec.mlProgram.functions["main"].block_specializations["CoreML8"]
    dtype = next(each for each in block.operations if each.type == "const")
    dtype.attributes["val"].immediateValue.tensor.strings.values[0] = "int33"
    graph = read_function(type(package)(package.name, spec, package.weights), "main")
    with pytest.raises(
        PackageError, match=r"^operation 'whole' \(cast\): unknown element type 'int33'\n  expected: one of"
    ):
        Plan(graph, Target(Numerics.DECLARED))


# --- number of outputs ----------------------------------------------------------------------------------------


def _suppression(boxes, scores):
    return mb.non_maximum_suppression(
        boxes=boxes, scores=scores, iou_threshold=0.5, score_threshold=0.0, max_boxes=2, name="nms"
    )[0]


def test_outputs_of_another_operation_set_are_rejected(build):
    """iOS17 has no fourth output, the number of boxes."""
    data = {name: np.ones((1, 4, 4), np.float32) for name in ("boxes", "scores")}
    model = build(data, _suppression, ios=15)
    package = Package("toy", model.get_spec(), open_package(model).weights)
    function = package.spec.mlProgram.functions["main"]
    function.block_specializations["CoreML7"].CopyFrom(function.block_specializations["CoreML5"])
    function.opset = "CoreML7"
    operations = function.block_specializations["CoreML7"].operations
    (suppression,) = (each for each in operations if each.type == "non_maximum_suppression")
    del suppression.inputs["score_threshold"]
    names = [each.name for each in suppression.outputs]
    assert len(names) == 4
    with pytest.raises(PackageError) as caught:
        Program(package, "main").run([torch.ones(1, 4, 4)] * 2, Target(Numerics.DECLARED))
    assert str(caught.value) == (
        "operation 'nms' (non_maximum_suppression) fails on float32[1, 4, 4], float32[1, 4, 4]: "
        f"it has 3 outputs in iOS17; the program names {names}"
    )


def test_missing_output_of_a_rounded_operation_is_rejected(build):
    weights = {"weight_ih": np.ones((8, 3), np.float16), "weight_hh": np.ones((8, 2), np.float16)}
    x, state = np.ones((1, 1, 3), np.float16), np.ones((1, 2), np.float16)
    model = build(
        {"x": x, "h": state, "c": state},
        lambda x, h, c: mb.lstm(x=x, initial_h=h, initial_c=c, name="lstm", **weights)[0],
    )
    arguments = [torch.from_numpy(each) for each in (x, state, state)]
    for kept in (2, 1):
        package = Package("toy", model.get_spec(), open_package(model).weights)
        (block,) = package.spec.mlProgram.functions["main"].block_specializations.values()
        (lstm,) = (each for each in block.operations if each.type == "lstm")
        del lstm.outputs[kept:]
        names = [each.name for each in lstm.outputs]
        with pytest.raises(PackageError) as caught:
            Program(package, "main").run(arguments, Target(Numerics.DECLARED))
        assert str(caught.value).endswith(f": it has 3 outputs in iOS18; the program names {names}")
