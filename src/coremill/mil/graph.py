"""Reads a function of an ML Program into a graph of operations over numbered values.

Each value has a slot. Constants are read once and shared; a weight is a view of its file. The signatures of the
kernels define which inputs of an operation are tensors and which are attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from coremill.core.errors import PackageError, UnsupportedOperationError
from coremill.mil import ops
from coremill.mil.coremltools_quietly import MIL_pb2
from coremill.mil.loader import Package
from coremill.mil.ops.registry import Definition, find, supported_operations
from coremill.mil.values import (
    ELEMENT_TYPES,
    STRING,
    Constant,
    ListType,
    TensorType,
    tensor_from_bytes,
    tensor_from_numbers,
)
from coremill.mil.weights import WeightStore

NONE_SLOT = 0
"""The slot of an optional input that is missing."""

BRANCH = "cond"
LOOP = "while_loop"

_MOST_ELEMENTS = 2**63 - 1
"""torch counts in int64."""

_IOS_VERSION = {"CoreML5": 15, "CoreML6": 16, "CoreML7": 17, "CoreML8": 18, "CoreML9": 26}
"""The iOS version that introduced each operation set; see coremltools' `_OPSET`."""

assert ops.__all__, "importing the package registers the operations"


@dataclass(frozen=True, slots=True)
class Block:
    """A nested block: its graph, and the outer slots of its captured inputs.

    The graph's inputs are the block's own inputs, followed by the captured values.
    """

    graph: Graph
    captured: tuple[int, ...]

    @property
    def own_inputs(self) -> tuple[int, ...]:
        return self.graph.inputs[: len(self.graph.inputs) - len(self.captured)]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of a graph."""

    op_type: str
    name: str
    definition: Definition | None
    """None for a branch or a loop."""
    tensors: tuple[tuple[int, ...], ...]
    """Slots of each tensor parameter in the kernel's order: one slot, or one for each element of a list."""
    lists: tuple[bool, ...]
    """Whether each of `tensors` is a list."""
    attributes: Mapping[str, tuple[int, ...]]
    outputs: tuple[int, ...]
    blocks: tuple[Block, ...] = ()

    @property
    def tensor_slots(self) -> tuple[int, ...]:
        return tuple(slot for slots in self.tensors for slot in slots)

    @property
    def attribute_slots(self) -> tuple[int, ...]:
        return tuple(slot for slots in self.attributes.values() for slot in slots)

    def __str__(self) -> str:
        return f"operation {self.name!r} ({self.op_type})"


@dataclass(slots=True)
class Graph:
    """A function or a nested block, with its nodes in execution order."""

    ios_version: int
    names: list[str] = field(default_factory=lambda: [""])
    """By slot; the first is :data:`NONE_SLOT`."""
    types: dict[int, TensorType] = field(default_factory=dict)
    """Declared types of tensors by slot; a state's is the type of its tensor."""
    states: set[int] = field(default_factory=set)
    """Slots of states."""
    list_types: dict[int, ListType] = field(default_factory=dict)
    """Declared types of lists by slot."""
    constants: dict[int, Constant] = field(default_factory=dict)
    """By slot: a tensor in its declared type's storage, a string, or a tuple of strings or integers."""
    inputs: tuple[int, ...] = ()
    nodes: list[Node] = field(default_factory=list)
    outputs: tuple[int, ...] = ()

    def new_slot(self, name: str, value_type: TensorType | ListType | None) -> int:
        self.names.append(name)
        slot = len(self.names) - 1
        if isinstance(value_type, ListType):
            self.list_types[slot] = value_type
        elif value_type is not None:
            self.types[slot] = value_type
        return slot

    def type_of(self, slot: int) -> TensorType | ListType | None:
        """Return a value's declared type; None for a string or a dictionary."""
        return self.types.get(slot) or self.list_types.get(slot)

    def kind_of(self, slot: int) -> str:
        """Return "tensor", "list" or "state", or "value" for a string or a dictionary."""
        if slot in self.list_types:
            return "list"
        if slot not in self.types:
            return "value"
        return "state" if slot in self.states else "tensor"

    def kinds_of(self, slots: tuple[int, ...]) -> list[str]:
        return [self.kind_of(slot) for slot in slots]


