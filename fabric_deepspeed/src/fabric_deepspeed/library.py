"""DeepSpeed itself: imported when it is needed, kept quiet, and kept from compiling or waiting without a word."""

from __future__ import annotations

import importlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fabric_core.errors import BrokenPluginError, LaunchError, UnsupportedError

STALE = 60.0
"""Seconds after which a lock beside which nothing is written any more is taken for what a killed build has left."""

_SHARED_MEMORY = "deepspeed_shm_comm"
_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""What DeepSpeed sets while it is imported, for the rest of the process and all that it starts."""


def load(device_type: str) -> Any:
    """Import DeepSpeed for a kind of device.

    Raises:
        BrokenPluginError: It cannot be imported.
        UnsupportedError: It works with another kind of device in this process already.
    """
    variables = {"DS_ACCELERATOR": device_type, _CHECK: os.environ.get(_CHECK, "1")}
    try:
        with _environ(variables), _known_warnings():
            deepspeed = importlib.import_module("deepspeed")
            accelerator = deepspeed.get_accelerator()
    except Exception as error:  # whatever a broken installation raises
        raise BrokenPluginError(
            f"DeepSpeed is installed, but cannot be imported ({type(error).__name__}: {error}). Install it anew for "
            f"this PyTorch ({torch.__version__}), or use another strategy."
        ) from error
    if accelerator.device_name() != device_type:
        raise UnsupportedError(
            f"DeepSpeed was imported for {accelerator.device_name()!r} in this process, and cannot be used with "
            f"{device_type!r} as well. Unset DS_ACCELERATOR, or import deepspeed after Fabric was launched."
        )
    return deepspeed


def join(deepspeed: Any, backend: str, *, shared_memory: bool, log_level: int) -> None:
    """Let DeepSpeed talk through the process group that there is. Called on every rank.

    Args:
        deepspeed: What `load` returned.
        backend: The name of the group's backend.
        shared_memory: Allow the compiled kernels with which CPUs of one node reduce through shared memory.
        log_level: Of DeepSpeed's logger.
    """
    logger = importlib.import_module("deepspeed.utils").logger
    logger.setLevel(log_level)
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
    operations: dict[str, bool] = importlib.import_module("deepspeed.ops").__compatible_ops__
    if shared_memory:
        announce_build(deepspeed, "ShareMemCommBuilder")
    else:
        operations[_SHARED_MEMORY] = False  # would be compiled for a minute, and change no number
    leave()
    with _known_warnings():
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    talks: Any = importlib.import_module("deepspeed.comm.comm").cdb
    for attribute, name in (
        ("all_gather_function", "all_gather_single"),
        ("reduce_scatter_function", "reduce_scatter_single"),
    ):  # what PyTorch calls now what DeepSpeed calls by names that are deprecated
        setattr(talks, attribute, getattr(dist, name, getattr(talks, attribute)))


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed takes our `Joined` for an optimizer that nobody has tried."""
    return "ZeRO with an untested optimizer" not in record.getMessage()


def leave() -> None:
    """Let DeepSpeed forget the process group, which somebody else has made and destroys. Safe to call twice."""
    comm: Any = importlib.import_module("deepspeed.comm.comm")
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    comm.cdb = None
    for name, value in vars(groups).items():
        if name.startswith("_") and name.endswith(("_GROUP", "_RANKS", "_RANK", "_WORLD_SIZE")):
            setattr(groups, name, {} if isinstance(value, dict) else None)


@contextmanager
def working(local_rank: int) -> Iterator[None]:
    """While DeepSpeed makes an engine or partitions a model, it reads the rank from a variable, and may be noisy."""
    with _environ({"LOCAL_RANK": str(local_rank)}), _known_warnings():
        yield


def quiet() -> Any:
    """A context in which DeepSpeed's use of what PyTorch deprecates is not reported."""
    return _known_warnings()


# -- what is compiled at first use ------------------------------------------------------------------------------------


def announce_build(deepspeed: Any, builder_name: str) -> None:
    """Say that an operation is about to be compiled, and see to it that nobody waits for a build that was killed.

    Raises:
        LaunchError: A build was killed, and its lock is still there.
        UnsupportedError: It cannot be compiled here.
    """
    builder = deepspeed.get_accelerator().create_op_builder(builder_name)
    name = builder.name
    if importlib.import_module("deepspeed.git_version_info").installed_ops.get(name, False):
        return
    folder = build_folder(name)
    check_lock(folder)
    if any(folder.glob(f"{name}*.so")):
        return
    if not builder.is_compatible(verbose=False):
        raise UnsupportedError(
            f"DeepSpeed's operation {name!r} cannot be compiled here: {builder.error_log or 'see its log'}. A C++ "
            "compiler and ninja are needed. Use an optimizer of torch.optim, or leave the option out that needs it."
        )
    warnings.warn(
        f"DeepSpeed compiles {name!r} for this machine now, which may take some minutes; what it makes is kept in "
        f"{str(folder)!r}. To have it made at installation: DS_BUILD_{name.upper()}=1 pip install deepspeed.",
        UserWarning,
        stacklevel=2,
    )


def build_folder(name: str) -> Path:
    """Where PyTorch builds an extension; not created."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        extension: Any = importlib.import_module("torch.utils.cpp_extension")
        return Path(extension._get_build_directory(name, False))
    return Path(root) / name


def check_lock(folder: Path, now: float | None = None) -> None:
    """Refuse to wait for a build that nobody finishes.

    Raises:
        LaunchError: There is a lock, and nothing in the folder has been written for a while.
    """
    lock = folder / "lock"
    if not lock.exists():
        return
    newest = max(entry.stat().st_mtime for entry in folder.rglob("*"))
    idle = (time.time() if now is None else now) - newest
    if idle > STALE:
        raise LaunchError(
            f"A build of {folder.name!r} was interrupted and has left its lock, for which every later one would wait "
            f"forever: {str(lock)!r}, where nothing was written for {idle:.0f} s. Delete that file, and start again."
        )


@contextmanager
def _environ(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _known_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for text, kind in (
            (
                r".*(all_gather_into_tensor|reduce_scatter_tensor|_all_gather_base|_reduce_scatter_base)",
                FutureWarning,
            ),
            (r".*`torch\.jit\.", DeprecationWarning),
            (r".*torch\.cuda\.amp", FutureWarning),
        ):
            warnings.filterwarnings("ignore", text, kind)
        yield


def backend_name() -> str:
    """The name of the backend of the default process group."""
    return str(dist.get_backend())
