"""What `coremill mil inspect` says of packages, exactly; sizes against sums worked out by hand."""

from __future__ import annotations

import json
import logging

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.cli import main as cli

INT4 = """\
{package}
ML Program, specification version 9, 1 function

function main, operations of iOS18
        name  dtype    shape
──────────────────────────────
input   x     float16  [3, 32]
output  y     float16  [3, 24]

2 operations
constexpr_blockwise_shift_scale 1, linear 1

weights, 672 bytes
dtype  tensors  elements  bytes
───────────────────────────────
int4         2       864    432
fp16         2       120    240

of these, compressed
operation                        count  bytes stored  bytes dense
─────────────────────────────────────────────────────────────────
constexpr_blockwise_shift_scale      1           624        1,536
"""


def test_compressed_weights(mil, bundle):
    """864 = 24 · 32 + 24 · 4 int4 in half a byte each; 120 = 24 · 4 scales and 24 biases; dense 24 · 32 fp16."""
    package = bundle / "int4.mlpackage"
    assert mil("inspect", package) == (0, INT4.format(package=package), "")


def test_states_and_ranges(mil, bundle):
    out = mil("inspect", bundle / "cache.mlpackage").out
    assert "input   input_ids  int32    rank 2 with sizes [1, 1 to 8]\n" in out
    assert "input   mask       float16  rank 4 with sizes [1, 1, 1 to 8, 1 to 16]\n" in out
    assert "output  logits     float16  [1, ?, 48]\n" in out
    assert "state   keys       float16  [1, 4, 16, 8]\nstate   values     float16  [1, 4, 16, 8]\n" in out


def test_enumerated_shapes_start_with_the_default(mil, bundle):
    out = mil("inspect", bundle / "decoder.mlpackage").out
    assert "input   input_ids  int32    one of [1, 8], [1, 16], [1, 24]\n" in out


def test_operations_of_nested_blocks_count(mil, bundle):
    out = mil("inspect", bundle / "control_flow.mlpackage").out
    assert (
        "16 operations\n"
        "add 3, identity 3, mul 2, abs 1, cond 1, greater 1, less 1, reduce_max 1,\n"
        "reduce_sum 1, squeeze 1, while_loop 1\n"
    ) in out


@pytest.mark.parametrize("name", ["decoder", "cache", "control_flow", "indexing", "normalization"])
def test_it_fits_80_columns(mil, bundle, name, monkeypatch):
    monkeypatch.chdir(bundle)  # a path is printed whole
    assert max(map(len, mil("inspect", f"{name}.mlpackage").out.splitlines())) <= 80


def test_json_has_the_same_content(mil, bundle):
    document = json.loads(mil("inspect", bundle / "cache.mlpackage", "--json").out)
    assert document["package"] == str(bundle / "cache.mlpackage")
    (function,) = document["functions"]
    assert function["inputs"][0] == {
        "name": "input_ids",
        "dtype": "int32",
        "shape": [1, None],
        "enumerated_shapes": [],
        "size_ranges": [[1, 1], [1, 8]],
        "default": None,
    }
    assert [each["name"] for each in function["states"]] == ["keys", "values"]
    assert function["operations"]["read_state"] == 4
    assert function["weights"][0] == {"dtype": "fp16", "tensors": 9, "elements": 6288, "size_bytes": 12576}


def test_a_weight_that_two_operations_take_counts_once(mil, save):
    table = np.arange(32, dtype=np.float32)

    def body(x):
        shared = mb.const(val=table)
        return mb.mul(x=mb.add(x=x, y=shared), y=shared)

    out = mil("inspect", save("shared", {"x": table}, body)).out
    assert "weights, 128 bytes\n" in out
    assert "fp32         1        32    128\n" in out


def test_a_weight_that_two_branches_take_counts_once(mil, save):
    table = np.arange(32, dtype=np.float32)

    def body(x):
        shared = mb.const(val=table)
        is_positive = mb.greater(x=mb.reduce_sum(x=x, axes=[0], keep_dims=False), y=np.float32(0))
        return mb.cond(
            pred=is_positive,
            _true_fn=lambda: mb.add(x=x, y=shared),
            _false_fn=lambda: mb.mul(x=mb.sin(x=mb.exp(x=x)), y=shared),
        )

    # The 33rd is what the sum is compared with.
    assert "fp32         2        33    132\n" in mil("inspect", save("shared", {"x": table}, body)).out


def test_every_function_is_described(mil, save, tmp_path):
    x = np.ones(4, np.float32)
    one = save("one", {"x": x}, lambda x: mb.sin(x=x))
    other = save("other", {"x": x}, lambda x: mb.cos(x=mb.exp(x=x)))
    description = ct.utils.MultiFunctionDescriptor()
    description.add_function(str(one), src_function_name="main", target_function_name="first")
    description.add_function(str(other), src_function_name="main", target_function_name="second")
    description.default_function_name = "first"
    ct.utils.save_multifunction(description, str(tmp_path / "both.mlpackage"))
    out = mil("inspect", tmp_path / "both.mlpackage").out
    assert "specification version 9, 2 functions\n" in out
    first, second = out.split("function first, operations of iOS18\n")[1].split(
        "function second, operations of iOS18\n"
    )
    assert "\n1 operations\nsin 1\n" in first
    assert "\n2 operations\ncos 1, exp 1\n" in second


def test_invalid_package_is_rejected(mil, tmp_path):
    ended = mil("inspect", tmp_path / "none.mlpackage")
    assert ended.code == 44
    assert ended.err == (
        f"package error: {tmp_path / 'none.mlpackage'}: no such package\n"
        "  expected: an .mlpackage directory as coremltools or Xcode saves it\n"
    )


def test_command_does_not_change_coremltools_logging(capsys):
    """A conversion in the same process still hears of its warnings."""
    logger = logging.getLogger("coremltools")
    before = logger.level
    with pytest.raises(SystemExit):
        cli.main(["mil", "inspect", "--help"])
    assert logger.level == before
    assert "usage: " in capsys.readouterr().out
