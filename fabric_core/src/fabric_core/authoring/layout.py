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


def _configured(tool: Mapping[str, Any]) -> Iterator[str]:
    """What the settings of hatchling, setuptools, Poetry, PDM and uv say."""
    for package in _get(tool, "hatch", "build", "targets", "wheel", "packages", default=()):
        yield str(Path(package).parent)
    yield from _get(tool, "setuptools", "packages", "find", "where", default=())
    yield from (_get(tool, "setuptools", "package-dir", "", default=None) or "src",)
    for package in _get(tool, "poetry", "packages", default=()):
        yield package.get("from", ".")
    yield _get(tool, "pdm", "build", "package-dir", default="src")
    yield _get(tool, "uv", "build-backend", "module-root", default="src")


def _get(tree: Any, *keys: str, default: Any) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return default if tree is None else tree


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
