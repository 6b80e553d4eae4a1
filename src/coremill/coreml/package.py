"""The .mlpackage on disk: canonical bytes, a digest of the weights inside it, and the checks that use both.

A package is a directory: `Manifest.json` lists items by id, `Data/com.apple.CoreML/model.mlmodel` is the
model's specification (protobuf; https://apple.github.io/coremltools/mlmodel), and
`Data/com.apple.CoreML/weights/weight.bin` contains the weights. Loaders do not detect a changed weight, nor a
changed specification that still parses. So the specification contains the digest of the weights, and the id of each
item is derived from its content: a package can be checked on its own.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path

import msgspec
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # comes with coremltools

from coremill.core.digest import digest, file_digest
from coremill.core.documents import Record
from coremill.core.errors import DigestError, PackageError
from coremill.coreml.converter import MLModel, Spec, ct
from coremill.coreml.multifunction import FunctionJoiner

WEIGHTS_KEY = "com.coremill.weights_sha256"
CONTRACT_KEY = "com.coremill.contract_digest"
MODEL = "com.apple.CoreML/model.mlmodel"
WEIGHTS = "com.apple.CoreML/weights"
WEIGHT_FILE = WEIGHTS + "/weight.bin"

_DATE_KEY = "com.github.apple.coremltools.conversion_date"
_ITEM_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "package-item.coremill")
_CONVERT = "python -m coremill.conversion.convert_coreml --help"


class ManifestItem(Record):
    """One entry of a package's `Manifest.json`."""

    author: str = "com.apple.CoreML"
    description: str
    name: str
    path: str
    """Relative to `Data/`."""


class PackageManifest(Record, rename="camel"):
    """A package's `Manifest.json`, in Apple's format."""

    file_format_version: str = "1.0.0"
    item_info_entries: dict[str, ManifestItem]
    root_model_identifier: str


class PackageFacts(Record):
    """The digests that a complete package records."""

    weights_digest: str
    contract_digest: str


def write_package(functions: Iterable[tuple[str, MLModel]], package: Path, *, contract_digest: str) -> None:
    """Write the functions' models, `main` first, to the empty directory `package`.

    Equal models with the same contract give equal bytes. The caller publishes the directory.
    """
    weights = package / "Data" / WEIGHT_FILE
    weights.parent.mkdir(parents=True)
    joiner = FunctionJoiner(weights)
    for name, model in functions:
        joiner.add(name, model)
    spec = joiner.finish()
    metadata = spec.description.metadata.userDefined
    # The date of the conversion, which would make equal models differ.
    metadata.pop(_DATE_KEY, None)
    metadata[WEIGHTS_KEY] = file_digest(weights)
    metadata[CONTRACT_KEY] = contract_digest
    (package / "Data" / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    write_manifest(package)
    for path in (package, *package.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # coremltools makes some readable by their owner only


def write_manifest(package: Path) -> None:
    """Write the `Manifest.json` that lists the current items of `package`."""
    model, weights = item_id(package, MODEL), item_id(package, WEIGHTS)
    items = {
        model: ManifestItem(description="CoreML Model Specification", name="model.mlmodel", path=MODEL),
        weights: ManifestItem(description="CoreML Model Weights", name="weights", path=WEIGHTS),
    }
    manifest = PackageManifest(item_info_entries=dict(sorted(items.items())), root_model_identifier=model)
    # The exact layout of coremltools, which rewrites the manifest whenever it opens a package.
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=4) + b"\n"
    (package / "Manifest.json").write_bytes(data)


def item_id(package: Path, item: str) -> str:
    """The id of an item, derived from its path in the package and its content."""
    return str(uuid.uuid5(_ITEM_NAMESPACE, f"{item}\n{digest(package / 'Data' / item)}"))


def check_package(package: Path) -> PackageFacts:
    """Check that the package is complete, and that its model and weights are unchanged since it was saved.

    Raises:
        PackageError: it is not a package, or a part of it is missing or does not parse.
        DigestError: a part was changed after the package was saved.
    """
    manifest = _read_manifest(package)
    for item in (MODEL, WEIGHT_FILE):
        if not (package / "Data" / item).is_file():
            raise PackageError(f"{package} lacks Data/{item}", expected="a complete package", run=_CONVERT)
    metadata = read_spec(package).description.metadata.userDefined
    for key in (WEIGHTS_KEY, CONTRACT_KEY):
        if key not in metadata:
            raise PackageError(f"{package} has no `{key}`", expected="a package saved by coremill", run=_CONVERT)
    weights = package / "Data" / WEIGHT_FILE
    found = file_digest(weights)
    if found != metadata[WEIGHTS_KEY]:
        raise DigestError(
            f"{weights}: found {found}",
            expected=f"{metadata[WEIGHTS_KEY]}, which the package recorded when it was saved",
            run=_CONVERT,
        )
    for item in (MODEL, WEIGHTS):
        if item_id(package, item) not in manifest.item_info_entries:
            raise DigestError(
                f"{package / 'Data' / item} does not match the package's Manifest.json",
                expected="a package that is unchanged since it was saved",
                run=_CONVERT,
            )
    return PackageFacts(weights_digest=found, contract_digest=metadata[CONTRACT_KEY])


def read_spec(package: Path) -> Spec:
    """Read the specification of the package.

    Raises:
        PackageError: it is missing or does not parse.
    """
    path = package / "Data" / MODEL
    spec = ct.proto.Model_pb2.Model()
    try:
        spec.ParseFromString(path.read_bytes())
    except OSError as failure:
        raise PackageError(
            f"cannot read {path}: {failure.strerror}", expected="a complete package", run=_CONVERT
        ) from failure
    except DecodeError as failure:
        raise PackageError(
            f"{path} is not a model: {failure}", expected="a complete package", run=_CONVERT
        ) from failure
    return spec


def _read_manifest(package: Path) -> PackageManifest:
    path = package / "Manifest.json"
    if not package.is_dir():
        what = "is a file" if package.exists() else "does not exist"
        raise PackageError(f"{package} {what}", expected="an .mlpackage directory", run=_CONVERT)
    try:
        return msgspec.json.decode(path.read_bytes(), type=PackageManifest)
    except OSError as failure:
        raise PackageError(
            f"cannot read {path}: {failure.strerror}", expected="a complete package", run=_CONVERT
        ) from failure
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise PackageError(
            f"{path} is not a package's manifest: {failure}", expected="a package saved by coremill", run=_CONVERT
        ) from failure
