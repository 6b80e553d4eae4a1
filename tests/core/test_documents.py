"""Reading and writing typed documents, and the errors of invalid ones."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.core.contract import ShapeFailed, ShapeOk
from coremill.core.documents import Document, Record, encode, from_builtins, read_json, write_json
from coremill.core.errors import ConfigError, DocumentError, SchemaVersionError


class Leaf(Record):
    size: int
    name: str = "leaf"


class Tree(Document):
    leaves: tuple[Leaf, ...]
    by_name: dict[str, ShapeOk | ShapeFailed] = msgspec.field(default_factory=dict)


def plain(**changes):
    return {"schema_version": "1.0", "leaves": [{"size": 1}], **changes}


@given(st.lists(st.integers(min_value=-(2**53), max_value=2**53)), st.text())
def test_document_round_trip(tmp_path_factory, sizes, name):
    path = tmp_path_factory.mktemp("documents") / "tree.json"
    tree = Tree(leaves=tuple(Leaf(size=size, name=name) for size in sizes))
    write_json(path, tree)
    assert read_json(path, Tree) == tree
    assert path.read_bytes() == encode(tree)


def refusal(value, error=DocumentError):
    with pytest.raises(error) as caught:
        from_builtins(value, Tree, where="tree.json", error=error if error is ConfigError else DocumentError)
    return str(caught.value)


def test_wrong_type_is_reported_with_its_path():
    assert refusal(plain(leaves=[{"size": 1}, {"size": "2"}])) == (
        "tree.json: Expected `int`, got `str` at `$.leaves[1].size`\n  expected: a Tree"
    )


def test_unknown_key_suggests_the_nearest_name():
    assert refusal(plain(leaves=[{"sizes": 1}]), ConfigError) == (
        "tree.json: unknown key `sizes` at `$.leaves[0]`\n  expected: `size`?"
    )


def test_unknown_key_without_a_near_name_lists_all_names():
    assert refusal(plain(zzz=1)) == (
        "tree.json: unknown key `zzz` at `$`\n  expected: one of `by_name`, `leaves`, `schema_version`"
    )


def test_unknown_key_in_a_tagged_union_is_rejected():
    found = refusal(plain(by_name={"T64": {"status": "ok", "max_abs_err": 0.0, "error": "x"}}))
    assert found.startswith("tree.json: unknown key `error` at `$.by_name['T64']`")


def test_missing_version_is_rejected():
    value = plain()
    del value["schema_version"]
    assert refusal(value) == (
        "tree.json: no `schema_version` at `$`\n  expected: schema_version 1.x, as coremill's Tree is 1.0"
    )


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", "one", 2])
def test_unknown_major_version_is_rejected(version):
    with pytest.raises(SchemaVersionError, match=r"schema_version 1\.x") as caught:
        from_builtins(plain(schema_version=version), Tree, where="tree.json")
    assert caught.value.found == f"tree.json: schema_version {version!r}"
    assert caught.value.exit_code == 12


def test_newer_minor_version_is_read_with_a_warning(caplog):
    value = plain(schema_version="1.10", new=3, leaves=[{"size": 1, "newer": 2}])
    with caplog.at_level(logging.WARNING):
        tree = from_builtins(value, Tree, where="tree.json")
    assert tree.leaves == (Leaf(size=1),)
    assert "tree.json: ignoring `$.new`" in caplog.text
    assert "tree.json: ignoring `$.leaves[0].newer`" in caplog.text


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"", "is not JSON"),
        (b"[]", "found list at `$`"),
    ],
)
def test_invalid_json_is_rejected(tmp_path, data, found):
    path = tmp_path / "tree.json"
    path.write_bytes(data)
    with pytest.raises(DocumentError, match=re.escape(found)):
        read_json(path, Tree)


def test_missing_file_is_reported(tmp_path):
    with pytest.raises(DocumentError) as caught:
        read_json(tmp_path / "none.json", Tree, run="make it")
    assert str(caught.value) == (
        f"cannot read {tmp_path / 'none.json'}: No such file or directory\n"
        "  expected: a readable file\n  run: make it"
    )


def test_records_are_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        Leaf(size=1).size = 2
    with pytest.raises(TypeError):
        Leaf(1)


def test_encoding_ends_with_a_newline_and_is_json():
    data = encode(Tree(leaves=()))
    assert data.endswith(b"}\n")
    assert json.loads(data) == {"schema_version": "1.0", "leaves": [], "by_name": {}}


def test_checked_in_schemas_are_current():
    from coremill.core.documents import json_schemas
    from coremill.core.schemas import FORMATS

    folder = Path(__file__).parents[2] / "docs" / "schemas"
    assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == json_schemas(FORMATS), (
        "run: nox -s schemas"
    )
