"""Reading a program: against coremltools' own reader, and malformed ones."""

from __future__ import annotations

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.frontend.milproto.load import load as load_with_coremltools
from coremltools.converters.mil.mil import types

from coremill.core.errors import PackageError, UnsupportedOperationError
from coremill.mil.graph import read_function
from coremill.mil.loader import Package, open_package
from coremill.mil.ops.registry import supported_operations
from coremill.mil.plan import Target
from coremill.mil.program import Program
from coremill.mil.values import STRING, Numerics

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
INPUTS = {"x": X}


def _body(x):
    y = mb.linear(x=x, weight=np.ones((4, 4), np.float32), name="product")
    y = mb.softmax(x=mb.concat(values=[y, x], axis=1), axis=-1, name="share")
    y = mb.slice_by_index(x=y, begin=[0, 2], end=[0, 0], end_mask=[True, True], name="part")
    return mb.reduce_mean(x=y, axes=[-1], keep_dims=True, name="y")


@pytest.fixture(scope="module")
def model(build):
    return build(INPUTS, _body)


@pytest.fixture
def package(model):
    """A package to take apart: its spec is its own."""
    return Package("toy", model.get_spec(), open_package(model).weights)


def _block(package):
    return package.spec.mlProgram.functions["main"].block_specializations["CoreML8"]


def _operation(package, op_type):
    return next(each for each in _block(package).operations if each.type == op_type)


def test_agrees_with_coremltools_reader(model):
    graph = read_function(open_package(model), "main")
    theirs = load_with_coremltools(model.get_spec(), specification_version=9, file_weights_dir=model.weights_dir)
    operations = [each for each in theirs.functions["main"].operations if each.op_type != "const"]
    assert [node.op_type for node in graph.nodes] == [each.op_type for each in operations]
    for node, operation in zip(graph.nodes, operations, strict=True):
        (output,) = operation.outputs
        (slot,) = node.outputs
        assert graph.names[slot] == output.name
        assert graph.types[slot].element.name == types.builtin_to_string(output.dtype)
        assert graph.types[slot].shape == tuple(output.shape)
        for name, slots in node.attributes.items():
            np.testing.assert_array_equal(graph.constants[slots[0]].numpy(), operation.inputs[name].val)
    assert [graph.names[slot] for slot in graph.inputs] == ["x"]
    assert [graph.names[slot] for slot in graph.outputs] == ["y"]


def test_constants_are_shared_with_the_weight_store(build):
    model = build(
        {"x": np.ones((1, 64), np.float32)}, lambda x: mb.linear(x=x, weight=np.eye(64, dtype=np.float32))
    )
    package = open_package(model)
    weights = [
        value
        for value in read_function(package, "main").constants.values()
        if getattr(value, "shape", None) == (64, 64)
    ]
    again = [
        value
        for value in read_function(package, "main").constants.values()
        if getattr(value, "shape", None) == (64, 64)
    ]
    assert len(weights) == 1
    assert weights[0] is again[0]


def _package_error(package):
    with pytest.raises(PackageError) as caught:
        read_function(package, "main")
    return str(caught.value)


def test_an_unsupported_operation_is_named(package):
    for old, new in (("softmax", "hypermax"), ("reduce_mean", "reduce_midrange")):
        _operation(package, old).type = new
    with pytest.raises(UnsupportedOperationError) as caught:
        read_function(package, "main")
    assert str(caught.value) == (
        "toy: unsupported operations: hypermax (as 'share'), reduce_midrange (as 'y')\n"
        f"  expected: const, cond, while_loop, {', '.join(supported_operations())}"
    )


def _nms(boxes, scores):
    options = {"iou_threshold": 0.5, "max_boxes": 2}
    return mb.non_maximum_suppression(boxes=boxes, scores=scores, score_threshold=0.0, name="nms", **options)[0]


def _gather(boxes, scores):
    return mb.gather(x=boxes, indices=[0], batch_dims=0, name="gather")


def _topk(boxes, scores):
    return mb.topk(x=boxes, k=1, return_indices=True, name="topk")[0]


