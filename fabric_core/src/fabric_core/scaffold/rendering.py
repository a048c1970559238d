"""From templates to files: what stands under ``$name`` and the like is filled in, in texts and in paths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from string import Template

from fabric_core.scaffold.kinds import Kind

_TEMPLATES = Path(__file__).parent / "templates"
_SUFFIX = ".txt"
_PACKAGE = "package"
"""The folder that gets the name of the package."""
_USE = "use.md"
"""Is no file of its own: it goes into the README."""


def render(kind: Kind, licence: str, values: Mapping[str, str]) -> dict[PurePosixPath, str]:
    """The files of a new distribution, by their paths in it.

    Args:
        kind: The kind of its part.
        licence: The text of its licence, a template as well.
        values: What stands for what.
    """
    texts = {**_texts(_TEMPLATES / "common"), **_texts(_TEMPLATES / kind.folder)}
    values = {**values, "use": _filled(texts.pop(PurePosixPath(_USE)), values)}
    texts[PurePosixPath("LICENSE")] = licence
    return {_placed(path, values): _filled(text, values) for path, text in sorted(texts.items())}


def _texts(folder: Path) -> dict[PurePosixPath, str]:
    return {
        PurePosixPath(path.relative_to(folder).as_posix().removesuffix(_SUFFIX)): path.read_text(
            encoding="utf-8"
        )
        for path in folder.rglob(f"*{_SUFFIX}")
    }


def _placed(path: PurePosixPath, values: Mapping[str, str]) -> PurePosixPath:
    return PurePosixPath(*(values["package"] if part == _PACKAGE else part for part in path.parts))


def _filled(text: str, values: Mapping[str, str]) -> str:
    return Template(text).substitute(values)
