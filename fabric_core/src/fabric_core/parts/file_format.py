"""What a file of ``torch.save`` is to hold, what it may hold, and how it is written and read."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import decimal
import io
import json
import os
import pathlib
import pickle
import re
import secrets
import threading
import types
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fabric_core.beside import remove_abandoned, temporary_for
from fabric_core.disk import flush, make_folders
from fabric_core.errors import CheckpointError, UnsafeCheckpointError
from fabric_core.manifest import MANIFEST, check_format, described, read_manifest
from fabric_core.parts import archive, numpy_pickle
from fabric_core.parts.bare_pickle import globals_of, harmful_call, may_harm
from fabric_core.parts.stand_ins import RangeStandIn, no_bytes, resolved

FORMAT, VERSION = "fabric-file", 1
"""What the manifest calls this format. Without a manifest, it is a file that ``torch.save`` alone has written."""

METADATA_TYPES: tuple[Any, ...] = (
    *(pathlib.Path, pathlib.PosixPath, pathlib.WindowsPath),
    *(pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    *(argparse.Namespace, types.SimpleNamespace),
    *(decimal.Decimal, uuid.UUID, frozenset),
)
"""Harmless types, beyond tensors and containers, that people put beside their weights."""

STAND_INS: dict[str, Any] = {"builtins.range": RangeStandIn, "builtins.bytes": no_bytes}
"""What is read in the place of others that people put there; see [Note: stand-ins]."""

REFUSALS = ("not an allowed global", "is blocked", "allowlisted", "unrecognized function", "must be imported")
"""By these words PyTorch says that it will not bring something back; anything else that it says is about damage."""


def save(path: Path, checkpoint: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Write a checkpoint to a temporary name beside ``path``, flush to disk, rename. Errors as `CheckpointIO.save`.

    Args:
        path: Of the file.
        checkpoint: For ``torch.save``.
        origin: What writes it, for the manifest.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(f"{_what_is_there(path)}. Name a file")
        make_folders(path.parent)
        remove_abandoned(path)
        temporary = temporary_for(path, secrets.token_hex(4))
        try:
            manifest = json.dumps(described(FORMAT, VERSION, origin), indent=1)
            archive.write(temporary, checkpoint, MANIFEST, manifest)
            _warn_of_refusal(path, temporary)
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        flush(path.parent)
    except Exception as error:  # whatever pickling an object of the user's may raise, too
        raise CheckpointError(
            f"Cannot write a checkpoint to {str(path)!r}: {_cause(error)}. What was there before is untouched."
        ) from error


def load(path: Path, weights_only: bool) -> dict[str, Any]:
    """Read a file onto the CPU. Arguments and errors as `CheckpointIO.load`."""
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {str(path)!r}: {_what_is_there(path)}.")
    manifest = read_manifest(path)
    if manifest is not None:
        check_format(manifest, path, FORMAT, VERSION)
    try:
        with archive.checked(path) as file:
            _check_calls(path, weights_only)
            with _allowances(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error says more
                loaded = torch.load(file, map_location="cpu", weights_only=weights_only)
        checkpoint: dict[str, Any] = resolved(loaded) if weights_only else loaded
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from error
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} cannot be read; it is damaged, cut short, or no checkpoint at all "
            f"({type(error).__name__}: {_first_line(error)})."
        ) from error
    return checkpoint


def _warn_of_refusal(path: Path, written: Path) -> None:
    """What is written and cannot be read without trust is better known now than when it is needed."""
    names = _what_it_needs(written)
    if names:
        warnings.warn(
            f"The checkpoint {str(path)!r} holds more than tensors and plain values: {names}. Loading it will need "
            "weights_only=False, because that can execute code. Save plain values instead, or tensors.",
            UserWarning,
            stacklevel=2,
        )


def _check_calls(path: Path, weights_only: bool) -> None:
    """Look into the pickle before PyTorch does.

    Raises:
        pickle.UnpicklingError: It asks for what PyTorch allows and we do not.
    """
    name = _harmful_call(path) if weights_only else None
    if name is not None:
        raise pickle.UnpicklingError(f"{name} is not allowlisted")


def _harmful_call(path: Path) -> str | None:
    if zipfile.is_zipfile(path):
        pickled = archive.pickles(path)
        return next(
            filter(None, (harmful_call(io.BytesIO(each)) for each in pickled if may_harm(each))), None
        )
    with (
        contextlib.suppress(Exception),
        path.open("rb") as file,
    ):  # garbage, or one pickle and no file of PyTorch
        return harmful_call(file, pickles=5)
    return None


_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def _allowances() -> Iterator[None]:
    """Allow what we know to be harmless. PyTorch keeps one list for all threads.

    What the user has allowed is left out, because PyTorch would take it away again at the end.
    """
    with _one_at_a_time:
        allowed = set(torch.serialization.get_safe_globals())
        names = {
            each[1] if isinstance(each, tuple) else f"{each.__module__}.{each.__name__}" for each in allowed
        }
        ours = [*_known(), *numpy_pickle.allowed(arrays="numpy.ndarray" not in names)]
        wanted: Any = [each for each in ours if each not in allowed]
        invariants: Any = torch.sparse.check_sparse_tensor_invariants  # sparse indices are checked, too
        with torch.serialization.safe_globals(wanted), invariants():
            yield


def _known() -> Iterator[tuple[Any, str]]:
    """What is allowed, by its name in the versions of Python."""
    for kind in METADATA_TYPES:
        moved = ("pathlib", "pathlib._local") if kind.__module__.startswith("pathlib") else (kind.__module__,)
        for home in moved:
            yield kind, f"{home}.{kind.__name__}"
    yield from ((stand_in, name) for name, stand_in in STAND_INS.items())


def _refusal(path: Path, error: Exception) -> CheckpointError:
    """Tell a file that asks for more than is allowed from one that is garbage."""
    if not any(words in str(error) for words in REFUSALS):
        asked = None if zipfile.is_zipfile(path) else globals_of(path)
        if asked:
            return UnsafeCheckpointError(
                f"The checkpoint {str(path)!r} was not loaded, because it is a plain pickle, not a file of torch.save, "
                f"and asks for {', '.join(asked)}. Loading that can execute code. If you trust whoever wrote the file, "
                "read it with pickle.load() and save it anew with fabric.save(); weights_only=False would execute it "
                "too, but find no checkpoint."
            )
        return CheckpointError(
            f"The checkpoint {str(path)!r} cannot be read; it is damaged or no checkpoint at all ({_last_line(error)})."
        )
    needed = _what_it_needs(path) or "types that are not allowed"
    return UnsafeCheckpointError(
        f"The checkpoint {str(path)!r} was not loaded, because it holds more than tensors and plain values: {needed}. "
        "Loading that can execute code. If you trust whoever wrote the file, load it with weights_only=False; or "
        "allow single types with torch.serialization.add_safe_globals([...])."
    )


def _what_it_needs(path: Path) -> str:
    """The types in a file that are not allowed; empty when there are none, or when they cannot be told."""
    try:
        with _allowances():
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        return ", ".join(names) or _harmful_call(path) or _arrays_that_stay_out(path)
    except Exception:
        return ""


def _arrays_that_stay_out(path: Path) -> str:
    """All that PyTorch lists is allowed; it does not look into the dtypes of arrays, which are texts."""
    pickled = archive.pickles(path)[0]
    found = b"cnumpy\ndtype\n" in pickled and re.search(rb"X.\0\0\0[OV]\d", pickled, re.DOTALL)
    return "NumPy arrays of objects or records" if found else ""


def _what_is_there(path: Path) -> str:
    if path.is_dir():
        return "that is a directory"
    if path.exists():
        return "that is no regular file"
    if not path.parent.is_dir():
        return f"there is no folder {str(path.parent)!r} either"
    files = sorted(
        entry.name for entry in path.parent.iterdir() if entry.is_file() and entry.suffix == path.suffix
    )
    return f"the folder has {', '.join(files[:5]) or 'no such files'}"


def _cause(error: BaseException) -> BaseException:
    """What the system said, when that is what another error came from."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    asks = next((number for number, line in enumerate(lines) if "file an issue" in line), None)
    if asks is not None and asks + 1 < len(lines):  # PyTorch wants to hear of it, and then says what it is
        return lines[asks + 1]
    return next((line for line in lines if "rror" in line), _first_line(error))
