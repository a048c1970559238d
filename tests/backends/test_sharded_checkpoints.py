"""Checkpoints of sharded training: in shards or whole, to and from any number of processes, and never half of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_task import adam, seeded

PROGRAM = f"""
sys.path.insert(0, {str(Path(__file__).parent / "programs")!r})
from sharded_task import *
import datetime, pathlib, shutil

BLOCKS = {{"auto_wrap_policy": {{Block}}}}

class Counter:
    '''An object of the user's, with tensors of the model in its state.'''
    def __init__(self, model=None):
        self.model, self.state = model, None
    def state_dict(self):
        copy = {{name: value.clone() for name, value in self.model.state_dict().items()}}
        return {{"copy": copy, "day": datetime.date(2026, 1, 2)}}
    def load_state_dict(self, state):
        self.state = state

def everything(strategy, seed=7, precision="32-true", **options):
    '''A training with all that one has: two groups of parameters, a scheduler, an object, plain values.'''
    fabric = fabric_for(strategy, precision, **options)
    model = seeded(seed)
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    model, optimizer = fabric.setup(model, optimizer)
    return fabric, {{
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "object": Counter(model),
        "nested": {{"step": 0, "names": ["a", "b"]}},
    }}

def advance(fabric, state, steps=3):
    for inputs, targets in loader(fabric, steps):
        fabric.backward(mse_loss(state["model"](inputs), targets))
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        state["scheduler"].step()

def look(state):
    '''All that a state holds, whole.'''
    return {{
        "model": whole(state["model"].state_dict()),
        "optimizer": whole_optimizer(state["optimizer"].state_dict()),
        "scheduler": state["scheduler"].state_dict(),
    }}

def whole_optimizer(state):
    return {{**state, "state": {{key: whole(value) for key, value in state["state"].items()}}}}
