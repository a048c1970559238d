"""What a process can still do after a probe."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

SECONDS = 60.0


def first_tensor_after_fork(part: tuple[str, dict[str, Any]], found: Any, initialised: str | None) -> str:
    """Use every device in a forked process, and then in this one.

    Args:
        part: The accelerator's name and its options.
        found: The inventory.
        initialised: A function that tells whether this process has initialised a device, by its path.

    Returns:
        What went wrong; empty when nothing did.
    """
    from fabric_core.registry import default_registry
    from fabric_core.targets import import_target
    from fabric_core.testing.parts import made

    name, options = part
    accelerator = made(default_registry().one("accelerator", name), options)
    devices = [accelerator.device(index) for index in found.indices or (0,)]
    if initialised is not None and import_target(initialised, "the kit")():
        return "the device is initialised, by the probe or by device()"
    child = os.fork()
    if child == 0:
        os._exit(_use(accelerator, devices))
    code = _wait(child)
    if code is None:
        return f"a forked process that makes a tensor on the device hangs for {SECONDS:.0f} s"
    return f"a forked process cannot make a tensor on the device; it ended with {code}" if code else ""


def _use(accelerator: Any, devices: list[Any]) -> int:
    import torch

    try:
        for device in devices:
            accelerator.setup_device(device)
            assert float(torch.ones(8, device=device).sum()) == 8.0
    except Exception as error:
        sys.stderr.write(f"in the forked process: {type(error).__name__}: {error}\n")
        return 1
    return 0


def _wait(child: int) -> int | None:
    """The exit code of a child; ``None`` when it had to be killed."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None
