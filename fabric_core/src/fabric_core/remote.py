"""Files of checkpoints on stores that fsspec reaches (``s3://``, ``gs://``, ``memory://``, …), by one process alone.

[Note: remote folders] Stores replace single objects at once, and folders never. So the files of a folder lie below its
address in a folder of their own, with a new name for each save, and one small object, written last, says which one
counts: ``s3://bucket/run/fabric.json``. What it does not name is not there, for a reader; the folder that it does name
is an ordinary checkpoint, to be copied and loaded by other means, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fabric_core.beside import shortened, temporary_name
from fabric_core.checked import crc32
from fabric_core.errors import CheckpointError, ConfigurationError
from fabric_core.manifest import LARGEST, MANIFEST, check_format, parsed, read_manifest

FORMAT, VERSION = "fabric-remote", 1

_TOKEN = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(r"\.?\w[\w.-]*")
_PATTERN = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Found:
    """A checkpoint that is there.

    Attributes:
        folder: Below the address, for one that is a folder; ``None`` for a single file.
        sizes: Of its files, by name, in bytes.
        about: Of a single file, a checksum of what the store says of it: another one in its place has another.
    """

    folder: str | None
    sizes: Mapping[str, int]
    about: int = 0


class Remote:
    """One address.

    Args:
        url: With its protocol.

    Raises:
        ImportError: The package for this protocol is not installed.
        ValueError: There is no such protocol.
        OSError: It cannot be reached.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self._system: Any
        self._system, self._path = fsspec.url_to_fs(url.rstrip("/"))
        self._system.invalidate_cache()
        self._url = url

    # -- writing --------------------------------------------------------------------------------------------------

    def publish_file(self, file: Path, token: str) -> None:
        """Upload a file, and put it in its place when it is there whole.

        Raises:
            CheckpointError: A folder is there.
        """
        if self._system.isdir(self._path):
            raise CheckpointError("That is a folder. Name a file")
        parent, _, name = self._path.rpartition("/")
        self._publish(file, f"{parent}/{temporary_name(name, token)}", self._path)
        self._sweep(parent, re.compile(rf"\.{re.escape(shortened(name))}\.{_TOKEN.pattern}\.tmp"))

    def upload(self, folder: Path, names: Iterable[str], token: str) -> None:
        """Upload some files of a folder. They do not count before `publish_folder`.

        Raises:
            CheckpointError: A file is there.
        """
        if self._size_of(self._path) is not None:
            raise CheckpointError("That is a file. Name a folder, or another address")
        for name in names:
            self._put(folder / name, f"{self._path}/{token}/{name}")

    def publish_folder(self, folder: Path, pointer: Path, token: str) -> None:
        """Let the uploaded files of a folder count, in the place of what was there before.

        Args:
            folder: It is uploaded.
            pointer: A local file to be made.
            token: What the files were uploaded with.
        """
        shared = ("plan", "versions", "world_size")
        about = {name: value for name, value in (read_manifest(folder) or {}).items() if name in shared}
        sizes = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
        self._check_there(f"{self._path}/{token}", sizes)
        content = {"format": FORMAT, "version": VERSION, **about, "folder": token, "files": sizes}
        pointer.write_text(json.dumps(content), encoding="utf-8")
        self._publish(pointer, f"{self._path}/{token}.json", f"{self._path}/{MANIFEST}")
        self._sweep(self._path, re.compile(rf"(?!{token}){_TOKEN.pattern}(?:\.json)?"))

    def _check_there(self, folder: str, sizes: Mapping[str, int]) -> None:
        there = {_last(entry["name"]): entry["size"] for entry in self._system.ls(folder, detail=True)}
        if there != sizes:
            raise OSError(
                "not all of its files are there any more. Does another program save to the same address?"
            )

    def _publish(self, file: Path, temporary: str, place: str) -> None:
        try:
            self._put(file, temporary)
            self._move(temporary, place)
        except BaseException:
            with suppress(Exception):
                self._system.rm_file(temporary)
            raise

    def _move(self, temporary: str, place: str) -> None:
        from fsspec import AbstractFileSystem

        if type(self._system).mv is not AbstractFileSystem.mv:  # it can rename
            self._system.mv(temporary, place)
            return
        self._system.copy(temporary, place)
        with suppress(Exception):  # what counts is in its place; this goes with the next save
            self._system.rm_file(temporary)

    def _put(self, file: Path, place: str) -> None:
        self._system.put_file(str(file), place)
        there, wanted = self._system.info(place)["size"], file.stat().st_size
        if there != wanted:
            raise OSError(f"of {wanted} bytes, {there} have arrived")

    def remove(self) -> None:
        """Delete what is at the address, if there is anything: of a folder first what says that it counts."""
        if self._size_of(self._path) is not None:
            self._system.rm_file(self._path)
        elif self._system.isdir(self._path):
            with suppress(FileNotFoundError):
                self._system.rm_file(f"{self._path}/{MANIFEST}")
            self._system.rm(self._path, recursive=True)

    def _sweep(self, folder: str, names: re.Pattern[str]) -> None:
        """Remove what does not count any more, or never did because its writer was killed."""
        with suppress(Exception):  # the new checkpoint is there, and that is what counts
            for entry in self._system.ls(folder, detail=False):
                if names.fullmatch(entry.rstrip("/").rpartition("/")[2]):
                    self._system.rm(entry, recursive=True)

    # -- reading --------------------------------------------------------------------------------------------------

    def find(self) -> Found:
        """What is at the address.

        Raises:
            CheckpointError: There is no checkpoint, or its record is damaged.
        """
        about = self._file_at(self._path)
        if about is not None:
            return Found(None, {_last(self._path): int(about["size"])}, crc32(str(about).encode()))
        pointer = f"{self._path}/{MANIFEST}"
        size = self._size_of(pointer)
        if size is None:
            there = self._system.isdir(self._path)
            raise CheckpointError(
                "That is a folder without a manifest: no checkpoint that was finished"
                if there
                else "There is nothing of that name"
            )
        if size > LARGEST:
            raise CheckpointError(f"Its {MANIFEST} is too large")
        content = parsed(self._system.cat_file(pointer), Path(self._path))
        check_format(content, Path(self._path), FORMAT, VERSION)
        return _checked(content)

    def kind(self) -> str | None:
        """``"file"``, ``"folder"``, or ``None`` for nothing."""
        if self._size_of(self._path) is not None:
            return "file"
        return "folder" if self._system.isdir(self._path) else None

    def names(self) -> list[str]:
        """What lies below the address, sorted."""
        return sorted(self._below())

    def finished(self, names: Iterable[str]) -> set[str]:
        """Which of these, below the address, are checkpoints: files, and folders of which a record says what counts."""
        kinds = self._below()
        folders = [name for name in names if kinds.get(name) == "directory"]
        records = self.texts(f"{name}/{MANIFEST}" for name in folders)
        files = {name for name in names if kinds.get(name) == "file"}
        return files | {name for name in folders if f"{name}/{MANIFEST}" in records}

    def texts(self, names: Iterable[str]) -> dict[str, str]:
        """What small files below the address hold; those that are not there are left out."""
        paths = {name: f"{self._path}/{name}" for name in names}
        contents: dict[str, Any] = self._system.cat(list(paths.values()), on_error="return") if paths else {}
        found = {}
        for name, path in paths.items():
            content = contents.get(path)
            if isinstance(content, FileNotFoundError):
                continue
            if isinstance(content, Exception):
                raise content
            found[name] = str(content or b"", "utf-8", "replace")
        return found

    def modified(self) -> datetime:
        """When something was written there last."""
        times: list[datetime] = [self._system.modified(path) for path in self._system.find(self._path)]
        return max(time if time.tzinfo else time.replace(tzinfo=timezone.utc) for time in times)

    def _below(self) -> dict[str, str]:
        """The names and types of what lies below the address."""
        try:
            entries = self._system.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        there = {entry["name"].rstrip("/"): entry["type"] for entry in entries}
        return {path.rpartition("/")[2]: kind for path, kind in there.items() if path != self._path}

    def _size_of(self, path: str) -> int | None:
        """Bytes of a file; ``None`` when there is none."""
        about = self._file_at(path)
        return None if about is None else int(about["size"])

    def _file_at(self, path: str) -> Mapping[str, Any] | None:
        """What the store says of a file; ``None`` when there is none."""
        try:
            about: Mapping[str, Any] = self._system.info(path)
        except FileNotFoundError:
            return None
        return about if about["type"] == "file" else None

    def fetch(self, found: Found, names: Iterable[str], folder: Path) -> None:
        """Download some files.

        Args:
            found: What `find` gave.
            names: Of the files.
            folder: Where to.
        """
        for name in names:
            place = self._path if found.folder is None else f"{self._path}/{found.folder}/{name}"
            self._system.get_file(place, str(folder / name))
            there = (folder / name).stat().st_size
            if there != found.sizes[name]:
                raise OSError(f"of the {found.sizes[name]} bytes of {name!r}, {there} have arrived")


