"""Lists of tensors, against numpy arrays that are written and read by the same indices."""

from __future__ import annotations

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import get_new_symbol
from coremltools.proto import MIL_pb2

from coremill.core.errors import PackageError, PredictionInputError
from coremill.mil import MLModel
from coremill.mil.graph import read_function
from coremill.mil.loader import Package, open_package
from coremill.mil.values import FP32, ListType, TensorType

A, B = np.float32([1, 3]), np.float32([2, 4])
ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)
ONE = {"a": A}
AT = {"a": A, "at": np.array([1], np.int32)}


def test_elements_are_zero_until_they_are_written(evaluate):
    """The writes of coremltools' own test, one of them past the end, on rows of a numpy array."""

    def body(a, b):
        ls = mb.make_list(init_length=2, elem_shape=(2,))
        before = mb.list_read(ls=ls, index=0)
        ls = mb.list_write(ls=ls, index=0, value=a)
        ls = mb.list_write(ls=ls, index=4, value=b)
        ls = mb.list_scatter(ls=ls, indices=[2, 1], value=-ROWS[:2])
        every = mb.list_gather(ls=ls, indices=[4, 3, 2, 1, 0, 4])
        return before, mb.list_read(ls=ls, index=0), every, mb.identity(x=mb.list_length(ls=ls))

    rows = np.zeros((5, 2), np.float32)
    rows[0], rows[4], rows[[2, 1]] = A, B, -ROWS[:2]
    before, first, every, length = evaluate({"a": A, "b": B}, body)
    np.testing.assert_array_equal(before, np.zeros(2))
    np.testing.assert_array_equal(first, rows[0])
    np.testing.assert_array_equal(every, rows[[4, 3, 2, 1, 0, 4]])
    assert length.tolist() == [5]


def test_writing_leaves_the_list_as_it_was(evaluate):
    def body(a):
        empty = mb.make_list(init_length=1, elem_shape=(2,))
        written = mb.list_write(ls=empty, index=0, value=a)
        longer = mb.list_write(ls=empty, index=2, value=a)
        lengths = [mb.identity(x=mb.list_length(ls=each)) for each in (empty, written, longer)]
        return (*(mb.list_read(ls=each, index=0) for each in (longer, written, empty)), *lengths)

    found = [each.tolist() for each in evaluate(ONE, body)]
    assert found == [[0, 0], A.tolist(), [0, 0], [1], [1], [3]]


def test_the_last_write_to_an_index_stays(evaluate):
    def body(a):
        ls = mb.make_list(init_length=2, elem_shape=(2,))
        return mb.list_read(ls=mb.list_scatter(ls=ls, indices=[1, 0, 1], value=ROWS), index=1)

    assert evaluate(ONE, body)[0].tolist() == ROWS[2].tolist()


def test_a_list_grows_in_a_loop(evaluate):
    """Element i is i · update. The list is a loop variable, and its length follows from the input."""

    def body(count, update):
        def condition(i, ls):
            return mb.less(x=i, y=mb.squeeze(x=count))

        def append(i, ls):
            element = mb.mul(x=update, y=mb.cast(x=i, dtype="fp32"))
            return mb.add(x=i, y=1), mb.list_write(ls=ls, index=i, value=element)

        start = (np.int32(0), mb.make_list(init_length=1, elem_shape=(2,)))
        _, ls = mb.while_loop(_cond=condition, _body=append, loop_vars=start)
        return mb.list_gather(ls=ls, indices=mb.range_1d(start=0, end=mb.list_length(ls=ls), step=1))

    for count in (1, 5):
        (found,) = evaluate({"count": np.array([count], np.int32), "update": A}, body)
        np.testing.assert_array_equal(found, np.arange(count)[:, None] * A)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_list_out_of_a_branch(evaluate, sign):
    """One branch writes to a list from outside, the other hands it on."""

    def body(a):
        ls = mb.make_list(init_length=2, elem_shape=(2,))
        chosen = mb.cond(
            pred=mb.greater(x=mb.reduce_sum(x=a), y=np.float32(0)),
            _true_fn=lambda: mb.list_write(ls=ls, index=1, value=a),
            _false_fn=lambda: mb.list_write(ls=ls, index=0, value=a),
        )
        return mb.list_gather(ls=chosen, indices=[0, 1])

    zero = np.zeros(2)
    np.testing.assert_array_equal(evaluate({"a": sign * A}, body)[0], [zero, A] if sign > 0 else [-A, zero])


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "int32", "bool"])
@pytest.mark.parametrize("mode", ["declared", "oracle", "oracle-fp64"])
def test_element_types(build, dtype, mode):
    """An element that was written and one that was not, together: both are of the list's type."""
    x = np.float32([0.1, 2])

    def body(x):
        ls = mb.make_list(init_length=2, elem_shape=(2,), dtype=dtype)
        ls = mb.list_write(ls=ls, index=1, value=mb.cast(x=x, dtype=dtype))
        return mb.cast(x=mb.list_gather(ls=ls, indices=[0, 1]), dtype="fp32")

    (found,) = MLModel(build({"x": x}, body), mode=mode).predict({"x": x}).values()
    kind = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}[dtype]
    expected = x if dtype == "fp16" and mode != "declared" else x.astype(kind)
    np.testing.assert_array_equal(found, [[0, 0], expected])


