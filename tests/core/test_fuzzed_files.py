"""Random damage to single files: an error, or exactly what was saved. ``FABRIC_FUZZ`` sets how many; 300 by default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = """
    import json, random, sys, warnings
    from pathlib import Path
    import torch
    from fabric_core import CheckpointError
    from fabric_core.parts.torch_file import TorchFile

    warnings.simplefilter("ignore")
    path, count = Path(sys.argv[1]), int(sys.argv[2])
    torch.manual_seed(0)
    given = {
        "model": {"weight": torch.randn(7, 5), "bias": torch.arange(5, dtype=torch.bfloat16)},
        "optimizer": [{"step": torch.tensor(3.0), "betas": (0.9, 0.999)}],
        "epoch": 3, "names": ["a", "b"], "big": torch.randn(700),
    }
    TorchFile().save(path, given)
    whole = path.read_bytes()

    def same(one, other):
        if isinstance(one, torch.Tensor):
            return one.dtype == other.dtype and torch.equal(one, other)
        if isinstance(one, dict):
            return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
        if isinstance(one, (list, tuple)):
            return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
        return type(one) is type(other) and one == other

    def flip(content, chance):
        for _ in range(chance.choice([1, 1, 1, 3, 20])):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)

    def truncate(content, chance):
        del content[chance.randrange(len(content)):]

    def piece(content, chance):
        start = chance.randrange(len(content))
        return slice(start, start + chance.choice([1, 4, 16, 64, 512]))

    def delete(content, chance):
        del content[piece(content, chance)]

    def swap(content, chance):
        one, other = piece(content, chance), piece(content, chance)
        content[one], content[other] = bytes(content[other]), bytes(content[one])

    def insert(content, chance):
        place = chance.randrange(len(content))
        content[place:place] = chance.choice([chance.randbytes(9), bytes(64), bytes(content[piece(content, chance)])])

    def overwrite(content, chance):
        where = piece(content, chance)
        content[where] = chance.choice([bytes, chance.randbytes])(len(content[where]))

    counts = {"refused": 0, "right": 0, "wrong": []}
    for seed in range(count):
        chance, content = random.Random(seed), bytearray(whole)
        chance.choice([flip, truncate, delete, swap, insert, overwrite])(content, chance)
        path.write_bytes(content)
        try:
            found = TorchFile().load(path)
        except CheckpointError:
            counts["refused"] += 1
        else:
            if same(given, found):
                counts["right"] += 1
            else:
                counts["wrong"].append(seed)
    counts["executed"] = any(entry.name != path.name for entry in path.parent.iterdir())
    print(json.dumps(counts))
"""


def test_random_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    count = int(os.environ.get("FABRIC_FUZZ", "300"))
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "x.pt"), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + count, check=False)
    assert done.returncode == 0, done.stderr  # a crash of the interpreter would show here
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert not found["executed"]
    assert found["refused"] + found["right"] == count
    assert found["refused"] > count * 0.8
