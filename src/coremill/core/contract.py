"""The contract of an exported graph: names, dtypes and shapes, and the errors that were measured at export."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Literal

from coremill.core.documents import Document, Record, read_json
from coremill.core.errors import DocumentError

ComputePrecision = Literal["float16", "float32"]

Frontend = Literal["torchscript", "torch-export"]

MAIN = "main"
"""The function that scores whole sequences; every package has it."""

Dim = int | str
"""A size, or the name of a symbolic dimension such as `T`."""


class DType(str, enum.Enum):
    INT32 = "int32"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class TensorSpec(Record):
    """An input, output or state of a graph."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]

    def at(self, **sizes: int) -> tuple[int, ...]:
        """Return the shape with values for its symbolic dimensions: `spec.at(T=128)`."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)


class ModelArch(Record):
    """The optional parts of the architecture."""

    use_halt_head: bool
    tie_embeddings: bool


class TokenizerRef(Record):
    """The tokenizer that a model was trained with."""

    vocab_size: int
    digest: str


class Toolchain(Record):
    """The versions that a stage ran with."""

    python: str
    platform: str
    packages: dict[str, str]


class ShapeSet(Record):
    """The sequence lengths of a graph; a failure at `primary` fails the build, at others it is recorded.

    Raises:
        ValueError: a length is repeated or not positive, or the primary one is not in the list.
    """

    primary: int
    all: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.primary not in self.all:
            raise ValueError(f"the primary shape {self.primary} is not one of {list(self.all)}")
        if len(set(self.all)) != len(self.all) or min(self.all) < 1:
            raise ValueError(f"shapes must be distinct and positive, found {list(self.all)}")


def shape_key(seq_len: int) -> str:
    """Return the name of a sequence length in reports, such as `T128`."""
    return f"T{seq_len}"


class ShapeOk(Record, tag_field="status", tag="ok"):
    max_abs_err: float


class ShapeFailed(Record, tag_field="status", tag="error"):
    error: str


ShapeValidation = ShapeOk | ShapeFailed


class StatefulFunction(Record):
    """A graph that reads and writes the contract's states: `prefill` or `decode`."""

    name: str
    inputs: tuple[TensorSpec, ...]
    """For inputs with a dimension `T`, a package has one function for each of the contract's shapes that passed."""
    outputs: tuple[TensorSpec, ...]
    max_abs_err: float
    """The largest difference from the checkpoint's logits, on real token ids."""


class PackageFunction(Record):
    """A function of the package that a contract's program becomes."""

    name: str
    graph: str
    """The graph of the program that it is converted from."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...] = ()
    lengths: tuple[int, ...]
    """The values of T that it accepts; () if its inputs have no T."""
    default: int | None
    """The value of T if the caller does not choose one."""


class Contract(Document):
    """A description of the graphs that `export_pytorch` saved.

    `inputs`, `outputs` and the shapes are those of `main`, which scores whole sequences and has no state.

    Raises:
        ValueError: the shapes and their validation differ, the primary shape failed, two tensors of a function have
            the same name, or there are states without functions that use them.
    """

    model_type: str
    model_arch: ModelArch
    graph: str
    """File name of the exported program, in the directory of the contract."""
    frontend: Frontend = "torchscript"
    """How torch exported the program: `torchscript` (traced) or `torch-export`."""
    graph_digest: str
    checkpoint_digest: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...] = ()
    """The key/value cache of a package, float16; the second-last dimension is its positions."""
    functions: tuple[StatefulFunction, ...] = ()
    """The functions other than `main`."""
    shapes: ShapeSet
    shape_validation: dict[str, ShapeValidation]
    tokenizer: TokenizerRef
    toolchain: Toolchain

    def __post_init__(self) -> None:
        expected = [shape_key(seq_len) for seq_len in self.shapes.all]
        if sorted(self.shape_validation) != sorted(expected):
            raise ValueError(
                f"shape_validation covers {sorted(self.shape_validation)}, and the shapes are {expected}"
            )
        primary = shape_key(self.shapes.primary)
        if isinstance(result := self.shape_validation[primary], ShapeFailed):
            raise ValueError(f"the primary shape {primary} failed: {result.error}")
        if bool(self.states) != bool(self.functions):
            raise ValueError(
                f"`states` has {len(self.states)} entries and `functions`, which use them, {len(self.functions)}"
            )
        tensors = [(self.inputs, self.outputs), *((each.inputs, each.outputs) for each in self.functions)]
        for inputs, outputs in tensors:
            names = [spec.name for spec in (*inputs, *outputs, *self.states)]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"more than one tensor is named {', '.join(twice)}")

    @property
    def working_lengths(self) -> tuple[int, ...]:
        """The sequence lengths at which the exported graph matches the model."""
        validation = self.shape_validation
        return tuple(seq_len for seq_len in self.shapes.all if isinstance(validation[shape_key(seq_len)], ShapeOk))

    @property
    def package_functions(self) -> tuple[PackageFunction, ...]:
        """The functions of the package that the program becomes, `main` first.

        `main` accepts every working length. `prefill` becomes one function per length, `prefill_T512`: coremltools
        converts a program with a state and an input of flexible length, but Core ML cannot load the package
        (apple/coremltools issues 2500 and 2548).
        """
        found = [
            PackageFunction(
                name=MAIN,
                graph=MAIN,
                inputs=self.inputs,
                outputs=self.outputs,
                lengths=self.working_lengths,
                default=self.shapes.primary,
            )
        ]
        for function in self.functions:
            has_t = any(isinstance(dim, str) for spec in function.inputs for dim in spec.shape)
            for seq_len in self.working_lengths if has_t else (None,):
                found.append(
                    PackageFunction(
                        name=function.name if seq_len is None else f"{function.name}_{shape_key(seq_len)}",
                        graph=function.name,
                        inputs=function.inputs,
                        outputs=function.outputs,
                        states=self.states,
                        lengths=() if seq_len is None else (seq_len,),
                        default=seq_len,
                    )
                )
        return tuple(found)

    @property
    def cache_positions(self) -> int:
        """S: the capacity of the key/value cache in tokens; 0 without a cache."""
        return int(self.states[0].shape[-2]) if self.states else 0


def read_contract(path: Path) -> Contract:
    """Read a contract.

    Raises:
        DocumentError: it is missing, not JSON, or not a contract; names the JSON path.
        SchemaVersionError: its major version is unknown.
    """
    return read_json(path, Contract, error=DocumentError, run="python -m coremill.conversion.export_pytorch --help")
