"""Reading and writing typed, versioned documents (JSON and TOML); errors name the path inside the document."""

from __future__ import annotations

import difflib
import inspect
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec
from packaging.version import InvalidVersion, Version

from coremill.core.errors import CoremillError, DocumentError, SchemaVersionError
from coremill.core.publish import write_atomic

if sys.version_info >= (3, 11):
    from typing import dataclass_transform

    import tomllib
else:  # the standard library has both from 3.11
    import tomli as tomllib
    from typing_extensions import dataclass_transform

log = logging.getLogger(__name__)


class _RecordMeta(msgspec.StructMeta):
    # msgspec inherits `frozen` and `forbid_unknown_fields`, but `kw_only` holds for one class alone.
    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        return super().__new__(mcs, name, bases, namespace, **{"kw_only": True, **options})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, metaclass=_RecordMeta):
    """Base of every typed part of a document: immutable, keyword-only, unknown keys refused."""


class Document(Record):
    """Base of every file format that coremill owns."""

    format_version: ClassVar[str] = "1.0"
    schema_version: str = "1.0"


AnyDocument = TypeVar("AnyDocument", bound=Document)
AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_json(
    path: Path, kind: type[AnyDocument], *, error: type[CoremillError] = DocumentError, run: str | None = None
) -> AnyDocument:
    """Read the document at `path`.

    Raises:
        error: the file is missing, is not JSON, or is not of the type `kind`.
        SchemaVersionError: its major version is unknown.
    """
    try:
        value = msgspec.json.decode(_read_bytes(path, error=error, run=run))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as failure:  # the last of nested brackets
        raise error(f"{path} is not JSON: {failure}", expected=f"a {kind.__name__} document", run=run) from failure
    return from_builtins(value, kind, where=str(path), error=error, run=run)


def read_toml(path: Path, kind: type[AnyDocument], *, error: type[CoremillError] = DocumentError) -> AnyDocument:
    """Read the TOML document at `path`; raises as :func:`read_json` does."""
    value = toml_value(path, expected=f"a {kind.__name__} document", error=error)
    return from_builtins(value, kind, where=str(path), error=error)