"""

WRITING = """
written = {}
for name, strategy, options in (
    ("sharded", "fsdp", BLOCKS),
    ("full", "fsdp", {"checkpoint": "full", **BLOCKS}),
    ("hybrid", "fsdp_hybrid", {"device_mesh": (2, world // 2) if world > 1 else (1, 1)}),
    ("offloaded", "fsdp_cpu_offload", BLOCKS),
    ("ddp", "ddp", {}),
):
    fabric, state = everything(strategy, **options)
    advance(fabric, state)
    state["nested"]["step"] = 3
    fabric.save(f"{name}-{world}", state)
    written[name] = look(state)
    advance(fabric, state)
    written[f"{name}, later"] = look(state)
    fabric.close()
answer(written)
"""

READING = """
read = {}
for name in NAMES:
    for kind, strategy, options in (
        ("fsdp", "fsdp", BLOCKS),
        ("one unit", "fsdp", dict(reshard_after_forward=True)),
        ("ddp", "ddp", {}),
    ):
        if kind == "ddp" and not os.path.isfile(name):
            continue
        fabric, state = everything(strategy, seed=1, **options)
        rest = fabric.load(name, state)
        read[name, kind] = look(state), state["nested"], state["object"].state, rest
        advance(fabric, state)
        read[name, kind, "later"] = look(state)
        if kind == "fsdp":
            read[name, "plain"] = fabric.load(name)
        fabric.close()
answer(read)
"""


def trees_differ(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two trees of tensors and values are not the same, bit by bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        if list(one) != list(other):
            return [f"{at}: {list(one)} {list(other)}"]
        return [where for key in one for where in trees_differ(one[key], other[key], f"{at}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            where
            for i, pair in enumerate(zip(one, other, strict=True))
            for where in trees_differ(*pair, f"{at}.{i}")
        ]
    if isinstance(one, torch.Tensor):
        same = type(other) is torch.Tensor and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [at]
    return [] if one == other else [f"{at}: {one!r} {other!r}"]


WORLDS = (1, 2, 4)
NAMES = ("sharded", "full", "hybrid", "offloaded", "ddp")


@pytest.fixture(scope="module")
def written(shared_programs: Any) -> dict[int, list[Any]]:
    return {world: shared_programs.answers_of(PROGRAM + WRITING, world, timeout=110) for world in WORLDS}


@pytest.fixture(scope="module")
def read(shared_programs: Any, written: Any) -> dict[int, list[Any]]:
    names = [f"{name}-{world}" for name in NAMES for world in WORLDS]
    text = PROGRAM + READING.replace("NAMES", repr(names))
    return {world: shared_programs.answers_of(text, world, timeout=110) for world in WORLDS}


@pytest.mark.parametrize("reader", WORLDS)
@pytest.mark.parametrize("writer", WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_comes_back_bit_by_bit_on_any_number_of_processes(
    written: dict[int, list[Any]], read: dict[int, list[Any]], name: str, writer: int, reader: int
) -> None:
    expected = written[writer][0][name]
    kinds = ["fsdp", "one unit"] + (["ddp"] if name in ("full", "ddp") else [])
    for rank, found in enumerate(read[reader]):
        for kind in kinds:
            state, nested, theirs, rest = found[f"{name}-{writer}", kind]
            assert trees_differ(state, expected) == [], (rank, kind)
            assert nested == {"step": 3, "names": ["a", "b"]}
            assert trees_differ(theirs["copy"], expected["model"]) == []
            assert str(theirs["day"]) == "2026-01-02"
            assert rest == {}


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(
    written: dict[int, list[Any]], read: dict[int, list[Any]], name: str
) -> None:
    for reader in WORLDS:
        expected = written[reader][0][f"{name}, later"]["model"]
        for found in read[reader]:
            weights = found[f"{name}-{reader}", "fsdp", "later"]["model"]
            for key, value in expected.items():
                assert (weights[key] - value).abs().max() <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_without_a_state_all_of_a_checkpoint_comes_back_whole_and_plain(
    written: dict[int, list[Any]], read: dict[int, list[Any]], name: str
) -> None:
    for reader in WORLDS:
        for found in read[reader]:
            plain = found[f"{name}-2", "plain"]
            assert list(plain) == ["model", "optimizer", "scheduler", "object", "nested"]
            for key in ("model", "optimizer", "scheduler"):
                assert trees_differ(dict(plain[key]), written[2][0][name][key]) == []


def test_a_whole_checkpoint_is_what_ddp_writes_and_torch_load_reads(
    written: dict[int, list[Any]], shared_programs: Any
) -> None:
    one, other = (
        torch.load(shared_programs.folder / f"{name}-2", weights_only=False) for name in ("full", "ddp")
    )
    assert list(one) == list(other)
    assert type(one["model"]) is type(other["model"])
    assert one["model"]._metadata == other["model"]._metadata
    assert list(one["optimizer"]["state"]) == list(other["optimizer"]["state"])
    plain = seeded(1)
    plain.load_state_dict(one["model"])
    optimizer = adam(plain)
    optimizer.load_state_dict(one["optimizer"])
    assert trees_differ(dict(plain.state_dict()), written[2][0]["full"]["model"]) == []


def test_pytorchs_own_tools_read_a_folder(written: Any, shared_programs: Any, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(shared_programs.folder / "sharded-2", tmp_path / "whole.pt")
    weights = torch.load(tmp_path / "whole.pt")
    assert torch.equal(weights["model.last.weight"], written[2][0]["sharded"]["model"]["last.weight"])


HANDLING = """
import json, math, pickle, warnings
warnings.filterwarnings("ignore", "Detected call of")  # the first step is skipped, until the scale is low enough
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from fabric_backends.sharding import folder as folders
found = {}

def only(function):
    '''Something that rank 0 does to the disk while the others wait.'''
    fabric.barrier()
    if rank == 0:
        function()
    fabric.barrier()

def copied(name):
    only(lambda: shutil.copytree("whole", name))
    return name

fabric, state = everything("fsdp", precision="16-mixed", **BLOCKS)
advance(fabric, state)
state["nested"]["step"] = 3
fabric.save("whole", state)
found["files"] = sorted(path.name for path in pathlib.Path("whole").iterdir())
found["scale"] = fabric._parts.precision.state_dict()["scale"]
before = look(state)

# What was there before is replaced, be it a folder or a file, and nothing is left beside it.
only(lambda: pathlib.Path("file").write_text("old"))
fabric.save("file", {"model": state["model"]})
advance(fabric, state)
fabric.save("file", state)
found["beside"] = sorted(path.name for path in pathlib.Path(".").iterdir() if "file" in path.name)
found["replaced"] = whole(state["model"].state_dict()), fabric.load("file")["model"]
fabric.load("whole", state)
found["back"] = before, look(state)

# Not finished, or not all there.
def without(name, missing):
    copied(name)
    only(lambda: os.remove(f"{name}/{missing}"))
    return error_of(fabric.load, name, state)

found["unfinished"] = without("unfinished", "fabric.json")
found["a file is missing"] = without("missing", "__1_0.distcp")
copied("short")
only(lambda: os.truncate("short/__0_0.distcp", 100))
found["cut short"] = error_of(fabric.load, "short")
copied("future")
only(lambda: pathlib.Path("future/fabric.json").write_text('{"version": 2, "files": {}}'))
found["of the future"] = error_of(fabric.load, "future")
copied("garbled")
only(lambda: pathlib.Path("garbled/fabric.json").write_text("{"))
found["garbled"] = error_of(fabric.load, "garbled")
found["nothing there"] = error_of(fabric.load, "nowhere")

# A crash while one takes the place of the other.
copied("crashed")
only(lambda: os.rename("crashed", ".crashed.0abc.tmp"))
found["crashed"] = fabric.load("crashed")["nested"]

# Nothing is executed.
class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)

def with_index(name, change):
    copied(name)
    def write():
        with open("whole/.metadata", "rb") as file:
            index = pickle.load(file)
        index = change(index)
        with open(f"{name}/.metadata", "wb") as file:
            pickle.dump(index, file)
        manifest = json.loads(pathlib.Path(f"{name}/fabric.json").read_text())
        manifest["files"][".metadata"] = os.path.getsize(f"{name}/.metadata")
        pathlib.Path(f"{name}/fabric.json").write_text(json.dumps(manifest))
    only(write)
    return error_of(fabric.load, name, state)

def as_bytes(index):
    index.state_dict_metadata["model.last.weight"] = BytesStorageMetadata()
    return index

def elsewhere(index):
    for key in index.storage_data:
        index.storage_data[key].relative_path = "../whole/__0_0.distcp"
    return index

found["evil index"] = with_index("evil", lambda index: Evil())
found["evil value"] = with_index("bytes", as_bytes)
found["out of the folder"] = with_index("outside", elsewhere)
found["executed"] = os.path.exists("executed")

# What does not fit is said, and nothing hangs.
class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.more = nn.Linear(5, 9), nn.Linear(3, 3)
other = fabric.setup(Other())
found["another model"] = error_of(fabric.load, "whole", {"model": other})
found["a missing key"] = error_of(fabric.load, "whole", {"models": state["model"]})

# Bare state dicts, and parts of them.
only(lambda: torch.save(seeded(3).state_dict(), "bare.pt"))
fabric.load_raw("bare.pt", state["model"])
found["raw"] = whole(state["model"].state_dict()), dict(seeded(3).state_dict())
only(lambda: torch.save(seeded(4).state_dict(), "old.pt", _use_new_zipfile_serialization=False))
fabric.load_raw("old.pt", state["model"])
found["raw, of old"] = whole(state["model"].state_dict()), dict(seeded(4).state_dict())
fabric.save("part", {"model": state["model"]}, filter={"model": lambda name, value: name.startswith("last")})
found["part"] = sorted(fabric.load("part")["model"])
fabric.load("part", {"model": state["model"]}, strict=False)
fabric.save("bare", state["model"].state_dict())
fabric.load_raw("bare", state["model"])
placeholder = {"model": None}
fabric.load("whole", placeholder)
found["by a placeholder"] = {name: type(value) for name, value in placeholder["model"].items()}

# The scale of the losses.
with fabric_for(precision="16-mixed", **BLOCKS) as second:
    model = second.setup(seeded())
    second._parts.precision.scale_loss(torch.ones(1))
    second._parts.precision.load_state_dict({**second._parts.precision.state_dict(), "scale": 4.0})
    second.load("whole", {"model": model, "nested": {}})
    found["scale after loading"] = second._parts.precision.state_dict()["scale"]

# What cannot be written fails on every rank, and leaves what was there.
only(lambda: pathlib.Path("blocked").write_text(""))
found["blocked"] = error_of(fabric.save, "blocked/inside", state)
sys.path.insert(0, os.getcwd())
writer = folders.write_shards
def failing(*args):
    if rank == 1:
        raise OSError("no space left")
    return None
folders.write_shards = failing
found["one rank fails"] = error_of(fabric.save, "whole", state)
folders.write_shards = writer
found["intact"] = before["model"], fabric.load("whole")["model"]
found["left"] = sorted(path.name for path in pathlib.Path(".").iterdir() if path.name.startswith(".whole"))
answer(found)
fabric.close()
"""


@pytest.fixture(scope="module")
def handling(shared_programs: Any) -> list[dict[str, Any]]:
    return shared_programs.answers_of(PROGRAM + HANDLING, timeout=110)


def test_a_checkpoint_takes_the_place_of_what_was_there_and_leaves_nothing_beside(
    handling: list[dict[str, Any]],
) -> None:
    for found in handling:
        assert found["files"] == [".metadata", "__0_0.distcp", "__1_0.distcp", "fabric.json", "values.pt"]
        assert found["beside"] == ["file"]
        assert trees_differ(*map(dict, found["replaced"])) == []
        assert trees_differ(*found["back"]) == []


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("unfinished", "no checkpoint that was finished"),
        ("a file is missing", "'__1_0.distcp' is missing"),
        ("cut short", "100 bytes"),
        ("of the future", "version 2"),
        ("garbled", "damaged"),
        ("nothing there", "There is no checkpoint"),
        ("another model", "size mismatch for first.weight"),
        ("a missing key", "no 'models'"),
        ("blocked", "Rank 0 could not write"),
        ("one rank fails", "Rank 1 could not write the checkpoint 'whole': OSError: no space left"),
    ],
)
def test_what_cannot_be_read_or_written_is_an_error_on_every_rank(
    handling: list[dict[str, Any]], what: str, words: str
) -> None:
    for found in handling:
        name, message = found[what]
        assert name == ("CheckpointKeyError" if what == "a missing key" else "CheckpointError")
        assert words in message


def test_a_checkpoint_survives_a_crash_between_old_and_new(handling: list[dict[str, Any]]) -> None:
    for found in handling:
        assert found["crashed"] == {"step": 3, "names": ["a", "b"]}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("evil index", "asks for posix.mkdir"),
        ("evil value", "asks for torch.distributed.checkpoint.metadata.BytesStorageMetadata"),
        ("out of the folder", "points out of its folder"),
    ],
)
def test_nothing_is_executed_while_a_folder_is_read(
    handling: list[dict[str, Any]], what: str, words: str
) -> None:
    for found in handling:
        name, message = found[what]
        assert name == "UnsafeCheckpointError"
        assert words in message
        assert found["executed"] is False


@pytest.mark.parametrize("what", ["raw", "raw, of old", "intact"])
def test_states_come_back_unchanged(handling: list[dict[str, Any]], what: str) -> None:
    for found in handling:
        assert trees_differ(*map(dict, found[what])) == []
        assert found["left"] == []


def test_parts_of_a_model_can_be_saved_and_values_come_back_plain(handling: list[dict[str, Any]]) -> None:
    for found in handling:
        assert found["part"] == ["last.bias", "last.weight"]
        assert set(found["by a placeholder"].values()) == {torch.Tensor}


def test_the_scale_of_losses_is_saved_along(handling: list[dict[str, Any]]) -> None:
    for found in handling:
        assert found["scale after loading"] == found["scale"] != 4.0
