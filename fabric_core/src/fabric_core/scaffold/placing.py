"""Putting files into a new folder: all of them, or none."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from fabric_core.errors import ConfigurationError


def place(files: Mapping[PurePosixPath, str], folder: Path) -> None:
    """Make a folder with these files. When that fails, there is nothing of them.

    They are written beside the place first, and then moved there.

    Args:
        files: Texts, by their paths in the folder.
        folder: Absolute. Folders above it are made, too; it may exist, and is empty then.

    Raises:
        ConfigurationError: Something is there already, or it cannot be written.
    """
    check_place(folder)
    try:
        if folder.exists():
            _fill(files, folder)
        else:
            _create(files, folder)
    except OSError as error:
        raise ConfigurationError(
            f"The plugin cannot be written to {str(folder)!r}: {error.strerror or error}. Nothing was left there. "
            "Choose another place with --dir."
        ) from error


def check_place(folder: Path) -> None:
    """Refuse a place where something is.

    Raises:
        ConfigurationError: It is no folder, or one that is not empty, or cannot be looked into.
    """
    try:
        found = next(folder.iterdir(), None)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        what = next(path for path in (folder, *folder.parents) if path.exists())
        raise ConfigurationError(
            f"A plugin cannot be made in {str(folder)!r}: {str(what)!r} is a file. Choose another place with --dir."
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"A plugin cannot be made in {str(folder)!r}: {error.strerror}. Choose another place with --dir."
        ) from error
    if found is not None:
        raise ConfigurationError(
            f"The folder {str(folder)!r} is not empty: it has {found.name!r}. Nothing is ever overwritten; choose "
            "another place with --dir."
        )


def _create(files: Mapping[PurePosixPath, str], folder: Path) -> None:
    """Write what is missing of the path under another name, and rename that: one step, that happens or does not."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with _temporary(missing[-1].parent) as temporary:
        _write(files, temporary / folder.relative_to(missing[-1]))
        os.rename(temporary, missing[-1])


def _fill(files: Mapping[PurePosixPath, str], folder: Path) -> None:
    """Write into a folder inside of the empty one, and move up what is in it."""
    moved: list[Path] = []
    with _temporary(folder) as temporary:
        _write(files, temporary)
        try:
            for entry in sorted(temporary.iterdir()):
                os.rename(entry, folder / entry.name)
                moved.append(folder / entry.name)
        except BaseException:
            for entry in moved:
                os.rename(entry, temporary / entry.name)
            raise


@contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """A new folder, as accessible to others as any; gone in the end, with what is left in it."""
    folder = parent / f".fabric-new-{secrets.token_hex(4)}.tmp"
    folder.mkdir()
    try:
        yield folder
    finally:
        with contextlib.suppress(FileNotFoundError):  # it has become what was wanted
            shutil.rmtree(folder)


def _write(files: Mapping[PurePosixPath, str], folder: Path) -> None:
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")
