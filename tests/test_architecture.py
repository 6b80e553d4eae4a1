"""docs/architecture.md describes the tree on disk and the import contract."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
SOURCE = ROOT / "src" / "coremill"


def fenced_block(first_line: str) -> list[str]:
    """The lines of the fenced block that begins with `first_line`, without the fences."""
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if block.startswith(first_line)]
    return block.splitlines()


def page_tree() -> dict[str, list[str]]:
    """The modules of each package by its path below src/coremill, as the page lists them; "" is coremill."""
    tree: dict[str, list[str]] = {}
    path: list[str] = []
    for line in fenced_block("src/coremill/\n"):
        depth = (len(line) - len(line.lstrip())) // 2
        if package := re.match(r" *([a-z_/]+)/(?: |$)", line):
            path = [*path[: max(0, depth - 1)], *([package[1]] if depth else [])]
            tree["/".join(path)] = []
        else:
            tree["/".join(path[: depth - 1])] += line.split("#")[0].replace(",", " ").split()
    return tree


def disk_tree() -> dict[str, list[str]]:
    """The same, of the files on disk."""
    packages = sorted({file.parent for file in SOURCE.rglob("*.py")})
    return {
        "" if package == SOURCE else package.relative_to(SOURCE).as_posix(): sorted(
            file.stem for file in package.glob("*.py") if file.stem != "__init__"
        )
        for package in packages
    }


def test_the_tree_on_the_page_is_the_tree_on_disk():
    page = page_tree()
    assert {package: sorted(modules) for package, modules in page.items()} == disk_tree()


def test_the_layers_on_the_page_are_those_that_import_linter_enforces():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [contract] = [
        contract
        for contract in settings["contracts"]
        if contract["type"] == "layers" and contract["containers"] == ["coremill"]
    ]
    assert fenced_block("cli\n") == contract["layers"]


def test_the_top_level_of_the_repository_is_on_the_page():
    listed = {line.split()[0].rstrip("/") for line in fenced_block("noxfile.py")}
    assert all((ROOT / name).exists() for name in listed)
    assert {"configs", "requirements", "docs", "tests", "benchmarks"} <= listed


def imports_by_name(file: Path) -> bool:
    """Whether the module uses importlib.import_module or __import__, which import-linter cannot follow."""
    names = {
        getattr(node, "attr", getattr(node, "id", getattr(node, "name", None)))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.Attribute, ast.Name, ast.alias))
    }
    return not names.isdisjoint({"import_module", "__import__"})


def test_only_the_cli_and_the_stage_table_import_modules_by_name():
    found = {file.relative_to(SOURCE).as_posix() for file in SOURCE.rglob("*.py") if imports_by_name(file)}
    assert found == {"cli/main.py", "pipeline/stages.py"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import importlib; importlib.import_module('x')", True),
        ("from importlib import import_module as load", True),
        ("__import__('x')", True),
        ("import importlib.util; importlib.util.find_spec('x')", False),
    ],
)
def test_imports_by_name_are_found(tmp_path: Path, code: str, expected: bool):
    (tmp_path / "m.py").write_text(code)
    assert imports_by_name(tmp_path / "m.py") is expected
