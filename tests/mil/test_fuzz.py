"""Damaged packages: whatever is wrong with them, an error of coremill's own says so, or the package runs.

Damaged in two ways: in the bytes of a file, and in the structure of the program (its bindings, types, constants and
operations). Each test asserts that it tried its number of cases: 600 of the first kind and 11 · 60 of the second.
More by hand, of the first kind as many a test as said, of the second two fifths of it a kind of change:

    COREMILL_FUZZ_CASES=20000 pytest tests/mil/test_fuzz.py --hypothesis-seed=random
"""

from __future__ import annotations

import os
import shutil

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from coremill.core.errors import CoremillError, PackageError
from coremill.mil import MLModel
from coremill.mil.coremltools_quietly import Model_pb2
from coremill.mil.ops.registry import supported_operations

CASES = int(os.environ.get("COREMILL_FUZZ_CASES", "150"))

CASES_OF_A_CHANGE = CASES * 2 // 5

FUZZING = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)

IDS = {"ids": np.array([[1, 2, 3, 4]], np.int32)}


@pytest.fixture(scope="module")
def package(build, tmp_path_factory):
    """Ids through an embedding, a product, a norm, a branch and a softmax."""
    rng = np.random.default_rng(3)
    table = rng.standard_normal((16, 32)).astype(np.float16)
    weight = rng.standard_normal((48, 32)).astype(np.float16)

    def body(ids):
        x = mb.linear(x=mb.gather(x=table, indices=ids, axis=0), weight=weight)
        x = mb.layer_norm(x=x, axes=[-1])
        some = mb.reduce_max(x=mb.cast(x=ids, dtype="fp32"), keep_dims=False)
        x = mb.cond(pred=mb.greater(x=some, y=np.float32(0)), _true_fn=lambda: mb.relu(x=x), _false_fn=lambda: x)
        parts = mb.split(x=x, num_splits=2, axis=-1)
        return mb.softmax(x=mb.concat(values=[parts[1], parts[0]], axis=-1), axis=-1)

    path = tmp_path_factory.mktemp("fuzz") / "whole.mlpackage"
    model = build({"ids": IDS["ids"]}, body)
    assert isinstance(model, ct.models.MLModel)
    model.save(str(path))
    assert MLModel(path).predict(IDS)
    return path


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Some bytes changed, removed, doubled, or all that follows cut off."""
    result = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(result) - 1)))
        length = data.draw(st.integers(1, 16))
        match data.draw(st.sampled_from(["set", "remove", "double", "cut"])):
            case "set":
                result[at : at + length] = data.draw(st.binary(min_size=1, max_size=length))
            case "remove":
                del result[at : at + length]
            case "double":
                result[at:at] = result[at : at + length]
            case "cut":
                del result[at:]
    return bytes(result)


PARTS = ("Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin")


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.rpartition("/")[2])
def test_damaged_package_raises_or_runs(package, tmp_path_factory, part):
    copy = tmp_path_factory.mktemp("copy") / "damaged.mlpackage"
    shutil.copytree(package, copy)
    content = (package / part).read_bytes()
    outcomes = {"error": 0, "ran": 0}

    @FUZZING
    @given(data=st.data())
    def damage(data):
        (copy / part).write_bytes(damaged(data, content))
        try:
            MLModel(copy).predict(IDS)
        except CoremillError:
            outcomes["error"] += 1
        else:
            outcomes["ran"] += 1

    damage()
    assert sum(outcomes.values()) >= CASES
    if part.endswith((".mlmodel", ".json")):
        assert outcomes["error"] > CASES / 4, outcomes


def test_truncated_weight_file_is_always_rejected(package, tmp_path):
    """Wherever it ends: each byte of it belongs to a weight that the program uses."""
    copy = tmp_path / "damaged.mlpackage"
    shutil.copytree(package, copy)
    content = (package / PARTS[2]).read_bytes()
    tried = []

    @FUZZING
    @given(length=st.integers(0, len(content) - 1))
    @example(length=0)
    @example(length=64)
    @example(length=len(content) - 1)
    def cut(length):
        tried.append(length)
        (copy / PARTS[2]).write_bytes(content[:length])
        with pytest.raises(PackageError, match=r"weight\.bin: "):
            MLModel(copy)

    cut()
    assert len(tried) >= CASES


X = np.linspace(-1, 1, 24, dtype=np.float16).reshape(2, 3, 4)
DATA = {"x": X, "at": np.array([1], np.int32)}


@pytest.fixture(scope="module")
def structured(tmp_path_factory):
    """A state, a list, a branch, tables of weights, and operations that take axes, sizes, types and strings.

    No loop: a change could make it one without end.
    """
    table = np.arange(8, dtype=np.float16)

    @mb.program(
        input_specs=[
            mb.StateTensorSpec((4, 4), dtype=types.fp16),
            mb.TensorSpec(X.shape, dtype=types.fp16),
            mb.TensorSpec((1,), dtype=types.int32),
        ],
        opset_version=ct.target.iOS18,
    )
    def program(kept, x, at):
        indices = np.arange(16).reshape(4, 4).astype(types.np_uint4_dtype)
        weight = mb.constexpr_lut_to_dense(
            indices=indices, lut=np.arange(16, dtype=np.float16).reshape(1, 1, 16, 1)
        )
        scales = mb.constexpr_blockwise_shift_scale(
            data=np.ones((4, 4), np.int8), scale=np.full((2, 1), 0.5, np.float16)
        )
        y = mb.layer_norm(x=mb.matmul(x=x, y=mb.add(x=weight, y=scales)), axes=[-1])
        y = mb.cond(
            pred=mb.greater(x=mb.reduce_max(x=x, keep_dims=False), y=np.float16(0)),
            _true_fn=lambda: mb.relu(x=y),
            _false_fn=lambda: mb.gelu(x=y, mode="EXACT"),
        )
        y = mb.softmax(x=mb.transpose(x=mb.reshape(x=y, shape=[3, 2, 4]), perm=[1, 0, 2]), axis=-1)
        end = mb.add(x=at, y=np.int32(1))
        row = mb.squeeze(x=mb.slice_by_index(x=y, begin=[0, 0, 0], end=[1, 1, 4]), axes=[0])
        begin = mb.concat(values=[at, np.array([0], np.int32)], axis=0)
        end = mb.concat(values=[end, np.array([4], np.int32)], axis=0)
        updated = mb.slice_update(x=mb.read_state(input=kept), update=row, begin=begin, end=end)
        new = mb.coreml_update_state(state=kept, value=updated)
        elements = mb.make_list(init_length=2, elem_shape=(4,), dtype="fp16")
        elements = mb.list_write(ls=elements, index=0, value=mb.gather(x=new, indices=np.int32(1), axis=0))
        taken = mb.list_gather(ls=elements, indices=[1, 0])
        values, order = mb.topk(x=mb.concat(values=[taken, row], axis=0), k=2, axis=1)
        wide = mb.cast(x=mb.scatter(data=table, indices=at, updates=np.ones(1, np.float16)), dtype="fp32")
        left, right = mb.split(x=y, num_splits=2, axis=2)
        return values, order, wide, mb.sub(x=left, y=right)

    model = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    path = tmp_path_factory.mktemp("structure") / "whole.mlpackage"
    model.save(str(path))
    opened = MLModel(path)
    assert len(opened.predict(DATA, opened.make_state())) == 4
    return path


class Program:
    """The parts of a program that a case may change."""

    def __init__(self, spec) -> None:
        self.functions = list(spec.mlProgram.functions.values())
        self.blocks = []
        for function in self.functions:
            self._add_block(function.block_specializations[function.opset])
        self.operations = [each for block in self.blocks for each in block.operations]
        self.arguments = [
            argument
            for operation in self.operations
            for _, parameter in sorted(operation.inputs.items())
            for argument in parameter.arguments
        ]
        bound = [each.value for each in self.arguments if each.WhichOneof("binding") == "value"]
        named = [value for each in self.operations for _, value in sorted(each.attributes.items())]
        self.values = bound + named
        defined = [each for group in (self.functions, self.blocks) for owner in group for each in owner.inputs]
        defined += [each for operation in self.operations for each in operation.outputs]
        self.names = [*sorted({each.name for each in defined}), "nowhere"]
        self.types = [tensor_type(each.type) for each in defined + self.values]

    def _add_block(self, block) -> None:
        self.blocks.append(block)
        for operation in block.operations:
            for nested in operation.blocks:
                self._add_block(nested)


def tensor_type(value_type):
    """The message of the tensor type itself, an element's of a list, a state's of a state."""
    match value_type.WhichOneof("type"):
        case "listType":
            return tensor_type(value_type.listType.type)
        case "stateType":
            return tensor_type(value_type.stateType.wrappedType)
    return value_type.tensorType


SIZES = st.sampled_from([0, 1, 2, 3, 5, 1 << 20, 2**63 - 1, 2**63, 2**64 - 1])
NUMBERS = {
    "ints": st.sampled_from([-(2**31), -5, -2, -1, 0, 1, 2, 3, 7, 1 << 20]),
    "longInts": st.sampled_from([-(2**63), -1, 0, 1, 2**63 - 1]),
    "floats": st.sampled_from([-1.5, 0.0, 2.0, float("inf"), float("nan"), 1e38]),
    "doubles": st.sampled_from([-1.5, 0.0, 2.0, float("inf"), float("nan"), 1e300]),
    "bools": st.booleans(),
    "strings": st.sampled_from(["", "fp32", "int8", "int4", "string", "EXACT", "update", "x"]),
}


def rename_a_binding(program, draw):
    draw(st.sampled_from(program.arguments)).name = draw(st.sampled_from(program.names))


def rename_a_definition(program, draw):
    operation = draw(st.sampled_from([each for each in program.operations if each.outputs]))
    draw(st.sampled_from(list(operation.outputs))).name = draw(st.sampled_from(program.names))


def change_an_output(program, draw):
    outputs = draw(st.sampled_from(program.blocks)).outputs
    outputs[draw(st.integers(0, len(outputs) - 1))] = draw(st.sampled_from(program.names))


def change_a_dimension(program, draw):
    dimensions = draw(st.sampled_from(program.types)).dimensions
    how = draw(st.sampled_from(["set", "add", "remove", "unknown"]))
    if how == "add" or not dimensions:
        dimensions.add().constant.size = draw(SIZES)
    elif how == "remove":
        del dimensions[draw(st.integers(0, len(dimensions) - 1))]
    elif how == "set":
        draw(st.sampled_from(list(dimensions))).constant.size = draw(SIZES)
    else:
        draw(st.sampled_from(list(dimensions))).unknown.SetInParent()


def change_an_element_type(program, draw):
    draw(st.sampled_from(program.types)).dataType = draw(st.integers(0, 45))


def change_a_type(program, draw):
    """To another value's, which may be a list or a state."""
    outputs = [each for operation in program.operations for each in operation.outputs]
    defined = outputs + [each for function in program.functions for each in function.inputs]
    draw(st.sampled_from(outputs)).type.CopyFrom(draw(st.sampled_from(defined)).type)


