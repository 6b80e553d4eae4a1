"""`coremill mil inspect`: the contents of a package, which is not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from coremill.core.command import command_parser
from coremill.mil.commands.output import bytes_text, console, print_json, shape_text, table, title
from coremill.mil.description import (
    ImageSpec,
    InputSpec,
    LabelSpec,
    OutputSpec,
    ProbabilitiesSpec,
    TensorSpec,
    describe_function,
)
from coremill.mil.graph import Graph, Node, read_function
from coremill.mil.loader import Package, open_package
from coremill.mil.values import ElementType, TensorType

CONSTEXPR = "constexpr_"
"""The prefix of operations on compressed weights."""


@dataclass(frozen=True)
class Weights:
    """The weights of one element type; each is counted once, even if several operations use it."""

    dtype: str
    tensors: int
    elements: int
    size_bytes: int
    """As stored: int4 takes half a byte."""


@dataclass(frozen=True)
class Compressed:
    """The weights that one operation decompresses."""

    operation: str
    count: int
    stored_bytes: int
    dense_bytes: int
    """Their decompressed size, in their declared type."""


@dataclass(frozen=True)
class FunctionSummary:
    """The contents of a function, including operations and weights of nested blocks."""

    name: str
    operation_set: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    states: tuple[TensorSpec, ...]
    operations: dict[str, int]
    """The number of each type, the most frequent first."""
    weights: tuple[Weights, ...]
    compressed: tuple[Compressed, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(each.size_bytes for each in self.weights)


@dataclass(frozen=True)
class PackageSummary:
    """The contents of a package."""

    package: str
    specification_version: int
    functions: tuple[FunctionSummary, ...]


def summarize(package: Package) -> PackageSummary:
    """Read every function of a package.

    Raises:
        PackageError: it is malformed.
        UnsupportedOperationError: it contains an unsupported operation.
    """
    program = package.spec.mlProgram
    described = [each.name for each in package.spec.description.functions]
    return PackageSummary(
        package.name,
        int(package.spec.specificationVersion),
        tuple(_summarize_function(package, name) for name in described or sorted(program.functions)),
    )


def _summarize_function(package: Package, name: str) -> FunctionSummary:
    graph = read_function(package, name)
    description = describe_function(package, name, graph)
    nodes = [node for _, node in all_nodes(graph)]
    counts = Counter(node.op_type for node in nodes)
    return FunctionSummary(
        name,
        f"iOS{graph.ios_version}",
        description.inputs,
        description.outputs,
        description.states,
        dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        _weights(graph),
        _compressed(graph),
    )


def all_nodes(graph: Graph) -> Iterator[tuple[Graph, Node]]:
    """Yield every operation with its graph; those of nested blocks follow the operation that contains them."""
    for node in graph.nodes:
        yield graph, node
        for block in node.blocks:
            yield from all_nodes(block.graph)


@dataclass(frozen=True)
class NonfiniteConstant:
    """A constant with infinite or NaN elements as it is saved: a float32 beyond 65504 becomes infinite in fp16."""

    name: str
    value_type: TensorType
    counts: tuple[tuple[int, str], ...]
    """How many elements are NaN, inf and -inf, without zeros."""
    readers: tuple[str, ...]
    """The operations that take it as an input."""

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {what}" for count, what in self.counts)
        return f"{self.name} {self.value_type}: {counts}, an input of {', '.join(self.readers)}"


def nonfinite_constants(graph: Graph) -> list[NonfiniteConstant]:
    """Return the constants with infinite or NaN elements, in the order of the operations that read them first."""
    owners: dict[int, tuple[Graph, int]] = {}
    readers: dict[int, dict[str, None]] = {}
    for owner, node in all_nodes(graph):
        for slot in node.tensor_slots + node.attribute_slots:
            value = owner.constants.get(slot)
            if isinstance(value, torch.Tensor) and not is_finite(value):
                owners.setdefault(id(value), (owner, slot))
                readers.setdefault(id(value), {})[f"{node.name} ({node.op_type})"] = None
    found = []
    for identity, (owner, slot) in owners.items():
        value = owner.constants[slot]
        assert isinstance(value, torch.Tensor)
        kinds = ((value.isnan(), "NaN"), (value == torch.inf, "inf"), (value == -torch.inf, "-inf"))
        counts = tuple((count, what) for mask, what in kinds if (count := int(mask.sum())))
        found.append(NonfiniteConstant(owner.names[slot], owner.types[slot], counts, tuple(readers[identity])))
    return found


def is_finite(value: torch.Tensor) -> bool:
    """Return whether every element is finite, without a mask of the value's size."""
    if not value.is_floating_point() or not value.numel():
        return True
    return all(bool(end.isfinite()) for end in torch.aminmax(value))


