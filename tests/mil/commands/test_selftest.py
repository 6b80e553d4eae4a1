"""`coremill mil selftest`: the bundle passes, is what its script makes, and notices what is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from coremill.core.digest import digest, size_bytes
from coremill.mil import MLModel
from coremill.mil.commands import selftest
from coremill.mil.commands.arrays import read_npz, write_npz

OUTPUTS = {
    "decoder": ["logits"],
    "cache": ["logits"],
    "int4": ["y"],
    "int8": ["y"],
    "lut": ["y"],
    "control_flow": ["y", "count"],
    "indexing": ["gathered", "along", "nd", "scattered_along", "scattered_nd"],
    "normalization": ["layer_norm", "attention", "softmax", "log_sum_exp"],
}


@pytest.fixture(scope="module")
def recipe():
    path = Path(__file__).with_name("make_selftest.py")
    spec = importlib.util.spec_from_file_location("make_selftest", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_selftest"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_selftest"]


@pytest.fixture
def altered(bundle, tmp_path):
    """A copy of the bundle with two cases, to be altered."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    index = json.loads((folder / "bundle.json").read_text())
    index["cases"] = [case for case in index["cases"] if case["name"] in ("int8", "control_flow")]
    (folder / "bundle.json").write_text(json.dumps(index))
    return folder


def test_all_pass(mil):
    ended = mil("selftest")
    assert (ended.code, ended.err) == (0, "")
    rows = ended.out.splitlines()
    # How far fp16 is off depends on the order in which a processor adds; copies and integers are exact.
    found = [(row.split()[0], row.split()[1]) for row in rows if row.endswith("  passed")]
    assert found == [(case, output) for case, outputs in OUTPUTS.items() for output in outputs]
    assert "control_flow   count                    0    equal  passed\n" in ended.out
    assert "indexing       scattered_along          0    equal  passed\n" in ended.out
    assert rows[-1] == "8 of 8 packages passed"
    if sys.platform != "darwin":
        assert rows[-2] == f"Core ML: not_run, it needs macOS and this is {sys.platform}"


def test_expected_outputs_are_those_of_torch_and_numpy(recipe, bundle):
    for case in recipe.CASES:
        stored, made = read_npz(bundle / f"{case.name}.npz"), recipe.arrays_of(case)
        assert stored.keys() == made.keys()
        for name, array in made.items():
            assert stored[name].dtype == array.dtype
            np.testing.assert_allclose(stored[name], array, rtol=1e-5, atol=1e-6, err_msg=f"{case.name} {name}")


def test_packages_match_the_recipe(recipe, bundle, tmp_path):
    """Those built operation by operation, to the byte; the converter's own may change with its version."""
    for case in recipe.CASES[2:]:
        made = tmp_path / f"{case.name}.mlpackage"
        recipe.save_package(case.model(), made)
        assert digest(made) == digest(bundle / made.name), case.name


def test_index_lists_the_recipe(recipe, bundle):
    listed = json.loads((bundle / "bundle.json").read_text())["cases"]
    assert [(each["name"], each["min_sqnr_db"]) for each in listed] == [
        (case.name, case.min_sqnr_db) for case in recipe.CASES
    ]
    assert size_bytes(bundle) < 150_000


def test_some_cases_have_several_calls(bundle):
    """Every enumerated length; decoding over several calls, whose state counts; both sides of the branch."""
    assert {
        name: len(selftest._calls(bundle / f"{name}.npz")) for name in ("decoder", "cache", "control_flow")
    } == {
        "decoder": 3,
        "cache": 4,
        "control_flow": 2,
    }
    model = MLModel(bundle / "cache.mlpackage")
    calls = selftest._calls(bundle / "cache.npz")
    alone = model.predict(calls[1].inputs, model.make_state())["logits"]
    assert np.abs(alone - calls[1].outputs["logits"]).max() > 0.05


