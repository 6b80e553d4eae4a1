"""`coremill mil lint`: each rule on a program that breaks it and on one that does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.mil.commands.lint import RULES, Place, Rule, Subject, lint
from coremill.mil.description import FunctionDescription, TensorSpec, describe_function
from coremill.mil.graph import Graph, Node, read_function
from coremill.mil.loader import open_package
from coremill.mil.values import BY_NAME, TensorType

HALF = np.ones((2, 3), np.float16)
TABLE = np.ones((9, 4), np.float16)
INTS = np.zeros(2, np.int32)


@pytest.fixture
def findings(build):
    """`findings(inputs, body)`: where each rule is broken, by the rule's name."""

    def run(inputs, body, **options):
        package = open_package(build(inputs, body, **options))
        graph = read_function(package, "main")
        found = {}
        for each in lint(describe_function(package, "main", graph), graph):
            found.setdefault(each.rule.name, []).append(each.where)
        return found

    return run


def _loop(x):
    def within(value):
        return mb.less(x=mb.reduce_max(x=value, axes=[0, 1], keep_dims=False), y=np.float16(9))

    return mb.while_loop(
        _cond=within, _body=lambda value: mb.add(x=value, y=np.float16(1)), loop_vars=(x,), name="loop"
    )


def _gathers(i):
    """One by computed indices, one by constant ones of computed rows."""
    total = mb.cast(x=mb.reduce_sum(x=i, axes=[0]), dtype="fp16")
    rows = mb.add(x=TABLE, y=total)
    return mb.gather(x=TABLE, indices=i, axis=0, name="lookup"), mb.gather(x=rows, indices=[1, 2], axis=0)


BROKEN = [
    (
        "inputs with range shapes",
        {"x": ((2, (1, 8)), np.float16)},
        lambda x: mb.relu(x=x, name="y"),
        ["input x: rank 2 with sizes [2, 1 to 8]"],
    ),
    (
        "floating-point types other than fp16",
        {"x": HALF},
        lambda x: mb.cast(x=mb.sin(x=mb.cast(x=x, dtype="fp32"), name="wide"), dtype="fp16"),
        ["wide (sin): fp32[2, 3]"],
    ),
    (
        "tensors of rank above 5",
        {"x": np.ones((1, 1, 1, 2, 1, 4), np.float16)},
        lambda x: mb.reduce_sum(x=x, axes=[0, 1, 2], keep_dims=False, name="y"),
        ["input x: fp16[1, 1, 1, 2, 1, 4]"],
    ),
    (
        "integer and bool tensors",
        {"x": HALF},
        lambda x: mb.select(cond=mb.greater(x=x, y=np.float16(0), name="mask"), a=x, b=HALF),
        ["mask (greater): bool[2, 3]"],
    ),
    (
        "gathers with computed indices",
        {"i": INTS},
        _gathers,
        ["lookup (gather): its indices are computed"],
    ),
    (
        "topk",
        {"x": HALF},
        lambda x: mb.topk(x=x, k=2, axis=1, name="best")[0],
        ["best (topk)"],
    ),
    ("loops", {"x": HALF}, _loop, ["loop (while_loop)"]),
    (
        "reshapes to a computed shape",
        {"x": ((2, (1, 8)), np.float16)},
        lambda x: mb.reshape(x=x, shape=mb.concat(values=[mb.shape(x=x), [1]], axis=0), name="y"),
        ["y (reshape): its shape is computed"],
    ),
    (
        "linear layers on fewer than 4 dimensions",
        {"x": np.ones((1, 5, 4), np.float16)},
        lambda x: mb.linear(x=x, weight=np.ones((6, 4), np.float16), name="y"),
        ["y (linear): fp16[1, 5, 6]"],
    ),
    (
        "reshapes and transposes",
        {"x": HALF},
        lambda x: mb.transpose(x=mb.reshape(x=x, shape=[3, 2], name="a"), perm=[1, 0], name="b"),
        ["a (reshape): fp16[3, 2]", "b (transpose): fp16[2, 3]"],
    ),
    (
        "a last axis of 1",
        {"x": np.ones((1, 2, 3), np.float16)},
        lambda x: mb.sub(x=x, y=mb.reduce_mean(x=x, axes=[-1], keep_dims=True, name="mean"), name="y"),
        ["mean (reduce_mean): fp16[1, 2, 1]"],
    ),
    (
        "very large dimensions",
        {"x": np.ones((1, 4), np.float16)},
        lambda x: mb.linear(x=x, weight=np.ones((20_000, 4), np.float16), name="y"),
        ["y (linear): fp16[1, 20000]"],
    ),
    (
        "infinite or NaN constants",
        {"x": HALF},
        lambda x: mb.add(
            x=mb.mul(x=x, y=mb.const(val=np.float16(-np.inf), name="bias"), name="a"),
            y=mb.const(val=np.array([1, np.nan, np.inf], np.float16), name="c"),
            name="b",
        ),
        ["bias fp16[]: 1 -inf, an input of a (mul)", "c fp16[3]: 1 NaN, 1 inf, an input of b (add)"],
    ),
]


