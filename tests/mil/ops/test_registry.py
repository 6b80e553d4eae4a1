"""What is registered, and that it is what coremltools registers."""

from __future__ import annotations

import inspect

import pytest
import torch
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from torch import Tensor

from coremill.mil import ops
from coremill.mil.ops.registry import OperationError, definitions, find, op, supported_operations

# `coreml_update_state` is saved as `write_state`, which coremltools' converter has no operation for.
SAVED_ONLY = {"write_state"}


def test_every_family_is_imported():
    modules = {each.kernel.__module__.rpartition(".")[2] for each in definitions()}
    assert modules == set(ops.__all__)


@pytest.mark.parametrize("definition", definitions(), ids=lambda each: f"{each.op_type}-iOS{each.since}")
def test_parameters_are_those_of_coremltools(definition):
    """Names, and which may be left out, as its definition of that version says."""
    if definition.op_type in SAVED_ONLY:
        return
    classes = SSAOpRegistry.core_ops[definition.op_type]
    versions = {int(target.name.removeprefix("iOS")): each for target, each in classes.items()}
    usable = [version for version in versions if version <= definition.since]
    earliest = versions[max(usable)]
    # One kernel serves later versions too, so it may know parameters that only they have.
    later = [versions[v] for v in sorted(versions) if v > definition.since]
    known = set(earliest.input_spec.input_types)
    mine = {each.name for each in definition.tensors} | set(definition.attributes)
    assert known <= mine
    assert mine <= known.union(*(each.input_spec.input_types for each in later))
    required = {name for name, kind in earliest.input_spec.input_types.items() if not kind.optional}
    for parameter in (*definition.tensors, *definition.attributes.values()):
        if parameter.required:
            assert parameter.name in required, parameter.name


@pytest.mark.parametrize("definition", definitions(), ids=lambda each: f"{each.op_type}-iOS{each.since}")
def test_a_kernel_says_what_it_is(definition):
    documentation = inspect.getdoc(definition.kernel)
    assert documentation
    assert documentation.split(":")[0].split()[0] == definition.op_type
    module = inspect.getmodule(definition.kernel)
    assert "Source of the semantics: `coremltools.converters.mil.mil.ops.defs" in module.__doc__


def test_versions_of_one_operation():
    old, new = find("gather", 16), find("gather", 17)
    assert old is not None
    assert new is not None
    assert (old.since, new.since) == (15, 17)
    assert find("gather", 26) is new
    assert find("slice_update", 17) is None
    assert find("no_such_operation", 18) is None
    assert "gather" in supported_operations()


def test_a_version_is_registered_once():
    with pytest.raises(ValueError, match="operation gather of iOS17 is registered twice"):

        @op("gather", since=17)
        def gather(x: Tensor) -> Tensor:
            return x


def test_a_positional_parameter_is_a_tensor():
    with pytest.raises(TypeError, match="positional parameter axis is <class 'int'>, not a tensor"):

        @op("of_a_test")
        def wrong(x: Tensor, axis: int) -> Tensor:
            return x.select(axis, 0)


def test_attributes_are_converted():
    convert = {name: each.convert for name, each in find("matmul", 18).attributes.items()}
    assert convert["transpose_x"](True) is True
    sizes = find("reshape", 18).attributes["shape"].convert
    assert sizes([2, 3]) == (2, 3)
    assert sizes(6) == (6,)
    axis = find("softmax", 18).attributes["axis"].convert
    assert axis([1]) == 1
    with pytest.raises(OperationError, match=r"\[1, 2\] is not one int"):
        axis([1, 2])
    with pytest.raises(OperationError, match="'a' is not one int"):
        axis("a")


def test_no_kernel_writes_to_its_inputs(evaluate):
    """The plan hands constants and states to kernels as they are."""
    import numpy as np
    from coremltools.converters.mil import Builder as mb  # noqa: N813

    x = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    before = x.clone()
    for name in ("relu", "abs", "cumsum", "softmax", "tile", "pad", "reverse", "argsort"):
        attributes = {"tile": {"reps": (1, 2)}, "pad": {"pad": (1, 1)}}.get(name, {})
        find(name, 18).kernel(x, **attributes)
    assert torch.equal(x, before)
    data = np.ones((2, 3), np.float32)
    evaluate({"x": data}, lambda x: mb.scatter(data=x, indices=np.int32([0]), updates=np.ones((1, 3), np.float32)))
    assert (data == 1).all()
