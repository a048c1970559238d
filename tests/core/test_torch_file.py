"""The checkpoint as one file: what is written survives anything, and what is read executes nothing."""

from __future__ import annotations

import argparse
import datetime
import decimal
import errno
import os
import pathlib
import pickle
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
import types
import uuid
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fabric_core import CheckpointError, UnsafeCheckpointError
from fabric_core.beside import ABANDONED, temporary_for
from fabric_core.parts.torch_file import TorchFile

FILE = TorchFile()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.ckpt"


def state(value: float = 1.0, size: int = 1000) -> dict[str, Any]:
    return {"weight": torch.full((size,), value), "step": 3, "inner": {"names": ["a", "b"]}}


# -- there and back -----------------------------------------------------------------------------------------------


def test_plain_pytorch_reads_the_file_and_we_read_plain_pytorchs(path: Path) -> None:
    FILE.save(path, state())
    assert torch.equal(torch.load(path, weights_only=True)["weight"], state()["weight"])
    torch.save(state(2.0), path)
    assert torch.equal(FILE.load(path)["weight"], state(2.0)["weight"])
    torch.save(state(3.0), path, _use_new_zipfile_serialization=False)
    assert torch.equal(FILE.load(path)["weight"], state(3.0)["weight"])


def test_a_file_that_was_written_without_checksums_is_read(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert FILE.load(path)["step"] == 3


METADATA: list[Any] = [
    Path("a/b"),
    pathlib.PurePosixPath("a"),
    pathlib.PureWindowsPath("a"),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    datetime.date(2026, 1, 2),
    datetime.time(1, 2),
    datetime.timedelta(days=1, microseconds=2),
    argparse.Namespace(lr=0.1, path=Path("a")),
    types.SimpleNamespace(lr=0.1),
    decimal.Decimal("0.1"),
    uuid.UUID(int=7),
    frozenset({1, 2}),
    range(2, 9, 3),
    np.float64(0.1),
    np.float32(0.5),
    np.float16(0.5),
    np.int64(-7),
    np.uint8(255),
    np.bool_(True),
    np.complex64(1j),
    np.str_("text"),
]


@pytest.mark.parametrize("value", METADATA, ids=lambda value: f"{type(value).__name__}")
def test_what_people_put_beside_their_weights_comes_back_by_default(path: Path, value: Any) -> None:
    FILE.save(path, {"value": value, "list": [value, value]})
    loaded = FILE.load(path)
    assert loaded == {"value": value, "list": [value, value]}
    assert type(loaded["value"]) is type(value)


@pytest.mark.parametrize(
    ("old", "new"),
    [("numpy._core.multiarray\nscalar", "numpy.core.multiarray\nscalar"), ("pathlib\n", "pathlib._local\n")],
    ids=["an older NumPy", "a newer Python"],
)
def test_files_of_other_versions_of_python_and_numpy_are_read(path: Path, old: str, new: str) -> None:
    value = Path("a") if old.startswith("pathlib") else np.float64(0.5)
    pickled = pickle.dumps({"value": value}, protocol=2)
    assert old.encode() in pickled
    write_raw(path, pickled.replace(old.encode(), new.encode()))
    assert FILE.load(path) == {"value": value}


def test_what_the_user_has_allowed_stays_allowed(path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.add_safe_globals([argparse.Namespace, Allowed, (Path, "pathlib.Path")])
        FILE.save(path, {"mine": Allowed(3), "namespace": argparse.Namespace(a=1)})
        assert FILE.load(path)["mine"].value == 3
        left = torch.serialization.get_safe_globals()
        assert {argparse.Namespace, Allowed, (Path, "pathlib.Path")} <= set(left)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_loading_allows_nothing_for_good(path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    FILE.save(path, {"path": Path("a")})
    FILE.load(path)
    with pytest.raises(CheckpointError):
        FILE.load(path.with_name("none"))
    assert set(torch.serialization.get_safe_globals()) == before


def test_threads_do_not_take_each_others_allowances_away(path: Path) -> None:
    def work(number: int) -> None:
        own = path.with_name(f"{number}.ckpt")
        for _ in range(20):
            FILE.save(own, {"path": Path("a")})  # warns, and so fails, if it were not to be read again
            assert FILE.load(own) == {"path": Path("a")}

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(max_workers=4) as threads:
            list(threads.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)


class Allowed:
    def __init__(self, value: int) -> None:
        self.value = value


def test_what_will_not_be_read_by_default_is_warned_about_when_it_is_written(path: Path) -> None:
    with pytest.warns(UserWarning, match=r"x\.ckpt' holds more.*Allowed.*weights_only=False"):
        FILE.save(path, {"mine": Allowed(3), "model": nn.Linear(1, 1)})
    with pytest.raises(UnsafeCheckpointError, match=r"Allowed.*weights_only=False.*add_safe_globals"):
        FILE.load(path)
    assert FILE.load(path, weights_only=False)["mine"].value == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FILE.save(path, state())


# -- damage -------------------------------------------------------------------------------------------------------


def test_a_file_that_was_cut_short_anywhere_is_named_as_damaged(path: Path) -> None:
    FILE.save(path, state())
    whole = path.read_bytes()
    lengths = {0, 1, 2, 4, 30, len(whole) - 1, len(whole) - 22, *range(0, len(whole), 97)}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.ckpt' cannot be read"):
            FILE.load(path)


def test_a_flipped_bit_is_either_harmless_or_an_error_and_never_another_weight(path: Path) -> None:
    FILE.save(path, state())
    whole = path.read_bytes()
    chance = random.Random(0)
    errors = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch wonders at versions that are none
        for _ in range(400):
            damaged = bytearray(whole)
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            loaded = loaded_or_none(path)
            if loaded is None:
                errors += 1
                continue
            assert torch.equal(loaded["weight"], state()["weight"])
            assert (loaded["step"], loaded["inner"]) == (3, {"names": ["a", "b"]})
    assert errors > 200


def loaded_or_none(path: Path) -> dict[str, Any] | None:
    """What is in a file; ``None`` when it is refused with an error of ours."""
    try:
        return FILE.load(path)
    except CheckpointError:
        return None


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"hello, this is a text\n" * 99, b"\x80\x02", b"PK\x03\x04" + b"\0" * 99, b"\x7fELF", b"{}"],
    ids=["empty", "line", "text", "pickle head", "zip head", "program", "json"],
)
def test_a_file_that_is_no_checkpoint_is_named_so(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        FILE.load(path)
    assert not isinstance(caught.value, UnsafeCheckpointError)
    assert caught.value.__cause__ is not None


def test_a_zip_of_something_else_is_named_as_no_checkpoint(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="cannot be read"):
        FILE.load(path)


def test_what_is_not_there_is_answered_with_what_is(tmp_path: Path) -> None:
    for name in ("epoch1.ckpt", "epoch2.ckpt", "notes.txt"):
        FILE.save(tmp_path / name, {"a": 1})
    with pytest.raises(
        CheckpointError, match=r"no checkpoint at .*the folder has epoch1\.ckpt, epoch2\.ckpt\.$"
    ):
        FILE.load(tmp_path / "epoch3.ckpt")
    with pytest.raises(CheckpointError, match="that is a directory"):
        FILE.load(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        FILE.load(tmp_path / "nowhere" / "x.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        FILE.load(tmp_path / "notes.txt" / "x.ckpt")
    with pytest.raises(CheckpointError):
        FILE.load(Path("/dev/null"))


# -- malice -------------------------------------------------------------------------------------------------------


def write_raw(path: Path, pickled: bytes, **records: bytes) -> None:
    """A file as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)


class Evil:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


class EvilState:
    def __init__(self, evil: Evil) -> None:
        self.evil = evil

    def __reduce__(self) -> Any:
        return torch.Tensor, (), {"evil": self.evil}


def where(evil: Evil) -> dict[str, Any]:
    """The positions in which the call may hide."""
    return {
        "as the whole": evil,
        "as a value": {"a": evil},
        "as a key": {evil: 1},
        "deep inside": {"a": [{"b": (1, [evil])}]},
        "in an ordered dictionary": OrderedDict(a=evil),
        "behind weights": {"weight": torch.ones(1), "z": evil},
        "in the state of a tensor": {"a": EvilState(evil)},
        "in a set": {"a": {evil}},
        "in metadata": {"a": argparse.Namespace(x=evil)},
        "in the arguments of a path": {"a": Evil(Path, evil)},
    }


@pytest.mark.parametrize("position", where(Evil(print)))
@pytest.mark.parametrize("form", ["zip", "old", "bare pickle", "newer bare pickle", "text pickle"])
def test_a_malicious_file_is_refused_and_nothing_is_executed(
    path: Path, tmp_path: Path, position: str, form: str
) -> None:
    marker = tmp_path / "executed"
    calls = [
        Evil(os.system, f"touch {marker}"),
        Evil(subprocess.check_call, ["touch", str(marker)]),
        Evil(exec, f"open({str(marker)!r}, 'w')"),
        Evil(eval, f"open({str(marker)!r}, 'w')"),
        Evil(open, str(marker), "w"),
        Evil(__import__, "antigravity"),
        Evil(getattr, Evil(__import__, "os"), "system"),
    ]
    for call in calls:
        content = where(call)[position]
        if form == "zip":
            torch.save(content, path)
        elif form == "old":
            torch.save(content, path, _use_new_zipfile_serialization=False)
        else:
            protocols = {"bare pickle": 2, "newer bare pickle": None, "text pickle": 0}
            path.write_bytes(pickle.dumps(content, protocol=protocols[form]))
        with pytest.raises(UnsafeCheckpointError, match=r"can execute code.*weights_only=False") as caught:
            FILE.load(path)
        assert "file an issue" not in str(caught.value)
        assert not marker.exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_plain_pickle_is_refused_by_the_names_that_it_asks_for(path: Path, protocol: int) -> None:
    path.write_bytes(pickle.dumps([Evil(os.system, "true"), Evil(os.system, "true")], protocol=protocol))
    with pytest.raises(UnsafeCheckpointError, match=r"plain pickle.* asks for posix\.system\. "):
        FILE.load(path)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
    with pytest.raises(CheckpointError, match="Unsupported operand") as caught:
        FILE.load(path)
    assert "file an issue" not in str(caught.value)


ARRAYS = [
    np.ones(2),
    np.arange(6).reshape(2, 3).T,
    np.array(["a", "bc"]),
    np.array(True),
    np.zeros((0, 3), dtype="complex64"),
    np.asfortranarray(np.eye(2, dtype="f4")),
    np.array(["2026-01-02"], dtype="M8[ns]"),
    np.arange(3, dtype=">i4"),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}")
def test_arrays_of_numbers_and_texts_come_back_by_default(path: Path, array: Any) -> None:
    FILE.save(path, {"a": array, "b": np.float64(3)})
    loaded = FILE.load(path)
    assert np.array_equal(loaded["a"], array)
    assert (loaded["a"].dtype, loaded["a"].shape, loaded["b"]) == (array.dtype, array.shape, 3.0)


def test_arrays_come_back_wherever_they_are(path: Path) -> None:
    ones = np.ones(2)
    FILE.save(path, {"a": [{"b": (1, ones)}], "c": argparse.Namespace(d=ones), "e": OrderedDict(f=ones)})
    loaded = FILE.load(path)
    for found in (loaded["a"][0]["b"][1], loaded["c"].d, loaded["e"]["f"]):
        assert type(found) is np.ndarray
        assert found.tolist() == [1.0, 1.0]


class FlaggedDtype:
    """Pickles as a float64 that claims to hold references to objects."""

    def __reduce__(self) -> Any:
        return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63)


class FlaggedArray:
    def __reduce__(self) -> Any:
        state = (1, (1,), FlaggedDtype(), False, b"A" * 8)
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state


def test_the_flags_that_a_file_gives_a_dtype_are_not_believed(path: Path) -> None:
    torch.save({"a": FlaggedArray()}, path)
    assert FILE.load(path)["a"].dtype.flags == np.dtype("f8").flags


def test_a_user_who_allows_arrays_as_a_whole_reads_them_too(path: Path) -> None:
    FILE.save(path, {"a": np.ones(2), "b": np.float64(3)})
    with torch.serialization.safe_globals([np.ndarray, np._core.multiarray._reconstruct]):
        loaded = FILE.load(path)
    assert (loaded["a"].tolist(), loaded["b"]) == ([1.0, 1.0], 3.0)


class Pointers:
    """An array of objects that was given bytes in their place, behind a dtype that is told to take them."""

    def __init__(self, *dtype: Any) -> None:
        self.dtype = dtype

    def __reduce__(self) -> Any:
        state = (1, (1,), Evil(np.dtype, *self.dtype), False, b"A" * 8)
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state


def test_arrays_of_objects_are_refused_and_nothing_is_executed(path: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    evil = Evil(os.system, f"touch {marker}")
    contents: list[Any] = [
        np.array([evil, 1], dtype=object),
        np.array([(evil, 1)], dtype=[("a", object), ("b", int)]),
        Evil(np.dtype, [("a", evil)]),
        Pointers("O"),
        Pointers([("a", "O")]),
        Evil(np.ndarray, (1,), "O", b"A" * 8),
        Evil(np.ndarray, (1,), [("a", "O")], b"A" * 8),
        Evil(np._core.multiarray._reconstruct, np.dtype, (1,), b"O"),
    ]
    for content in contents:
        torch.save({"a": content}, path)
        with pytest.raises(CheckpointError):
            FILE.load(path)
        assert not marker.exists()


@pytest.mark.parametrize("dtype", ["O", [("a", "i8")]], ids=["objects", "records"])
def test_arrays_that_will_not_be_read_are_warned_about_when_they_are_written(path: Path, dtype: Any) -> None:
    content = {"weights": torch.ones(2), "numbers": np.ones(2), "a": np.zeros(2, dtype=dtype)}
    with pytest.warns(UserWarning, match="NumPy arrays of objects or records"):
        FILE.save(path, content)
    with pytest.raises(UnsafeCheckpointError, match="NumPy arrays of objects or records"):
        FILE.load(path)
    assert len(FILE.load(path, weights_only=False)["a"]) == 2


def test_the_refusal_says_which_types_are_not_allowed(path: Path) -> None:
    torch.save({"a": Evil(os.system, "true"), "b": Allowed(1)}, path)
    with pytest.raises(UnsafeCheckpointError, match=r"plain values: .*posix\.system"):
        FILE.load(path)
    assert FILE.load(path, weights_only=False)["a"] == 0


# -- writing ------------------------------------------------------------------------------------------------------


def test_it_is_written_flushed_renamed_and_flushed_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_fsync, real_replace, real_save = os.fsync, os.replace, torch.save

    def fsync(descriptor: int) -> None:
        order.append(f"flush {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        assert zipfile.is_zipfile(source)
        assert Path(source).parent == Path(target).parent  # between file systems a rename would be a copy
        order.append(f"rename to {Path(target).name}")
        real_replace(source, target)

    def save(content: Any, target: Any) -> None:
        order.append("write")
        real_save(content, target)

    FILE.save(path, state(1.0))
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(torch, "save", save)
    FILE.save(path, state(2.0))
    temporary = order[1].removeprefix("flush ")
    assert temporary.startswith(".x.ckpt.")
    assert order == ["write", f"flush {temporary}", "rename to x.ckpt", f"flush {path.parent.name}"]
    order.clear()
    FILE.save(path.parent / "new" / "newer" / "x.ckpt", state())
    assert order[:2] == ["flush new", f"flush {path.parent.name}"]
    assert order[-1] == "flush newer"


@pytest.mark.parametrize("step", ["torch.save", "os.fsync", "os.replace"])
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    FILE.save(path, state(1.0))
    module, name = step.split(".")
    monkeypatch.setattr({"torch": torch, "os": os}[module], name, fail)
    with pytest.raises(CheckpointError, match=r"x\.ckpt'.*No space left.*untouched") as caught:
        FILE.save(path, state(2.0))
    monkeypatch.undo()
    assert isinstance(caught.value.__cause__, OSError)
    assert [file.name for file in path.parent.iterdir()] == ["x.ckpt"]
    assert torch.equal(FILE.load(path)["weight"], state(1.0)["weight"])


def test_ctrl_c_in_the_middle_leaves_the_old_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    FILE.save(path, state(1.0))
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FILE.save(path, state(2.0))
    assert [file.name for file in path.parent.iterdir()] == ["x.ckpt"]


def test_what_cannot_be_pickled_is_an_error_of_ours(path: Path) -> None:
    FILE.save(path, state(1.0))
    for value in (lambda: 1, (x for x in ()), open(os.devnull)):  # noqa: SIM115
        with pytest.raises(CheckpointError, match="Cannot write.*untouched"):
            FILE.save(path, {"value": value})
        getattr(value, "close", lambda: None)()
    assert FILE.load(path)["step"] == 3
    assert len(list(path.parent.iterdir())) == 1


def test_a_place_that_cannot_be_written_to_is_an_error_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (file / "x.ckpt", "file"),  # below a file, where not even root can write
        (file / "deeper" / "x.ckpt", "file"),
        (Path("/proc/none/x.ckpt"), "proc"),
        (Path("/sys/x.ckpt"), "sys"),
        (tmp_path / "folder", "that is a directory. Name a file"),
        (tmp_path / ("x" * 300), "too long"),
        (tmp_path / "pipe", "no regular file"),
    ):
        with pytest.raises(CheckpointError, match=rf"(?s)Cannot write a checkpoint to .*{words}"):
            FILE.save(path, state())
    assert file.read_text() == "text"
    assert not (tmp_path / "pipe").is_file()


@pytest.fixture
def _small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("_small_files")
def test_a_file_that_grows_too_large_leaves_the_old_one(path: Path) -> None:
    FILE.save(path, state(1.0, size=1000))
    with pytest.raises(CheckpointError, match="Cannot write"):
        FILE.save(path, state(2.0, size=100_000))
    assert torch.equal(FILE.load(path)["weight"], state(1.0)["weight"])
    assert [file.name for file in path.parent.iterdir()] == ["x.ckpt"]
    FILE.save(path, state(3.0, size=1000))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_leaves_the_old_file(full_disk: Path) -> None:
    path = full_disk / "x.ckpt"
    FILE.save(path, state(1.0))
    with pytest.raises(CheckpointError, match="Cannot write"):
        FILE.save(path, state(2.0, size=1_000_000))
    assert torch.equal(FILE.load(path)["weight"], state(1.0)["weight"])
    assert [file.name for file in full_disk.iterdir()] == ["x.ckpt"]
    FILE.save(path, state(3.0))


def test_what_a_crash_has_left_is_swept_away_after_a_while(path: Path) -> None:
    left = [path.with_name(f".{path.name}.{n:08x}.tmp") for n in range(3)]
    others = [
        path.with_name(".y.ckpt.00000000.tmp"),
        path.with_name("x.ckpt.tmp"),
        path.with_name(".x.ckpt.bak"),
    ]
    long_ago = time.time() - ABANDONED - 60
    for file in (*left, *others):
        file.write_text("half")
        os.utime(file, (long_ago, long_ago))
    left[0].write_text("somebody is writing this now")
    FILE.save(path, state())
    assert {file.name for file in path.parent.iterdir()} == {f.name for f in (path, left[0], *others)}


def test_names_with_the_signs_of_patterns_are_taken_literally(tmp_path: Path) -> None:
    path, other = tmp_path / "[ab]*.ckpt", tmp_path / ".a.ckpt.00000000.tmp"
    other.write_text("not ours")
    os.utime(other, (0, 0))
    FILE.save(path, state())
    assert FILE.load(path)["step"] == 3
    assert other.exists()


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "x" * 250 + ".ckpt"], ids=["long", "wide", "suffix"])
def test_every_name_that_the_system_takes_is_one_and_what_a_crash_has_left_of_it_is_known(
    tmp_path: Path, name: str
) -> None:
    path, other = tmp_path / name, tmp_path / f"{name[:-1]}y"
    left = [temporary_for(each, "0abc") for each in (path, other)]
    for each in left:
        each.write_text("half")
        os.utime(each, (0, 0))
    FILE.save(path, state())
    FILE.save(path, state(2.0))
    assert torch.equal(FILE.load(path)["weight"], state(2.0)["weight"])
    assert {entry.name for entry in tmp_path.iterdir()} == {name, left[1].name}


def test_removing_what_is_gone_is_no_error(path: Path) -> None:
    FILE.save(path, state())
    FILE.remove(path)
    FILE.remove(path)
    assert not path.exists()


def test_a_link_is_replaced_by_the_file(path: Path) -> None:
    target = path.with_name("target.ckpt")
    FILE.save(target, state(1.0))
    path.symlink_to(target)
    FILE.save(path, state(2.0))
    assert torch.equal(FILE.load(target)["weight"], state(1.0)["weight"])
    assert torch.equal(FILE.load(path)["weight"], state(2.0)["weight"])


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_file_or_the_new_one(path: Path) -> None:
    """One process saves over and over; it is forked and killed 40 times, at random moments."""
    script = """
        import os, random, signal, sys, time
        from pathlib import Path
        import torch
        from fabric_core.parts.torch_file import TorchFile
        path, size, kills = Path(sys.argv[1]), 500_000, 40
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        TorchFile().save(path, {"weight": torch.full((size,), 0.0)})
        chance, seen, started = random.Random(0), set(), time.monotonic()
        TorchFile().save(path, {"weight": torch.full((size,), 0.0)})
        duration = time.monotonic() - started
        for kill in range(kills):
            child = os.fork()
            if child == 0:
                value = 0.0
                while True:
                    value += 1.0
                    TorchFile().save(path, {"weight": torch.full((size,), value)})
            time.sleep(chance.random() * 8 * duration)  # a child is slower, above all at first
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            weight = TorchFile().load(path)["weight"]
            assert weight.shape == (size,) and bool((weight == weight[0]).all()), kill
            seen.add(float(weight[0]))
        TorchFile().save(path, {"weight": torch.ones(1)})
        print(len(list(path.parent.glob(".*.tmp"))), len(seen))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    half, seen = map(int, result.stdout.split())
    assert half > 5  # that many kills hit the middle of a save
    assert seen > 1
    for left in path.parent.glob(".*.tmp"):
        os.utime(left, (0, 0))
    FILE.save(path, state())
    assert [file.name for file in path.parent.iterdir()] == ["x.ckpt"]


def test_loading_does_not_hold_the_file(path: Path) -> None:
    FILE.save(path, state(1.0))
    loaded = FILE.load(path)
    FILE.save(path, state(2.0))
    assert torch.equal(loaded["weight"], state(1.0)["weight"])
    assert not any(str(path) in os.readlink(f"/proc/self/fd/{fd}") for fd in _open_files())


def _open_files() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def test_signals_are_left_alone(path: Path) -> None:
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    FILE.save(path, state())
    assert [signal.getsignal(number) for number in signal.valid_signals()] == before