@pytest.mark.parametrize(("rule", "inputs", "body", "expected"), BROKEN, ids=[each[0] for each in BROKEN])
def test_rule_finds_a_violation(findings, rule, inputs, body, expected):
    assert findings(inputs, body)[rule] == expected


def test_conforming_program_has_no_findings(findings):
    """Convolution-shaped, fp16, fixed; what follows from constants alone is computed beforehand and counts not."""

    def body(x):
        weights = mb.constexpr_affine_dequantize(
            quantized_data=np.ones((1, 4, 1, 1), np.int8),
            zero_point=np.int8(0),
            scale=np.float16(1),
            axis=np.int32(0),
        )
        return mb.relu(x=mb.mul(x=x, y=mb.reshape(x=weights, shape=[1, 4, 1, 1])), name="y")

    assert findings({"x": np.ones((1, 4, 1, 64), np.float16)}, body) == {}


def test_constant_operations_are_ignored(findings):
    """Indices behind a cast and a shape behind a concat, each of constants alone; here and in a nested block."""

    def of_constants(x):
        indices = mb.cast(x=mb.const(val=np.array([0, 1], np.int32)), dtype="int16")
        shape = mb.concat(values=[mb.const(val=np.array([2], np.int32)), [3]], axis=0)
        return indices, shape, mb.reshape(x=mb.gather(x=x, indices=indices, axis=0), shape=shape)

    def body(x):
        indices, shape, y = of_constants(x)
        return mb.cond(
            pred=mb.greater(x=mb.reduce_max(x=x, axes=[0, 1], keep_dims=False), y=np.float16(0)),
            _true_fn=lambda: mb.reshape(x=mb.gather(x=x, indices=indices, axis=0), shape=shape),
            _false_fn=lambda: y,
        )

    found = findings({"x": HALF}, body)
    assert len(found["reshapes and transposes"]) == 2
    assert "gathers with computed indices" not in found
    assert "reshapes to a computed shape" not in found


def test_inputs_and_states_are_examined(findings, bundle):
    """Even those that the first operation turns into something else."""
    wide, ids = np.ones((1, 2, 1), np.float32), np.zeros((2, 20_000), np.int32)
    found = findings(
        {"x": wide, "i": ids},
        lambda x, i: (mb.cast(x=x, dtype="fp16"), mb.cast(x=mb.reduce_sum(x=i, axes=[1]), dtype="fp16")),
    )
    assert found["floating-point types other than fp16"] == ["input x: fp32[1, 2, 1]"]
    assert found["integer and bool tensors"][0] == "input i: int32[2, 20000]"
    assert found["very large dimensions"] == ["input i: int32[2, 20000]"]
    single = findings({"x": np.ones((1, 2, 1), np.float16)}, lambda x: mb.squeeze(x=x, axes=[2]))
    assert single["a last axis of 1"] == ["input x: fp16[1, 2, 1]"]