def check_literal(url: str, shown: str) -> None:
    """Refuse to write to an address that fsspec takes for a pattern: it would delete whatever that matches.

    Args:
        url: The address.
        shown: The same for messages.

    Raises:
        ConfigurationError: It is such a one.
    """
    if _PATTERN.search(url):
        raise ConfigurationError(
            f"The address {shown!r} has one of the signs '*', '?' and '[', which stand for other names there. Nothing "
            "is written to it, since that could delete what has those names. Give another address."
        )


def _checked(content: Mapping[str, Any]) -> Found:
    """A pointer, none of whose names leads outside."""
    folder, sizes = content.get("folder"), content.get("files")
    if not (isinstance(folder, str) and _TOKEN.fullmatch(folder) and isinstance(sizes, dict) and sizes):
        raise CheckpointError(f"Its {MANIFEST} is damaged: it names no folder, or no files")
    for name, size in sizes.items():
        if not _NAME.fullmatch(name) or type(size) is not int or size < 0:
            raise CheckpointError(f"Its {MANIFEST} is damaged: {name!r} is no file of a checkpoint")
    return Found(folder, sizes)


def _last(path: str) -> str:
    """The last part of a path, as a name on a disk; of a strange one, what its kind is told by."""
    name = path.rpartition("/")[2]
    if _NAME.fullmatch(name):
        return name
    return "checkpoint.safetensors" if name.endswith(".safetensors") else "checkpoint"
