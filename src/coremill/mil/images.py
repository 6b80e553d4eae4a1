"""Converts images to tensors and back, as coremltools' binding of Core ML does.

Source: `coremlpython/CoreMLPythonUtils.mm` in coremltools' repository, and `ImageFeatureType` in its protobuf
definitions. Pillow is imported only to create an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch

from coremill.core.errors import MachineError, PredictionInputError
from coremill.measures import Array
from coremill.mil.description import ColorSpace, ImageSpec


class Image(Protocol):
    """The part of a PIL image that is read."""

    @property
    def mode(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    def tobytes(self) -> bytes: ...


_GIVEN_MODES: Mapping[ColorSpace, str] = MappingProxyType(
    {
        ColorSpace.RGB: "RGB",
        ColorSpace.BGR: "RGB",
        ColorSpace.GRAYSCALE: "L",
        ColorSpace.GRAYSCALE_FLOAT16: "F",
    }
)
"""Pillow's mode of an input image, by color space."""

_OPAQUE = 255


def tensor_from_image(spec: ImageSpec, image: Array | Image) -> torch.Tensor:
    """Return a PIL image as (1, channels, height, width), of the type that the program declares.

    Raises:
        PredictionInputError: it is not a PIL image, or the input does not allow its mode or size.
    """
    mode = _GIVEN_MODES[spec.color_space]
    if isinstance(image, np.ndarray) or not all(hasattr(image, each) for each in ("mode", "size", "tobytes")):
        raise PredictionInputError(
            f"input {spec.name!r} is a {type(image).__name__}", expected=f"a PIL image of mode {mode!r}"
        )
    if image.mode != mode:
        raise PredictionInputError(
            f"input {spec.name!r} is an image of mode {image.mode!r}",
            expected=f"mode {mode!r}, for color space {spec.color_space.value}",
        )
    width, height = image.size
    channels = spec.color_space.channels
    if not spec.tensor.admits((1, channels, height, width)):
        raise PredictionInputError(
            f"input {spec.name!r} is an image of {width} x {height}", expected=spec.describe_sizes()
        )
    pixels = np.frombuffer(image.tobytes(), np.float32 if mode == "F" else np.uint8)
    pixels = pixels.reshape(height, width, channels)
    if spec.color_space is ColorSpace.BGR:
        pixels = pixels[:, :, ::-1]
    with np.errstate(over="ignore"):  # a value beyond fp16's range becomes an infinity, as IEEE specifies
        planes = pixels.transpose(2, 0, 1)[None].astype(spec.tensor.dtype, order="C")
    return torch.from_numpy(planes)


def image_from_array(spec: ImageSpec, array: Array) -> Image:
    """Return a (1, channels, height, width) array as a PIL image of mode RGBA (opaque), L or F.

    In a color space of 8 bits, values are rounded to the nearest integer (half to even) and clamped to 0 to 255;
    NaN becomes 0. Core ML does not document its conversion.

    Raises:
        MachineError: Pillow is not installed.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise MachineError(
            f"output {spec.name!r} is an image, and Pillow is not installed", run="pip install pillow"
        ) from error
    planes = array[0]
    if spec.color_space is ColorSpace.GRAYSCALE_FLOAT16:
        mode, pixels = "F", planes.astype(np.float32)
    else:
        whole = np.rint(np.nan_to_num(planes, nan=0, posinf=255, neginf=0))
        mode, pixels = "L", np.clip(whole, 0, 255).astype(np.uint8)
    if spec.color_space.channels == 3:
        if spec.color_space is ColorSpace.BGR:
            pixels = pixels[::-1]
        mode, pixels = "RGBA", np.concatenate([pixels, np.full_like(pixels[:1], _OPAQUE)])
    _, height, width = pixels.shape
    image: Image = PIL.Image.frombytes(mode, (width, height), pixels.transpose(1, 2, 0).tobytes())
    return image
