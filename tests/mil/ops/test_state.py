"""States: what may be written to one. More programs with states: tests/mil/test_model.py, test_in_place.py."""

from __future__ import annotations

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types

from coremill.core.errors import PackageError, PredictionInputError
from coremill.mil import MLModel
from coremill.mil.loader import Package, open_package
from coremill.mil.plan import Target
from coremill.mil.program import Program
from coremill.mil.values import Numerics, StateCell

ONES = torch.ones(4, dtype=torch.float16)


@pytest.fixture(scope="module")
def model():
    """A state `kept` (4,) of fp16 to which x is added."""

    @mb.program(
        input_specs=[mb.StateTensorSpec((4,), dtype=types.fp16), mb.TensorSpec((4,), dtype=types.fp16)],
        opset_version=ct.target.iOS18,
    )
    def program(kept, x):
        total = mb.add(x=mb.read_state(input=kept), y=x)
        wider = mb.concat(values=[total, x], axis=0)
        other = mb.cast(x=total, dtype="fp32")
        new = mb.coreml_update_state(state=kept, value=total)
        return new, wider, other

    return ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )


@pytest.fixture
def package(model):
    return Package("toy", model.get_spec(), open_package(model).weights)


def _operation(package, op_type):
    block = package.spec.mlProgram.functions["main"].block_specializations["CoreML8"]
    return next(each for each in block.operations if each.type == op_type)


def test_a_write_replaces_the_content(model):
    opened = MLModel(model)
    state = opened.make_state()
    for _ in range(2):
        opened.predict({"x": np.array([1, 2, 3, 4], np.float16)}, state)
    assert state.read("kept").tolist() == [2, 4, 6, 8]


@pytest.mark.parametrize(("op_type", "found"), [("concat", "float16[8]"), ("cast", "float32[4]")])
def test_a_write_of_another_shape_or_type(package, op_type, found):
    """The error names the operation that writes, and the state stays as it was."""
    written = _operation(package, op_type).outputs[0].name
    _operation(package, "write_state").inputs["data"].arguments[0].name = written
    cell = StateCell(torch.zeros(4, dtype=torch.float16))
    with pytest.raises(PredictionInputError) as caught:
        Program(package, "main").run([cell, ONES], Target(Numerics.DECLARED))
    assert str(caught.value).startswith("operation 'coreml_update_state_0_write_state' (write_state): ")
    assert str(caught.value).endswith(f": a tensor of {found} for a state, expected float16[4]")
    assert cell.tensor.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("op_type", "parameter", "name", "kind"),
    [("read_state", "input", "x", "state"), ("write_state", "input", "x", "state"), ("add", "x", "kept", "tensor")],
)
def test_only_states_are_read_and_written(package, op_type, parameter, name, kind):
    _operation(package, op_type).inputs[parameter].arguments[0].name = name
    with pytest.raises(PackageError, match=rf"\({op_type}\): its input '{parameter}' is not a {kind}$"):
        Program(package, "main")


def test_a_state_is_no_output(package):
    package.spec.mlProgram.functions["main"].block_specializations["CoreML8"].outputs[0] = "kept"
    with pytest.raises(PackageError, match=r"^toy: a block's output is the state 'kept'$"):
        Program(package, "main")