def toml_value(path: Path, *, expected: str, error: type[CoremillError]) -> dict[str, Any]:
    """What the TOML at `path` says, unchecked: for a reader that has to choose the type first."""
    try:
        return tomllib.loads(_read_bytes(path, error=error, run=None).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as failure:
        raise error(f"{path} is not TOML: {failure}", expected=expected) from failure


def _read_bytes(path: Path, *, error: type[CoremillError], run: str | None) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as failure:
        raise error(f"cannot read {path}: {failure.strerror}", expected="a readable file", run=run) from failure


def from_builtins(
    value: Any,
    kind: type[AnyDocument],
    *,
    where: str,
    error: type[CoremillError] = DocumentError,
    run: str | None = None,
) -> AnyDocument:
    """Check the plain `value` read from `where` against `kind`.

    An unknown major version is an error. Keys that this version does not know are an error too, except in
    a document of a newer minor version, where they are dropped with a warning.
    """
    newer_minor = _check_version(value, kind, where=where, error=error, run=run)
    for holder, key, path, known in list(unknown_keys(value, kind)):
        if newer_minor:
            log.warning("%s: ignoring `%s`, which a newer version than this one wrote", where, f"{path}.{key}")
            del holder[key]
            continue
        near = difflib.get_close_matches(key, known, n=1)
        expected = f"`{near[0]}`?" if near else "one of " + ", ".join(f"`{name}`" for name in known)
        raise error(f"{where}: unknown key `{key}` at `{path}`", expected=expected, run=run)
    return convert(value, kind, where=where, error=error, run=run)


def convert(
    value: Any,
    kind: type[AnyRecord],
    *,
    where: str,
    error: type[CoremillError] = DocumentError,
    run: str | None = None,
) -> AnyRecord:
    """Turn plain `value` into `kind`; a value of the wrong type is an `error` that names its JSON path."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as failure:
        message, _, path = str(failure).partition(" - at ")
        raise error(f"{where}: {message} at {path or '`$`'}", expected=f"a {kind.__name__}", run=run) from failure


def _check_version(
    value: Any, kind: type[Document], *, where: str, error: type[CoremillError], run: str | None
) -> bool:
    """Whether `value` is of a newer minor version than `kind`; an error if it is of another major."""
    if not isinstance(value, dict):
        raise error(f"{where}: found {type(value).__name__} at `$`", expected=f"a {kind.__name__} object", run=run)
    found = value.get("schema_version")
    supported = Version(kind.format_version)
    expected = f"schema_version {supported.major}.x, as coremill's {kind.__name__} is {kind.format_version}"
    if found is None:
        raise error(f"{where}: no `schema_version` at `$`", expected=expected, run=run)
    try:
        version = Version(str(found))
    except InvalidVersion as failure:
        raise SchemaVersionError(f"{where}: schema_version {found!r}", expected=expected, run=run) from failure
    if version.major != supported.major:
        raise SchemaVersionError(f"{where}: schema_version {found!r}", expected=expected, run=run)
    if version > supported:
        log.warning("%s: schema_version %s is newer than %s, which this coremill writes", where, version, supported)
    return version > supported


def unknown_keys(value: Any, kind: Any) -> Iterator[tuple[dict[str, Any], str, str, list[str]]]:
    """Each key in `value` that the type `kind` does not have: (its object, key, the object's path, known names)."""
    yield from _unknown(value, msgspec.inspect.type_info(kind), "$")


def _unknown(value: Any, info: Any, path: str) -> Iterator[tuple[dict[str, Any], str, str, list[str]]]:
    if isinstance(info, msgspec.inspect.UnionType):
        for option in info.types:
            if _could_be(value, option):
                yield from _unknown(value, option, path)
    elif isinstance(info, msgspec.inspect.StructType) and isinstance(value, dict):
        fields = {field.encode_name: field.type for field in info.fields}
        known = sorted({*fields, *([info.tag_field] if info.tag_field else [])})
        for key in list(value):
            if key not in known:
                yield value, key, path, known
            elif key in fields:
                yield from _unknown(value[key], fields[key], f"{path}.{key}")
    elif isinstance(info, msgspec.inspect.DictType) and isinstance(value, dict):
        for key, item in value.items():
            yield from _unknown(item, info.value_type, f"{path}[{key!r}]")
    elif isinstance(info, (msgspec.inspect.VarTupleType, msgspec.inspect.ListType)) and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown(item, info.item_type, f"{path}[{index}]")


def _could_be(value: Any, info: Any) -> bool:
    """Whether `value` is meant as the union member `info`: for tagged records, the one with its tag."""
    if isinstance(info, msgspec.inspect.StructType) and isinstance(value, dict):
        return info.tag_field is None or value.get(info.tag_field) == info.tag
    return True


def encode(document: Record) -> bytes:
    """The document as indented JSON with a final newline; equal documents give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def write_json(path: Path, document: Record) -> None:
    """Write `document` to `path`, whole or not at all."""
    write_atomic(path, encode(document))


def json_schemas(kinds: list[type[Document]]) -> dict[str, bytes]:
    """The JSON Schema of each kind of document, by file name."""
    return {
        f"{kind.__name__}.schema.json": msgspec.json.format(
            msgspec.json.encode(_clean_descriptions(msgspec.json.schema(kind)), order="sorted"), indent=2
        )
        + b"\n"
        for kind in kinds
    }


def _clean_descriptions(value: Any) -> Any:
    """Docstrings without their indentation, which Python keeps up to 3.12 and strips from 3.13 on."""
    if isinstance(value, dict):
        return {
            key: inspect.cleandoc(item)
            if key == "description" and isinstance(item, str)
            else _clean_descriptions(item)
            for key, item in value.items()
        }
    return [_clean_descriptions(item) for item in value] if isinstance(value, list) else value