def read_function(package: Package, function_name: str) -> Graph:
    """Read one function of a package's program.

    Raises:
        PackageError: there is no such function, or it is malformed: an undefined value, a missing input, a weight
            that is not in its file.
        UnsupportedOperationError: it contains unsupported operations; the message lists all of them.
    """
    functions = package.spec.mlProgram.functions
    if function_name not in functions:
        raise PackageError(f"{package.name}: no function {function_name!r}", expected=f"one of {sorted(functions)}")
    function = functions[function_name]
    if function.opset not in function.block_specializations:
        raise PackageError(
            f"{package.name}: function {function_name!r} has no block for its operation set {function.opset!r}",
            expected=f"one of {sorted(function.block_specializations)}",
        )
    if function.opset not in _IOS_VERSION:
        raise UnsupportedOperationError(
            f"{package.name}: function {function_name!r} uses operation set {function.opset!r}",
            expected=f"one of {sorted(_IOS_VERSION)}",
        )
    block = function.block_specializations[function.opset]
    _refuse_unsupported(package, block, _IOS_VERSION[function.opset])
    reader = _BlockReader(package.weights, Graph(_IOS_VERSION[function.opset]), f"{package.name}: ")
    return reader.read(function.inputs, block)


def _operations(block: MIL_pb2.Block) -> Iterator[MIL_pb2.Operation]:
    for operation in block.operations:
        yield operation
        for nested in operation.blocks:
            yield from _operations(nested)


def _refuse_unsupported(package: Package, block: MIL_pb2.Block, ios_version: int) -> None:
    unsupported: dict[str, str] = {}
    for operation in _operations(block):
        if operation.type in ("const", BRANCH, LOOP) or find(operation.type, ios_version) is not None:
            continue
        unsupported.setdefault(operation.type, operation_name(operation))
    if unsupported:
        listed = ", ".join(f"{op_type} (as {name!r})" for op_type, name in unsupported.items())
        raise UnsupportedOperationError(
            f"{package.name}: unsupported operations: {listed}",
            expected=f"const, {BRANCH}, {LOOP}, {', '.join(supported_operations())}",
        )


def operation_name(operation: MIL_pb2.Operation) -> str:
    """Return an operation's name: its `name` attribute, or the name of its first output."""
    if "name" in operation.attributes:
        strings = operation.attributes["name"].immediateValue.tensor.strings.values
        if strings:
            return str(strings[0])
    return str(operation.outputs[0].name) if operation.outputs else ""


def declared_type(value_type: MIL_pb2.ValueType, where: str) -> TensorType | ListType | None:
    """Return the type that a `ValueType` message declares; for a state, the type of its tensor.

    None for a string, a list of strings or a dictionary.

    Raises:
        PackageError: its sizes are too large for a tensor.
        UnsupportedOperationError: an element type that no operation supports.
    """
    kind = value_type.WhichOneof("type")
    if kind == "stateType":
        value_type, kind = value_type.stateType.wrappedType, "tensorType"
    if kind == "listType":
        element = declared_type(value_type.listType.type, where)
        return ListType(element) if isinstance(element, TensorType) else None
    if kind != "tensorType" or value_type.tensorType.dataType == STRING:
        return None
    tensor = value_type.tensorType
    if tensor.dataType not in ELEMENT_TYPES:
        raise UnsupportedOperationError(
            f"{where} is of element type number {tensor.dataType}",
            expected=f"one of {', '.join(each.name for each in ELEMENT_TYPES.values())}",
        )
    shape = tuple(
        int(dimension.constant.size) if dimension.WhichOneof("dimension") == "constant" else None
        for dimension in tensor.dimensions
    )
    # Sizes of 0 are skipped: the other sizes of an empty tensor count too.
    if math.prod(size for size in shape if size) > _MOST_ELEMENTS:
        raise PackageError(
            f"{where} is of sizes {[size for size in shape if size is not None]}",
            expected=f"sizes whose product is at most {_MOST_ELEMENTS}",
        )
    return TensorType(ELEMENT_TYPES[tensor.dataType], shape)


def read_value(value: MIL_pb2.Value, weights: WeightStore, where: str) -> tuple[Constant, TensorType | None]:
    """Return a constant and its type: a tensor, or a string or list without a type.

    Raises:
        PackageError: its values do not match its shape, or it is not in its weight file.
        UnsupportedOperationError: a dictionary, or an element type that no operation supports.
    """
    if value.type.WhichOneof("type") == "listType":
        elements = [read_value(each, weights, where)[0] for each in value.immediateValue.list.values]
        return tuple(each.tolist() if isinstance(each, torch.Tensor) else each for each in elements), None
    value_type = declared_type(value.type, where)
    if not isinstance(value_type, TensorType):
        strings = value.immediateValue.tensor.strings.values
        if len(strings) != 1:
            raise UnsupportedOperationError(
                f"{where} is a dictionary, or several strings", expected="a tensor, one string, or a list"
            )
        return str(strings[0]), None
    if None in value_type.shape:
        raise PackageError(f"{where} is a constant of type {value_type}", expected="a type without unknown sizes")
    shape = tuple(size for size in value_type.shape if size is not None)
    if value.WhichOneof("value") == "blobFileValue":
        blob = value.blobFileValue
        return weights.tensor(blob.fileName, blob.offset, value_type.element, shape), value_type
    tensor = value.immediateValue.tensor
    kind = tensor.WhichOneof("value")
    try:
        if 0 in shape:
            return torch.empty(shape, dtype=value_type.element.storage), value_type
        if kind is None:
            raise ValueError("it has no value")
        numbers = getattr(tensor, kind).values
        if kind == "bytes":
            return tensor_from_bytes(numbers, value_type.element, shape), value_type
        return tensor_from_numbers(numbers, value_type.element, shape), value_type
    except (ValueError, RuntimeError, TypeError) as error:
        raise PackageError(f"{where}, a constant of type {value_type}: {error}") from error


