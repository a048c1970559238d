"""What goes wrong when processes are started from within a program, recognised before it does."""

from __future__ import annotations

import multiprocessing
import re
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from fabric_backends.accelerators.current import current_type
from fabric_core.errors import LaunchError
from fabric_core.supervisor import Failure, write_failure

# All that a spawned process knows while it imports the script, before it has become a rank.
_NAME = re.compile(r"(?P<private>fabric-\w+)-rank-(?P<rank>\d+)")


def process_name(private: str, rank: int) -> str:
    """The name of the process of a rank.

    Args:
        private: The directory of the launch, in the directory for temporary files.
        rank: The global rank.
    """
    return f"{Path(private).name}-rank-{rank}"


def refuse_unsafe_fork() -> None:
    """See whether copies of this process would work. Called before a fork.

    Raises:
        LaunchError: A device or a process group is in use, which does not survive in a copy.
    """
    in_use = _device_in_use()
    if in_use is not None:
        raise LaunchError(
            f"Processes cannot be forked from this one, because it uses the device {in_use!r} already, which breaks in "
            "a copy of the process. Restart the notebook or program and touch the device only in the function that is "
            "launched: no .to(device), no torch seed of the device, no query of its properties before. Or use the "
            "strategy 'ddp_spawn' or 'ddp' in a script."
        )
    if dist.is_available() and dist.is_initialized():
        raise LaunchError(
            "Processes cannot be forked from this one, because it has a process group, whose threads are missing in a "
            "copy of the process. Close the Fabric that opened it (fabric.close()), or destroy the group."
        )


def _device_in_use() -> str | None:
    """The type of the accelerator, if this process has started to use it. Asking does not start it."""
    device_type = current_type()
    if device_type is None:
        return None
    is_initialized = getattr(torch.get_device_module(device_type), "is_initialized", None)
    return device_type if is_initialized is not None and is_initialized() else None


def refuse_unguarded_main() -> None:
    """See whether this process is itself just being spawned and imports the script. Called before a launch.

    Raises:
        LaunchError: It is, so the script would start processes without end.
        SystemExit: Likewise, when the parent tells the user.
    """
    process = multiprocessing.current_process()
    if not getattr(process, "_inheriting", False):
        return
    message = (
        "The script launches processes as soon as it is imported. A spawned process imports the script to find "
        "the function, and would launch again. Move what starts the work under a guard, at the end of the script:\n\n"
        '    if __name__ == "__main__":\n'
        "        main()\n\n"
        "Or use the strategy 'ddp' or 'ddp_fork', which need none."
    )
    name = _NAME.fullmatch(process.name)
    private = Path(tempfile.gettempdir(), name["private"] if name else "")
    if name is None or not private.is_dir():
        raise LaunchError(message)
    write_failure(
        str(private), Failure(int(name["rank"]), 1, time.monotonic(), "LaunchError: no main guard", message)
    )
    raise SystemExit(1)
