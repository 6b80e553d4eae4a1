"""The source files that a module's behaviour depends on: what it imports, and what it starts by name."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from pathlib import Path

from coremill.core.digest import file_digest, value_digest

_PACKAGE = "coremill"
_MODULE_NAME = re.compile(rf"{_PACKAGE}(\.\w+)*")
_SOURCE_ROOT = Path(__file__).resolve().parents[1]
_DATA = ("*.toml", "*.txt")


def source_digest(module: str) -> str:
    """Return the digest of every file in :func:`source_files`."""
    files = sorted(source_files(module))
    return value_digest({file.relative_to(_SOURCE_ROOT).as_posix(): file_digest(file) for file in files})


def source_files(module: str) -> set[Path]:
    """Return the files of coremill that running `module` can use, without importing anything.

    These are the module itself, those that it imports, directly or not, those that it runs in another process or
    imports by name (the name must be a string literal), and the data files next to any of them.
    """
    found: set[Path] = set()
    waiting = [module]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _module_path(name)
        if path is None:  # `from coremill.core.errors import X` yields coremill.core.errors.X as well
            continue
        found.add(path)
        # Package data is read by the modules next to it.
        found.update(file for kind in _DATA for file in path.parent.glob(kind))
        waiting.extend(_module_names(path))
        waiting.append(name.rpartition(".")[0] or _PACKAGE)
    return found


def _module_path(name: str) -> Path | None:
    base = _SOURCE_ROOT.joinpath(*name.split(".")[1:])
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


@functools.cache
def _module_names(path: Path) -> tuple[str, ...]:
    """Return the names of coremill's modules in a file: of imports, also inside functions, and string literals."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.append(node.value)
        elif isinstance(node, ast.List | ast.Tuple):  # [python, "-m", package] runs the package's __main__
            values = [each.value if isinstance(each, ast.Constant) else None for each in node.elts]
            names += [f"{name!s}.__main__" for flag, name in itertools.pairwise(values) if flag == "-m"]
    return tuple(name for name in names if _MODULE_NAME.fullmatch(name))
