"""`coremill mil compare`: figures against numpy's, TorchScript beside a package, drawn inputs, bounds, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from torch import nn

from coremill.core.errors import PackageError, PredictionInputError, TorchScriptError
from coremill.mil import MLModel
from coremill.mil.commands.arrays import draw_inputs, index_limits
from coremill.mil.commands.compare import compare, torchscript_runner
from coremill.mil.graph import Graph, Node
from coremill.mil.ops.registry import find
from coremill.mil.values import BY_NAME, TensorType

X = np.array([[1, 2, -3, 4]], np.float32)


@pytest.fixture(scope="module")
def pair(save_in, tmp_path_factory):
    """y and y + (0, 0, 0, 0.04): noise 0.0016 against a signal of 30."""
    folder, error = tmp_path_factory.mktemp("pair"), np.array([[0, 0, 0, 0.04]], np.float32)
    return (
        save_in(folder, "a", {"x": X}, lambda x: mb.identity(x=x, name="logits")),
        save_in(folder, "b", {"x": X}, lambda x: mb.add(x=x, y=error, name="logits")),
    )


@pytest.fixture
def given(tmp_path):
    np.savez(tmp_path / "x.npz", x=X)
    return tmp_path / "x.npz"


def test_figures(mil, pair, given):
    """10·log10(30 / 0.0016) = 42.7 dB; the KL from its definition."""
    both = (X[0].astype(np.float64), (X[0] + np.array([0, 0, 0, 0.04], np.float32)).astype(np.float64))
    p, q = (np.exp(each) / np.exp(each).sum() for each in both)
    kl = (p * np.log(p / q)).sum()
    ended = mil("compare", *pair, "--input", given)
    assert ended.code == 0
    assert ended.out.splitlines()[-1].split() == [
        *("logits", "float32", "[1,", "4]", "0.04", "42.7"),
        f"{kl:.4g}",
        "all",
    ]


def test_equal_packages(mil, pair):
    ended = mil("compare", pair[0], pair[0])
    assert ended.out.endswith(
        "inputs x [1, 4], drawn with seed 0\n"
        "output  dtype    shape   max abs  SQNR dB  KL nats  finite\n"
        "──────────────────────────────────────────────────────────\n"
        "logits  float32  [1, 4]        0    equal        0  all\n"
    )


@pytest.mark.parametrize(
    ("bounds", "code"),
    [
        (["--max-abs", "0.041"], 0),
        (["--max-abs", "0.039"], 3),
        (["--min-sqnr", "42"], 0),
        (["--min-sqnr", "43"], 3),
        (["--max-abs", "0.041", "--min-sqnr", "43"], 3),
    ],
)
def test_bounds(mil, pair, given, bounds, code):
    ended = mil("compare", *pair, "--input", given, *bounds)
    assert ended.code == code
    assert ended.out.splitlines()[-1].endswith("  failed" if code else "  passed")


def test_values_that_are_not_finite_fail_every_bound(mil, save, tmp_path):
    package = save("log", {"x": X}, lambda x: mb.log(x=x, epsilon=np.float32(0), name="y"))
    np.savez(tmp_path / "x.npz", x=X)
    ended = mil("compare", package, package, "--input", tmp_path / "x.npz", "--max-abs", "9")
    assert ended.code == 3
    assert ended.out.splitlines()[-1].split() == [
        *("y", "float32", "[1,", "4]", "nan", "nan", "1", "NaN", "failed")
    ]


def test_kl_is_computed_for_logits_and_with_kl(mil, save):
    package = save("two", {"x": X}, lambda x: (mb.sin(x=x, name="scores"), mb.cos(x=x, name="y")))
    rows = [row.split() for row in mil("compare", package, package, "--kl", "scores").out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["scores", "y"]
    assert [len(row) for row in rows] == [8, 7]


def test_kl_without_classes_is_rejected(mil, pair, save):
    ended = mil("compare", *pair, "--kl", "loggits")
    assert (ended.code, ended.err) == (
        10,
        "configuration error: --kl loggits: no such output\n  expected: one of ['logits']\n",
    )
    ints = save("ints", {"x": X}, lambda x: mb.cast(x=x, dtype="int32", name="y"))
    ended = mil("compare", ints, ints, "--kl", "y")
    assert (ended.code, ended.err) == (
        10,
        "configuration error: --kl y: it is int32 of shape [1, 4]\n"
        "  expected: floats with at least two classes along the last axis\n",
    )


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 5)

    def forward(self, ids, offset):
        x = self.embed(ids) + offset
        return self.head(x), x.sum(-1)


@pytest.fixture
def traced(tmp_path):
    module = Head().eval()
    path = tmp_path / "head.pt"
    with torch.no_grad():
        torch.jit.trace(module, (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3, 1))).save(str(path))
    return module, path


def test_a_package_against_torchscript(mil, save, traced):
    """The program is the module's, written anew; floats of fp16 inputs go to torch as float32."""
    module, path = traced
    table, weight, bias = (
        each.detach().numpy().astype(np.float16)
        for each in (module.embed.weight, module.head.weight, module.head.bias)
    )

    def body(ids, offset):
        x = mb.add(x=mb.gather(x=table, indices=ids, axis=0), y=offset)
        return mb.linear(x=x, weight=weight, bias=bias, name="logits"), mb.reduce_sum(x=x, axes=[-1], name="sum")

    package = save("head", {"ids": np.zeros((1, 3), np.int32), "offset": np.zeros((1, 3, 1), np.float16)}, body)
    ended = mil("compare", path, package, "--seed", 4, "--min-sqnr", 55)
    assert ended.code == 0, ended.out
    back = mil("compare", package, path, "--seed", 4, "--min-sqnr", 55)
    assert back.code == 0
    first, second = (row.split() for row in back.out.splitlines() if row.startswith(("logits ", "sum ")))
    assert (first[:3], second[:3]) == (["logits", "float16", "/"], ["sum", "float16", "/"])
    assert "inputs ids [1, 3], offset [1, 3, 1], drawn with seed 4\n" in ended.out
    broken = save(
        "broken",
        {"ids": np.zeros((1, 3), np.int32), "offset": np.zeros((1, 3, 1), np.float16)},
        lambda ids, offset: body(ids, mb.mul(x=offset, y=np.float16(1.1))),
    )
    assert mil("compare", path, broken, "--seed", 4, "--min-sqnr", 55).code == 3


