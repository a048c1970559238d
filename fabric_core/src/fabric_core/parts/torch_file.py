"""A checkpoint as one file of ``torch.save``: written whole or not at all, read without executing anything."""

from __future__ import annotations

import datetime
import os
import pathlib
import pickle
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fabric_core.contracts.checkpoint_io import CheckpointIO
from fabric_core.errors import CheckpointError, UnsafeCheckpointError

METADATA_TYPES: tuple[Any, ...] = (
    pathlib.Path,
    pathlib.PosixPath,
    pathlib.WindowsPath,
    pathlib.PurePath,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.timezone,
)
"""Harmless types, beyond tensors and containers, that people put beside their weights."""


class TorchFile(CheckpointIO):
    """One file that plain ``torch.load`` reads too."""

    def save(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Write to a temporary name beside ``path``, flush to disk, rename. See the contract."""
        if path.is_dir():
            raise CheckpointError(
                f"Cannot write a checkpoint to {str(path)!r}: it is a directory. Name a file."
            )
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, temporary)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"Cannot write a checkpoint to {str(path)!r}: {error}. What was there before is untouched."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path, *, weights_only: bool = True) -> dict[str, Any]:
        """Read a file onto the CPU. See the contract."""
        if not path.is_file():
            raise CheckpointError(f"There is no checkpoint at {str(path)!r}: {_what_is_there(path)}.")
        try:
            with torch.serialization.safe_globals([*METADATA_TYPES, *_numpy_types()]):
                checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=weights_only)
        except pickle.UnpicklingError as error:
            raise _refusal(path, error) from error
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint {str(path)!r} cannot be read; it is damaged, cut short, or no checkpoint at all "
                f"({type(error).__name__}: {_first_line(error)})."
            ) from error
        return checkpoint

    def remove(self, path: Path) -> None:
        """Delete the file."""
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    if path.is_dir() and os.name == "nt":  # there a folder cannot be opened, and a rename needs no flush
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _numpy_types() -> list[Any]:
    """What NumPy needs to bring back a number. PyTorch has imported NumPy where it is installed."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return []
    multiarray = sys.modules.get("numpy._core.multiarray") or sys.modules["numpy.core.multiarray"]
    dtypes = [type(numpy.dtype(code)) for code in "?bBhHiIlLqQefdFD"]
    return [multiarray.scalar, numpy.dtype, *dtypes]


def _refusal(path: Path, error: Exception) -> CheckpointError:
    """Tell a file that asks for more than is allowed from one that is garbage."""
    if "nsupported" not in str(error) and "not an allowed global" not in str(error):
        return CheckpointError(
            f"The checkpoint {str(path)!r} cannot be read; it is damaged or no checkpoint at all ({_last_line(error)})."
        )
    return UnsafeCheckpointError(
        f"The checkpoint {str(path)!r} was not loaded, because it holds more than tensors and plain values: "
        f"{_what_it_needs(path)}. Loading that can execute code. If you trust whoever wrote the file, load it with "
        "weights_only=False; or allow single types with torch.serialization.add_safe_globals([...])."
    )


def _what_it_needs(path: Path) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        names = []
    return ", ".join(names) or "types that are not allowed"


def _what_is_there(path: Path) -> str:
    if path.is_dir():
        return "that is a directory"
    if not path.parent.is_dir():
        return f"there is no folder {str(path.parent)!r} either"
    files = sorted(
        entry.name for entry in path.parent.iterdir() if entry.is_file() and entry.suffix == path.suffix
    )
    return f"the folder has {', '.join(files[:5]) or 'no such files'}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if "rror" in line), _first_line(error))
