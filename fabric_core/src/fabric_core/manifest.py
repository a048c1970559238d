"""The manifest of a checkpoint: a small JSON record that says what it is and what wrote it. Read without PyTorch.

A single file has it among the records of its archive, a folder as a file of its own; both by the same name.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabric_core import __version__
from fabric_core.errors import CheckpointError
from fabric_core.plan import Plan

__all__ = ["LARGEST", "MANIFEST", "check_format", "described", "origin_of", "parsed", "read_manifest"]

MANIFEST = "fabric.json"
"""The name of the record, and of the file in a folder."""

LARGEST = 1 << 30
"""Bytes; a manifest that claims to be larger is refused before it is read. A part of a tensor takes 200 of them."""

_TYPES: dict[str, Any] = {"format": str, "version": int, "versions": dict, "plan": dict, "world_size": int}


def origin_of(plan: Plan) -> dict[str, Any]:
    """What a manifest says of the job that wrote a checkpoint.

    Returns:
        ``plan``: the names of the strategy, the precision and the accelerator. ``versions``: of the distributions that
        offer the parts of the plan. ``world_size``: how many processes the job has.
    """
    named = (plan.strategy, plan.precision, plan.accelerator)
    return {
        "versions": {part.distribution: part.version for part in plan if part.version},
        "plan": {part.kind: part.name for part in named},
        "world_size": plan.world_size,
    }


def described(kind: str, version: int, origin: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that all formats share. Whoever writes a format adds its own keys.

    Args:
        kind: The name of the format.
        version: Its version. It is raised when what an older library does with a checkpoint would be wrong.
        origin: What `origin_of` gave; empty when no plan is known.
    """
    import torch

    versions = {"fabric-core": __version__, "torch": str(torch.__version__), **origin.get("versions", {})}
    return {"format": kind, "version": version, **origin, "versions": dict(sorted(versions.items()))}


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a single file or of a folder. PyTorch is not imported, and no tensor is read.

    Returns:
        ``format``, ``version``, ``versions``, and what else the format has; ``plan`` and ``world_size`` where a
        ``Fabric`` wrote it. ``None`` when there is no manifest: a plain file of ``torch.save``, a folder that was not
        finished, nothing at all. The version may be newer than this library can load.

    Raises:
        CheckpointError: The manifest is there, but damaged.
    """
    try:
        if path.is_dir():
            content = _of_folder(path / MANIFEST)
        else:
            content = _of_archive(path) if path.is_file() and zipfile.is_zipfile(path) else None
    except Exception as error:  # whatever comes of taking any bytes for an archive
        raise CheckpointError(f"The checkpoint {str(path)!r} cannot be read: {error}.") from error
    return None if content is None else parsed(content, path)


def parsed(content: bytes, path: Path) -> dict[str, Any]:
    """A manifest from its text.

    Args:
        content: The text.
        path: Of the checkpoint, for messages.

    Raises:
        CheckpointError: It is damaged, or no manifest of ours.
    """
    try:
        manifest = json.loads(content)
        wrong = [
            name for name, kind in _TYPES.items() if name in manifest and type(manifest[name]) is not kind
        ]
        missing = [name for name in ("format", "version") if name not in manifest]
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"The manifest of the checkpoint {str(path)!r} is damaged: {error}.") from error
    if wrong or missing or not isinstance(manifest, dict):
        about = ", ".join([*missing, *wrong]) or "it is no object"
        raise CheckpointError(
            f"The manifest of the checkpoint {str(path)!r} is none that this library knows ({about})."
        )
    return manifest


def check_format(manifest: Mapping[str, Any], path: Path, kind: str, newest: int) -> None:
    """Refuse a checkpoint of another format, or of a version that is newer than this library.

    Args:
        manifest: What `read_manifest` gave.
        path: Of the checkpoint, for messages.
        kind: The name of the format that can be read.
        newest: The newest version of it that can be read.

    Raises:
        CheckpointError: It cannot be read.
    """
    if manifest["format"] != kind:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is of the format {manifest['format']!r}; what is read here is {kind!r}."
        )
    if not 1 <= manifest["version"] <= newest:
        writer = manifest.get("versions", {}).get("fabric-core", "a newer one")
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is of version {manifest['version']} of its format, and this library, "
            f"fabric-core {__version__}, reads versions up to {newest}. Load it with the version that wrote it "
            f"({writer}), or upgrade: pip install --upgrade fabric-core."
        )


def _of_folder(file: Path) -> bytes | None:
    if not file.is_file():
        return None
    if file.is_symlink() or file.stat().st_size > LARGEST:
        raise ValueError(f"its {MANIFEST} is a link, or too large")
    return file.read_bytes()


def _of_archive(path: Path) -> bytes | None:
    with zipfile.ZipFile(path) as archive:
        found = [entry for entry in archive.infolist() if entry.filename.partition("/")[2] == MANIFEST]
        if not found:
            return None
        if len(found) > 1 or found[0].compress_type != zipfile.ZIP_STORED or found[0].file_size > LARGEST:
            raise ValueError(f"its {MANIFEST} is there more than once, compressed, or too large")
        return archive.read(found[0])