@pytest.mark.parametrize(
    ("body", "made_for", "read_as", "expected"),
    [
        (
            _nms,
            15,
            17,
            "'nms' (non_maximum_suppression) has the inputs ['score_threshold']\n  expected: the inputs of iOS17: "
            "boxes, scores, iou_threshold, max_boxes; optional: per_class_suppression",
        ),
        (
            _gather,
            16,
            15,
            "'gather' (gather) has the inputs ['batch_dims']\n"
            "  expected: the inputs of iOS15: x, indices; optional: axis",
        ),
        (
            _topk,
            16,
            15,
            "'topk' (topk) has the inputs ['return_indices', 'sort']\n"
            "  expected: the inputs of iOS15: x; optional: k, axis, ascending",
        ),
    ],
    ids=["non_maximum_suppression", "gather", "topk"],
)
def test_inputs_of_another_operation_set_are_rejected(build, body, made_for, read_as, expected):
    """The program of one operation set under the name of another."""
    arrays = {"boxes": np.ones((1, 5, 4), np.float32), "scores": np.ones((1, 5, 2), np.float32)}
    model = build(arrays, body, ios=made_for)
    package = Package("toy", model.get_spec(), open_package(model).weights)
    function = package.spec.mlProgram.functions["main"]
    names = {15: "CoreML5", 16: "CoreML6", 17: "CoreML7"}
    function.block_specializations[names[read_as]].CopyFrom(function.block_specializations[names[made_for]])
    function.opset = names[read_as]
    with pytest.raises(UnsupportedOperationError) as caught:
        read_function(package, "main")
    assert str(caught.value) == f"toy: operation {expected}"


def test_missing_input_of_an_older_operation_set_is_rejected(build):
    """iOS17 renamed the region of crop_resize; iOS16 requires it."""
    boxes = np.array([[0, 0, 1, 1]], np.float32)
    model = build(
        {"x": np.ones((1, 1, 2, 2), np.float32)}, lambda x: mb.crop_resize(x=x, boxes=boxes, name="crop"), ios=17
    )
    package = Package("toy", model.get_spec(), open_package(model).weights)
    function = package.spec.mlProgram.functions["main"]
    function.block_specializations["CoreML6"].CopyFrom(function.block_specializations["CoreML7"])
    function.opset = "CoreML6"
    error = _package_error(package)
    assert error.startswith("toy: operation 'crop' (crop_resize) lacks its input 'roi'\n")
    assert "\n  expected: the inputs of iOS16: x, roi; optional: " in error


def test_an_operation_newer_than_the_program(package):
    """iOS17 has no slice_update, whatever the operation says."""
    function = package.spec.mlProgram.functions["main"]
    function.block_specializations["CoreML7"].CopyFrom(_block(package))
    function.opset = "CoreML7"
    for each in function.block_specializations["CoreML7"].operations:
        if each.type == "softmax":
            each.type = "slice_update"
    with pytest.raises(
        UnsupportedOperationError, match=r"^toy: unsupported operations: slice_update \(as 'share'\)"
    ):
        read_function(package, "main")


def test_an_unknown_operation_set(package):
    function = package.spec.mlProgram.functions["main"]
    function.block_specializations["CoreML99"].CopyFrom(_block(package))
    function.opset = "CoreML99"
    with pytest.raises(UnsupportedOperationError, match="function 'main' uses operation set 'CoreML99'"):
        read_function(package, "main")
    function.opset = "CoreML5"
    assert "has no block for its operation set 'CoreML5'" in _package_error(package)


def test_missing_value_is_rejected(package):
    _operation(package, "softmax").inputs["x"].arguments[0].name = "nowhere"
    assert _package_error(package) == (
        "toy: input 'x' of operation 'share' (softmax) is 'nowhere', which no earlier operation outputs\n"
        "  expected: operations in execution order, without a cycle"
    )


def test_cycle_is_rejected(package):
    _operation(package, "softmax").inputs["x"].arguments[0].name = "part"
    assert (
        "input 'x' of operation 'share' (softmax) is 'part', which no earlier operation outputs"
        in _package_error(package)
    )


def test_undefined_output_is_rejected(package):
    _block(package).outputs[0] = "elsewhere"
    assert "the block's output is 'elsewhere', which no earlier operation outputs" in _package_error(package)


