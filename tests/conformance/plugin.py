"""A pytest plugin that makes coremltools' operation tests compare numbers on any system.

On other systems than macOS, these tests convert programs and compare nothing. The plugin replaces `MLModel.predict`
and `make_state` by those of coremill.mil, sets the conditions that require macOS to true, and replaces
`compare_backend`: programs in fp32 are compared with the test's tolerances, and programs in fp16 with
`FP16_TOLERANCE` (the suite's tolerances for fp16 are a hundred times those of fp32, and at least 0.5 and 0.05).

The plugin appends one JSON line for each test, see `records.Record`, to the file of `--conformance-results`. Tests
that the file already contains are deselected, so that a stopped run is resumed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.models.utils as coremltools_utils
import numpy as np
import pytest
from coremltools.converters.mil import testing_utils
from tests.conformance.records import Record, append_record, drop_unfinished_line, read_records

from coremill.core.errors import CoremillError
from coremill.mil import MLModel
from coremill.mil.graph import Graph
from coremill.mil.values import TensorType

FP16_TOLERANCE = 5e-3
"""Absolute and relative tolerance for a program that computes in fp16."""

_CHECKS = (
    "assert_allclose",
    "assert_almost_equal",
    "assert_array_almost_equal",
    "assert_array_equal",
    "assert_equal",
)
"""Functions of numpy.testing that some tests call directly; others call `numpy.allclose`."""

_MACOS = (15, 2)
"""Some tests require the version that fixed a bug in Core ML."""

_NOT_COUNTED = frozenset({"const", "cast", "identity"})
"""Operations that the converter adds around the tested one; counted only if there are no others."""

_NODE_KEY = "conformance"


class _Tally:
    """Counts for the running test."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.predictions = 0
        self.compared = 0
        self.operations: set[str] = set()
        self.precision = ""


_tally = _Tally()
_models: dict[int, tuple[Any, MLModel]] = {}
"""By the id of the coremltools model, which is kept so that its id is not reused."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--conformance-results", type=Path, required=True, help="file with one JSON line for each test"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.runxfail:
        raise pytest.UsageError(
            "run with -c tests/conformance/pytest.ini: expected failures of Core ML must pass here"
        )
    testing_utils._IS_MACOS = True
    testing_utils.compare_backend = _compare_backend
    coremltools_utils._macos_version = lambda: _MACOS
    ct.models.MLModel.predict = _predict
    ct.models.MLModel.make_state = _make_state
    for name in _CHECKS:
        setattr(np.testing, name, _counting(getattr(np.testing, name)))
    np.allclose = _counting(np.allclose)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = {record.test for record in read_records(config.getoption("--conformance-results"))}
    left_out = [item for item in items if item.nodeid in done]
    items[:] = [item for item in items if item.nodeid not in done]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _tally.start()
    _models.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call" or (call.when == "setup" and not report.passed):
        operations = (_tally.operations - _NOT_COUNTED) or _tally.operations
        # xdist sends properties from its workers to the process that writes the records.
        report.user_properties.append(
            (
                _NODE_KEY,
                {
                    "predictions": _tally.predictions,
                    "compared": _tally.compared,
                    "operations": sorted(operations),
                    "precision": _tally.precision,
                },
            )
        )
    return report


class Writer:
    """Writes one record for each test; registered in the process that receives all reports."""

    def __init__(self, path: Path) -> None:
        drop_unfinished_line(path)
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seen = next((value for key, value in report.user_properties if key == _NODE_KEY), None)
        if seen is None or report.when == "teardown":
            return
        append_record(
            self._path, Record(test=report.nodeid, outcome=report.outcome, reason=_reason(report), **seen)
        )


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Writer(session.config.getoption("--conformance-results")))


def _reason(report: pytest.TestReport) -> str:
    if report.passed:
        return ""
    if report.skipped:
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash else report.longrepr).split())[:400]


def _evaluator(model: Any) -> MLModel:
    if id(model) not in _models:
        _models[id(model)] = (model, MLModel(model, function_name=model.function_name))
    return _models[id(model)][1]


def _predict(model: Any, data: Any, state: Any = None) -> Any:
    """Replace `coremltools.models.MLModel.predict`."""
    if isinstance(data, list):
        return [_predict(model, each) for each in data]
    evaluator = _evaluator(model)
    _tally.operations |= _operation_types(evaluator.program.graph)
    dtypes = {spec.name: getattr(spec, "dtype", None) for spec in evaluator.inputs}
    # Core ML converts arrays to the input's type, and the suite passes float32 for every input.
    given = {
        name: value.astype(dtypes[name]) if isinstance(value, np.ndarray) and dtypes.get(name) else value
        for name, value in data.items()
    }
    try:
        outputs = evaluator.predict(given, state)
    except CoremillError as error:
        # Core ML raises the same for an invalid prediction; some tests expect it.
        raise RuntimeError(f"Error computing NN outputs: {error}") from error
    _tally.predictions += 1
    return outputs


def _make_state(model: Any) -> Any:
    return _evaluator(model).make_state()


def _operation_types(graph: Graph) -> set[str]:
    types = {node.op_type for node in graph.nodes}
    for node in graph.nodes:
        for block in node.blocks:
            types |= _operation_types(block.graph)
    return types


def _holds_halves(graph: Graph) -> bool:
    """Return whether a computed value of the program is declared in fp16."""
    computed = (graph.types.get(slot) for node in graph.nodes for slot in node.outputs)
    return any(isinstance(each, TensorType) and each.element.is_half for each in computed) or any(
        _holds_halves(block.graph) for node in graph.nodes for block in node.blocks
    )


def _compare_backend(
    mlmodel: Any,
    input_key_values: dict[str, Any],
    expected_outputs: dict[str, Any],
    dtype: str = "fp32",
    atol: float = 1e-4,
    rtol: float = 1e-5,
    also_compare_shapes: bool = True,
    state: Any = None,
    allow_mismatch_ratio: float = 0.0,
) -> Any:
    """Replace `testing_utils.compare_backend`, with the same parameters."""
    predicted = testing_utils.run_core_ml_predict(mlmodel, input_key_values, state)
    # Some fp32 tests run a program that is declared in fp16.
    _tally.precision = "fp16" if dtype == "fp16" or _holds_halves(_evaluator(mlmodel).program.graph) else "fp32"
    if also_compare_shapes:
        testing_utils.compare_shapes(mlmodel, input_key_values, expected_outputs, pred=predicted)
    if _tally.precision == "fp16":
        atol = rtol = FP16_TOLERANCE
    for name, expected in expected_outputs.items():
        found = testing_utils._get_coreml_out_from_dict(predicted, name)
        if not isinstance(found, np.ndarray):
            _tally.compared += 1
            assert found == expected
        elif found.dtype.kind in "iub":
            # Indices, counts and masks must be equal: 1,000 instead of 1,003 is wrong at any tolerance.
            np.testing.assert_array_equal(found, expected)
        elif allow_mismatch_ratio:
            _tally.compared += 1
            share = np.mean(~np.isclose(found, expected, atol=atol, rtol=rtol))
            assert share <= allow_mismatch_ratio, f"{share:.2%} of the elements differ"
        else:
            np.testing.assert_allclose(found, expected, atol=atol, rtol=rtol)
    return predicted


def _counting(check: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(check)
    def counted(*arguments: Any, **options: Any) -> Any:
        if _tally.predictions:
            _tally.compared += 1
        return check(*arguments, **options)

    return counted
