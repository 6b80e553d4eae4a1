"""Runs ML Programs without macOS, in reference numerics; a device may compute slightly different values.

`MLModel` has the interface of coremltools' class of that name. The package depends on torch (as its array library),
numpy, coremltools' protobuf definitions and `coremill.core.errors`.
"""

from coremill.mil.description import ColorSpace, ImageSpec, LabelSpec, ProbabilitiesSpec, TensorSpec
from coremill.mil.model import MLModel, State

__all__ = ["ColorSpace", "ImageSpec", "LabelSpec", "MLModel", "ProbabilitiesSpec", "State", "TensorSpec"]
