"""Checkpoints in shards: what is written comes back bit by bit, or is refused; nothing is trusted, nothing executed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fabric_core import CheckpointError, Fabric, UnsafeCheckpointError
from fabric_core.beside import temporary_for
from fabric_core.parts.torch_file import TorchFile
from fabric_core.sharded import reading, safetensors, writing
from fabric_core.sharded.boxes import Box, boxes_of_row, tile, whole_box
from fabric_core.sharded.dtypes import DTYPES
from fabric_core.sharded.manifest import Chunk, Entry, as_text
from fabric_core.sharded.reading import ShardedFolder, read_checkpoint
from fabric_core.sharded.shares import Share
from fabric_core.sharded.stored import plain
from fabric_core.sharded.writing import VALUES, finish, sum_of, without_shares, write_part

SHARDS = "shard-000000.safetensors", "shard-000001.safetensors"
RANKS = 2

Content = dict[str, Any]


def state() -> dict[str, Any]:
    """A checkpoint with tensors of many shapes and dtypes, and plain values."""
    torch.manual_seed(3)
    model = {
        "first": torch.randn(6, 5),
        "second": torch.randn(7),
        "deep": torch.randn(3, 2, 4),
        "bias": torch.randn(()),
    }
    others = {
        name: torch.randint(0, 2, (4, 3)).to(dtype)
        for name, dtype in DTYPES.items()
        if not name.startswith("F8")
    }
    return {"model": model, "others": [others, torch.zeros(0, 3)], "step": 7}


def shared(tree: Any, rank: int, ranks: int = RANKS) -> Any:
    """The same with the share that a rank has of each tensor: a row of it, as ZeRO divides them."""

    def share(tensor: torch.Tensor) -> Share:
        begin, end = (tensor.numel() * edge // ranks for edge in (rank, rank + 1))
        return Share.of_row(tensor.shape, begin, tensor.reshape(-1)[begin:end])

    return writing.mapped(tree, share, torch.Tensor)


def write(path: Path, tree: Any, ranks: int = RANKS) -> Path:
    temporary = temporary_for(path, "0abc")
    temporary.mkdir()
    for rank in range(ranks):
        write_part(temporary, rank, shared(tree, rank, ranks))
    TorchFile().save(temporary / VALUES, without_shares(shared(tree, 0, ranks)))
    finish(temporary, path, ranks, {"world_size": ranks})
    return path


def read(path: Path) -> Any:
    return plain(read_checkpoint(path, TorchFile().load))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    return bool(one == other)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("original") / "folder", state())


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "folder"))


# -- boxes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_a_row_is_cut_into_few_boxes_that_hold_it_in_its_order(seed: int) -> None:
    draw = random.Random(seed)
    shape = [draw.randint(1, 4) for _ in range(draw.randint(0, 4))]
    whole = torch.arange(whole_box(shape).numel).view(shape)
    cuts = sorted(draw.randint(0, whole.numel()) for _ in range(draw.randint(0, 4)))
    boxes = []
    for begin, end in zip([0, *cuts], [*cuts, whole.numel()], strict=True):
        row = boxes_of_row(shape, begin, end - begin)
        parts = [whole[box.within(whole_box(shape))].reshape(-1) for box in row]
        assert torch.cat([torch.zeros(0), *parts]).tolist() == list(range(begin, end))
        assert len(row) <= max(1, 2 * len(shape) - 1)
        boxes += row
    assert tile(shape, boxes)
    assert not tile(shape, [*boxes, draw.choice(boxes)])
    assert not tile(shape, boxes[1:])


@pytest.mark.parametrize("seed", range(20))
def test_boxes_cover_a_tensor_exactly_when_each_element_is_in_one(seed: int) -> None:
    draw = random.Random(seed)
    shape = (3, 4)
    for _ in range(100):
        boxes = [Box((0, 0), (draw.randint(1, 3), draw.randint(1, 4)))]
        for _ in range(draw.randint(0, 3)):
            begin = draw.randint(0, 2), draw.randint(0, 3)
            boxes.append(Box(begin, (draw.randint(1, 3 - begin[0]), draw.randint(1, 4 - begin[1]))))
        counts = torch.zeros(shape)
        for box in boxes:
            counts[box.within(whole_box(shape))] += 1
        assert tile(shape, boxes) == bool((counts == 1).all())


@pytest.mark.parametrize("seed", range(10))
def test_any_box_of_any_dtype_is_read_through_a_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(reading, "PIECE", draw.choice([1, 16, 24, 100]))
    monkeypatch.setattr(writing, "LARGEST_CHUNK", draw.choice([40, 200, 10_000]))
    shape = [draw.randint(1, 9) for _ in range(draw.randint(0, 3))]
    dtype = draw.choice([torch.float64, torch.int16, torch.bfloat16, torch.bool])
    whole = torch.randint(0, 2 if dtype is torch.bool else 100, shape).to(dtype)
    folder = write(tmp_path / "folder", {"large": whole})
    stored = ShardedFolder(folder).values(TorchFile().load)["large"]
    for _ in range(10):
        begin = [draw.randrange(size) for size in shape]
        box = Box(
            tuple(begin), tuple(draw.randint(1, size - at) for size, at in zip(shape, begin, strict=True))
        )
        part = torch.zeros([*box.lengths, 2], dtype=draw.choice([dtype, torch.float64]))[..., 0]
        stored.read_into([(box, part)])
        assert torch.equal(part, whole[box.within(whole_box(shape))].to(part.dtype))
    shard = next(folder.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"checksum.*differs"):
        ShardedFolder(folder).values(TorchFile().load)["large"].read()
    with pytest.raises(CheckpointError, match=r"checksum.*differs"):
        ShardedFolder(folder).values(TorchFile().load)["large"].read_into(
            [(whole_box(shape), torch.zeros([*shape, 2], dtype=dtype)[..., 0])]
        )


@pytest.mark.parametrize("seed", range(20))
def test_none_of_the_chunks_that_a_box_needs_is_overlooked(seed: int) -> None:
    draw = random.Random(seed)
    shape = [draw.randint(1, 6) for _ in range(draw.randint(0, 3))]
    boxes = [whole_box(shape)]
    for _ in range(draw.randint(0, 4)):
        boxes = [piece for box in boxes for piece in box.pieces(max(1, box.numel // draw.randint(1, 3)))]
    draw.shuffle(boxes)
    entry = Entry(torch.uint8, torch.Size(shape), tuple(Chunk(box, "file", str(box), 0) for box in boxes))
    for _ in range(20):
        begin = [draw.randrange(size) for size in shape]
        wanted = Box(
            tuple(begin), tuple(draw.randint(1, size - at) for size, at in zip(shape, begin, strict=True))
        )
        assert {each.box for each in entry.near(wanted)} >= {box for box in boxes if box.overlap(wanted)}


def test_a_rank_looks_at_its_own_chunks_and_not_at_those_of_all_ranks() -> None:
    rows = [Chunk(Box((row, 0), (1, 8)), "file", str(row), 0) for row in range(1000)]
    entry = Entry(torch.uint8, torch.Size((1000, 8)), tuple(rows))
    assert entry.near(Box((500, 0), (2, 8))) == rows[500:502]


# -- writing and reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_tensors_of_every_dtype_come_back_bit_by_bit(tmp_path: Path, ranks: int) -> None:
    path = write(tmp_path / "folder", state(), ranks)
    assert same(read(path), state())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder"]


def test_strategies_without_shards_of_their_own_load_a_folder(original: Path) -> None:
    model = torch.nn.Module()
    for name, tensor in state()["model"].items():
        model.register_parameter(name, torch.nn.Parameter(torch.zeros_like(tensor)))
    with Fabric(accelerator="cpu") as fabric:
        loaded: dict[str, Any] = {"model": fabric.setup(model, move_to_device=False), "step": 0}
        rest = fabric.load(original, loaded)
        assert same(dict(model.state_dict()), state()["model"])
        assert loaded["step"] == 7
        assert same(rest["others"], state()["others"])
        assert same(fabric.load(original), state())


def test_what_is_made_for_being_written_lives_until_it_is(tmp_path: Path) -> None:
    """A copy in another order of memory, or from a device, belongs to nobody but the one who writes it."""
    columns = {str(n): torch.arange(5000.0).view(50, 100).t() + n for n in range(50)}
    safetensors.write_safetensors(tmp_path / "x.safetensors", columns, lambda tensor: tensor.clone())
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, columns[name])
    view = safetensors.bytes_of(torch.full((5000,), 7, dtype=torch.uint8))
    others = [torch.zeros(5000, dtype=torch.uint8) for _ in range(50)]
    assert bytes(view) == b"\x07" * 5000
    assert not any(map(torch.any, others))


def test_the_library_of_safetensors_reads_the_shards(original: Path) -> None:
    found = {}
    for name in SHARDS:
        with safe_open(original / name, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert torch.equal(
        torch.cat([found["model.second[0:3]"], found["model.second[3:7]"]]), state()["model"]["second"]
    )


def test_the_manifest_says_what_wrote_it_and_what_there_is(original: Path) -> None:
    content = json.loads((original / "fabric.json").read_text())
    assert (content["format"], content["version"], content["world_size"]) == ("fabric-shards", 1, RANKS)
    assert content["versions"]["torch"] == torch.__version__
    assert {name: entry["size"] for name, entry in content["files"].items()} == {
        path.name: path.stat().st_size for path in original.iterdir() if path.name != "fabric.json"
    }


def test_of_large_tensors_only_the_chunks_that_are_needed_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "LARGEST_CHUNK", 64)
    whole = torch.randn(32, 4)
    folder = ShardedFolder(write(tmp_path / "folder", {"large": whole}))
    assert {chunk.box.numel for chunk in folder.manifest.tensors["large"].chunks} == {16}
    keys: list[str] = []
    opened = safetensors.SafetensorsFile.opened
    monkeypatch.setattr(
        safetensors.SafetensorsFile, "opened", lambda *args: (keys.append(args[1]), opened(*args))[1]
    )
    stored = folder.values(TorchFile().load)["large"]
    assert torch.equal(stored.read_row(10, 20), whole.view(-1)[10:30])
    assert keys == ["large[0:4,0:4]", "large[4:8,0:4]"]
    part = torch.zeros(2, 9)[:, :3]
    stored.read_into([(Box((7, 1), (2, 3)), part)])
    assert torch.equal(part, whole[7:9, 1:4])


def test_a_chunk_that_is_wanted_in_several_places_goes_to_all_of_them(folder: Path) -> None:
    stored = read_checkpoint(folder, TorchFile().load)["model"]["first"]
    whole, row = torch.zeros(6, 5), torch.zeros(1, 5)
    stored.read_into([(whole_box(whole.shape), whole), (Box((1, 0), (1, 5)), row)])
    assert torch.equal(whole, state()["model"]["first"])
    assert torch.equal(row, whole[1:2])


def test_names_that_collide_are_told_apart(tmp_path: Path) -> None:
    tree = {
        "a": {"b": torch.ones(2)},
        "a.b": torch.zeros(2),
        "__metadata__": torch.ones(1),
        0: torch.ones(3),
        "x": [torch.zeros(4)],
    }
    assert same(read(write(tmp_path / "folder", tree)), tree)


def test_what_shards_cannot_hold_is_refused_when_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"'x' is of the dtype torch.complex128.*Save it as one of.*or in one file",
    ):
        write(tmp_path / "one", {"x": torch.zeros(1, dtype=torch.complex128)})  # of which rank 0 has nothing
    with pytest.raises(CheckpointError, match="'m' is on the meta device"):
        without_shares({"m": torch.empty(2, device="meta")})


def test_shares_that_make_no_whole_are_refused_and_leave_what_was_there(folder: Path) -> None:
    temporary = temporary_for(folder, "1abc")
    temporary.mkdir()
    for rank in range(2):
        write_part(temporary, rank, {"x": Share.of_row((4,), 0, torch.ones(3 - rank))})
    TorchFile().save(temporary / VALUES, {})
    with pytest.raises(CheckpointError, match="the parts of 'x' overlap, or do not make the whole"):
        finish(temporary, folder, 2, {})
    assert same(read(folder), state())


def test_more_parts_than_can_be_read_again_are_refused_and_leave_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "LARGEST", (folder / "fabric.json").stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"so many parts that the manifest takes \d+ bytes"):
        write(folder, state())
    monkeypatch.undo()
    assert same(read(folder), state())


def test_copies_are_kept_once_and_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    def two(path: Path, *tensors: torch.Tensor) -> Path:
        temporary = temporary_for(path, "1abc")
        temporary.mkdir()
        for rank, tensor in enumerate(tensors):
            write_part(temporary, rank, {"x": Share.of_row(tensor.shape, 0, tensor.view(-1))})
        TorchFile().save(
            temporary / VALUES, without_shares({"x": Share.of_row(tensor.shape, 0, tensor.view(-1))})
        )
        finish(temporary, path, len(tensors), {})
        return path

    assert torch.equal(read(two(tmp_path / "copies", torch.ones(4), torch.ones(4)))["x"], torch.ones(4))
    with pytest.raises(
        CheckpointError, match=r"Rank 1 has 'x' as F32 of the shape \[5\], and others as F32 of \[4\]"
    ):
        two(tmp_path / "other", torch.ones(4), torch.ones(5))


# -- the place of a folder -------------------------------------------------------------------------------------------


def test_what_a_crash_has_left_of_another_name_is_not_taken_for_this_one(folder: Path) -> None:
    folder.rename(folder.with_name(".run.1.0abc.tmp"))  # of "run.1"
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        read(folder.with_name("run"))
    assert read(folder.with_name("run.1"))


def test_a_folder_may_have_any_name_that_the_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    for _ in range(2):  # the second one takes the place of the first
        write(path, state())
        assert same(read(path), state())
    assert list(tmp_path.iterdir()) == [path]
    path.rename(temporary_for(path, "0abc"))  # as a crash may leave it
    assert same(read(path), state())


def test_the_old_folder_goes_back_when_the_new_one_cannot_take_its_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        write(folder, {"other": torch.ones(2, 2)})
    assert same(read(folder), state())
    assert not list(folder.parent.glob("*.old"))


def test_a_link_is_replaced_and_what_it_leads_to_is_left_alone(folder: Path) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    write(link, {"other": torch.ones(2, 2)})
    assert list(read(link)) == ["other"]
    assert same(read(folder), state())
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["folder", "link"]


# -- hostile folders -------------------------------------------------------------------------------------------------


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def sign(folder: Path, content: Content) -> None:
    content.pop("checksum", None)
    (folder / "fabric.json").write_text(as_text(content))


def manifest(change: Callable[[Content], Any]) -> Callable[[Path], None]:
    """A manifest that is changed, with the right checksum."""

    def hostile(folder: Path) -> None:
        content = json.loads((folder / "fabric.json").read_text())
        change(content)
        sign(folder, content)

    return hostile


def tensor(**changes: Any) -> Callable[[Path], None]:
    return manifest(lambda content: content["tensors"]["model.first"].update(changes))


def chunk(name: str = "model.first", number: int = 0, **changes: Any) -> Callable[[Path], None]:
    return manifest(lambda content: content["tensors"][name]["chunks"][number].update(changes))


def renamed(name: str) -> Callable[[Path], None]:
    """The first shard under another name; it is there, where it can be."""

    def hostile(folder: Path) -> None:
        with contextlib.suppress(OSError, ValueError):
            shutil.copy(folder / SHARDS[0], folder / name) if name[0] != "/" else None
        manifest(change)(folder)

    def change(content: Content) -> None:
        content["files"][name] = content["files"].pop(SHARDS[0])
        for entry in content["tensors"].values():
            for part in entry["chunks"]:
                part["file"] = name if part["file"] == SHARDS[0] else part["file"]

    return hostile


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def hostile(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "outside")
        make(folder / name)

    return hostile


def link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "outside")


def header(change: Callable[[Content, Content], Any]) -> Callable[[Path], None]:
    """A shard whose header is changed, with right checksums; the change also gets the manifest's tensors."""

    def hostile(folder: Path) -> None:
        content = json.loads((folder / "fabric.json").read_text())
        data = (folder / SHARDS[0]).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:end])
        text = change(entries, content["tensors"])
        text = json.dumps(entries).encode() if text is None else text
        head = len(text).to_bytes(8, "little") + text
        (folder / SHARDS[0]).write_bytes(head + data[end:])
        content["files"][SHARDS[0]] = {"size": len(head + data[end:]), "crc32": zlib.crc32(head)}
        sign(folder, content)

    return hostile