def change_a_value(program, draw):
    tensor = draw(st.sampled_from(program.values)).immediateValue.tensor
    kind = tensor.WhichOneof("value")
    if kind is None or draw(st.integers(0, 9)) == 0:
        kind = draw(st.sampled_from(sorted(NUMBERS)))
    if kind == "bytes":
        tensor.bytes.values = draw(st.binary(max_size=2 * len(tensor.bytes.values)))
        return
    numbers = getattr(tensor, kind).values
    at = draw(st.integers(0, len(numbers)))
    if at == len(numbers):
        numbers.append(draw(NUMBERS[kind]))
    elif draw(st.integers(0, 3)):
        numbers[at] = draw(NUMBERS[kind])
    else:
        del numbers[at]


def move_a_blob(program, draw):
    files = [each.blobFileValue for each in program.values if each.WhichOneof("value") == "blobFileValue"]
    # The others are those of the next blobs.
    draw(st.sampled_from(files)).offset = draw(SIZES.map(lambda size: size * 64 % 2**64) | SIZES)


def swap_inputs(program, draw):
    operation = draw(st.sampled_from([each for each in program.operations if each.inputs]))
    one, other = (operation.inputs[draw(st.sampled_from(sorted(operation.inputs)))] for _ in range(2))
    kept = type(one)()
    kept.CopyFrom(one)
    one.CopyFrom(other)
    other.CopyFrom(kept)


