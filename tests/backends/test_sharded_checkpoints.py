"""Checkpoints of sharded training: in shards or whole, to and from any number of processes, and never half of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_task import adam, seeded

pytestmark = pytest.mark.timeout(300)

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
    ("hybrid", "fsdp_hybrid", {"device_mesh": (2, 2)}),
    ("offloaded", "fsdp_cpu_offload", BLOCKS),
    ("ddp", "ddp", {}),
):
    if world not in WRITERS[name]:
        continue
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
for name, writer in ((name, writer) for name in WRITERS for writer in WRITERS[name]):
    path = f"{name}-{writer}"
    for strategy in ("fsdp", "ddp") if world == 2 else ("fsdp",):
        fabric, state = everything(strategy, seed=1, **(BLOCKS if writer == 2 and strategy == "fsdp" else {}))
        rest = fabric.load(path, state)
        read[path, strategy] = look(state), state["nested"], state["object"].state, rest
        if writer == world and strategy == "fsdp":
            advance(fabric, state)
            read[path, "later"] = look(state)
            read[path, "plain"] = fabric.load(path)
            rest = fabric.load(path, {"model": state["model"]})
            unread = repr(rest)
            if rank == 0:  # needs nothing of the others
                read[path, "left"] = rest.pop("optimizer"), sorted(rest), unread
        fabric.close()
answer(read)
"""

WRITERS = {"sharded": (1, 2, 4), "full": (1, 2, 4), "hybrid": (4,), "offloaded": (2,), "ddp": (2,)}
"""By how many processes each kind of checkpoint is written."""

FILES = [(name, writer) for name, writers in WRITERS.items() for writer in writers]


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


class Runs:
    """What the ranks answered, by how many there were; each program runs once, when it is asked for."""

    def __init__(self, programs: Any) -> None:
        self.programs, self._answers = programs, {}

    def _run(self, text: str, world: int) -> Any:
        if (text, world) not in self._answers:
            text_with = PROGRAM + text.replace("WRITERS", repr(WRITERS))
            self._answers[text, world] = self.programs.answers_of(text_with, world, timeout=280)
        return self._answers[text, world]

    def written(self, world: int) -> Any:
        return self._run(WRITING, world)

    def read(self, world: int) -> Any:
        for writer in WRITERS["sharded"]:
            self.written(writer)
        return self._run(READING, world)


@pytest.fixture(scope="module")
def runs(shared_programs: Any) -> Runs:
    return Runs(shared_programs)


@pytest.mark.parametrize("writer", [1, 2, 4])
def test_checkpoints_are_folders_of_shards_or_whole_files(runs: Runs, writer: int) -> None:
    for answers in runs.written(writer):
        for name in (name for name in WRITERS if writer in WRITERS[name]):
            path = runs.programs.folder / f"{name}-{writer}"
            shards = 2 if name == "hybrid" else writer  # of two copies of the model, one is written
            assert path.is_file() if name in ("full", "ddp") else len(list(path.glob("shard-*"))) == shards
            assert trees_differ(answers[name], runs.written(writer)[0][name]) == []


@pytest.mark.parametrize("reader", [1, 2, 4])
@pytest.mark.parametrize(("name", "writer"), FILES)
def test_a_checkpoint_comes_back_bit_by_bit_on_any_number_of_processes(
    runs: Runs, name: str, writer: int, reader: int
) -> None:
    expected = runs.written(writer)[0][name]
    for rank, found in enumerate(runs.read(reader)):
        for strategy in ("fsdp", "ddp") if reader == 2 else ("fsdp",):
            state, nested, theirs, rest = found[f"{name}-{writer}", strategy]
            assert trees_differ(state, expected) == [], (rank, strategy)
            assert nested == {"step": 3, "names": ["a", "b"]}
            assert trees_differ(theirs["copy"], expected["model"]) == []
            assert str(theirs["day"]) == "2026-01-02"
            assert rest == {}


@pytest.mark.parametrize(("name", "writer"), FILES)
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(
    runs: Runs, name: str, writer: int
) -> None:
    expected = runs.written(writer)[0][f"{name}, later"]["model"]
    for found in runs.read(writer):
        weights = found[f"{name}-{writer}", "later"]["model"]
        for key, value in expected.items():
            assert (weights[key] - value).abs().max() <= 1e-6