def _weights(graph: Graph) -> tuple[Weights, ...]:
    """Return the constants that are tensor inputs; attributes such as axes and sizes are excluded."""
    seen: dict[int, tuple[ElementType, int]] = {}
    for owner, node in all_nodes(graph):
        for slot in node.tensor_slots:
            value = owner.constants.get(slot)
            if isinstance(value, torch.Tensor):
                seen[id(value)] = (owner.types[slot].element, value.numel())
    by_type: dict[str, list[tuple[ElementType, int]]] = {}
    for element, count in seen.values():
        by_type.setdefault(element.name, []).append((element, count))
    totals = (
        Weights(
            name,
            len(tensors),
            sum(count for _, count in tensors),
            sum(_stored_bytes(element, count) for element, count in tensors),
        )
        for name, tensors in by_type.items()
    )
    return tuple(sorted(totals, key=lambda each: -each.size_bytes))


def _compressed(graph: Graph) -> tuple[Compressed, ...]:
    totals: dict[str, list[int]] = {}
    for owner, node in all_nodes(graph):
        if not node.op_type.startswith(CONSTEXPR):
            continue
        stored = sum(
            _stored_bytes(owner.types[slot].element, value.numel())
            for slot in node.tensor_slots
            if isinstance(value := owner.constants.get(slot), torch.Tensor)
        )
        dense = sum(_dense_bytes(owner, slot) for slot in node.outputs)
        total = totals.setdefault(node.op_type, [0, 0, 0])
        for position, value in enumerate((1, stored, dense)):
            total[position] += value
    return tuple(Compressed(name, *total) for name, total in sorted(totals.items()))


def _stored_bytes(element: ElementType, count: int) -> int:
    return -(-count * element.bits // 8)


def _dense_bytes(graph: Graph, slot: int) -> int:
    value_type = graph.types.get(slot)
    if value_type is None or None in value_type.shape:
        return 0
    count = 1
    for size in value_type.shape:
        count *= size or 0
    return _stored_bytes(value_type.element, count)


def render(summary: PackageSummary, to: Console) -> None:
    """Print the summary as tables."""
    count = len(summary.functions)
    to.print(title(summary.package), soft_wrap=True)
    to.print(
        Text(
            f"ML Program, specification version {summary.specification_version}, "
            f"{count} function{'s' if count > 1 else ''}"
        )
    )
    for function in summary.functions:
        _render_function(function, to)


def _row(spec: OutputSpec, *, is_input: bool) -> tuple[str, str, str]:
    """Return name, type and shape. Inputs list every allowed shape, because those are enforced."""
    if isinstance(spec, LabelSpec):
        return (spec.name, spec.label_type, "label")
    if isinstance(spec, ProbabilitiesSpec):
        return (spec.name, "float", f"by {spec.label_type} label")
    if isinstance(spec, ImageSpec):
        return (spec.name, f"image {spec.color_space.value}", spec.describe_sizes())
    return (spec.name, spec.dtype, spec.describe_shapes() if is_input else shape_text(spec.shape))


def _render_function(function: FunctionSummary, to: Console) -> None:
    to.print()
    to.print(title(f"function {function.name}, operations of {function.operation_set}"))
    rows = [
        (kind, *_row(spec, is_input=kind == "input"))
        for kind, specs in (("input", function.inputs), ("output", function.outputs), ("state", function.states))
        for spec in specs
    ]
    to.print(table(["", "name", "dtype", "shape"], rows))
    to.print()
    to.print(title(f"{sum(function.operations.values())} operations"))
    # text takes five lines where a table takes forty
    to.print(Text(", ".join(f"{name} {count}" for name, count in function.operations.items()) or "none"))
    to.print()
    to.print(title(f"weights, {bytes_text(function.weight_bytes)} bytes"))
    to.print(
        table(
            ["dtype", ">tensors", ">elements", ">bytes"],
            [
                (each.dtype, str(each.tensors), f"{each.elements:,}", bytes_text(each.size_bytes))
                for each in function.weights
            ],
        )
    )
    if function.compressed:
        to.print()
        to.print(title("of these, compressed"))
        to.print(
            table(
                ["operation", ">count", ">bytes stored", ">bytes dense"],
                [
                    (each.operation, str(each.count), bytes_text(each.stored_bytes), bytes_text(each.dense_bytes))
                    for each in function.compressed
                ],
            )
        )


def as_document(summary: PackageSummary) -> dict[str, Any]:
    """Return the document that `--json` prints."""
    return asdict(summary)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("mil inspect", __doc__, example="model.mlpackage")
    parser.add_argument("package", type=Path, help="an .mlpackage")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    options = parser.parse_args(argv)
    summary = summarize(open_package(options.package))
    if options.json:
        print_json(console(), as_document(summary))
    else:
        render(summary, console())
    return 0
