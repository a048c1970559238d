"""What others may import of the core: a module is public when it says ``__all__``, and so are the names in it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

OUTSIDE = ("fabric_backends", "fabric_cuda", "fabric_xla", "fabric_deepspeed", "examples")
TEMPLATES = "fabric_core/src/fabric_core/scaffold"


def imports_of_the_core(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of everything that a text imports of the core; no name for a whole module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fabric_core":
            yield from ((node.lineno, node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            modules = (alias.name for alias in node.names)
            yield from ((node.lineno, name, "") for name in modules if name.split(".")[0] == "fabric_core")


def is_public(module: str, name: str) -> bool:
    """Whether strangers may import it."""
    public = getattr(importlib.import_module(module), "__all__", ())
    return name in public if name else module == "fabric_core"


@pytest.mark.parametrize("folder", [*OUTSIDE, TEMPLATES])
def test_whoever_is_outside_of_the_core_imports_public_names_only(root: Path, folder: str) -> None:
    if folder == TEMPLATES:  # with placeholders, so not always Python
        texts = {file: file.read_text("utf-8") for file in (root / folder).rglob("*.py.txt")}
        sources = {file: text.replace("${", "_").replace("$", "_") for file, text in texts.items()}
    else:
        sources = {file: file.read_text("utf-8") for file in (root / folder).rglob("*.py")}
    assert sources
    private = [
        f"{file.relative_to(root)}:{line}: {module}:{name}"
        for file, source in sources.items()
        for line, module, name in imports_of_the_core(source)
        if not is_public(module, name)
    ]
    assert private == []


def test_what_is_public_is_there(root: Path) -> None:
    folder = root / "fabric_core" / "src"
    modules = [
        ".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        for file in folder.rglob("*.py")
        if "\n__all__ = " in file.read_text("utf-8")
    ]
    assert {"fabric_core", "fabric_core.errors", "fabric_core.testing"} <= set(modules)
    for module in modules:
        found = importlib.import_module(module)
        assert [name for name in found.__all__ if not hasattr(found, name)] == []
        assert [name for name in found.__all__ if name.startswith("_") and name != "__version__"] == []