def first(entries: Content) -> Content:
    return next(entry for key, entry in entries.items() if key.startswith("model.first["))


def huge_header(folder: Path) -> None:
    data = bytearray((folder / SHARDS[0]).read_bytes())
    data[:8] = (1 << 62).to_bytes(8, "little")
    (folder / SHARDS[0]).write_bytes(data)


def evil_values(folder: Path) -> None:
    torch.save({"model": Evil()}, folder / VALUES)
    size, checksum = sum_of(folder / VALUES)
    manifest(lambda content: content["files"].update({VALUES: {"size": size, "crc32": checksum}}))(folder)


def evil_file(name: str) -> Callable[[Path], None]:
    def hostile(folder: Path) -> None:
        torch.save(Evil(), folder / name)
        if name in SHARDS:
            size, checksum = sum_of(folder / name)
            manifest(lambda content: content["files"].update({name: {"size": size, "crc32": checksum}}))(
                folder
            )

    return hostile


def swapped(folder: Path) -> None:
    one, other = (folder / name for name in SHARDS)
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)


def bomb(content: Content) -> None:
    """A tensor of a terabyte that is the same few bytes many times."""
    entry = content["tensors"]["model.second"]
    part = entry["chunks"][0]
    entry["shape"] = [3000]
    entry["chunks"] = [{**part, "offsets": [begin], "lengths": [3]} for begin in range(0, 3000, 3)]


