"""Read and write typed, versioned documents (JSON and TOML); errors name the path inside the document."""

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
from coremill.core.plain import Plain
from coremill.core.publish import write_atomic

if sys.version_info >= (3, 11):
    from typing import dataclass_transform

    import tomllib
else:  # the standard library has both from 3.11
    import tomli as tomllib
    from typing_extensions import dataclass_transform

log = logging.getLogger(__name__)


class _RecordMeta(msgspec.StructMeta):
    # msgspec inherits `frozen` and `forbid_unknown_fields`, but `kw_only` applies to one class alone.
    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> _RecordMeta:
        return super().__new__(mcs, name, bases, namespace, **{"kw_only": True, **options})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, metaclass=_RecordMeta):
    """Base of every typed part of a document: immutable, keyword-only, unknown keys are rejected."""


class Document(Record):
    """Base of every file format that coremill owns."""

    format_version: ClassVar[str] = "1.0"
    schema_version: str = "1.0"


AnyDocument = TypeVar("AnyDocument", bound=Document)


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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as failure:  # the last: deeply nested brackets
        raise error(f"{path} is not JSON: {failure}", expected=f"a {kind.__name__} document", run=run) from failure
    return from_builtins(value, kind, where=str(path), error=error, run=run)


def read_toml(path: Path, kind: type[AnyDocument], *, error: type[CoremillError] = DocumentError) -> AnyDocument:
    """Read the TOML document at `path`; raises as :func:`read_json` does."""
    value = toml_value(path, expected=f"a {kind.__name__} document", error=error)
    return from_builtins(value, kind, where=str(path), error=error)


def toml_value(path: Path, *, expected: str, error: type[CoremillError]) -> dict[str, Plain]:
    """Return the unchecked contents of the TOML file at `path`, for a reader that has to choose the type first."""
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
    value: Plain,
    kind: type[AnyDocument],
    *,
    where: str,
    error: type[CoremillError] = DocumentError,
    run: str | None = None,
) -> AnyDocument:
    """Return `value`, which was read from `where`, as a `kind`.

    Keys that this version does not know are an error, except in a document of a newer minor version, where they are
    dropped with a warning.

    Raises:
        error: a value has the wrong type or a key is unknown; names the JSON path.
        SchemaVersionError: its major version is unknown.
    """
    newer_minor = _check_version(value, kind, where=where, error=error, run=run)
    for holder, key, path, known in list(_unknown_keys(value, msgspec.inspect.type_info(kind), "$")):
        if newer_minor:
            log.warning("%s: ignoring `%s`, which a newer version than this one wrote", where, f"{path}.{key}")
            del holder[key]
            continue
        near = difflib.get_close_matches(key, known, n=1)
        expected = f"`{near[0]}`?" if near else "one of " + ", ".join(f"`{name}`" for name in known)
        raise error(f"{where}: unknown key `{key}` at `{path}`", expected=expected, run=run)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as failure:
        message, _, path = str(failure).partition(" - at ")
        raise error(f"{where}: {message} at {path or '`$`'}", expected=f"a {kind.__name__}", run=run) from failure


def _check_version(
    value: Plain, kind: type[Document], *, where: str, error: type[CoremillError], run: str | None
) -> bool:
    """Return whether `value` is of a newer minor version than `kind`; another major version is an error."""
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


def _unknown_keys(
    value: Plain, info: msgspec.inspect.Type, path: str
) -> Iterator[tuple[dict[str, Plain], str, str, list[str]]]:
    """Yield each key in `value` that `info` lacks, as (its object, the key, the object's path, known keys)."""
    if isinstance(info, msgspec.inspect.UnionType):
        for option in info.types:
            if _may_be(value, option):
                yield from _unknown_keys(value, option, path)
    elif isinstance(info, msgspec.inspect.StructType) and isinstance(value, dict):
        fields = {field.encode_name: field.type for field in info.fields}
        known = sorted({*fields, *([info.tag_field] if info.tag_field else [])})
        for key in list(value):
            if key not in known:
                yield value, key, path, known
            elif key in fields:
                yield from _unknown_keys(value[key], fields[key], f"{path}.{key}")
    elif isinstance(info, msgspec.inspect.DictType) and isinstance(value, dict):
        for key, item in value.items():
            yield from _unknown_keys(item, info.value_type, f"{path}[{key!r}]")
    elif isinstance(info, msgspec.inspect.CollectionType) and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(item, info.item_type, f"{path}[{index}]")


def _may_be(value: Plain, info: msgspec.inspect.Type) -> bool:
    """Return whether `value` can be the union member `info`; a tagged record needs its tag."""
    if isinstance(info, msgspec.inspect.StructType) and isinstance(value, dict):
        return info.tag_field is None or value.get(info.tag_field) == info.tag
    return True


def encode(document: Record) -> bytes:
    """Return the document as indented JSON with a final newline; equal documents give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def write_json(path: Path, document: Record) -> None:
    """Write `document` to `path` atomically."""
    write_atomic(path, encode(document))


def json_schemas(kinds: list[type[Document]]) -> dict[str, bytes]:
    """Return the JSON Schema of each kind of document, by file name."""
    return {
        f"{kind.__name__}.schema.json": msgspec.json.format(
            msgspec.json.encode(_clean_descriptions(msgspec.json.schema(kind)), order="sorted"), indent=2
        )
        + b"\n"
        for kind in kinds
    }


def _clean_descriptions(value: Plain) -> Plain:
    """Remove the indentation of docstrings, which Python up to 3.12 keeps and later ones strip."""
    if isinstance(value, dict):
        return {
            key: inspect.cleandoc(item)
            if key == "description" and isinstance(item, str)
            else _clean_descriptions(item)
            for key, item in value.items()
        }
    return [_clean_descriptions(item) for item in value] if isinstance(value, list) else value