def change_arguments(program, draw):
    operation = draw(st.sampled_from([each for each in program.operations if each.inputs]))
    name = draw(st.sampled_from(sorted(operation.inputs)))
    arguments = operation.inputs[name].arguments
    how = draw(st.sampled_from(["double", "remove", "drop"]))
    if how == "double":
        arguments.add().CopyFrom(arguments[0]) if arguments else None
    elif how == "remove":
        del arguments[:]
    else:
        del operation.inputs[name]


def change_operations(program, draw):
    operations = draw(st.sampled_from([each for each in program.blocks if each.operations])).operations
    at = draw(st.integers(0, len(operations) - 1))
    kept = type(operations[at])()
    kept.CopyFrom(operations[at])
    how = draw(st.sampled_from(["remove", "double", "double with other names", "move", "rename", "cut outputs"]))
    if how == "rename":
        operations[at].type = draw(st.sampled_from(supported_operations()))
        return
    if how == "cut outputs":
        del operations[at].outputs[-1:]
        return
    if how in ("remove", "move"):
        del operations[at]
    if how != "remove":
        if how == "double with other names":
            for each in kept.outputs:
                each.name += "_again"
        operations.insert(draw(st.integers(0, len(operations))), kept)


CHANGES = [
    rename_a_binding,
    rename_a_definition,
    change_an_output,
    change_a_dimension,
    change_an_element_type,
    change_a_type,
    change_a_value,
    move_a_blob,
    swap_inputs,
    change_arguments,
    change_operations,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_structure_raises_or_runs(structured, tmp_path, change):
    """One change of a kind, and often some of any kind."""
    copy = tmp_path / "damaged.mlpackage"
    shutil.copytree(structured, copy)
    content = (structured / PARTS[1]).read_bytes()
    outcomes = {"error": 0, "ran": 0}

    @settings(FUZZING, max_examples=CASES_OF_A_CHANGE)
    @given(data=st.data())
    def damage(data):
        spec = Model_pb2.Model.FromString(content)
        change(Program(spec), data.draw)
        for _ in range(data.draw(st.integers(0, 2))):
            data.draw(st.sampled_from(CHANGES))(Program(spec), data.draw)
        (copy / PARTS[1]).write_bytes(spec.SerializeToString())
        try:
            model = MLModel(copy)
            for _ in range(2):
                model.predict(DATA, model.make_state() if model.states else None)
        except CoremillError:
            outcomes["error"] += 1
        else:
            outcomes["ran"] += 1

    damage()
    assert sum(outcomes.values()) >= CASES_OF_A_CHANGE
    assert outcomes["error"] >= CASES_OF_A_CHANGE / 10, outcomes
