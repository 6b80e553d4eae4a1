"""The registered operations match those of coremltools."""

from __future__ import annotations

import inspect

import pytest
import torch
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from torch import Tensor

from coremill.mil import ops
from coremill.mil.ops.registry import OperationError, definitions, find, op, supported_operations

# `coreml_update_state` is saved as `write_state`, for which coremltools' converter has no operation.
SAVED_ONLY = {"write_state"}


# Core operations of coremltools that need no kernel.
STRUCTURE = {
    "const": "a constant is a value of the graph, which its reader materialises",
    "cond": "a branch: the plan runs one of two nested blocks",
    "while_loop": "a loop: the plan runs two nested blocks in turn",
    "_const_symbolic": "a symbol within coremltools' builder; a program that holds one is not saved",
}
IOS_VERSIONS = (15, 16, 17, 18)


def _theirs(op_type, version):
    """Return coremltools' class of an operation for an iOS version, or None if the version is too old."""
    classes = {target.name: each for target, each in SSAOpRegistry.core_ops.get(op_type, {}).items()}
    return classes.get(f"iOS{version}")


def _kernel(definition):
    """Return the kernel's function, without the parameters that a version fixes."""
    return getattr(definition.kernel, "func", definition.kernel)


def test_every_family_is_imported():
    modules = {_kernel(each).__module__.rpartition(".")[2] for each in definitions()}
    assert modules == set(ops.__all__)


@pytest.mark.parametrize("op_type", sorted(set(SSAOpRegistry.core_ops) - set(STRUCTURE)))
def test_every_operation_has_its_parameters_in_every_version(op_type):
    """The names and the optional parameters match coremltools' definition for each iOS version."""
    for version in IOS_VERSIONS:
        theirs, mine = _theirs(op_type, version), find(op_type, version)
        if theirs is None:
            assert mine is None, f"iOS{version}"
            continue
        assert mine is not None, f"iOS{version}"
        parameters = (*mine.tensors, *mine.attributes.values())
        assert {each.name for each in parameters} == set(theirs.input_spec.input_types), f"iOS{version}"
        optional = {name for name, kind in theirs.input_spec.input_types.items() if kind.optional}
        assert optional <= {each.name for each in parameters if not each.required}, f"iOS{version}"


def test_only_structural_operations_have_no_kernel():
    assert set(STRUCTURE) <= set(SSAOpRegistry.core_ops)
    assert not set(STRUCTURE) & set(supported_operations())
    assert set(supported_operations()) - set(SSAOpRegistry.core_ops) == SAVED_ONLY


@pytest.mark.parametrize("definition", definitions(), ids=lambda each: f"{each.op_type}-iOS{each.since}")
def test_definitions_start_at_a_version_of_coremltools(definition):
    """Each one starts at a version of coremltools' definitions, so that none is redundant."""
    if definition.op_type in SAVED_ONLY:
        return
    theirs = _theirs(definition.op_type, definition.since)
    assert theirs is not None
    assert theirs is not _theirs(definition.op_type, definition.since - 1) or definition.since == 15


@pytest.mark.parametrize("definition", definitions(), ids=lambda each: f"{each.op_type}-iOS{each.since}")
def test_kernel_is_documented(definition):
    kernel = _kernel(definition)
    documentation = inspect.getdoc(kernel)
    assert documentation
    assert documentation.split(":")[0].split()[0] == definition.op_type
    module = inspect.getmodule(kernel)
    assert "Source of the semantics: `coremltools.converters.mil.mil.ops.defs" in module.__doc__


def test_find_returns_the_version_of_an_operation():
    versions = [find("gather", version) for version in IOS_VERSIONS]
    assert [each.since for each in versions] == [15, 16, 17, 17]
    assert find("gather", 26) is versions[-1]
    assert find("slice_update", 17) is None
    assert find("no_such_operation", 18) is None
    assert "gather" in supported_operations()


def test_duplicate_version_is_rejected():
    with pytest.raises(ValueError, match="operation gather of iOS17 is registered twice"):

        @op("gather", since=17)
        def gather(x: Tensor) -> Tensor:
            return x


def test_positional_parameter_must_be_a_tensor():
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
    pairs = find("space_to_batch", 18).attributes["paddings"].convert
    assert pairs([[1, 2], [3, 4]]) == ((1, 2), (3, 4))
    with pytest.raises(OperationError, match=r"\[\[1, 2, 3\]\] is not a list of pairs of int"):
        pairs([[1, 2, 3]])


def test_no_kernel_writes_to_its_inputs(evaluate):
    """The plan passes constants and states to kernels without copying them."""
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