def test_missing_and_unknown_inputs_are_rejected(package):
    slicing = _operation(package, "slice_by_index")
    slicing.inputs["colour"].CopyFrom(slicing.inputs["begin"])
    with pytest.raises(
        UnsupportedOperationError, match=r"operation 'part' \(slice_by_index\) has the inputs \['colour'\]"
    ):
        read_function(package, "main")
    del slicing.inputs["colour"]
    del slicing.inputs["begin"]
    assert _package_error(package) == (
        "toy: operation 'part' (slice_by_index) lacks its input 'begin'\n"
        "  expected: the inputs of iOS18: x, begin, end; optional: stride, begin_mask, end_mask, squeeze_mask"
    )
    del slicing.inputs["x"]
    assert _package_error(package).startswith(
        "toy: operation 'part' (slice_by_index) lacks its input 'x'\n  expected: "
    )


def test_list_for_a_single_tensor_is_rejected(package):
    argument = _operation(package, "softmax").inputs["x"]
    argument.arguments.add().CopyFrom(argument.arguments[0])
    assert "operation 'share' (softmax): 2 values for input 'x'\n  expected: one" in _package_error(package)


def test_inconsistent_constants_are_rejected(package):
    constant = next(each for each in _block(package).operations if each.outputs[0].name.startswith("part_begin"))
    value = constant.attributes["val"]
    value.immediateValue.tensor.ints.values.append(7)
    message = _package_error(package)
    assert "a constant of type int32[2]: " in message
    assert "size 3" in message
    value.type.tensorType.dimensions[0].unknown.SetInParent()
    assert "is a constant of type int32[?]\n  expected: a type without unknown sizes" in _package_error(package)
    value.type.tensorType.dataType = 40
    with pytest.raises(UnsupportedOperationError, match="is of element type number 40"):
        read_function(package, "main")
    del constant.attributes["val"]
    assert "has no value\n  expected: an attribute 'val'" in _package_error(package)


def test_constant_of_unsupported_type_is_rejected(package):
    constant = next(each for each in _block(package).operations if each.outputs[0].name.startswith("part_begin"))
    constant.attributes["val"].type.dictionaryType.SetInParent()
    with pytest.raises(UnsupportedOperationError) as caught:
        read_function(package, "main")
    assert str(caught.value) == (
        f"toy: value {constant.outputs[0].name!r} is a dictionary, or several strings\n"
        "  expected: a tensor, one string, or a list"
    )


def test_a_blob_past_the_end_of_the_weight_file(build):
    model = build(
        {"x": np.ones((1, 64), np.float32)}, lambda x: mb.linear(x=x, weight=np.eye(64, dtype=np.float32))
    )
    package = Package("toy", model.get_spec(), open_package(model).weights)
    for each in _block(package).operations:
        if each.attributes["val"].WhichOneof("value") == "blobFileValue":
            each.attributes["val"].blobFileValue.offset = 1 << 40
    assert "the program reads a blob at offset 1099511627776; the file has" in _package_error(package)


def test_string_for_a_tensor_is_rejected(package):
    value = _operation(package, "const").attributes["val"]
    value.type.tensorType.dataType = STRING
    value.immediateValue.tensor.strings.values.append("text")
    text = _operation(package, "const").outputs[0].name
    _operation(package, "linear").inputs["weight"].arguments[0].name = text
    assert _package_error(package) == "toy: operation 'product' (linear): its input 'weight' is not a tensor"


def test_a_value_defined_twice(package):
    """By an operation, by a constant, and by an input."""
    first, second = _operation(package, "linear"), _operation(package, "softmax")
    name = second.outputs[0].name
    second.outputs[0].name = first.outputs[0].name
    expected = "toy: value 'product' is defined twice\n  expected: one definition a block"
    assert _package_error(package) == expected
    second.outputs[0].name = name
    constant = _operation(package, "const").outputs[0]
    constant.name = "x"
    assert "value 'x' is defined twice" in _package_error(package)
    function = package.spec.mlProgram.functions["main"]
    function.inputs.add().CopyFrom(function.inputs[0])
    assert "value 'x' is defined twice" in _package_error(package)