def test_operations_of_nested_blocks_are_examined(findings):
    def body(x):
        return mb.cond(
            pred=mb.greater(x=mb.reduce_max(x=x, axes=[0, 1], keep_dims=False), y=np.float16(0)),
            _true_fn=lambda: mb.transpose(x=x, perm=[0, 1], name="inner"),
            _false_fn=lambda: mb.relu(x=x),
        )

    assert findings({"x": HALF}, body)["reshapes and transposes"] == ["inner (transpose): fp16[2, 3]"]


# --- rules that no program built here breaks: on a graph made by hand --------------------------------------


def _rule(name):
    return next(rule for rule in RULES if rule.name == name)


def _found(
    rule: Rule, *, output="fp16", shape=(1,), op_type="sin", inputs=(), states=(), state_type=None, dilations=None
):
    graph = Graph(18)
    if state_type is not None:
        graph.inputs = (graph.new_slot("keys", state_type),)
    slot = graph.new_slot("y", TensorType(BY_NAME[output], shape))
    attributes = {}
    if dilations is not None:
        attributes["dilations"] = (graph.new_slot("dilations", None),)
        graph.constants[attributes["dilations"][0]] = torch.tensor(dilations)
    node = Node(op_type, "y", None, (), (), attributes, (slot,))
    places = (Place(graph, node, frozenset(graph.constants)),)
    return list(rule.find(Subject(FunctionDescription("main", inputs, (), states), graph, places)))


def test_high_rank():
    rule = _rule("tensors of rank above 5")
    deep = (1, 1, 1, 1, 2, 32)
    keys = {"states": (TensorSpec("keys", "float16", deep),), "state_type": TensorType(BY_NAME["fp16"], deep)}
    assert _found(rule, **keys) == ["state keys: fp16[1, 1, 1, 1, 2, 32]"]
    assert _found(rule, shape=(1, 2, 1, 2, 1, 2)) == ["y (sin): fp16[1, 2, 1, 2, 1, 2]"]
    assert _found(rule, shape=(1, 2, 1, 2, 1)) == []


def test_sizes_at_their_limits():
    rule = _rule("very large dimensions")
    assert _found(rule, shape=(65_536, 1, 16_384, 16_384)) == []
    assert _found(rule, shape=(65_537, 1, 1, 1)) == ["y (sin): fp16[65537, 1, 1, 1]"]
    assert _found(rule, shape=(1, 1, 16_385, 1)) == ["y (sin): fp16[1, 1, 16385, 1]"]
    assert _found(rule, shape=(1, 16_385, 1, None)) == []


def test_wide_integers():
    rule = _rule("64-bit and uint32 integers")
    assert _found(rule, output="int64") == ["y (sin): int64[1]"]
    assert _found(rule, output="int32") == []


def test_many_enumerated_shapes():
    rule = _rule("inputs with more than 128 enumerated shapes")
    shapes = tuple((1, size) for size in range(1, 130))
    assert _found(rule, inputs=(TensorSpec("x", "float16", (1, None), shapes),)) == ["input x: 129 shapes"]
    assert _found(rule, inputs=(TensorSpec("x", "float16", (1, None), shapes[1:]),)) == []


def test_range_without_an_upper_bound():
    spec = TensorSpec("x", "float16", (1, None), size_ranges=((1, 1), (2, None)))
    assert _found(_rule("inputs with range shapes"), inputs=(spec,)) == [
        "input x: rank 2 with sizes [1, at least 2], which has no upper bound"
    ]


def test_recurrent_layers_and_dilations():
    assert _found(_rule("recurrent layers"), op_type="lstm") == ["y (lstm)"]
    rule = _rule("dilated convolutions")
    assert _found(rule, op_type="conv", dilations=[1, 2]) == ["y (conv): dilations [1, 2]"]
    assert _found(rule, op_type="conv", dilations=[1, 1]) == []
    assert _found(rule, op_type="conv") == []