def test_wrong_output_fails(mil, altered):
    arrays = read_npz(altered / "int8.npz")
    arrays["0.output.y"] = arrays["0.output.y"] * np.float32(1.01)
    write_npz(altered / "int8.npz", arrays)
    ended = mil("selftest", altered)
    assert ended.code == 3
    # The outputs are a hundredth off: 20·log10(1.01 / 0.01) = 40.1 dB.
    assert re.search(r"^int8 +y +0\.\d+ +40\.1  failed$", ended.out, re.MULTILINE)
    assert ended.out.endswith("1 of 2 packages passed\n")


def test_integers_must_be_equal(mil, altered):
    arrays = read_npz(altered / "control_flow.npz")
    arrays["1.output.count"] = arrays["1.output.count"] + 1
    write_npz(altered / "control_flow.npz", arrays)
    ended = mil("selftest", altered)
    assert ended.code == 3
    (row,) = [row for row in ended.out.splitlines() if "count" in row]
    assert row.split()[:3] == ["control_flow", "count", "1"]
    assert row.endswith("failed")


def test_a_value_that_is_not_finite_fails(mil, altered):
    arrays = read_npz(altered / "int8.npz")
    arrays["0.input.x"][0, 0] = np.nan
    write_npz(altered / "int8.npz", arrays)
    ended = mil("selftest", altered)
    assert ended.code == 3
    assert "int8          y           nan      nan  failed\n" in ended.out


@pytest.mark.parametrize("call", [0, 1])
def test_value_that_is_not_finite_is_the_worst(mil, altered, call):
    """Also if a later call is exact."""
    arrays = read_npz(altered / "control_flow.npz")
    arrays[f"{call}.input.x"][0] = np.nan
    write_npz(altered / "control_flow.npz", arrays)
    ended = mil("selftest", altered)
    assert ended.code == 3
    assert "control_flow  y            nan      nan  failed\n" in ended.out


def test_failing_package_does_not_stop_the_others(mil, altered):
    weights = altered / "int8.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    weights.write_bytes(weights.read_bytes()[:100])
    ended = mil("selftest", altered)
    assert ended.code == 3
    assert "int8                                    failed\n" in ended.out
    assert f"int8: package error: {weights}: the program reads a blob at offset" in ended.out
    assert "control_flow  count         0    equal  passed\n" in ended.out
    assert ended.out.endswith("1 of 2 packages passed\n")


def test_written_and_run_elsewhere(mil, tmp_path):
    assert mil("selftest", "--write", tmp_path / "copy") == (0, "", "")
    assert digest(tmp_path / "copy") == digest(selftest.BUNDLE)
    assert mil("selftest", tmp_path / "copy").out == mil("selftest").out
    ended = mil("selftest", "--write", tmp_path / "copy")
    assert (ended.code, ended.err) == (
        52,
        f"output error: {tmp_path / 'copy'} exists\n  expected: a new directory\n",
    )
    (tmp_path / "file").write_text("")
    assert mil("selftest", "--write", tmp_path / "file" / "copy").code == 52


def test_invalid_bundle_is_rejected(mil, tmp_path):
    ended = mil("selftest", tmp_path)
    assert (ended.code, ended.err) == (
        44,
        f"package error: cannot read {tmp_path / 'bundle.json'}: No such file or directory\n"
        "  expected: a directory that `coremill mil selftest --write` wrote\n",
    )
    (tmp_path / "bundle.json").write_text("{")
    assert mil("selftest", tmp_path).code == 11
    for text in (
        "[]",
        "{}",
        '{"cases": [{"name": "x"}]}',
        '{"cases": [{"name": "x", "min_sqnr_db": "high"}]}',
        '{"cases": [{"name": "x", "min_sqnr_db": 1' + "0" * 400 + "}]}",
        '{"cases": [{"name": "x", "min_sqnr_db": -Infinity}]}',
    ):
        (tmp_path / "bundle.json").write_text(text)
        ended = mil("selftest", tmp_path)
        assert ended.code == 11
        assert ended.err.startswith(f"document error: {tmp_path / 'bundle.json'} does not list cases (")


