"""A function of a package, and its plans by mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coremill.mil.graph import Graph, read_function
from coremill.mil.loader import Package
from coremill.mil.plan import CPU, Constants, Observer, Plan, Target
from coremill.mil.settings import neutral
from coremill.mil.values import Value


class Program:
    """One function of a package. Its plans share their constants.

    Args:
        function_name: a function of the package's program.

    Raises:
        PackageError: see `coremill.mil.graph.read_function`.
        UnsupportedOperationError: likewise.
    """

    def __init__(self, package: Package, function_name: str) -> None:
        with neutral(CPU):
            self.graph: Graph = read_function(package, function_name)
        self._weights = package.weights
        self._constants = Constants()
        self._plans: dict[Target, Plan] = {}

    def plan(self, target: Target) -> Plan:
        """Return the plan of a mode on a device; it is compiled at the first call.

        Raises:
            PackageError: an operation on constants cannot be computed.
        """
        if target not in self._plans:
            with neutral(target.device):
                self._plans[target] = Plan(self.graph, target, self._constants)
        return self._plans[target]

    def run(self, arguments: Sequence[Value], target: Target, observe: Observer | None = None) -> tuple[Value, ...]:
        """Return the values of the function's outputs, in its order; see `coremill.mil.plan.Section.run`.

        Args:
            arguments: a tensor for each input and a cell for each state, in the function's order.

        Raises:
            PackageError: see Section.run; also if a weight file was truncated after it was opened.
        """
        self._weights.check_sizes()
        plan = self.plan(target)
        with neutral(target.device):
            held = [
                argument.to(target.device, target.numerics.storage(self.graph.types[slot].element))
                if isinstance(argument, torch.Tensor)
                else argument
                for slot, argument in zip(self.graph.inputs, arguments, strict=True)
            ]
            return plan.run(held, observe)
