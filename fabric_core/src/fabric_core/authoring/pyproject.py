"""A project's ``pyproject.toml``: what it states, and on which lines."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fabric_core.authoring.findings import Finding
from fabric_core.authoring.layout import find_module, source_folders
from fabric_core.authoring.subject import Entry, Stated, Subject
from fabric_core.errors import ConfigurationError
from fabric_core.hookspecs import ENTRY_POINT_GROUP

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "pyproject.toml"
KEYS = ("dependencies", "dynamic", "readme", "license", "license-files")
"""Of the table ``[project]``: those that findings are about."""


def read_project(folder: Path) -> tuple[Subject | None, list[Finding]]:
    """What the project in a folder states.

    Returns:
        The subject of the further checks, ``None`` when there is nothing to check; and what is wrong so far.

    Raises:
        ConfigurationError: The folder is no project.
    """
    file = folder / FILE
    if not file.is_file():
        raise ConfigurationError(
            f"{folder} is no project: it has no {FILE}. Give the folder of a plugin's project, or the name of an "
            "installed distribution with --installed. 'fabric plugins new' makes a project."
        )
    try:
        text = file.read_text(encoding="utf-8")
        stated = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        found = re.search(r"at line (\d+)", str(error))
        return None, [Finding(file, int(found[1]) if found else 0, "toml", f"It cannot be read: {error}.")]
    project = stated.get("project")
    if not isinstance(project, dict) or not isinstance(project.get("name"), str):
        return None, [
            Finding(file, _line(text, "[project]"), "toml", "It has no table [project] that states a name.")
        ]
    odd = [
        Finding(file, _line(text, key), "toml", f"{key} has to be {SHAPES[key][0]}.")
        for key in _misshapen(project)
    ]
    return (None, odd) if odd else _subject(file, text, stated, project)


def _misshapen(project: dict[str, Any]) -> list[str]:
    """The keys of a table ``[project]`` whose values are of another sort than the standard says."""
    return [key for key, (_, fits) in SHAPES.items() if key in project and not fits(project[key])]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _tables(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(table, dict) for table in value.values())


def _lists(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_texts, value.values()))


SHAPES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "dependencies": ("a list of texts", _texts),
    "optional-dependencies": ("a table of lists of texts", _lists),
    "dynamic": ("a list of texts", _texts),
    "license-files": ("a list of texts", _texts),
    "entry-points": ("a table of tables, one for each group", _tables),
    "readme": ("a text or a table", lambda value: isinstance(value, str | dict)),
    "license": ("a text or a table", lambda value: isinstance(value, str | dict)),
}
"""What is read of the table ``[project]``: what each key has to be, and whether a value is."""


def _subject(
    file: Path, text: str, stated: dict[str, Any], project: dict[str, Any]
) -> tuple[Subject | None, list[Finding]]:
    lines = {key: _line(text, rf"{key} ") for key in KEYS}
    lines["project"] = _line(text, "[project]")
    modules = _modules(project)
    if not modules:
        message = (
            f"The group {ENTRY_POINT_GROUP!r} of entry points is missing. Add a table [project.entry-points."
            f'"{ENTRY_POINT_GROUP}"] with a line such as: acme = "acme.hooks".'
        )
        return None, [Finding(file, lines["project"], "entry-point", message)]
    folders = source_folders(file.parent, stated)
    found = {module: find_module(folders, module) for module in modules}
    missing = [
        _missing(file, _line(text, module), module, folders) for module in modules if not found[module]
    ]
    roots = [root for root, _ in filter(None, found.values())]
    subject = Subject(
        name=project["name"],
        metadata=file,
        entries=tuple(Entry(module, where[1]) for module, where in found.items() if where),
        dependencies=None if "dependencies" in project.get("dynamic", ()) else tuple(_stated(text, project)),
        root=roots[0] if roots else None,
        lines=lines,
        project=project,
    )
    return subject, missing


def _modules(project: dict[str, Any]) -> list[str]:
    return [str(module) for module in project.get("entry-points", {}).get(ENTRY_POINT_GROUP, {}).values()]


def _missing(file: Path, line: int, module: str, folders: list[Path]) -> Finding:
    looked = ", ".join(folder.relative_to(file.parent).as_posix() for folder in folders)
    message = f"The entry point names the module {module!r}, which is not there. Looked in: {looked}."
    if not re.fullmatch(r"\w+(\.\w+)*", module):
        message = f"The entry point {module!r} does not name a module, such as 'acme.hooks'."
    return Finding(file, line, "entry-point", message)


def _stated(text: str, project: dict[str, Any]) -> Iterator[Stated]:
    for requirement in project.get("dependencies", ()):
        yield Stated(requirement, _line(text, requirement))
    for extra, requirements in project.get("optional-dependencies", {}).items():
        for requirement in requirements:
            yield Stated(requirement, _line(text, requirement), extra)


def _line(text: str, wanted: str) -> int:
    """The first line that begins with a text, or else that holds it; 0 when none does."""
    lines = list(enumerate(text.splitlines(), 1))
    begins = [number for number, line in lines if f"{line.lstrip()} ".startswith(wanted)]
    holds = [number for number, line in lines if wanted in line and not line.lstrip().startswith("#")]
    return next(iter((*begins, *holds)), 0)
