"""Asking another process: what can only be learned by using a device is learned there, and this one stays clean."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

PATIENCE = 120.0
"""Seconds for an answer; importing PyTorch and waking all devices of a big machine may take a while."""


def ask(code: str, question: Any = None) -> Any:
    """What a fresh Python process answers.

    Args:
        code: Reads the question, as JSON, from ``sys.argv[1]``, and prints its answer, as JSON, in its last line.
        question: Plain data.

    Raises:
        RuntimeError: It failed, or did not answer in time.
    """
    command = [sys.executable, "-c", code, json.dumps(question)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"A process that looks at the devices did not answer within {PATIENCE:.0f} seconds."
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"A process that looks at the devices failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])