def drop(*names: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for name in names[:-1]:
            content = content[name]
        del content[names[-1]]

    return change


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

HOSTILE: dict[str, Callable[[Path], Any]] = {
    "a pickle for values": evil_values,
    "a pickle for a shard": evil_file(SHARDS[0]),
    "a pickle for the manifest": evil_file("fabric.json"),
    "a link for values": replaced(VALUES, link),
    "a link for a shard": replaced(SHARDS[1], link),
    "a link for the manifest": replaced("fabric.json", link),
    "a pipe for values": replaced(VALUES, os.mkfifo),
    "a pipe for a shard": replaced(SHARDS[1], os.mkfifo),
    "a pipe for the manifest": replaced("fabric.json", os.mkfifo),
    "a folder for a shard": replaced(SHARDS[1], os.mkdir),
    "a file above": renamed("../outside.safetensors"),
    "an absolute file": renamed("/etc/passwd"),
    "a file with a zero": renamed("shard-000000.safetensors\0"),
    "a file with a backslash": renamed("..\\shard-000000.safetensors"),
    "a file with a line break": renamed("shard-000000.safetensors\n"),
    "the folder as a file": renamed("."),
    "values as a shard": chunk(file=VALUES),
    "a file that is not listed": chunk(file="shard-000007.safetensors"),
    "a file that is a number": chunk(file=0),
    "a key that is none": chunk(key=None),
    "a key that is not there": chunk(key="nothing"),
    "a hole": manifest(lambda content: content["tensors"]["model.first"]["chunks"].pop()),
    "an overlap": chunk(offsets=[1, 0]),
    "a part outside": chunk(number=-1, offsets=[5, 4]),
    "a negative offset": chunk(offsets=[-1, 0]),
    "an offset of another dimension": chunk(offsets=[0]),
    "offsets that are no numbers": chunk(offsets=[0.0, False]),
    "offsets that are a text": chunk(offsets="00"),
    "an empty part": chunk(lengths=[0, 5]),
    "a shape beyond all memory": tensor(shape=[1 << 61, 1 << 61], chunks=[]),
    "a shape that wraps around": tensor(shape=[1 << 32, 1 << 32]),
    "a shape of very many dimensions": tensor(shape=[1] * 10_000),
    "a shape of huge numbers": tensor(shape=[10**400, 5]),
    "a shape that is another": tensor(shape=[5, 6]),
    "a dtype that is not known": tensor(dtype="PY"),
    "a dtype that is no text": tensor(dtype=["F32"]),
    "another dtype as large": tensor(dtype="I32"),
    "a bomb": manifest(bomb),
    "a newer version": manifest(lambda content: content.update(version=2)),
    "a version that is a text": manifest(lambda content: content.update(version="1")),
    "another format": manifest(lambda content: content.update(format="fabric-file")),
    "no files": manifest(drop("files")),
    "files in a list": manifest(lambda content: content.update(files=[])),
    "no values": manifest(drop("files", VALUES)),
    "no tensors": manifest(lambda content: content.update(tensors={})),
    "a tensor too few": manifest(drop("tensors", "model.first")),
    "a size that is negative": manifest(lambda content: content["files"][SHARDS[0]].update(size=-1)),
    "a checksum that is a text": chunk(crc32="0"),
    "a manifest that is a list": lambda folder: (folder / "fabric.json").write_text("[]"),
    "a manifest that is deep": lambda folder: (folder / "fabric.json").write_bytes(DEEP),
    "a manifest with a huge number": lambda folder: (folder / "fabric.json").write_text(
        '{"version":' + "9" * 9999 + "}"
    ),
    "a manifest that is no text": lambda folder: (folder / "fabric.json").write_bytes(b"\xff\xfe{}"),
    "a manifest without its checksum": lambda folder: (folder / "fabric.json").write_text(
        (folder / "fabric.json").read_text().replace('"checksum":', '"other":')
    ),
    "a manifest that is gone": lambda folder: (folder / "fabric.json").unlink(),
    "an index of PyTorch": lambda folder: (folder / "fabric.json").rename(folder / ".metadata"),
    "a huge header": huge_header,
    "a header that is deep": header(lambda entries, tensors: DEEP),
    "a header that is no object": header(lambda entries, tensors: b"[1]"),
    "a header without offsets": header(lambda entries, tensors: first(entries).pop("data_offsets") and None),
    "a header with another shape": header(lambda entries, tensors: first(entries).update(shape=[5, 3])),
    "a header with overlaps": header(lambda entries, tensors: first(entries).update(data_offsets=[0, 60])),
    "a header beyond the file": header(
        lambda entries, tensors: first(entries).update(data_offsets=[1 << 40, (1 << 40) + 60])
    ),
    "a header with a bomb": header(lambda entries, tensors: first(entries).update(shape=[1 << 40, 1 << 40])),
    "shards that are swapped": swapped,
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.timeout(60)
def test_a_hostile_folder_is_refused_and_nothing_is_executed_or_read_outside(
    folder: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    HOSTILE[what](folder)
    with pytest.raises(
        UnsafeCheckpointError if what == "a pickle for values" else CheckpointError
    ) as refused:
        read(folder)
    assert str(folder) in str(refused.value)
    assert not Path("executed").exists()


def test_the_messages_name_the_file_and_the_tensor(folder: Path) -> None:
    data = bytearray((folder / SHARDS[1]).read_bytes())
    data[-1] ^= 1
    (folder / SHARDS[1]).write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"checksum of '(.*)\[.*\]' in 'shard-000001.safetensors', which is part of"
    ):
        read(folder)
    (folder / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=r"shard-000001.safetensors' is missing"):
        read(folder)
    os.rename(folder / "fabric.json", folder / ".metadata")
    with pytest.raises(CheckpointError, match=r"torch\.distributed\.checkpoint alone.*dcp_to_torch_save"):
        read(folder)


# -- folders that are damaged by chance --------------------------------------------------------------------------------


def damage(folder: Path, draw: random.Random) -> str:
    """Do one thing to a folder that a disk or a person might do."""
    path = draw.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    kind = draw.choice(("flip", "cut", "delete", "longer", "zeros", "other", "edit", "swap"))
    if kind == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    elif kind == "longer":
        data += draw.randbytes(draw.randint(1, 100))
    elif kind == "zeros":
        begin = draw.randrange(len(data))
        data[begin : begin + 512] = bytes(len(data[begin : begin + 512]))
    elif kind == "other":
        other = bytearray(draw.choice(sorted(folder.iterdir())).read_bytes())
        data = other
    elif kind == "edit":
        path = folder / "fabric.json"
        data = bytearray(path.read_bytes())
        places = [place for place, byte in enumerate(data) if chr(byte).isdigit()]
        data[draw.choice(places)] = ord(draw.choice("0123456789"))
    elif kind == "swap":
        other_path = draw.choice(sorted(folder.iterdir()))
        data = bytearray(other_path.read_bytes())
        other_path.write_bytes(path.read_bytes())
    path.unlink() if kind == "delete" else path.write_bytes(data)
    return f"{kind} {path.name}"


@pytest.mark.timeout(110)
def test_a_damaged_folder_gives_an_error_or_what_was_saved(original: Path, tmp_path: Path) -> None:
    expected, refused, folder = state(), 0, tmp_path / "folder"
    for seed in range(400):
        shutil.copytree(original, folder)
        what = damage(folder, random.Random(seed))
        try:
            found = read(folder)
        except CheckpointError:
            refused += 1
        else:
            assert same(found, expected), (seed, what)
        shutil.rmtree(folder)
    assert refused > 300


def test_what_was_loaded_does_not_depend_on_its_folder_any_more(folder: Path) -> None:
    """The shards are mapped while they are read; who uses them after they were cut short is killed by SIGBUS."""
    found = read(folder)
    for path in folder.iterdir():
        os.truncate(path, 0)
    assert same(found, state())