def test_integers_beside_zeros_are_exact(evaluate):
    x = np.int32([2**24 + 1, -3])

    def body(x):
        ls = mb.list_write(ls=mb.make_list(init_length=2, elem_shape=(2,), dtype="int32"), index=1, value=x)
        return mb.list_gather(ls=ls, indices=[0, 1])

    assert evaluate({"x": x}, body)[0].tolist() == [[0, 0], x.tolist()]


def test_an_element_shape_that_the_first_write_decides(build):
    """`elem_shape` may name a size instead of giving it."""

    def body(x):
        ls = mb.make_list(init_length=3, elem_shape=(get_new_symbol("rows").name, 2))
        return mb.list_gather(ls=mb.list_write(ls=ls, index=1, value=x), indices=[0, 1])

    model = MLModel(build({"x": (((1, 4), 2), np.float32)}, body))
    for rows in (1, 3):
        x = np.ones((rows, 2), np.float32)
        (found,) = model.predict({"x": x}).values()
        np.testing.assert_array_equal(found, [np.zeros_like(x), x])


def test_a_length_that_the_program_computes(build):
    def body(count):
        ls = mb.make_list(init_length=mb.add(x=mb.squeeze(x=count), y=1), elem_shape=(2,))
        return mb.list_gather(ls=ls, indices=mb.range_1d(start=0, end=mb.list_length(ls=ls), step=1))

    model = MLModel(build({"count": np.array([1], np.int32)}, body))
    for count in (3, 0, 3):
        (found,) = model.predict({"count": np.array([count], np.int32)}).values()
        assert found.shape == (count + 1, 2)
    with pytest.raises(PredictionInputError, match="a list of length -1"):
        model.predict({"count": np.array([-2], np.int32)})


def test_no_indices(evaluate):
    ls = {"init_length": 2, "elem_shape": (2, 3)}
    (found,) = evaluate(ONE, lambda a: mb.list_gather(ls=mb.make_list(**ls), indices=np.zeros(0, np.int32)))
    assert found.shape == (0, 2, 3)


READ = {
    "read": lambda ls, at, a: mb.list_read(ls=ls, index=at),
    "gather": lambda ls, at, a: mb.list_gather(ls=ls, indices=mb.expand_dims(x=at, axes=[0])),
}
WRITTEN = {
    "write": lambda ls, at, a: mb.list_length(ls=mb.list_write(ls=ls, index=at, value=a)),
    "scatter": lambda ls, at, a: mb.list_length(
        ls=mb.list_scatter(ls=ls, indices=mb.expand_dims(x=at, axes=[0]), value=mb.expand_dims(x=a, axes=[0]))
    ),
}


def _at(build, use, **options):
    """A model that uses a list of two elements at an index it is given."""

    def body(a, at):
        return mb.identity(x=use(mb.make_list(init_length=2, elem_shape=(2,), **options), mb.squeeze(x=at), a))

    return MLModel(build(AT, body))


def _at_index(model, index):
    return next(iter(model.predict({"a": A, "at": np.array([index], np.int32)}).values()))


@pytest.mark.parametrize("use", READ.values(), ids=list(READ))
def test_reading_out_of_bounds(build, use):
    model = _at(build, use)
    assert not _at_index(model, 1).any()
    for index in (-1, 2):
        with pytest.raises(PredictionInputError, match=rf"index {index} is out of bounds: the list has 2 elements"):
            _at_index(model, index)


