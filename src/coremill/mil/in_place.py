"""Which updates of a state may write into the state's own memory.

`coreml_update_state` of a slice is saved as read_state → slice_update → write_state. Executed literally, that
copies the whole state to change a part of it, once per layer for a key/value cache. If nothing reads the old
content afterwards, only the part is written, and its old content is kept until the run has succeeded.
"""

from __future__ import annotations

from collections.abc import Mapping

from coremill.mil.graph import Graph, Node

_RETURNS_VIEWS = frozenset({"einsum"})
"""Operations that are not `native` but may return their input's memory."""
_RETURNS_NEW = frozenset({"linear", "scaled_dot_product_attention"})
"""`native` operations that never do; every other one may."""


def updates_in_place(graph: Graph) -> Mapping[int, int]:
    """Return the state's slot for each update in place, by the update's index among the graph's nodes."""
    if any(node.definition is None for node in graph.nodes):
        return {}  # what nested blocks read is not analysed
    states = dict.fromkeys(node.tensor_slots[0] for node in graph.nodes if node.op_type == "write_state")
    return {position: state for state in states for position in _of_state(graph, state)}


def _of_state(graph: Graph, state: int) -> list[int]:
    found: list[int] = []
    written: set[int] = set()
    """Results of the updates found."""
    read: set[int] = set()
    aliases: set[int] = set()
    """Slots of values that may share the state's memory."""
    for position, node in enumerate(graph.nodes):
        if _is_state_operation(node, state):
            if node.op_type == "read_state":
                read.update(node.outputs)
                aliases.update(node.outputs)
            elif node.tensor_slots[1] not in written:
                break  # from here on the state has the memory of another value
            continue
        if (
            node.tensor_slots[:1]
            and node.tensor_slots[0] in read
            and _may_overwrite(graph, position, state, aliases)
        ):
            found.append(position)
            written.update(node.outputs)
        if _may_return_memory_of_inputs(node) and aliases.intersection(node.tensor_slots):
            aliases.update(node.outputs)
    return found


def _is_state_operation(node: Node, state: int) -> bool:
    return node.op_type in ("read_state", "write_state") and node.tensor_slots[0] == state


def _may_overwrite(graph: Graph, position: int, state: int, aliases: set[int]) -> bool:
    """Return whether the node's result is the state's next content, and no later node reads the old content."""
    node = graph.nodes[position]
    if node.definition is None or node.definition.in_place is None or aliases.intersection(node.tensor_slots[1:]):
        return False
    rest = graph.nodes[position + 1 :]
    next_use = next((each for each in rest if _is_state_operation(each, state)), None)
    if next_use is None or next_use.op_type != "write_state" or next_use.tensor_slots[1] != node.outputs[0]:
        return False
    later = set(graph.outputs)
    for each in rest:
        later.update(each.tensor_slots, each.attribute_slots)
    return not aliases.intersection(later)


def _may_return_memory_of_inputs(node: Node) -> bool:
    if node.definition is None or node.op_type in _RETURNS_VIEWS:
        return True
    return node.definition.native and node.op_type not in _RETURNS_NEW
