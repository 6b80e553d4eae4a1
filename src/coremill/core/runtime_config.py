"""RuntimeConfig: what a program that runs a package needs to know of it."""

from __future__ import annotations

from coremill.core.contract import Contract, ShapeSet
from coremill.core.documents import Document
from coremill.core.errors import ContractMismatchError


class RuntimeConfig(Document):
    """`runtime_config.json`; made from a contract, so that it cannot promise what the graph lacks."""

    model_type: str
    package: str
    """File name of the .mlpackage."""
    package_digest: str
    tokenizer_digest: str
    shapes: ShapeSet
    halt_head: bool
    """Whether to stop on the halt head as well as on the end token."""


def runtime_config(contract: Contract, *, package: str, package_digest: str, halt_head: bool) -> RuntimeConfig:
    """The configuration for running `package`.

    Raises:
        ContractMismatchError: `halt_head` is asked of a model that has none.
    """
    outputs = [spec.name for spec in contract.outputs]
    if halt_head and not (contract.model_arch.use_halt_head and "halt_logits" in outputs):
        raise ContractMismatchError(
            f"halt_head is on, the model's outputs are {outputs}", expected="an output `halt_logits`"
        )
    return RuntimeConfig(
        model_type=contract.model_type,
        package=package,
        package_digest=package_digest,
        tokenizer_digest=contract.tokenizer.digest,
        shapes=contract.shapes,
        halt_head=halt_head,
    )