def test_states_of_odd_sizes():
    rule = _rule("states whose last axis is not a multiple of 32")
    assert _found(rule, states=(TensorSpec("keys", "float16", (1, 4, 70)),)) == ["state keys: [1, 4, 70]"]
    assert _found(rule, states=(TensorSpec("keys", "float16", (1, 4, 64)),)) == []


def test_every_rule_names_its_source_and_has_a_test():
    for rule in RULES:
        assert "github.com/" in rule.source or "apple.com/" in rule.source or "apple.github.io/" in rule.source
        assert rule.why.endswith(".")
    by_hand = {
        "64-bit and uint32 integers",
        "inputs with more than 128 enumerated shapes",
        "recurrent layers",
        "dilated convolutions",
        "states whose last axis is not a multiple of 32",
    }
    assert {rule.name for rule in RULES} == {each[0] for each in BROKEN} | by_hand


# --- the command ----------------------------------------------------------------------------------------


def test_report(mil, save, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    save("topk", {"x": HALF}, lambda x: mb.topk(x=x, k=2, axis=1, name="best")[0])
    ended = mil("lint", "topk.mlpackage")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == (
        "topk.mlpackage, function main\n"
        "\n"
        "integer and bool tensors: 1\n"
        "    best (topk): int32[2, 2]\n"
        "  why: The Neural Engine appears to use float16 for everything.\n"
        "  source: hollance/neural-engine, Is the ANE 16-bit? (observations),\n"
        "  github.com/hollance/neural-engine/blob/master/docs/16-bit.md\n"
        "\n"
        "topk: 1\n"
        "    best (topk)\n"
        "  why: It and what consumes its indices were the operations that left the Neural\n"
        "  Engine.\n"
        "  source: a user's measurement with MLComputePlan (M3 Pro, macOS 27),\n"
        "  github.com/roboflow/rf-detr/pull/1495\n"
        "\n"
        "2 findings; these are hints, see --help\n"
    )


def test_findings_are_cut_without_all(mil, save):
    """The eighth is the last that is listed: a ninth costs the same line."""

    def linears(count):
        def body(x):
            for index in range(count):
                x = mb.linear(x=x, weight=np.ones((4, 4), np.float16), name=f"linear_{index}")
            return x

        return save(f"linear{count}", {"x": np.ones((1, 5, 4), np.float16)}, body)

    nine = linears(9)
    short, whole = mil("lint", nine).out, mil("lint", nine, "--all").out
    assert "dimensions: 9\n" in short
    assert "    linear_7 (linear): fp16[1, 5, 4]\n    … and 1 more; --all lists them\n  why: " in short
    assert "linear_8" not in short
    assert "    linear_8 (linear): fp16[1, 5, 4]\n  why: " in whole
    assert "more" not in whole
    assert short.splitlines()[-1] == whole.splitlines()[-1] == "9 findings; these are hints, see --help"
    assert mil("lint", linears(8)).out.count("linear_") == 8
    assert "--all" not in mil("lint", linears(8)).out


def test_strict(mil, save, bundle):
    assert mil("lint", bundle / "cache.mlpackage", "--strict").code == 3
    clean = save("clean", {"x": np.ones((1, 4, 1, 64), np.float16)}, lambda x: mb.relu(x=x))
    ended = mil("lint", clean, "--strict")
    assert ended.code == 0
    assert ended.out.endswith("\n0 findings; these are hints, see --help\n")


def test_unknown_function_is_rejected(mil, bundle):
    assert mil("lint", bundle / "cache.mlpackage", "--function", "none").code == 44


def test_findings_of_a_decoder_fit_80_columns(mil, bundle, monkeypatch):
    monkeypatch.chdir(bundle)
    assert max(map(len, mil("lint", "decoder.mlpackage").out.splitlines())) <= 80