@pytest.mark.parametrize("use", WRITTEN.values(), ids=list(WRITTEN))
def test_only_a_list_of_dynamic_length_grows(build, use):
    dynamic, fixed = _at(build, use), _at(build, use, dynamic_length=False)
    assert [_at_index(dynamic, index).tolist() for index in (0, 1, 6)] == [[2], [2], [7]]
    assert _at_index(fixed, 1).tolist() == [2]
    with pytest.raises(PredictionInputError, match="index 2 is out of bounds: the list has 2 elements"):
        _at_index(fixed, 2)
    with pytest.raises(PredictionInputError, match="index -1 is out of bounds"):
        _at_index(dynamic, -1)


def test_a_far_index_costs_no_memory(build):
    assert _at_index(_at(build, WRITTEN["write"]), 2**31 - 2).tolist() == [2**31 - 1]


def test_elements_of_one_shape(build):
    """The builder sees no difference where a size is only known at run time."""

    def body(x, y):
        ls = mb.make_list(init_length=2, elem_shape=(get_new_symbol("size").name,))
        ls = mb.list_write(ls=mb.list_write(ls=ls, index=0, value=x), index=1, value=y, name="second")
        return mb.list_read(ls=ls, index=0)

    model = MLModel(build(dict.fromkeys("xy", (((1, 4),), np.float32)), body))
    model.predict({"x": A, "y": B})
    with pytest.raises(PredictionInputError, match=r"'second' .* a value of shape \[3\], the list's are of \[2\]"):
        model.predict({"x": A, "y": np.ones(3, np.float32)})


def test_reading_what_has_no_shape_yet(build):
    def body(a):
        ls = mb.make_list(init_length=2, elem_shape=(get_new_symbol("size").name,))
        mb.identity(x=a)
        return mb.list_read(ls=ls, index=0, name="early")

    with pytest.raises(PackageError, match=r"'early' \(list_read\).*nothing was written .* are of shape \[\?\]"):
        MLModel(build(ONE, body))


def _package(build):
    def body(a):
        ls = mb.list_write(ls=mb.make_list(init_length=2, elem_shape=(2,)), index=0, value=a, name="written")
        return mb.list_read(ls=ls, index=0, name="read")

    model = build(ONE, body)
    return Package("toy", model.get_spec(), open_package(model).weights)


def test_types_of_lists(build):
    graph = read_function(_package(build), "main")
    slot = graph.names.index("written")
    assert graph.type_of(slot) == ListType(TensorType(FP32, (2,)))
    assert str(graph.type_of(slot)) == "list of fp32[2]"
    assert slot not in graph.types


@pytest.mark.parametrize(
    ("operation", "parameter", "given", "kind"),
    [("written", "ls", "a", "list"), ("written", "value", "make_list_0", "tensor"), ("read", "ls", "a", "list")],
)
def test_a_list_for_a_tensor_and_the_reverse(build, operation, parameter, given, kind):
    package = _package(build)
    for each in package.spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations:
        if each.outputs[0].name == operation:
            each.inputs[parameter].arguments[0].name = given
    with pytest.raises(PackageError, match=f"its input '{parameter}' is not a {kind}$"):
        read_function(package, "main")


def test_a_size_that_is_neither_number_nor_name(build):
    model = build(ONE, lambda a: mb.list_read(ls=mb.make_list(init_length=2, elem_shape=(2,), name="ls"), index=0))
    spec = model.get_spec()
    for each in spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations:
        if each.outputs[0].name == "ls_elem_shape0_0":
            value = each.attributes["val"]
            value.type.tensorType.dataType = MIL_pb2.DataType.FLOAT32
            value.immediateValue.tensor.floats.values.append(2.5)
    with pytest.raises(
        PackageError, match=r"'ls' \(make_list\): input 'elem_shape': 2.5 is not a list of int and str$"
    ):
        MLModel(ct.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True))


@pytest.mark.needs_cuda
def test_on_a_gpu(build):
    def body(a):
        ls = mb.list_write(ls=mb.make_list(init_length=3, elem_shape=(2,)), index=1, value=a)
        return mb.list_gather(ls=ls, indices=[0, 1]), mb.identity(x=mb.list_length(ls=ls))

    rows, length = MLModel(build(ONE, body), device="cuda").predict(ONE).values()
    assert (rows.tolist(), length.tolist()) == ([[0, 0], A.tolist()], [3])