def test_two_torchscript_files_describe_no_inputs(mil, traced):
    _, path = traced
    ended = mil("compare", path, path)
    assert (ended.code, ended.err) == (
        10,
        "configuration error: two TorchScript files, which describe no inputs\n  expected: --input X.npz\n",
    )


def test_file_that_is_not_torchscript_is_rejected(mil, pair, given, tmp_path):
    path = tmp_path / "x.pt"
    ended = mil("compare", pair[0], path)
    assert ended.code == 41
    assert ended.err.startswith(f"TorchScript error: cannot load {path}: The provided filename")
    torch.save({"weight": torch.ones(3)}, path)
    ended = mil("compare", pair[0], path)
    assert ended.code == 41
    assert ended.err.endswith("\n  expected: a TorchScript program, as torch.jit.save writes it\n")
    path.write_bytes(b"nonsense")
    assert mil("compare", pair[0], path).code == 41


def test_wrong_inputs_of_torchscript_are_rejected(mil, pair, traced):
    ended = mil("compare", pair[0], traced[1])
    assert ended.code == 41
    assert ended.err.startswith(f"TorchScript error: {traced[1]} does not run on these inputs: ")


class Halved(nn.Module):
    def forward(self, x):
        return x.to(torch.bfloat16), x.to(torch.float16)


