"""`coremill mil lint`: operations that keep a graph off the Neural Engine, or make it slow there.

One more rule finds constants that are infinite or NaN.

The rules are hints from published sources: Apple does not document the operations of the Neural Engine, and the
processor of an operation depends on device and system. Xcode's performance report on the device is decisive. Each
rule names its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from coremill.core.command import command_parser
from coremill.core.errors import GATES_FAILED, OK
from coremill.mil.commands.inspect import nonfinite_constants
from coremill.mil.commands.output import console, title
from coremill.mil.description import FunctionDescription, ImageSpec, TensorSpec, choose_function, describe_function
from coremill.mil.graph import LOOP, Graph, Node, read_function
from coremill.mil.loader import open_package
from coremill.mil.values import TensorType

ARTICLE = (
    "Apple, Deploying Transformers on the Apple Neural Engine (2022), "
    "machinelearning.apple.com/research/neural-engine-transformers"
)
FLEXIBLE_INPUTS = (
    "coremltools guide, Flexible Input Shapes, apple.github.io/coremltools/docs-guides/source/flexible-inputs.html"
)
FAQ = (
    "coremltools guide, FAQs, Neural Engine With Flexible Input Shapes, "
    "apple.github.io/coremltools/docs-guides/source/faqs.html"
)
TYPED_EXECUTION = (
    "coremltools guide, Typed Execution Workflow Example, "
    "apple.github.io/coremltools/docs-guides/source/typed-execution-example.html"
)
UNSUPPORTED_LAYERS = (
    "hollance/neural-engine, Which Core ML layers are not supported by the ANE? (observations), "
    "github.com/hollance/neural-engine/blob/master/docs/unsupported-layers.md"
)

MAX_RANK = 5
MAX_ENUMERATED = 128
MAX_INNER_SIZE, MAX_OUTER_SIZE = 16_384, 65_536
"""Of the last two dimensions, and of any."""
STATE_MULTIPLE = 32

WIDE_FLOATS = ("fp32", "fp64", "bf16")
WIDE_INTEGERS = ("int64", "uint32")
"""Integers that no cast of an ML Program returns."""

RECURRENT = ("gru", "lstm", "rnn")
SHAPERS = ("reshape", "transpose")

SHOWN = 8
"""The number of findings of a rule that are printed without --all."""


@dataclass(frozen=True)
class Place:
    """An operation that runs in each prediction (not once, on constants), and its graph."""

    graph: Graph
    node: Node
    known: AbstractSet[int]
    """Slots of the graph that depend on constants alone."""

    def is_constant(self, slot: int) -> bool:
        return slot in self.known

    def tensors(self, parameter: str) -> tuple[int, ...]:
        """Return the slots of a tensor parameter."""
        if self.node.definition is None:
            return ()
        names = [each.name for each in self.node.definition.tensors]
        return self.node.tensors[names.index(parameter)] if parameter in names else ()

    def outputs(self) -> list[TensorType]:
        types = (self.graph.types.get(slot) for slot in self.node.outputs)
        return [each for each in types if each is not None]

    def __str__(self) -> str:
        return f"{self.node.name} ({self.node.op_type})"


@dataclass(frozen=True)
class Subject:
    """What a rule examines."""

    description: FunctionDescription
    graph: Graph
    places: tuple[Place, ...]

    def inputs(self) -> Iterator[tuple[str, TensorType]]:
        """Yield inputs and states, as the program declares them."""
        states = {each.name for each in self.description.states}
        for slot in self.graph.inputs:
            if slot in self.graph.types:
                name = self.graph.names[slot]
                yield f"{'state' if name in states else 'input'} {name}", self.graph.types[slot]

    def values(self) -> Iterator[tuple[str, TensorType]]:
        """Yield every tensor of a prediction: inputs, states and outputs of operations."""
        yield from self.inputs()
        for place in self.places:
            for value_type in place.outputs():
                yield str(place), value_type


@dataclass(frozen=True)
class Rule:
    """A known limitation of the Neural Engine."""

    name: str
    why: str
    source: str
    find: Callable[[Subject], Iterator[str]]
    """Yields each input, state or operation that the rule applies to, with the reason."""


@dataclass(frozen=True)
class Finding:
    """One input, state or operation that a rule applies to."""

    rule: Rule
    where: str


def lint(description: FunctionDescription, graph: Graph) -> list[Finding]:
    """Return the findings of all rules in a function, rule by rule."""
    subject = Subject(description, graph, tuple(_places(graph, set())))
    return [Finding(rule, where) for rule in RULES for where in rule.find(subject)]


def _places(graph: Graph, constant: set[int]) -> Iterator[Place]:
    """Yield every operation that does not depend on constants alone, including those of nested blocks.

    Args:
        constant: slots of the graph whose values are known at compilation.
    """
    known = constant | set(graph.constants)
    for node in graph.nodes:
        slots = {slot for slot in node.tensor_slots + node.attribute_slots if slot}
        if node.definition is not None and node.definition.pure and slots <= known:
            known.update(node.outputs)
            continue
        yield Place(graph, node, known)
        for block in node.blocks:
            inner = block.graph
            captured = inner.inputs[len(inner.inputs) - len(block.captured) :]
            yield from _places(
                inner, {own for own, outer in zip(captured, block.captured, strict=True) if outer in known}
            )


def _input_tensors(subject: Subject) -> Iterator[TensorSpec]:
    for spec in subject.description.inputs:
        yield spec.tensor if isinstance(spec, ImageSpec) else spec


def _range_shapes(subject: Subject) -> Iterator[str]:
    for spec in _input_tensors(subject):
        if spec.supported_shapes is None:
            unbounded = any(high is None for _, high in spec.size_ranges)
            yield f"input {spec.name}: {spec.describe_shapes()}{', which has no upper bound' if unbounded else ''}"


def _many_shapes(subject: Subject) -> Iterator[str]:
    for spec in _input_tensors(subject):
        if len(spec.enumerated_shapes) > MAX_ENUMERATED:
            yield f"input {spec.name}: {len(spec.enumerated_shapes)} shapes"


def _high_rank(subject: Subject) -> Iterator[str]:
    for where, value_type in subject.values():
        if len(value_type.shape) > MAX_RANK:
            yield f"{where}: {value_type}"


def _large_dimensions(subject: Subject) -> Iterator[str]:
    for where, value_type in subject.values():
        sizes = [size or 0 for size in value_type.shape]
        if max(sizes[-2:], default=0) > MAX_INNER_SIZE or max(sizes, default=0) > MAX_OUTER_SIZE:
            yield f"{where}: {value_type}"


def _of_types(names: Sequence[str], *, besides: Sequence[str] = ()) -> Callable[[Subject], Iterator[str]]:
    """Return a rule for inputs and outputs of these types; some operations are excluded."""

    def find(subject: Subject) -> Iterator[str]:
        for where, value_type in subject.inputs():
            if value_type.element.name in names:
                yield f"{where}: {value_type}"
        for place in subject.places:
            found = [each for each in place.outputs() if each.element.name in names]
            if found and place.node.op_type not in besides:
                yield f"{place}: {', '.join(map(str, found))}"

    return find


def _integer_or_bool(subject: Subject) -> Iterator[str]:
    def is_narrow(value_type: TensorType) -> bool:
        element = value_type.element
        return not element.is_float and element.name not in WIDE_INTEGERS and len(value_type.shape) > 0

    for where, value_type in subject.inputs():
        if is_narrow(value_type):
            yield f"{where}: {value_type}"
    for place in subject.places:
        found = list(filter(is_narrow, place.outputs()))
        # since the A17 Pro the Neural Engine computes with quantized activations (coremltools guide, What's New)
        if found and place.node.op_type != "quantize":
            yield f"{place}: {', '.join(map(str, found))}"


def _of_op_types(*op_types: str) -> Callable[[Subject], Iterator[str]]:
    def find(subject: Subject) -> Iterator[str]:
        return (str(place) for place in subject.places if place.node.op_type in op_types)

    return find


def _gathers(subject: Subject) -> Iterator[str]:
    for place in subject.places:
        if place.node.op_type.startswith("gather") and not all(
            place.is_constant(slot) for slot in place.tensors("indices")
        ):
            yield f"{place}: its indices are computed"


def _dilated(subject: Subject) -> Iterator[str]:
    for place in subject.places:
        slots = place.node.attributes.get("dilations", ())
        if place.node.op_type.startswith("conv") and slots:
            dilations = place.graph.constants.get(slots[0])
            if isinstance(dilations, torch.Tensor) and bool((dilations != 1).any()):
                yield f"{place}: dilations {dilations.tolist()}"


def _computed_reshapes(subject: Subject) -> Iterator[str]:
    for place in subject.places:
        slots = place.node.attributes.get("shape", ())
        if place.node.op_type == "reshape" and not all(place.is_constant(slot) for slot in slots):
            yield f"{place}: its shape is computed"


def _memory_copies(subject: Subject) -> Iterator[str]:
    for place in subject.places:
        if place.node.op_type in SHAPERS:
            yield f"{place}: {', '.join(map(str, place.outputs()))}"


def _linear_layers(subject: Subject) -> Iterator[str]:
    for place in subject.places:
        outputs = place.outputs()
        if place.node.op_type == "linear" and outputs and len(outputs[0].shape) < 4:
            yield f"{place}: {outputs[0]}"


def _single_last_axis(subject: Subject) -> Iterator[str]:
    for where, value_type in subject.values():
        shape = value_type.shape
        if value_type.element.name == "fp16" and len(shape) >= 3 and shape[-1] == 1:
            yield f"{where}: {value_type}"


def _nonfinite_constants(subject: Subject) -> Iterator[str]:
    yield from map(str, nonfinite_constants(subject.graph))


def _state_sizes(subject: Subject) -> Iterator[str]:
    for spec in subject.description.states:
        last = spec.shape[-1] if spec.shape else None
        if last is not None and last % STATE_MULTIPLE:
            yield f"state {spec.name}: [{', '.join(map(str, spec.shape))}]"


RULES: tuple[Rule, ...] = (
    Rule(
        "inputs with range shapes",
        "Core ML runs them on the Neural Engine only at the default shape; it runs every enumerated shape there. "
        "From iOS 17.4 the hint reshapeFrequency = infrequent can allow others.",
        f"an Apple engineer, developer.apple.com/forums/thread/724930; {FLEXIBLE_INPUTS}",
        _range_shapes,
    ),
    Rule(
        f"inputs with more than {MAX_ENUMERATED} enumerated shapes",
        f"At most {MAX_ENUMERATED} can be given.",
        FLEXIBLE_INPUTS,
        _many_shapes,
    ),
    Rule(
        f"tensors of rank above {MAX_RANK}",
        f"Core ML supports tensors up to rank {MAX_RANK}, on any processor.",
        "a coremltools maintainer, github.com/apple/coremltools/issues/1723; coremltools' own check, "
        "converters/mil/mil/program.py",
        _high_rank,
    ),
    Rule(
        "very large dimensions",
        f"The Neural Engine's compiler rejects a height or width above {MAX_INNER_SIZE:,}, and any size above "
        f"{MAX_OUTER_SIZE:,}.",
        'its message ("Tensor dimensions … are not within supported range"), as logged in '
        "github.com/FluidInference/FluidAudio/issues/121",
        _large_dimensions,
    ),
    Rule(
        "floating-point types other than fp16",
        "Programs of fp16 are eligible for the Neural Engine; those of fp32 run on GPU and CPU.",
        TYPED_EXECUTION,
        _of_types(WIDE_FLOATS, besides=("cast",)),
    ),
    Rule(
        "64-bit and uint32 integers",
        "They come from the source framework; `cast` has int8, int16, int32, uint8, uint16, bool, fp16 and fp32.",
        "coremltools reference, MIL operations, cast (iOS17), "
        "apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html",
        _of_types(WIDE_INTEGERS),
    ),
    Rule(
        "integer and bool tensors",
        "The Neural Engine appears to use float16 for everything.",
        "hollance/neural-engine, Is the ANE 16-bit? (observations), "
        "github.com/hollance/neural-engine/blob/master/docs/16-bit.md",
        _integer_or_bool,
    ),
    Rule(
        "gathers with computed indices",
        "Embedding lookups ran on the CPU even in Apple's own optimized model, where that was the more efficient.",
        f"apple/ml-ane-transformers, README, github.com/apple/ml-ane-transformers; {UNSUPPORTED_LAYERS}",
        _gathers,
    ),
    Rule(
        "recurrent layers",
        "They are not supported on the Neural Engine.",
        f"a coremltools maintainer, github.com/apple/coremltools/issues/1780; {UNSUPPORTED_LAYERS}",
        _of_op_types(*RECURRENT),
    ),
    Rule(
        "dilated convolutions",
        "They are known not to run on the Neural Engine.",
        UNSUPPORTED_LAYERS,
        _dilated,
    ),
    Rule(
        "loops",
        "A loop over a matrix product ran neither on the Neural Engine nor on the GPU.",
        "a user's measurement, github.com/apple/coremltools/issues/2208",
        _of_op_types(LOOP),
    ),
    Rule(
        "topk",
        "It and what consumes its indices were the operations that left the Neural Engine.",
        "a user's measurement with MLComputePlan (M3 Pro, macOS 27), github.com/roboflow/rf-detr/pull/1495",
        _of_op_types("topk"),
    ),
    Rule(
        "reshapes to a computed shape",
        "A fully dynamic reshape is not supported on the Neural Engine.",
        FAQ,
        _computed_reshapes,
    ),
    Rule(
        "linear layers on fewer than 4 dimensions",
        "The format that suits the Neural Engine is 4-D and channels first, (B, C, 1, S), with 1×1 convolutions.",
        f"{ARTICLE}, principle 1; apple/ml-ane-transformers",
        _linear_layers,
    ),
    Rule(
        "reshapes and transposes",
        "They are likely to copy memory; Apple's attention for the Neural Engine has one transpose and no reshape.",
        f"{ARTICLE}, principle 3",
        _memory_copies,
    ),
    Rule(
        "a last axis of 1",
        "The last axis is padded to 64 bytes: in fp16, a last axis of 1 takes 32 times its memory.",
        f"{ARTICLE}, principle 1",
        _single_last_axis,
    ),
    Rule(
        f"states whose last axis is not a multiple of {STATE_MULTIPLE}",
        "A model with such a state failed on the Neural Engine, and ran with a multiple.",
        "a user's report (M4, macOS 15.2), github.com/apple/coremltools/issues/2631",
        _state_sizes,
    ),
    Rule(
        "infinite or NaN constants",
        "0 · ∞ and ∞ − ∞ are NaN, on any processor. The converter saves a float32 beyond 65504 in fp16 as an "
        "infinity, such as a mask of torch.finfo(torch.float32).min.",
        "a contributor's analysis, github.com/apple/coremltools/pull/2669",
        _nonfinite_constants,
    ),
)


def render(findings: Sequence[Finding], to: Console, shown: int | None = SHOWN) -> None:
    """Print the findings by rule, with the reason and the source.

    Args:
        shown: the largest number of findings of a rule; None for all.
    """
    for rule in RULES:
        places = [each.where for each in findings if each.rule is rule]
        if not places:
            continue
        to.print(Text.assemble((rule.name, "bold"), f": {len(places)}"))
        for where in places[:shown]:
            to.print(Padding(Text(where), (0, 0, 0, 4), expand=False))
        if hidden := len(places) - len(places[:shown]):
            to.print(
                Padding(Text(f"… and {hidden} more; --all lists them", style="dim"), (0, 0, 0, 4), expand=False)
            )
        to.print(Padding(Text.assemble(("why: ", "dim"), rule.why), (0, 0, 0, 2), expand=False))
        to.print(Padding(Text.assemble(("source: ", "dim"), rule.source), (0, 0, 0, 2), expand=False))
        to.print()
    count = len(findings)
    to.print(Text(f"{count} finding{'' if count == 1 else 's'}; these are hints, see --help"))


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("mil lint", __doc__, example="model.mlpackage --strict")
    parser.add_argument("package", type=Path, help="an .mlpackage")
    parser.add_argument("--function", help="the function to look at (default: the package's own)")
    parser.add_argument("--all", action="store_true", help=f"list all findings of a rule, not only {SHOWN}")
    parser.add_argument("--strict", action="store_true", help="exit with 3 if there is a finding")
    options = parser.parse_args(argv)
    package = open_package(options.package)
    name = choose_function(package, options.function)
    graph = read_function(package, name)
    findings = lint(describe_function(package, name, graph), graph)
    to = console()
    to.print(title(f"{package.name}, function {name}"), soft_wrap=True)
    to.print()
    render(findings, to, None if options.all else SHOWN)
    return GATES_FAILED if findings and options.strict else OK
