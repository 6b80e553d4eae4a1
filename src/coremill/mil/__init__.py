"""Runs Core ML ML Programs without macOS, in reference numerics: not what a given device computes.

`MLModel` reads like coremltools' class of the name. Depends on torch (as its array library), numpy, coremltools'
protobuf definitions and `coremill.core.errors`.
"""

from coremill.mil.description import ColorSpace, ImageSpec, LabelSpec, ProbabilitiesSpec, TensorSpec
from coremill.mil.model import MLModel, State

__all__ = ["ColorSpace", "ImageSpec", "LabelSpec", "MLModel", "ProbabilitiesSpec", "State", "TensorSpec"]