class _BlockReader:
    """Reads one block; further readers read the blocks nested in it."""

    def __init__(self, weights: WeightStore, graph: Graph, where: str, outer: _BlockReader | None = None) -> None:
        self._weights = weights
        self._graph = graph
        self._where = where
        self._outer = outer
        self._slots: dict[str, int] = {}
        self.captured: dict[int, int] = {}
        """The outer block's slot, by own slot."""

    def read(self, inputs: Iterable[MIL_pb2.NamedValueType], block: MIL_pb2.Block) -> Graph:
        graph = self._graph
        own = tuple(self._define(each) for each in inputs)
        for operation in block.operations:
            self._read_operation(operation)
        graph.outputs = tuple(self._resolve(name, "the block's output") for name in block.outputs)
        for slot in graph.outputs:
            if slot in graph.states:
                raise PackageError(f"{self._where}a block's output is the state {graph.names[slot]!r}")
        graph.inputs = own + tuple(self.captured)
        return graph

    def _define(self, named: MIL_pb2.NamedValueType) -> int:
        value_type = declared_type(named.type, f"{self._where}value {named.name!r}")
        slot = self._graph.new_slot(named.name, value_type)
        if named.type.WhichOneof("type") == "stateType":
            self._graph.states.add(slot)
        self._name(named.name, slot)
        return slot

    def _name(self, name: str, slot: int) -> None:
        if name in self._slots:
            raise PackageError(f"{self._where}value {name!r} is defined twice", expected="one definition a block")
        self._slots[name] = slot

    def _lookup(self, name: str) -> int | None:
        """Return the slot of a value of this block, or of a value captured from an outer block."""
        if name not in self._slots:
            outer_slot = self._outer._lookup(name) if self._outer is not None else None
            if self._outer is None or outer_slot is None:
                return None
            outer = self._outer._graph
            slot = self._graph.new_slot(name, outer.type_of(outer_slot))
            self._slots[name] = slot
            if outer_slot in outer.states:
                self._graph.states.add(slot)
            if outer_slot in outer.constants:
                self._graph.constants[slot] = outer.constants[outer_slot]
            else:
                self.captured[slot] = outer_slot
        return self._slots[name]

    def _resolve(self, name: str, reader: str) -> int:
        slot = self._lookup(name)
        if slot is None:
            raise PackageError(
                f"{self._where}{reader} is {name!r}, which no earlier operation outputs",
                expected="operations in execution order, without a cycle",
            )
        return slot

    def _constant(self, value: MIL_pb2.Value, name: str) -> int:
        content, value_type = read_value(value, self._weights, f"{self._where}value {name!r}")
        slot = self._graph.new_slot(name, value_type)
        self._graph.constants[slot] = content
        return slot

    def _read_operation(self, operation: MIL_pb2.Operation) -> None:
        name = operation_name(operation)
        if operation.type == "const":
            if "val" not in operation.attributes or len(operation.outputs) != 1:
                raise PackageError(f"{self._where}constant {name!r} has no value", expected="an attribute 'val'")
            output = operation.outputs[0].name
            self._name(output, self._constant(operation.attributes["val"], output))
            return
        arguments = self._arguments(operation, name)
        if operation.type in (BRANCH, LOOP):
            node = self._structured_node(operation, name, arguments)
        else:
            node = self._plain_node(operation, name, arguments)
        self._graph.nodes.append(node)

    def _arguments(self, operation: MIL_pb2.Operation, name: str) -> dict[str, tuple[int, ...]]:
        """Return slots by parameter: those of inputs and of attributes."""
        found: dict[str, tuple[int, ...]] = {}
        for parameter, argument in operation.inputs.items():
            reader = f"input {parameter!r} of operation {name!r} ({operation.type})"
            found[parameter] = tuple(
                self._resolve(binding.name, reader)
                if binding.WhichOneof("binding") == "name"
                else self._constant(binding.value, f"{name}.{parameter}")
                for binding in argument.arguments
            )
        for parameter, value in operation.attributes.items():
            if parameter != "name":
                found[parameter] = (self._constant(value, f"{name}.{parameter}"),)
        return found

    def _plain_node(self, operation: MIL_pb2.Operation, name: str, arguments: dict[str, tuple[int, ...]]) -> Node:
        definition = find(operation.type, self._graph.ios_version)
        assert definition is not None, "unsupported operations are refused before reading"
        where = f"{self._where}operation {name!r} ({operation.type})"
        tensors: list[tuple[int, ...]] = []
        for parameter in definition.tensors:
            slots = arguments.pop(parameter.name, None)
            if slots is None and parameter.required:
                raise PackageError(
                    f"{where} lacks its input {parameter.name!r}", expected=self._inputs_of(definition)
                )
            if slots is not None and len(slots) != 1 and not parameter.is_list:
                raise PackageError(f"{where}: {len(slots)} values for input {parameter.name!r}", expected="one")
            kind = "list" if parameter.is_list_value else "state" if parameter.is_state else "tensor"
            if any(self._graph.kind_of(slot) != kind for slot in slots or ()):
                raise PackageError(f"{where}: its input {parameter.name!r} is not a {kind}")
            tensors.append((NONE_SLOT,) if slots is None else slots)
        for attribute in definition.attributes.values():
            if attribute.required and attribute.name not in arguments:
                raise PackageError(
                    f"{where} lacks its input {attribute.name!r}", expected=self._inputs_of(definition)
                )
        unknown = sorted(set(arguments) - set(definition.attributes))
        if unknown:
            raise UnsupportedOperationError(
                f"{where} has the inputs {unknown}",
                expected=self._inputs_of(definition),
            )
        outputs = tuple(self._define(output) for output in operation.outputs)
        if not definition.returns_tuple:
            kind = "list" if definition.returns_list_value else "tensor"
            found = self._graph.kinds_of(outputs)
            if found != [kind]:
                raise PackageError(f"{where}: its outputs are {found}", expected=f"one {kind}")
        return Node(
            operation.type,
            name,
            definition,
            tuple(tensors),
            tuple(parameter.is_list for parameter in definition.tensors),
            arguments,
            outputs,
        )

    def _inputs_of(self, definition: Definition) -> str:
        """Describe the inputs of an operation in the program's operation set; versions of it have others."""
        parameters = (*definition.tensors, *definition.attributes.values())
        required, optional = (
            [each.name for each in parameters if each.required is which] for which in (True, False)
        )
        text = f"the inputs of iOS{self._graph.ios_version}: {', '.join(required)}"
        return f"{text}; optional: {', '.join(optional)}" if optional else text

    def _structured_node(
        self, operation: MIL_pb2.Operation, name: str, arguments: dict[str, tuple[int, ...]]
    ) -> Node:
        expected = {"pred"} if operation.type == BRANCH else {"loop_vars"}
        if set(arguments) != expected or len(operation.blocks) != 2:
            raise PackageError(
                f"{self._where}operation {name!r} ({operation.type}) has the inputs {sorted(arguments)} and "
                f"{len(operation.blocks)} blocks",
                expected=f"the input {expected.pop()!r} and 2 blocks",
            )
        where = f"{self._where}operation {name!r} ({operation.type})"
        blocks = []
        for block in operation.blocks:
            reader = _BlockReader(self._weights, Graph(self._graph.ios_version), self._where, self)
            graph = reader.read(block.inputs, block)
            blocks.append(Block(graph, tuple(reader.captured.values())))
        (slots,) = arguments.values()
        outputs = tuple(self._define(output) for output in operation.outputs)
        self._check_structure(where, operation.type, slots, outputs, blocks)
        tensors = (slots, *(block.captured for block in blocks))
        return Node(operation.type, name, None, tensors, (True, True, True), {}, outputs, tuple(blocks))

    def _check_structure(
        self, where: str, op_type: str, slots: tuple[int, ...], outputs: tuple[int, ...], blocks: list[Block]
    ) -> None:
        """Check that the blocks have as many inputs and outputs as the operation, of the same kinds."""
        given = self._graph.kinds_of(slots)
        results = self._graph.kinds_of(outputs)
        taken = [block.graph.kinds_of(block.own_inputs) for block in blocks]
        returned = [block.graph.kinds_of(block.graph.outputs) for block in blocks]
        if op_type == BRANCH:
            fits = given == ["tensor"] and taken == [[], []] and returned == [results, results]
        else:
            fits = taken == [given, given] and returned == [["tensor"], given] and results == given
        if not fits:
            raise PackageError(
                f"{where} has inputs {given} and outputs {results}, its blocks {taken} and {returned}",
                expected="blocks with the inputs and outputs of the operation",
            )
