"""Digests are equal exactly if bytes and names are equal."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from coremill.core.digest import bytes_digest, digest, file_digest, size_bytes, value_digest

NAMES = st.text(alphabet="ab.- \n", min_size=1, max_size=6).filter(lambda name: name.strip("."))
TREES = st.dictionaries(NAMES, st.binary(max_size=20), max_size=4)


def grow(folder, tree):
    folder.mkdir(parents=True)
    for name, data in tree.items():
        (folder / name).write_bytes(data)
    return folder


def test_file_digest_is_sha256(tmp_path):
    data = b"x" * (3 << 20)
    (tmp_path / "f").write_bytes(data)
    assert file_digest(tmp_path / "f") == "sha256:" + hashlib.sha256(data).hexdigest() == bytes_digest(data)


@given(TREES, TREES)
def test_only_equal_directories_have_equal_digests(tmp_path_factory, one, other):
    folder = tmp_path_factory.mktemp("trees")
    first, second = grow(folder / "a", one), grow(folder / "b", other)
    assert (digest(first) == digest(second)) == (one == other)
    assert size_bytes(first) == sum(map(len, one.values()))


def test_file_name_cannot_imitate_a_digest(tmp_path):
    # In a list of `<digest>  <name>` lines these two would be equal.
    empty = bytes_digest(b"")
    one = grow(tmp_path / "one", {"a": b"", "b": b""})
    other = grow(tmp_path / "other", {f"a\n{empty}  b": b""})
    assert digest(one) != digest(other)


def test_path_of_a_nested_file_changes_the_digest(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "f").write_bytes(b"1")
    before = digest(tmp_path / "x")
    (tmp_path / "x" / "y").rename(tmp_path / "x" / "z")
    assert digest(tmp_path / "x") != before


def test_value_digest_ignores_the_order_of_keys():
    assert value_digest({"a": 1, "b": [2]}) == value_digest({"b": [2], "a": 1})
    assert value_digest({"a": 1}) != value_digest({"a": 2})
