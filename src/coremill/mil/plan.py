"""Compiles a graph to a flat list of steps, and runs it.

Compiling does once what does not depend on values: it binds attributes to their kernels as Python values, computes
operations on constants, drops dead operations, and finds the last use of each value, after which the value is
freed. The second run at an input shape also records the values that depend on shapes alone (sizes, masks cut to
length, …). Later runs at that shape start with those values and skip the operations that computed them.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from coremill.core.errors import CoremillError, PackageError, PredictionInputError
from coremill.mil.graph import BRANCH, NONE_SLOT, Block, Graph, Node
from coremill.mil.in_place import updates_in_place
from coremill.mil.ops.control_flow import run_cond, run_while_loop
from coremill.mil.ops.registry import Attribute, Definition, Given, Kernel, OperationError, Overwritten
from coremill.mil.values import BY_NAME, Constant, ElementType, Numerics, StateCell, TensorType, Value, as_tensor

Observer: TypeAlias = "Callable[[Step, list[Value]], None]"
"""Called after each step with the step and the values of all slots, before the step's slots are freed."""

Values: TypeAlias = "Mapping[int, Value]"
"""By slot."""

KERNEL_FAILURES = (
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
)
"""What torch, numpy and Python raise if the shapes or attributes of a malformed program do not match.

For example, LookupError for a missing key or index, AttributeError or TypeError for a value of the wrong kind, and
MemoryError for a shape that does not fit in memory. The kernels' own checks raise OperationError, with a better
message.
"""

_SHAPES_KEPT = 8
"""Number of input shapes whose shape-only values are kept; the least recently used is dropped first."""

_KEPT_VALUE_BYTES = 16 << 20
"""A larger shape-only value is computed in each run, unless it is a view of a constant."""

WIDE_CONSTANT_BYTES = 1 << 20
"""An fp32 copy of an fp16 constant is kept up to this size; a larger constant is widened at each use.

Norms and biases are therefore converted once, and the fp32 copies of a large model's matrices, which are twice the
size of its package, are never in memory together. `linear` widens its weight in pieces."""


_TABLE = {"gather": 0, "gather_along_axis": 0, "gather_nd": 0, "linear": 1}
"""Operations that read a large table in its declared type, with the index of that input: `linear` widens its weight
in pieces, and the others return elements, which are widened afterwards."""

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Target:
    """What a graph is compiled for: the numerics and the device."""

    numerics: Numerics
    device: torch.device = CPU


