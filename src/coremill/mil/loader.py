"""Opens a Core ML package: an .mlpackage directory, or a coremltools model in memory.

A package is a `Manifest.json` that lists items under `Data/` and names one of them as the root model; the root
model is a serialized `Model` message (coremltools' protobuf definitions), and its weight files are next to it.

Paths in a package's files must stay inside it: they are not absolute and do not contain `..`. Symbolic links are
followed even out of the package, because download caches consist of them.

The program is read from the messages directly. coremltools' own reader (`frontend.milproto.load`) builds its
converter's graph from them, which copies every weight and re-infers every type; see `coremill.mil.program`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # its stubs are a separate package

from coremill.core.errors import PackageError
from coremill.mil.coremltools_quietly import CoreMLToolsModel, Model_pb2
from coremill.mil.weights import WeightStore

_SAVED = "an .mlpackage directory as coremltools or Xcode saves it"


@dataclass(frozen=True, slots=True)
class Package:
    """An opened package."""

    name: str
    """Its name in messages: the path, or "the coremltools model" for a model in memory."""
    spec: Model_pb2.Model
    weights: WeightStore


def open_package(source: str | Path | CoreMLToolsModel) -> Package:
    """Open a package.

    Raises:
        PackageError: it is not a package, a part is missing or unreadable, or its model is not an ML Program.
    """
    if isinstance(source, CoreMLToolsModel):
        name, spec = "the coremltools model", source.get_spec()
        _check_type(name, spec)
        return Package(name, spec, WeightStore(Path(source.weights_dir).parent))
    path = Path(source)
    model_path = _root_model(path)
    spec = _read_spec(model_path)
    _check_type(str(path), spec)
    return Package(str(path), spec, WeightStore(model_path.parent))


def _check_type(name: str, spec: Model_pb2.Model) -> None:
    """Check that a model is an ML Program."""
    kind = spec.WhichOneof("Type")
    if kind == "mlProgram":
        return
    convert = "coremltools.convert(…, convert_to='mlprogram')"
    if kind is not None and kind.startswith("pipeline"):
        pipeline = getattr(spec, kind)
        models = (pipeline if kind == "pipeline" else pipeline.pipeline).models
        listed = ", ".join(str(each.WhichOneof("Type")) for each in models)
        raise PackageError(
            f"{name}: a pipeline ({kind}) of {len(models)} models: {listed or 'none'}",
            expected=f"one ML Program: open the models one by one, each made by {convert}",
        )
    if kind is not None and kind.startswith("neuralNetwork"):
        raise PackageError(
            f"{name}: a neural network ({kind})",
            expected=f"an ML Program: convert the original model again, by {convert}",
        )
    raise PackageError(
        f"{name}: the model is of type {kind or 'none'}", expected=f"an ML Program, as {convert} makes it"
    )


def _root_model(package: Path) -> Path:
    """Return the file of a package's root model."""
    if not package.exists():
        raise PackageError(f"{package}: no such package", expected=_SAVED)
    if not package.is_dir():
        raise PackageError(f"{package}: a file", expected=_SAVED)
    manifest_path = package / "Manifest.json"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PackageError(f"{package}: Manifest.json is missing", expected=_SAVED) from error
    except (OSError, ValueError) as error:
        raise PackageError(f"{manifest_path}: not readable as JSON ({error})", expected=_SAVED) from error
    try:
        relative = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (KeyError, TypeError) as error:
        raise PackageError(
            f"{manifest_path}: names no root model", expected="rootModelIdentifier and its entry with a path"
        ) from error
    if not isinstance(relative, str):
        raise PackageError(f"{manifest_path}: the root model's path is {relative!r}", expected="a string")
    named = PurePosixPath(relative)
    if named.is_absolute() or ".." in named.parts:
        raise PackageError(
            f"{manifest_path}: the root model's path {relative!r} leaves the package", expected="a path inside it"
        )
    return package / "Data" / named


def _read_spec(path: Path) -> Model_pb2.Model:
    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(path.read_bytes())
    except FileNotFoundError as error:
        raise PackageError(f"{path}: the root model is missing", expected=_SAVED) from error
    except (DecodeError, OSError, ValueError) as error:  # ValueError: an invalid file name
        raise PackageError(f"{path}: not a Core ML model ({error})", expected=_SAVED) from error
    return spec