def test_too_many_outputs_are_rejected(package):
    outputs = _operation(package, "softmax").outputs
    outputs.add().CopyFrom(outputs[0])
    outputs[1].name = "second"
    assert _package_error(package) == (
        "toy: operation 'share' (softmax): its outputs are ['tensor', 'tensor']\n  expected: one tensor"
    )
    del outputs[:]
    assert "(softmax): its outputs are []\n  expected: one tensor" in _package_error(package)


@pytest.mark.parametrize("sizes", [[2**63], [2**64 - 1, 0], [0, 2**64 - 1], [2**32, 2**31], [2**62, 2, 0]], ids=str)
@pytest.mark.parametrize("of_constant", [True, False])
def test_too_large_sizes_are_rejected(package, sizes, of_constant):
    if of_constant:
        tensor = _operation(package, "const").attributes["val"].type.tensorType
    else:
        tensor = _operation(package, "softmax").outputs[0].type.tensorType
    del tensor.dimensions[:]
    for size in sizes:
        tensor.dimensions.add().constant.size = size
    message = _package_error(package)
    assert f"is of sizes {sizes}\n  expected: sizes whose product is at most {2**63 - 1}" in message


@pytest.fixture
def with_list(build):
    model = build(
        {"x": np.ones(2, np.float32)},
        lambda x: mb.list_read(
            ls=mb.list_write(ls=mb.make_list(init_length=2, elem_shape=(2,), dtype="fp32"), index=0, value=x),
            index=0,
        ),
    )
    return Package("toy", model.get_spec(), open_package(model).weights)


def test_list_declared_as_tensor_is_rejected(with_list):
    read, written = (_operation(with_list, each).outputs[0].type for each in ("list_read", "list_write"))
    kept = written.SerializeToString()
    written.CopyFrom(read)
    assert "(list_write): its outputs are ['tensor']\n  expected: one list" in _package_error(with_list)
    written.ParseFromString(kept)
    read.CopyFrom(written)
    assert "(list_read): its outputs are ['list']\n  expected: one tensor" in _package_error(with_list)


def test_blocks_that_do_not_match_their_operation_are_rejected(build):
    def body(x):
        return mb.while_loop(
            _cond=lambda i, y: mb.less(x=i, y=np.float32(3)),
            _body=lambda i, y: (mb.add(x=i, y=np.float32(1)), mb.mul(x=y, y=np.float32(2))),
            loop_vars=(np.float32(0), mb.cond(pred=True, _true_fn=lambda: mb.relu(x=x), _false_fn=lambda: x)),
        )

    model = build({"x": np.ones(2, np.float32)}, body)
    edits = {
        "while_loop": [
            lambda loop: loop.inputs["loop_vars"].arguments.pop(),
            lambda loop: loop.outputs.pop(),
            lambda loop: loop.blocks[0].outputs.append(loop.blocks[0].outputs[0]),
            lambda loop: loop.blocks[1].outputs.pop(),
            lambda loop: loop.blocks[1].inputs.pop(),
        ],
        "cond": [
            lambda branch: branch.outputs.pop(),
            lambda branch: branch.blocks[1].outputs.pop(),
            lambda branch: branch.inputs["pred"].arguments.pop(),
        ],
    }
    for op_type, changes in edits.items():
        for change in changes:
            package = Package("toy", model.get_spec(), open_package(model).weights)
            read_function(package, "main")
            change(_operation(package, op_type))
            assert _package_error(package).startswith("toy: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_integer_attribute_is_rejected(package, value):
    axes = _operation(package, "reduce_mean").inputs["axes"].arguments[0].name
    constant = next(each for each in _block(package).operations if each.outputs[0].name == axes)
    constant.attributes["val"].type.tensorType.dataType = 11
    constant.attributes["val"].immediateValue.tensor.floats.values[:] = [value]
    message = r"operation 'y' \(reduce_mean\): input 'axes': (nan|inf) is not of type int"
    with pytest.raises(PackageError, match=message):
        Program(package, "main").plan(Target(Numerics.DECLARED))
