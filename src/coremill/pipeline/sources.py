"""Which source files a module's behaviour rests on: its imports within coremill, followed to the end."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from coremill.core.digest import file_digest, value_digest

_PACKAGE = "coremill"
_SOURCE_ROOT = Path(__file__).resolve().parents[1]
_DATA = ("*.toml", "*.txt")


def source_digest(module: str) -> str:
    """Digest of every file that importing `module` can bring in, and of the data files beside them."""
    files = sorted(source_files(module))
    return value_digest({file.relative_to(_SOURCE_ROOT).as_posix(): file_digest(file) for file in files})


def source_files(module: str) -> set[Path]:
    """The files of coremill that `module` imports, directly or not; read from the code, nothing is run."""
    found: set[Path] = set()
    waiting = [module]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _module_path(name)
        if path is None:  # `from coremill.core.errors import X` offers coremill.core.errors.X as well
            continue
        found.add(path)
        # Package data is read by the modules beside it.
        found.update(file for kind in _DATA for file in path.parent.glob(kind))
        waiting.extend(_imports(path))
        waiting.append(name.rpartition(".")[0] or _PACKAGE)
    return found


def _module_path(name: str) -> Path | None:
    parts = name.split(".")
    if parts[0] != _PACKAGE:
        return None
    base = _SOURCE_ROOT.joinpath(*parts[1:])
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    """Names in coremill that the file imports, at its top or inside a function."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(name for name in names if name.split(".")[0] == _PACKAGE)