@pytest.mark.parametrize(("name", "writer"), FILES)
def test_without_a_state_all_of_a_checkpoint_comes_back_whole_and_plain(
    runs: Runs, name: str, writer: int
) -> None:
    for found in runs.read(writer):
        plain = found[f"{name}-{writer}", "plain"]
        assert list(plain) == ["model", "optimizer", "scheduler", "object", "nested"]
        for key in ("model", "optimizer", "scheduler"):
            assert trees_differ(dict(plain[key]), runs.written(writer)[0][name][key]) == []


@pytest.mark.parametrize("name", ["sharded", "full"])
@pytest.mark.parametrize("writer", [1, 2, 4])
def test_what_was_not_asked_for_is_read_by_one_rank_alone_when_it_uses_it(
    runs: Runs, name: str, writer: int
) -> None:
    optimizer, others, unread = runs.read(writer)[0][f"{name}-{writer}", "left"]
    assert trees_differ(optimizer, runs.written(writer)[0][name]["optimizer"]) == []
    assert others == ["nested", "object", "scheduler"]
    assert "'optimizer': <" in unread
    assert "not read yet>, 'scheduler': {" in unread


def test_a_whole_checkpoint_is_what_ddp_writes_and_torch_load_reads(runs: Runs) -> None:
    expected, folder = runs.written(2)[0]["full"]["model"], runs.programs.folder
    one, other = (torch.load(folder / f"{name}-2", weights_only=False) for name in ("full", "ddp"))
    assert list(one) == list(other)
    assert type(one["model"]) is type(other["model"])
    assert one["model"]._metadata == other["model"]._metadata
    assert list(one["optimizer"]["state"]) == list(other["optimizer"]["state"])
    plain = seeded(1)
    plain.load_state_dict(one["model"])
    optimizer = adam(plain)
    optimizer.load_state_dict(one["optimizer"])
    assert trees_differ(dict(plain.state_dict()), expected) == []


