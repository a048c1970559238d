"""Keeping the compiler out: nobody can tell the difference, and it is there for whoever asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fabric_core import without_dynamo

PROGRAM = Path(__file__).parent / "programs" / "dynamo_kept_out.py"
LOADED = "'torch._dynamo' in sys.modules"


def python(*arguments: str, **variables: str) -> str:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, timeout=240, env=environ
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def plain() -> Any:
    return json.loads(python(str(PROGRAM), **{without_dynamo.VARIABLE: "0"}))


@pytest.fixture(scope="module")
def kept_out() -> Any:
    return json.loads(python(str(PROGRAM)))


def test_no_optimizer_and_no_data_parallel_training_loads_the_compiler(kept_out: Any) -> None:
    events = dict(kept_out["loaded"])
    assert events.pop("the compiler") is True
    events.pop("fsdp")  # which may need it
    assert [event for event, loaded in events.items() if loaded] == []


def test_the_variable_leaves_pytorch_as_it_is(plain: Any) -> None:
    assert all(plain["loaded"].values()), (
        "PyTorch's optimizers do not load the compiler any more: delete the module"
    )


def test_numbers_hooks_profiles_graphs_and_functions_are_the_same_with_and_without(
    plain: Any, kept_out: Any
) -> None:
    assert kept_out["seen"].keys() == plain["seen"].keys()
    for what, seen in plain["seen"].items():
        assert kept_out["seen"][what] == seen, what
    assert plain["seen"]["mode"] == without_dynamo._standard_mode()
    assert plain["seen"]["graphs"]["unique_graphs"] > 1
    assert plain["seen"]["found"] == plain["seen"]["finders"] == []


UNKNOWN = f"""
import sys, torch
from fabric_core.without_dynamo import _watch, keep_dynamo_out

def refused():
    keep_dynamo_out()
    return not _watch.changes and _watch not in sys.meta_path

version, zero_grad = torch.__version__, torch.optim.Optimizer.zero_grad
torch.__version__ = "9.9.0"
print("version", refused())
torch.__version__ = version
torch.optim.Optimizer.zero_grad = zero_grad.__wrapped__
print("wrapper", refused())
torch.optim.Optimizer.zero_grad = zero_grad
torch.distributed.__getattr__ = lambda name: 1 / 0
print("package", refused())
del torch.distributed.__getattr__
print("known", not refused())
keep_dynamo_out()
print("once", sys.meta_path.count(_watch) == 1)

import io
saved = io.BytesIO()
torch.save(torch.nn.Linear(1, 1).state_dict(), saved)
saved.seek(0)
torch.load(saved, weights_only=True)
print("needless", not {LOADED})
try:
    torch.distributed.nonsense
except AttributeError as error:
    print("missing", "has no attribute 'nonsense'" in str(error))
print("still out", not {LOADED})
print("brought", torch.distributed.tensor.DTensor in torch.serialization.get_safe_globals())
print("loaded", {LOADED} and refused())
"""


def test_an_unknown_pytorch_is_left_alone_and_what_is_missing_is_brought() -> None:
    said = dict(line.rsplit(" ", 1) for line in python("-c", UNKNOWN).splitlines())
    assert said == dict.fromkeys(
        [
            "version",
            "wrapper",
            "package",
            "known",
            "once",
            "needless",
            "missing",
            "still out",
            "brought",
            "loaded",
        ],
        "True",
    )


CENSUS = """
import sys
from fabric_core.without_dynamo import _COMES_WITH_DYNAMO
import torch
before = set(sys.modules)
import torch._dynamo
brought = {}
for name in sorted(set(sys.modules) - before):
    parent, _, last = name.rpartition(".")
    private = any(part.startswith("_") for part in name.split("."))
    if parent in before and parent.startswith("torch.") and not private:
        brought.setdefault(parent, []).append(last)
print(brought == {package: list(names) for package, names in _COMES_WITH_DYNAMO.items()}, brought)
"""


def test_every_public_module_that_came_with_the_compiler_still_comes_unasked() -> None:
    assert python("-c", CENSUS).startswith("True"), python("-c", CENSUS)


FILE_OF_STRANGERS = """
import io, sys, torch
import torch.distributed.tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
saved = io.BytesIO()
torch.save({"placements": (Replicate(), Shard(0))}, saved)
open(sys.argv[1], "wb").write(saved.getvalue())
"""
LOADING = f"""
import sys
from fabric_core import Fabric
import torch
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
print(not {LOADED})
print(torch.load(sys.argv[1], weights_only=True)["placements"][1].dim == 0)
print({LOADED})
"""


def test_a_file_with_classes_that_the_compiler_declares_safe_is_still_read(tmp_path: Path) -> None:
    file = str(tmp_path / "placements.pt")
    python("-c", FILE_OF_STRANGERS, file)
    assert python("-c", LOADING, file).split() == ["True"] * 3


TRAINING = f"""
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from fabric_core import Fabric

fabric = Fabric(accelerator="cpu", devices=1)
model, optimizer = fabric.setup(model := torch.nn.Linear(2, 1), torch.optim.AdamW(model.parameters()))
loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2, shuffle=True))
for (rows,) in loader:
    fabric.backward(model(rows).sum())
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
state = {{"model": model, "optimizer": optimizer, "loader": loader}}
fabric.save(sys.argv[1], state)
fabric.save(sys.argv[1], state, wait=False)
fabric.load(sys.argv[1], state)
fabric.close()
print({LOADED})
"""


def test_a_training_that_saves_and_loads_does_not_load_it(tmp_path: Path) -> None:
    assert python("-c", TRAINING, str(tmp_path / "training.ckpt")).split() == ["False"]


RANK = f"""
import sys, torch
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
print("before", {LOADED})
torch.compile(torch.nn.Linear(1, 1))
print("after", {LOADED})
"""


def test_a_rank_of_ours_makes_its_first_optimizer_without_it_and_compiling_loads_it(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    said = python("-m", "fabric_core.rank", str(tmp_path / "rank.py")).split()
    assert said == ["before", "False", "after", "True"]


def test_pytorch_that_was_imported_first_is_changed_with_the_first_fabric() -> None:
    code = f"""
import torch, sys
from fabric_core import Fabric
torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
print({LOADED})

import importlib.util
class Theirs:  # a finder that is the next after ours
    def find_spec(self, name, path=None, target=None):
        print(name)
sys.meta_path.insert(1, Theirs())
importlib.util.find_spec("torch._dynamo")
"""
    assert python("-c", code).split() == ["False", "torch._dynamo"]
