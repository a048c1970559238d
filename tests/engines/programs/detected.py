"""What a process of an engine sees of its job, as one line of JSON. It imports no PyTorch."""

from __future__ import annotations

import json
import os
import sys
import warnings

from fabric_core.registry import default_registry
from fabric_core.resolve.hardware import choose_environment

if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choice, found, sentences = choose_environment(None, default_registry(), os.environ)
    seen = {
        "environment": choice.spec.name,
        "size": found and [found.processes_per_node, found.num_nodes],
        "own_devices": found and found.own_devices,
        "warnings": [*(str(warning.message) for warning in caught), *sentences],
        "torch": "torch" in sys.modules,
    }
    sys.stdout.write(json.dumps(seen) + "\n")
