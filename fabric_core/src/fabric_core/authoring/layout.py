"""Where the modules of a project are, by what its build backend is told and by custom."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def source_folders(root: Path, stated: Mapping[str, Any]) -> list[Path]:
    """The folders that hold top-level packages: those that are configured, ``src``, and the project itself.

    Args:
        root: The folder of the project.
        stated: Its ``pyproject.toml``.
    """
    candidates = [*_configured(stated.get("tool", {})), "src", "."]
    folders = [(root / name).resolve() for name in candidates]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir() and folder.is_relative_to(root)]


FOLDERS = (
    ("setuptools", "packages", "find", "where"),
    ("setuptools", "package-dir", ""),
    ("pdm", "build", "package-dir"),
    ("uv", "build-backend", "module-root"),
)
"""The settings of build backends that name such a folder, or several."""


def _configured(tool: Any) -> Iterator[str]:
    """What the settings of build backends say."""
    for package in _all(tool, "hatch", "build", "targets", "wheel", "packages"):
        yield str(Path(package).parent)
    packages = _get(tool, "poetry", "packages")
    for package in packages if isinstance(packages, list) else ():
        yield from _all(package, "from")
    for keys in FOLDERS:
        yield from _all(tool, *keys)


def _all(tree: Any, *keys: str) -> list[str]:
    """The text at the end of some keys, or the texts; none when there is no such thing."""
    found = _get(tree, *keys)
    return [entry for entry in (found if isinstance(found, list) else [found]) if isinstance(entry, str)]


def _get(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def find_module(folders: list[Path], module: str) -> tuple[Path, Path] | None:
    """The folder in which a module is found, and its file; ``None`` when it is in none."""
    parts = module.split(".")
    for folder in folders:
        base = folder.joinpath(*parts)
        for file in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if file.is_file():
                return folder, file
    return None


def find_installed(module: str) -> Path | None:
    """The file of a module on the import path, found without importing the packages around it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = find_module(folders, ".".join(rest))
    return found[1] if found else None
