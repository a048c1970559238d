"""What runs in a fresh process: one hooks module is read, and perhaps its parts are loaded. The answer is JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fabric_core import hookspecs, specs  # noqa: F401  what every hooks module needs is not on its bill
from fabric_core.authoring.hook_module import Reading, read, spec_data
from fabric_core.authoring.places import Places


def main() -> None:
    """Answer the order that is in the first argument on the standard output; what the plugin prints goes elsewhere."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    order = json.loads(sys.argv[1])
    with answer:
        json.dump(_answer(order), answer)


def _answer(order: dict[str, Any]) -> dict[str, Any]:
    places = Places(Path(order["own"]))
    reading = read(order["module"], order["file"], places)
    told = _load(reading, order, places) if order["load"] else []
    return {
        "seconds": reading.seconds,
        "heavy": reading.heavy,
        "faults": [(*fault, "error") for fault in reading.faults] + told,
        "same": reading.same,
        "specs": [
            {"hook": hook, "file": file, "line": line, "spec": spec_data(spec)}
            for hook, spec, (file, line) in reading.specs
        ],
    }


def _load(reading: Reading, order: dict[str, Any], places: Places) -> list[Any]:
    from fabric_core.authoring.parts import Bench, check_part

    bench = Bench(places, order["module"].partition(".")[0], tuple(order["stated"]))
    told = [line for _, spec, place in reading.specs for line in check_part(spec, place, bench)]
    return list(dict.fromkeys(told))