@pytest.mark.parametrize("cases", [[], {}])
def test_bundle_without_cases_is_rejected(mil, tmp_path, cases):
    (tmp_path / "bundle.json").write_text(json.dumps({"cases": cases}))
    ended = mil("selftest", tmp_path)
    assert (ended.code, ended.out) == (11, "")
    assert ended.err.startswith(f"document error: {tmp_path / 'bundle.json'} lists no cases\n  expected: ")


Y = np.ones((1, 2), np.float32)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({}, "contains no calls"),
        ({"0.input.x": Y}, "expects no outputs of call 0"),
        ({"0.input.x": Y, "0.output.y": Y, "1.input.x": Y}, "expects no outputs of call 1"),
        ({"0.input.x": Y, "0.output.y": Y[:, :0]}, "expects nothing of output 'y' of call 0, of shape [1, 0]"),
        ({"0.input.x": Y, "0.output.y": Y, "2.input.x": Y, "2.output.y": Y}, "contains the calls [0, 2]"),
        *(
            ({"0.output.y": Y, key: Y}, f"contains an array named {key!r}")
            for key in ("x", "0.input", "0.input.", "0.inputs.x", "x.input.x", "-1.input.x", "00.input.x", "²..x")
        ),
    ],
)
def test_calls_that_compare_nothing(mil, altered, arrays, reason):
    write_npz(altered / "int8.npz", arrays)
    ended = mil("selftest", altered)
    assert (ended.code, ended.out) == (11, "")
    assert ended.err.startswith(f"document error: {altered / 'int8.npz'} {reason}\n  expected: ")


class FakeDevice:
    """Stands in for coremltools' MLModel on a Mac: the reference, one thousandth off, with a state of its own."""

    opened: list[Path] = []  # noqa: RUF012

    def __init__(self, path: str) -> None:
        self.opened.append(Path(path))
        self._model = MLModel(path)

    def get_spec(self):
        from coremill.mil.loader import open_package

        return open_package(self.opened[-1]).spec

    def make_state(self):
        return self._model.make_state()

    def predict(self, data, state=None):
        outputs = self._model.predict(data, state)
        return {name: (array * array.dtype.type(1.001)).astype(array.dtype) for name, array in outputs.items()}


@pytest.fixture
def device(monkeypatch):
    """A Mac, whose Core ML predicts as `device(predict)` says: from the device, the inputs and a state."""
    monkeypatch.setattr(selftest, "CoreMLToolsModel", FakeDevice)
    monkeypatch.setattr(sys, "platform", "darwin")
    FakeDevice.opened.clear()
    return lambda predict: monkeypatch.setattr(FakeDevice, "predict", predict)


REFERENCE_ROW = re.compile(r"^int8 +y +0\.\d+ +\d+\.\d  passed", re.MULTILINE)


def test_macos_reports_the_difference_of_device_and_reference(mil, bundle, device):
    ended = mil("selftest")
    assert ended.code == 0
    assert "not_run" not in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    rows = [row.split() for row in ended.out.splitlines()]
    assert rows[0] == ["package", "output", "max", "abs", "SQNR", "dB", "apart", "apart", "dB"]
    assert [tuple(row[:2]) for row in rows if len(row) == 7 and row[4] == "passed"] == [
        (case, output) for case, outputs in OUTPUTS.items() for output in outputs
    ]
    (row,) = [row for row in rows if row[1:2] == ["layer_norm"]]
    assert row[4] == "passed"
    assert row[6:] == ["60.0"]
    assert len(FakeDevice.opened) == 8
    assert not any(path.is_relative_to(bundle) for path in FakeDevice.opened)
    assert ended.out.endswith(
        "apart: difference between Core ML and the reference, in the same measures\n"
        "Core ML: 8 of 8 packages ran\n"
        "Core ML is far off (below 40 dB, or other integers) in 0\n"
        "8 of 8 packages passed\n"
    )
    assert mil("selftest", "--strict").code == 0


