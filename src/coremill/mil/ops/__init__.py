"""The operations of the Model Intermediate Language, one module a family; importing this registers them all."""

from coremill.mil.ops import (
    activation,
    constexpr,
    control_flow,
    elementwise_binary,
    elementwise_unary,
    linear,
    normalization,
    quantization,
    reduction,
    scatter_gather,
    state,
    tensor_operation,
    tensor_transformation,
    transformer,
)

__all__ = [
    "activation",
    "constexpr",
    "control_flow",
    "elementwise_binary",
    "elementwise_unary",
    "linear",
    "normalization",
    "quantization",
    "reduction",
    "scatter_gather",
    "state",
    "tensor_operation",
    "tensor_transformation",
    "transformer",
]