class Weighted(nn.Module):
    """Gives its parameter itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, x):
        return self.weight


class Sparse(nn.Module):
    def forward(self, x):
        return x.to_sparse()


class Complex(nn.Module):
    def forward(self, x):
        return torch.complex(x, x)


class Empty(nn.Module):
    def forward(self, x):
        return ()


@pytest.fixture
def scripted(tmp_path):
    """`scripted(module)`: what runs it, saved as TorchScript."""

    def run(module):
        path = tmp_path / "module.pt"
        torch.jit.script(module).save(str(path))
        return torchscript_runner(path)

    return run


def test_bfloat16_outputs_and_parameters_of_torchscript(scripted):
    """numpy has no bfloat16: it becomes float32, which holds all of its values. 1 + 2⁻⁸ lies between two."""
    first, second = scripted(Halved())({"x": np.array([1.00390625, 3], np.float32)}).values()
    np.testing.assert_array_equal(first, np.array([1, 3], np.float32), strict=True)
    np.testing.assert_array_equal(second, np.array([1.00390625, 3], np.float16), strict=True)
    (weight,) = scripted(Weighted())({"x": X}).values()
    np.testing.assert_array_equal(weight, np.array([3, 4], np.float32), strict=True)


@pytest.mark.parametrize("module", [Sparse(), Complex(), Empty()], ids=["sparse", "complex", "empty"])
def test_outputs_of_torchscript_that_are_not_tensors_are_rejected(scripted, module):
    with pytest.raises(TorchScriptError, match=r"expected: only dense tensors of real numbers$"):
        scripted(module)({"x": X})


def test_arrays_that_torch_does_not_support_are_rejected(scripted):
    with pytest.raises(PredictionInputError, match=r"^input 'x' is <U1\n  expected: numbers or bools$"):
        scripted(Weighted())({"x": np.array(["a", "b"])})


def test_outputs_that_do_not_pair(mil, pair, save):
    two = save("two", {"x": X}, lambda x: (mb.sin(x=x, name="a"), mb.cos(x=x, name="b")))
    ended = mil("compare", pair[0], two)
    assert (ended.code, ended.err) == (
        44,
        "package error: the measured model has the outputs ['a', 'b']\n"
        "  expected: as many as the first, ['logits']\n",
    )


def test_outputs_are_paired_by_name_and_otherwise_in_order():
    one, two = np.ones(3, np.float32), np.full(3, 2, np.float32)
    by_name = compare({"a": one, "b": two}, {"b": two, "a": one})
    in_order = compare({"a": one, "b": two}, {"c": one, "d": two})
    for found in (by_name, in_order):
        assert [(each.name, each.max_abs_err) for each in found] == [("a", 0), ("b", 0)]
    with pytest.raises(
        PackageError, match=r"^output 'a' of the measured model is of shape \[2\]\n  expected: \[3\]"
    ):
        compare({"a": one}, {"a": one[:2]})


def test_labels_are_equal_or_not():
    cat, dog = {"label": np.asarray("cat")}, {"label": np.asarray("dog")}
    assert compare(cat, cat)[0].passes(0, 300)
    assert not compare(cat, dog)[0].passes(None, 1)


# --- inputs drawn from a description ------------------------------------------------------------------


def test_ids_are_drawn_within_the_table_they_index(bundle):
    """The decoder's table has 48 rows; the converter puts a cast, and a wrap of negative ids, in between."""
    model = MLModel(bundle / "decoder.mlpackage")
    assert index_limits(model.program.graph) == {"input_ids": 48}
    assert index_limits(MLModel(bundle / "cache.mlpackage").program.graph) == {"input_ids": 48}
    drawn = np.concatenate([draw_inputs(model, seed)["input_ids"].ravel() for seed in range(60)])
    assert (drawn.min(), drawn.max()) == (0, 47)


def test_the_smallest_of_several_tables_counts(save):
    def one(i):
        return mb.gather(x=np.zeros((7, 5), np.float32), indices=i, axis=1)

    def both(i):
        first = mb.gather(x=np.zeros((9, 2), np.float32), indices=i, axis=0)
        return first, mb.gather(x=np.zeros((4, 2), np.float32), indices=mb.reshape(x=i, shape=[1, 2]), axis=0)

    for body, limit in ((one, 5), (both, 4)):
        package = save(body.__name__, {"i": np.zeros(2, np.int32)}, body)
        assert index_limits(MLModel(package).program.graph) == {"i": limit}


@pytest.mark.parametrize(("axis", "limits"), [(1, {"i": 5}), (-1, {"i": 5}), (7, {}), (-3, {}), ([0, 1], {})])
def test_gather_along_an_invalid_axis_sets_no_limit(axis, limits):
    """What is wrong there, prediction says."""
    graph = Graph(18)
    table, indices, along, y = (graph.new_slot(name, None) for name in ("table", "i", "axis", "y"))
    graph.types[table] = TensorType(BY_NAME["fp16"], (7, 5))
    graph.types[indices] = TensorType(BY_NAME["int32"], (2,))
    graph.constants |= {table: torch.zeros(7, 5), along: torch.tensor(axis, dtype=torch.int32)}
    graph.inputs, graph.outputs = (indices,), (y,)
    graph.nodes.append(
        Node("gather", "y", find("gather", 18), ((table,), (indices,)), (False, False), {"axis": (along,)}, (y,))
    )
    assert index_limits(graph) == limits


def test_ids_of_an_empty_table_are_drawn(save):
    table = np.zeros((0, 2), np.float32)
    package = save("none", {"i": np.zeros(2, np.int32)}, lambda i: mb.gather(x=table, indices=i, axis=0))
    assert draw_inputs(MLModel(package), 0)["i"].shape == (2,)


def test_other_integers_are_zero_or_one(save):
    package = save("cast", {"i": np.zeros(64, np.int32)}, lambda i: mb.cast(x=i, dtype="fp32"))
    assert set(draw_inputs(MLModel(package), 0)["i"].tolist()) == {0, 1}


def test_drawing_is_the_same_for_the_same_seed(bundle):
    model = MLModel(bundle / "normalization.mlpackage")
    first, again, other = (draw_inputs(model, seed) for seed in (5, 5, 6))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()


@pytest.mark.parametrize(("sizes", "drawn"), [((1, 8), 8), ((1, 300), 16), ((40, 300), 40)])
def test_drawn_size_of_a_range_is_near_sixteen(build, sizes, drawn):
    model = MLModel(build({"x": ((1, sizes), np.float32)}, lambda x: mb.sin(x=x)))
    assert draw_inputs(model, 0)["x"].shape == (1, drawn)