class Constants:
    """A program's constants in other types and on other devices; each copy is made once and shared.

    For values that last as long as the program or one of its plans: a copy is kept as long as its original.
    """

    def __init__(self) -> None:
        # The original is kept with its copy: an id is unique only while its object exists.
        self._copies: dict[tuple[int, torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def get(self, original: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if original.dtype is dtype and original.device == device:
            return original
        key = (id(original), dtype, device)
        if key not in self._copies:
            self._copies[key] = (original, original.to(device, dtype))
        return self._copies[key][1]


@dataclass(slots=True)
class Step:
    """One operation of a compiled graph."""

    node: Node
    call: Kernel
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    single: bool
    """Whether `call` returns the value of its only output, not a tuple of values."""
    frees: tuple[int, ...] = ()
    """Slots whose last use this is."""


@dataclass(slots=True)
class Section:
    """A compiled graph."""

    graph: Graph
    steps: list[Step]
    template: list[Value]
    """Values of all slots at the start: constants, and None in other slots."""
    constant_storages: frozenset[int]
    """Addresses of the memory of constants, including those of nested blocks."""

    def run(self, arguments: Sequence[Value], observe: Observer | None = None) -> tuple[Value, ...]:
        """Return the values of the graph's outputs for values of its inputs.

        Raises:
            PredictionInputError: an operation rejects its inputs' values.
            PackageError: an operation fails on its inputs' shapes.
        """
        values = self.template.copy()
        for slot, argument in zip(self.graph.inputs, arguments, strict=True):
            values[slot] = argument
        step = None
        try:
            for step in self.steps:
                result = step.call(*[values[slot] for slot in step.inputs])
                if step.single:
                    values[step.outputs[0]] = result
                else:
                    for slot, value in zip(step.outputs, _outputs(self.graph, step.node, result), strict=True):
                        values[slot] = value
                if observe is not None:
                    observe(step, values)
                for slot in step.frees:
                    values[slot] = None
        except CoremillError:
            raise  # from a nested block; it names the innermost operation
        except OperationError as error:
            assert step is not None
            raise PredictionInputError(f"{step.node}: {error}") from error
        except KERNEL_FAILURES as error:
            assert step is not None
            raise PackageError(f"{step.node} fails on {_describe(step, values)}: {error}") from error
        return tuple(values[slot] for slot in self.graph.outputs)


def _describe(step: Step, values: list[Value]) -> str:
    """Describe the inputs of a step for a message."""
    return ", ".join(
        f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        for value in (values[slot] for slot in step.inputs)
        if isinstance(value, torch.Tensor)
    )


class Plan:
    """A function compiled for one mode."""

    def __init__(self, graph: Graph, target: Target, constants: Constants | None = None) -> None:
        self.graph = graph
        self.target = target
        self._lasting = Lasting(target, Constants() if constants is None else constants)
        self.general = compile_graph(graph, self._lasting)
        """The steps that run at any shape."""
        self._shape_only = _shape_only_slots(self.general)
        self._at_shapes: OrderedDict[tuple[torch.Size | None, ...], Section | None] = OrderedDict()
        """The section for each shape of the inputs; None for a shape that was used once."""

    def run(self, arguments: Sequence[Value], observe: Observer | None = None) -> tuple[Value, ...]:
        """Return the values of the outputs for tensors, or state cells for states; see Section.run.

        An observer receives the steps of the general section.
        """
        if observe is not None or not self._shape_only:
            return self.general.run(arguments, observe)
        key = tuple(each.shape if isinstance(each, torch.Tensor) else None for each in arguments)
        section = self._at_shapes.get(key)
        if section is not None:
            self._at_shapes.move_to_end(key)
            return section.run(arguments)
        if key in self._at_shapes:
            outputs, self._at_shapes[key] = self._run_and_specialize(arguments)
            return outputs
        # Compiled at the second use of a shape: while a cache grows, each token has a different shape.
        self._at_shapes[key] = None
        if len(self._at_shapes) > _SHAPES_KEPT:
            self._at_shapes.popitem(last=False)
        return self.general.run(arguments)

    def keeps(self, tensor: torch.Tensor) -> bool:
        """Return whether a later run may read this tensor's memory."""
        address = tensor.untyped_storage().data_ptr()
        sections = (self.general, *self._at_shapes.values())
        return any(address in each.constant_storages for each in sections if each is not None)

    def _run_and_specialize(self, arguments: Sequence[Value]) -> tuple[tuple[Value, ...], Section]:
        """Run at a new shape, and compile for it with the shape-only values of that run as constants."""
        found: dict[int, Value] = {}

        def record(step: Step, values: list[Value]) -> None:
            for slot in step.outputs:
                if slot in self._shape_only and _is_worth_keeping(values[slot], self.general.constant_storages):
                    found[slot] = values[slot]

        outputs = self.general.run(arguments, record)
        return outputs, compile_graph(self.graph, self._lasting, self._general_values(), found)

    def _general_values(self) -> dict[int, Value]:
        """Return constants and values computed from them, without the general section's own copies."""
        slots = enumerate(self.general.template[: len(self.graph.names)])
        return {slot: value for slot, value in slots if value is not None}


def _is_worth_keeping(value: Value, constant_storages: frozenset[int]) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    storage = value.untyped_storage()
    return storage.nbytes() <= _KEPT_VALUE_BYTES or storage.data_ptr() in constant_storages


def _shape_only_slots(section: Section) -> frozenset[int]:
    """Return the slots whose values depend on the shapes of the inputs alone.

    A kernel's output shape depends only on its tensor inputs' shapes and its attributes' values; see
    `coremill.mil.ops.registry`.
    """
    constant = {slot for slot, value in enumerate(section.template) if value is not None} | {NONE_SLOT}
    known_value = set(constant)
    known_shape = constant | set(section.graph.inputs)
    for step in section.steps:
        node, definition = step.node, step.node.definition
        if definition is None:
            continue
        values_known = definition.pure and known_value.issuperset(node.tensor_slots + node.attribute_slots)
        shape_known = values_known or (
            not definition.data_dependent_shape
            and known_shape.issuperset(node.tensor_slots)
            and known_value.issuperset(node.attribute_slots)
        )
        if shape_known:
            known_shape.update(node.outputs)
        if values_known or (shape_known and node.op_type == "shape"):
            known_value.update(node.outputs)
    return frozenset(known_value - constant)


@dataclass(slots=True)
class Lasting:
    """What the sections of a plan share."""

    target: Target
    constants: Constants
    blocks: dict[int, Section] = field(default_factory=dict)
    """Nested blocks that were compiled with constants only, by the id of their graph."""


def compile_graph(
    graph: Graph,
    lasting: Lasting,
    shared: Mapping[int, Value] | None = None,
    own: Mapping[int, Value] | None = None,
) -> Section:
    """Compile a graph.

    Args:
        shared: values that last as long as the plan, in the mode's storage; the operations that compute them
            are skipped.
        own: values of this section alone; no copy of them is kept outside it.

    Raises:
        PackageError: an operation on constants cannot be computed.
    """
    compiler = _Compiler(graph, lasting, shared or {}, own or {})
    steps = []
    in_place = updates_in_place(graph)
    for position, node in enumerate(graph.nodes):
        if node.outputs and compiler.values.keys() >= set(node.outputs):
            continue
        step = compiler.bind(node, in_place.get(position))
        if node.definition is not None and node.definition.pure and compiler.values.keys() >= set(step.inputs):
            compiler.fold(step)
        else:
            steps.append(step)
    steps = _without_dead_steps(steps, graph.outputs)
    _set_frees(steps, graph.outputs, frozenset(compiler.values))
    template: list[Value] = [None] * compiler.slot_count
    for slot, value in compiler.values.items():
        template[slot] = value
    storages = frozenset(
        value.untyped_storage().data_ptr() for value in compiler.values.values() if isinstance(value, torch.Tensor)
    )
    return Section(graph, steps, template, storages.union(*compiler.nested_storages))


def _without_dead_steps(steps: list[Step], outputs: tuple[int, ...]) -> list[Step]:
    needed = set(outputs)
    live = []
    for step in reversed(steps):
        has_effect = step.node.definition is None or not step.node.definition.pure
        if has_effect or needed.intersection(step.outputs):
            needed.update(step.inputs)
            live.append(step)
    return live[::-1]


def _set_frees(steps: list[Step], outputs: tuple[int, ...], constant: frozenset[int]) -> None:
    """Set the slots that each step frees: those that no later step reads."""
    later = set(outputs) | constant | {NONE_SLOT}
    for step in reversed(steps):
        mentioned = dict.fromkeys(step.inputs + step.outputs)
        step.frees = tuple(slot for slot in mentioned if slot not in later)
        later.update(mentioned)


def _tables(graph: Graph) -> frozenset[int]:
    """Return the slots that nothing reads but operations that take a table in its declared type."""
    tables, others = set[int](), set(graph.outputs)
    for node in graph.nodes:
        for index, slot in enumerate(node.tensor_slots):
            (tables if _TABLE.get(node.op_type) == index else others).add(slot)
        others.update(node.attribute_slots)
    return frozenset(tables - others)


class _Compiler:
    """Binds nodes to calls, and keeps the values that are known at compilation."""

    def __init__(
        self, graph: Graph, lasting: Lasting, shared: Mapping[int, Value], own: Mapping[int, Value]
    ) -> None:
        self._graph = graph
        self._lasting = lasting
        self._numerics = lasting.target.numerics
        self._fleeting = set(own)
        """Slots of values that only this section uses."""
        self._has_own = bool(own)
        self._wide_slots: dict[int, int] = {}
        self.slot_count = len(graph.names)
        self.nested_storages: list[frozenset[int]] = []
        self.values: dict[int, Value] = {NONE_SLOT: None}
        self._tables = _tables(graph)
        for slot, value in graph.constants.items():
            if slot not in shared and slot not in own:
                self.values[slot] = self._stored(slot, value)
        self.values.update(shared)
        self.values.update(own)

    def _stored(self, slot: int, value: Constant) -> Constant:
        """Return a constant in the mode's storage, on the device."""
        if not isinstance(value, torch.Tensor):
            return value
        storage = self._numerics.storage(self._graph.types[slot].element)
        if slot in self._tables and value.numel() * storage.itemsize > WIDE_CONSTANT_BYTES:
            storage = value.dtype
        return self._lasting.constants.get(value, storage, self._lasting.target.device)

    def _is_narrow(self, slot: int) -> bool:
        """Return whether a constant is in its declared type although the mode's is wider."""
        value, value_type = self.values.get(slot), self._graph.types.get(slot)
        if not isinstance(value, torch.Tensor) or value_type is None:
            return False
        return value.dtype is not self._numerics.storage(value_type.element)

    def _is_half(self, slot: int) -> bool:
        value_type = self._graph.types.get(slot)
        return value_type is not None and value_type.element.is_half

    def fold(self, step: Step) -> None:
        """Run a step whose inputs are known."""
        try:
            result = step.call(*[self.values[slot] for slot in step.inputs])
            results = (result,) if step.single else _outputs(self._graph, step.node, result)
            self.values.update(zip(step.outputs, results, strict=True))
        except KERNEL_FAILURES as error:
            raise PackageError(f"{step.node}, whose inputs are constants: {error}") from error
        if self._has_own:
            self._fleeting.update(step.outputs)

    def bind(self, node: Node, state: int | None = None) -> Step:
        """Return the step of a node; with the slot of a state, one that writes into the state's memory."""
        if node.definition is None:
            return self._bind_structured(node)
        definition = node.definition
        kernel = definition.kernel if state is None else definition.in_place
        assert kernel is not None
        fixed: dict[str, Attribute] = {}
        dynamic: dict[str, tuple[int, ...]] = {}
        for name, slots in node.attributes.items():
            if self.values.keys() >= set(slots):
                fixed[name] = self._attribute(node, definition, name, [self.values[slot] for slot in slots])
            else:
                dynamic[name] = slots
        counts = tuple(
            len(slots) if is_list else None for slots, is_list in zip(node.tensors, node.lists, strict=True)
        )
        call: Kernel = functools.partial(kernel, **fixed) if fixed else kernel
        if dynamic or any(count is not None for count in counts):
            converters = {name: functools.partial(self._attribute, node, definition, name) for name in dynamic}
            sizes = {name: len(slots) for name, slots in dynamic.items()}
            call = _assembling(call, counts, sizes, converters)
        inputs = node.tensor_slots + tuple(slot for slots in dynamic.values() for slot in slots)
        if state is not None:
            inputs, call = (*inputs, state), _overwriting(call)
        if node.op_type in _TABLE and self._is_narrow(node.tensor_slots[_TABLE[node.op_type]]):
            call = _rounding(call, (), self._storages(node))
        if not definition.native:
            if self._numerics is Numerics.DECLARED:
                inputs, call = self._with_rounding(node, inputs, call)
            elif self._has_mixed_inputs(node):
                call = _rounding(call, (), self._storages(node))
        single = not definition.returns_tuple and len(node.outputs) == 1
        return Step(node, call, inputs, node.outputs, single)

    def _attribute(self, node: Node, definition: Definition, name: str, values: Sequence[Value]) -> Attribute:
        """Convert the tensors or the string of an attribute to its Python value."""
        plain: list[Given] = [value.tolist() if isinstance(value, torch.Tensor) else value for value in values]
        convert = definition.attributes[name].convert
        assert convert is not None
        try:
            value = convert(plain[0] if len(plain) == 1 else plain)
        except OperationError as error:
            raise PackageError(f"{node}: input {name!r}: {error}") from error
        if definition.attributes[name].is_element_type:
            return self._element_type(node, value)
        return value

    def _element_type(self, node: Node, name: Attribute) -> ElementType:
        if not isinstance(name, str) or name not in BY_NAME:
            raise PackageError(f"{node}: unknown element type {name!r}", expected=f"one of {sorted(BY_NAME)}")
        element = BY_NAME[name]
        return replace(element, storage=self._numerics.storage(element))

    def _with_rounding(self, node: Node, inputs: tuple[int, ...], call: Kernel) -> tuple[tuple[int, ...], Kernel]:
        """Widen fp16 inputs to fp32 (constants at compilation), and round fp16 results."""
        slots = list(inputs)
        positions = []
        for position, slot in enumerate(node.tensor_slots):
            if not self._is_half(slot):
                continue
            wide_slot = self._wide_slot(slot) if slot in self.values else None
            if wide_slot is None:
                positions.append(position)
            else:
                slots[position] = wide_slot
        storages = tuple(
            storage if self._is_half(slot) or self._has_mixed_inputs(node) else None
            for slot, storage in zip(node.outputs, self._storages(node), strict=True)
        )
        if not positions and not any(storages):
            return tuple(slots), call
        return tuple(slots), _rounding(call, tuple(positions), storages)

    def _storages(self, node: Node) -> tuple[torch.dtype | None, ...]:
        """Return the storage type of each output; None for an output that is not a tensor."""
        types = (self._graph.types.get(slot) for slot in node.outputs)
        return tuple(
            self._numerics.storage(each.element) if isinstance(each, TensorType) else None for each in types
        )

    def _has_mixed_inputs(self, node: Node) -> bool:
        """Return whether the tensors have different types; the result's type is then the declared one."""
        types = (self._graph.types.get(slot) for slot in node.tensor_slots)
        return len({each.element.name for each in types if isinstance(each, TensorType)}) > 1

    def _wide_slot(self, slot: int) -> int | None:
        if slot not in self._wide_slots:
            value = as_tensor(self.values[slot])
            if value.numel() * 4 > WIDE_CONSTANT_BYTES:
                return None
            if slot in self._fleeting:
                copy = value.float()
            else:
                copy = self._lasting.constants.get(value, torch.float32, self._lasting.target.device)
            self._wide_slots[slot] = self.slot_count
            self.values[self.slot_count] = copy
            self.slot_count += 1
        return self._wide_slots[slot]

    def _nested(self, block: Block) -> Section:
        """Return the section of a nested block; it is compiled once if its captured values last."""
        captured_inputs = block.graph.inputs[len(block.graph.inputs) - len(block.captured) :]
        known = {
            slot: outer for slot, outer in zip(captured_inputs, block.captured, strict=True) if outer in self.values
        }
        own = {slot: self.values[outer] for slot, outer in known.items() if outer in self._fleeting}
        shared = {slot: self.values[outer] for slot, outer in known.items() if slot not in own}
        if own:
            return compile_graph(block.graph, self._lasting, shared, own)
        blocks = self._lasting.blocks
        if id(block.graph) not in blocks:
            blocks[id(block.graph)] = compile_graph(block.graph, self._lasting, shared)
        return blocks[id(block.graph)]

    def _bind_structured(self, node: Node) -> Step:
        sections = [self._nested(block) for block in node.blocks]
        self.nested_storages += [section.constant_storages for section in sections]
        own, first, second = (len(slots) for slots in node.tensors)
        call = (_branch if node.op_type == BRANCH else _loop)(sections[0], sections[1], own, first)
        assert own + first + second == len(node.tensor_slots)
        return Step(node, call, node.tensor_slots, node.outputs, single=False)


def _branch(if_true: Section, if_false: Section, own: int, captured: int) -> Kernel:
    def call(*arguments: Value) -> tuple[Value, ...]:
        split = own + captured
        return run_cond(
            as_tensor(arguments[0]),
            if_true=lambda: if_true.run(arguments[own:split]),
            if_false=lambda: if_false.run(arguments[split:]),
        )

    return call


def _loop(condition: Section, body: Section, own: int, captured: int) -> Kernel:
    def call(*arguments: Value) -> tuple[Value, ...]:
        split = own + captured
        return run_while_loop(
            arguments[:own],
            condition=lambda *values: condition.run(values + arguments[own:split]),
            body=lambda *values: body.run(values + arguments[split:]),
        )

    return call


def _assembling(
    kernel: Kernel,
    counts: tuple[int | None, ...],
    sizes: Mapping[str, int],
    converters: Mapping[str, Callable[[Sequence[Value]], Attribute]],
) -> Kernel:
    """Return a call on flat arguments, for a kernel with list inputs or computed attributes."""

    def call(*arguments: Value) -> Value:
        tensors: list[Value] = []
        at = 0
        for count in counts:
            tensors.append(arguments[at] if count is None else arguments[at : at + count])
            at += 1 if count is None else count
        attributes = {}
        for name, size in sizes.items():
            attributes[name] = converters[name](arguments[at : at + size])
            at += size
        return kernel(*tensors, **attributes)

    return call


def _overwriting(call: Kernel) -> Kernel:
    """Return `call` with the state's cell as last argument; the cell keeps what was overwritten."""

    def overwrite(*arguments: Value) -> Value:
        *inputs, cell = arguments
        assert isinstance(cell, StateCell)
        done = call(*inputs)
        assert isinstance(done, Overwritten)
        cell.remember(done.part, done.before)
        return done.result

    return overwrite


def _rounding(call: Kernel, positions: tuple[int, ...], storages: tuple[torch.dtype | None, ...]) -> Kernel:
    """Return `call` with the arguments at `positions` widened to fp32 and its results rounded to `storages`."""

    def widened(arguments: tuple[Value, ...]) -> list[Value]:
        values = list(arguments)
        for position in positions:
            values[position] = as_tensor(values[position]).float()
        return values

    if len(storages) == 1:
        (storage,) = storages

        def call_one(*arguments: Value) -> Value:
            result = call(*widened(arguments))
            if storage is None or isinstance(result, tuple):  # the caller reports a tuple
                return result
            return as_tensor(result).to(storage)

        return call_one

    def call_many(*arguments: Value) -> tuple[Value, ...]:
        results = _results(call(*widened(arguments)))
        if len(results) != len(storages):
            return results  # the caller reports it
        return tuple(
            value if storage is None else as_tensor(value).to(storage)
            for value, storage in zip(results, storages, strict=True)
        )

    return call_many


def _results(result: Value) -> tuple[Value, ...]:
    return result if isinstance(result, tuple) else (result,)


def _outputs(graph: Graph, node: Node, result: Value) -> tuple[Value, ...]:
    """Return the values of a node's outputs.

    Raises:
        ValueError: it has another number of outputs; versions of an operation differ in it.
    """
    results = _results(result)
    if len(results) != len(node.outputs):
        declared = [graph.names[slot] for slot in node.outputs]
        raise ValueError(f"it has {len(results)} outputs in iOS{graph.ios_version}; the program names {declared}")
    return results