@pytest.mark.parametrize("error", [RuntimeError, Exception])
def test_failure_of_core_ml_does_not_fail_the_reference(mil, altered, device, error):
    """coremltools raises plain Exception where its libraries are missing."""

    def refuse(self, data, state=None):
        raise error("Error in declaring network.")

    device(refuse)
    ended = mil("selftest", altered)
    assert ended.code == 0
    assert REFERENCE_ROW.search(ended.out)
    (row,) = [row for row in ended.out.splitlines() if row.startswith("int8 ")]
    assert row.endswith("failed")
    assert "\nint8: Core ML does not run it: Error in declaring network.\n" in ended.out
    assert "\nCore ML: 0 of 2 packages ran\n" in ended.out
    assert ended.out.endswith(" in 0\n2 of 2 packages passed\n")
    strict = mil("selftest", altered, "--strict")
    assert (strict.code, strict.out) == (3, ended.out)


def test_core_ml_that_cannot_be_opened_is_reported(mil, altered, device, monkeypatch):
    def refuse(self, path):
        raise Exception("Unable to load CoreML.framework. Cannot make predictions.")

    monkeypatch.setattr(FakeDevice, "__init__", refuse)
    ended = mil("selftest", altered)
    assert ended.code == 0
    assert REFERENCE_ROW.search(ended.out)
    assert "Core ML does not run it: Unable to load CoreML.framework. Cannot make predictions.\n" in ended.out


@pytest.mark.parametrize(
    "outputs",
    [
        {"y": np.zeros((1, 1, 9), np.float32)},
        {},
        {"y": np.zeros((3, 16), np.float16), "z": np.zeros(1)},
    ],
)
def test_core_ml_with_different_outputs_is_reported(mil, altered, device, outputs):
    device(lambda self, data, state=None: outputs)
    ended = mil("selftest", altered)
    assert ended.code == 0
    assert REFERENCE_ROW.search(ended.out)
    assert re.search(r"^int8: Core ML's outputs cannot be compared: .*outputs? ", ended.out, re.MULTILINE)
    assert mil("selftest", altered, "--strict").code == 3


@pytest.mark.parametrize(("factor", "is_far"), [(1.02, True), (1.005, False), (np.nan, True)])
def test_core_ml_far_from_the_reference_is_reported(mil, altered, device, factor, is_far):
    """20·log10(1 / 0.02) = 34 dB, and 46 dB of a half per cent."""

    def scaled(self, data, state=None):
        outputs = self._model.predict(data, state)
        return {n: a.astype(np.float32) * np.float32(factor) if n == "y" else a for n, a in outputs.items()}

    device(scaled)
    ended = mil("selftest", altered)
    assert ended.code == 0
    assert "\nCore ML: 2 of 2 packages ran\n" in ended.out
    assert f" in {'2: int8, control_flow' if is_far else '0'}\n2 of 2 packages passed\n" in ended.out
    assert mil("selftest", altered, "--strict").code == (3 if is_far else 0)


def test_integers_of_core_ml_that_differ_are_far_off(mil, altered, device):
    """A count of 5001 for 5000 is 74 dB, and wrong."""

    def count(self, data, state=None):
        outputs = self._model.predict(data, state)
        return {name: array + (array.dtype.kind == "i") for name, array in outputs.items()}

    device(count)
    ended = mil("selftest", altered)
    assert ended.code == 0
    assert " in 1: control_flow\n2 of 2 packages passed\n" in ended.out


def test_failing_reference_fails_with_any_core_ml(mil, altered, device):
    arrays = read_npz(altered / "int8.npz")
    write_npz(altered / "int8.npz", arrays | {"0.output.y": arrays["0.output.y"] * np.float32(1.01)})
    ended = mil("selftest", altered)
    assert ended.code == 3
    assert ended.out.endswith(" in 0\n1 of 2 packages passed\n")


def test_strict_needs_core_ml(mil, altered, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    ended = mil("selftest", altered, "--strict")
    assert (ended.code, ended.out, ended.err) == (
        32,
        "",
        "machine error: --strict requires Core ML, and this is linux\n  expected: macOS\n",
    )


@pytest.mark.needs_macos
def test_core_ml_itself(mil):
    ended = mil("selftest")
    assert ended.code == 0
    assert "apart: Core ML from the reference" in ended.out