def test_the_library_of_safetensors_reads_every_shard(runs: Runs) -> None:
    from safetensors import safe_open

    expected = runs.written(2)[0]["sharded"]["model"]
    parts: dict[str, list[torch.Tensor]] = {}
    for path in sorted((runs.programs.folder / "sharded-2").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                parts.setdefault(key.partition("[")[0], []).append(file.get_tensor(key))
    for name, tensor in expected.items():
        if name != "offset":  # a buffer is in no shard
            assert torch.equal(torch.cat(parts[f"model.{name}"]), tensor)


HANDLING = """
import json, warnings
warnings.filterwarnings("ignore", "Detected call of")  # the first step is skipped, until the scale is low enough
from fabric_core.contracts import folder as folders
from fabric_core.sharded.manifest import as_text
from fabric_core.sharded.writing import sum_of
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
found["a file is missing"] = without("missing", "shard-000001.safetensors")
copied("short")
only(lambda: os.truncate("short/shard-000000.safetensors", 100))
found["cut short"] = error_of(fabric.load, "short")
copied("future")
future = '{"format": "fabric-shards", "version": 99}'
only(lambda: pathlib.Path("future/fabric.json").write_text(future))
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

def with_evil_values():
    torch.save({"nested": Evil()}, "evil/values.pt")
    content = json.loads(pathlib.Path("evil/fabric.json").read_text())
    size, checksum = sum_of(pathlib.Path("evil/values.pt"))
    content["files"]["values.pt"] = {"size": size, "crc32": checksum}
    del content["checksum"]
    pathlib.Path("evil/fabric.json").write_text(as_text(content))

copied("evil")
only(with_evil_values)
found["evil values"] = error_of(fabric.load, "evil", state)
found["executed"] = os.path.exists("executed")

def flip(name):
    with open(f"{name}/shard-000001.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))

copied("flipped")
only(lambda: flip("flipped"))
found["flipped"] = error_of(fabric.load, "flipped", state)

# What one rank alone finds, while the others restore.
class Failing:
    def state_dict(self):
        if rank == 1:
            raise ValueError("of rank 1 alone")
        return {}
    load_state_dict = None

def on_one_rank(fabric, state):
    alone = [error_of(fabric.load, "alone", {"model": state["model"]})]
    alone.append(error_of(fabric.load_raw, f"own-{rank}", state["model"]))
    Failing.load_state_dict = lambda self, state: self.state_dict()
    alone.append(error_of(fabric.load, "whole", {"object": Failing()}))
    alone.append(error_of(fabric.save, "never", {"object": Failing()}))
    fabric.load("whole", state)  # and the next time, they still agree
    return alone, whole(state["model"].state_dict())

fabric.save("alone", {"model": state["model"]})
fabric.save("own-0", state["model"].state_dict())
only(lambda: shutil.copytree("own-0", "own-1"))
only(lambda: flip("alone"))
only(lambda: flip("own-1"))
found["alone, fsdp"] = on_one_rank(fabric, state)
second, theirs = everything("ddp")
found["alone, ddp"] = on_one_rank(second, theirs)
second.close()

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
only(lambda: (pathlib.Path("home").mkdir(), pathlib.Path("home/thesis").write_text("mine")))
found["a folder of the user's"] = error_of(fabric.save, "home", state)
assert os.listdir("home") == ["thesis"]
sys.path.insert(0, os.getcwd())
writer = folders.write_part
def failing(*args):
    if rank == 1:
        raise OSError("no space left")
folders.write_part = failing
found["one rank fails"] = error_of(fabric.save, "whole", state)
folders.write_part = writer
found["intact"] = before["model"], fabric.load("whole")["model"]
found["left"] = sorted(path.name for path in pathlib.Path(".").iterdir() if path.name.startswith(".whole"))
answer(found)
fabric.close()
"""


@pytest.fixture(scope="module")
def handling(shared_programs: Any) -> list[dict[str, Any]]:
    return shared_programs.answers_of(PROGRAM + HANDLING, timeout=280)


def test_a_checkpoint_takes_the_place_of_what_was_there_and_leaves_nothing_beside(
    handling: list[dict[str, Any]],
) -> None:
    for found in handling:
        assert found["files"] == [
            "fabric.json",
            "shard-000000.safetensors",
            "shard-000001.safetensors",
            "values.pt",
        ]
        assert found["beside"] == ["file"]
        assert trees_differ(*map(dict, found["replaced"])) == []
        assert trees_differ(*found["back"]) == []


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("unfinished", "no checkpoint that was finished"),
        ("a file is missing", "shard-000001.safetensors' is missing"),
        ("cut short", "100 bytes"),
        ("of the future", "version 99"),
        ("garbled", "damaged"),
        ("flipped", "in 'shard-000001.safetensors', which is part of 'object.copy.last.bias'"),
        ("nothing there", "There is no checkpoint"),
        ("another model", "size mismatch for first.weight"),
        ("a missing key", "no 'models'"),
        ("blocked", "Rank 0 could not write"),
        ("a folder of the user's", "'home' is a folder with other things in it, and no checkpoint"),
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


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_what_one_rank_alone_finds_is_an_error_on_every_rank(
    handling: list[dict[str, Any]], strategy: str
) -> None:
    for rank, found in enumerate(handling):
        (chunk, disk, restored, collected), weights = found[f"alone, {strategy}"]
        for (name, message), told in (
            (chunk, "Rank 1 could not load the checkpoint 'alone': "),
            (disk, "Rank 1 could not load the checkpoint 'own-0': "),
        ):
            assert name == "CheckpointError"
            assert "in 'shard-000001.safetensors', which is part of" in message
            read_by_both = strategy == "ddp" and "alone" in told
            assert read_by_both or message.startswith(told) == (rank == 0)
        for error, what in ((restored, "load the checkpoint 'whole'"), (collected, "collect the state for")):
            assert error[0] == ("CheckpointError" if rank == 0 else "ValueError")
            assert error[1].startswith(f"Rank 1 could not {what}" if rank == 0 else "of rank 1 alone")
        assert trees_differ(dict(weights), dict(found["back"][0]["model"])) == []


def test_a_checkpoint_survives_a_crash_between_old_and_new(handling: list[dict[str, Any]]) -> None:
    for found in handling:
        assert found["crashed"] == {"step": 3, "names": ["a", "b"]}


def test_nothing_is_executed_while_a_folder_is_read(handling: list[dict[str, Any]]) -> None:
    for found in handling:
        name, message = found["evil values"]
        assert name == "UnsafeCheckpointError"
        assert "posix.mkdir" in message
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
