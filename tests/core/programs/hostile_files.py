"""Files that mean harm, each by name (`FILES`)."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fabric_core.parts.torch_file import TorchFile

GIB = 1 << 30
Files = dict[str, Callable[[Path], None]]
FILES: Files = {}


def hostile(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """Take a file into the corpus, under the name of the function that writes it."""
    FILES[write.__name__.strip("_")] = write
    return write


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def evil(path: Path) -> Call:
    """What would leave a mark when it is executed."""
    return Call(os.system, f"touch {path.parent / 'executed'}")


def archive(path: Path, pickled: bytes, extra: dict[str, bytes] | None = None, **options: Any) -> None:
    """A file as ``torch.save`` writes it, around any pickle and with any records."""
    records = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **(extra or {})}
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in records.items():
            file.writestr(f"archive/{name}", content)


def names(*globals_: str) -> bytes:
    """Operations that push functions or classes by name."""
    pairs = (name.rpartition(".") for name in globals_)
    return b"".join(f"c{module}\n{name}\n".encode() for module, _, name in pairs)


def number(value: int) -> bytes:
    """The operation that pushes a number."""
    content = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + content


def text(value: str) -> bytes:
    """The operation that pushes a text."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(kind: str, key: bytes, elements: int) -> bytes:
    """The operations that push a storage."""
    return b"(" + text("storage") + names(f"torch.{kind}") + key + text("cpu") + number(elements) + b"tQ"


def tensor(stored: bytes, offset: int, shape: list[int], stride: list[int]) -> bytes:
    """The operations that push a tensor."""
    sizes = b"(" + b"".join(map(number, shape)) + b"t"
    strides = b"(" + b"".join(map(number, stride)) + b"t"
    hooks = names("collections.OrderedDict") + b")R"
    arguments = stored + number(offset) + sizes + strides + b"\x89" + hooks
    return names("torch._utils._rebuild_tensor_v2") + b"(" + arguments + b"tR"


def in_dictionary(value: bytes) -> bytes:
    """A whole pickle: a dictionary with one entry."""
    return b"\x80\x02}" + text("w") + value + b"s."


def one_tensor(path: Path, stored: bytes, offset: int, shape: list[int], stride: list[int]) -> None:
    """A file with one tensor over 16 bytes."""
    archive(path, in_dictionary(tensor(stored, offset, shape, stride)), {"data/0": b"\0" * 16})


def saved(path: Path) -> bytearray:
    """The bytes of an honest file."""
    TorchFile().save(path, {"w": torch.arange(64.0), "step": 3})
    return bytearray(path.read_bytes())


# -- a pickle in every position -----------------------------------------------------------------------------------


@hostile
def a_call_in_a_value(path: Path) -> None:
    archive(path, pickle.dumps({"w": evil(path)}, protocol=2))


@hostile
def a_call_in_the_manifest(path: Path) -> None:
    archive(path, in_dictionary(b"K\x01"), {"fabric.json": pickle.dumps(evil(path))})


@hostile
def a_call_behind_the_end_of_the_pickle(path: Path) -> None:
    archive(path, pickle.dumps({"w": 1}, protocol=2)[:-1] + pickle.dumps(evil(path), protocol=2)[2:])


@hostile
def a_call_in_the_id_of_a_storage(path: Path) -> None:
    archive(path, in_dictionary(b"(" + text("storage") + pickle.dumps(evil(path), protocol=2)[2:-1] + b"tQ"))


@hostile
def an_id_that_is_no_storage(path: Path) -> None:
    archive(path, in_dictionary(b"(" + text("module") + names("os.system") + text("true") + b"tQ"))


@hostile
def a_call_in_the_hooks_of_a_tensor(path: Path) -> None:
    hooks = pickle.dumps(evil(path), protocol=2)[2:-1]
    sized = number(0) + b"K\x04\x85K\x01\x85\x89"
    stored = storage("FloatStorage", text("0"), 4)
    rebuilt = names("torch._utils._rebuild_tensor_v2") + b"(" + stored + sized + hooks + b"tR"
    archive(path, in_dictionary(rebuilt), {"data/0": b"\0" * 16})


@hostile
def a_call_in_a_rebuilding_function(path: Path) -> None:
    function = names("torch._tensor._rebuild_from_type_v2")
    call = (
        b"("
        + names("builtins.eval", "torch.Tensor")
        + b"("
        + text(f"open({str(path.parent / 'executed')!r}, 'w')")
    )
    archive(path, in_dictionary(function + call + b"t}tR"))


@hostile
def a_name_with_dots(path: Path) -> None:
    archive(path, in_dictionary(names("torch.os.system") + b"(" + text("true") + b"tR"))


@hostile
def a_method_of_an_allowed_class(path: Path) -> None:
    archive(
        path,
        in_dictionary(b"cpathlib\nPath.touch\n(" + names("pathlib.Path") + text("executed") + b"\x85RtR"),
    )


@hostile
def a_file_opened_through_a_path(path: Path) -> None:
    archive(path, pickle.dumps({"w": Call(open, "/etc/hostname")}, protocol=2))


@hostile
def a_module_imported_by_name(path: Path) -> None:
    archive(path, in_dictionary(names("antigravity.fly")))


@hostile
def a_codec_imported_by_name(path: Path) -> None:
    archive(path, in_dictionary(names("_codecs.encode") + text("a") + text("antigravity") + b"\x86R"))


@hostile
def a_mesh_of_processes(path: Path) -> None:
    mesh = names("torch.distributed.device_mesh.DeviceMesh") + text("cpu") + b"](K\x00K\x01e\x86R"
    archive(path, in_dictionary(mesh))


@hostile
def torchscript_code(path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    torch.jit.save(torch.jit.script(Module()), str(path))


@hostile
def constants_beside_the_data(path: Path) -> None:
    archive(
        path, in_dictionary(b"K\x01"), {"constants.pkl": pickle.dumps(evil(path)), "code/a.py": b"import os"}
    )


@hostile
def an_old_file_with_a_call(path: Path) -> None:
    torch.save({"w": evil(path)}, path, _use_new_zipfile_serialization=False)


@hostile
def a_call_in_the_head_of_an_old_file(path: Path) -> None:
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in (evil(path), 1001, {}, {}, [])))


@hostile
def a_call_in_the_list_of_storages_of_an_old_file(path: Path) -> None:
    magic = torch.serialization.MAGIC_NUMBER
    parts = (magic, 1001, {"little_endian": True}, {"w": 1}, evil(path))
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))


@hostile
def a_tar_of_pickles(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            content = pickle.dumps(evil(path), protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


@hostile
def a_tar_that_leads_outside(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
            file.addfile(entry)
        file.addfile(tarfile.TarInfo("../escaped"), io.BytesIO(b""))


@hostile
def a_bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(evil(path)))


@hostile
def a_bare_pickle_before_an_archive(path: Path) -> None:
    archive(path, in_dictionary(b"K\x01"))
    path.write_bytes(pickle.dumps(evil(path), protocol=2) + path.read_bytes())


# -- the archive --------------------------------------------------------------------------------------------------


@hostile
def names_that_lead_outside(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in ("../escaped", "/tmp/escaped", "..\\escaped", "archive/../../escaped"):
            file.writestr(name, b"x")


@hostile
def a_storage_whose_name_leads_outside(path: Path) -> None:
    one_tensor(path, storage("FloatStorage", text("../../../../etc/hostname"), 1), 0, [1], [1])


@hostile
def a_record_that_is_a_link(path: Path) -> None:
    archive(path, in_dictionary(tensor(storage("ByteStorage", text("0"), 13), 0, [13], [1])))
    link = zipfile.ZipInfo("archive/data/0")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(link, "/etc/hostname")


@hostile
def two_records_of_one_name(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in (in_dictionary(b"K\x01"), pickle.dumps(evil(path), protocol=2)):
            file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", b"3\n")


@hostile
def a_bomb(path: Path) -> None:
    pickled = in_dictionary(tensor(storage("ByteStorage", text("0"), GIB // 4), 0, [4], [1]))
    archive(path, pickled, {"data/0": bytes(GIB // 4)}, compression=zipfile.ZIP_DEFLATED, compresslevel=1)


@hostile
def a_bomb_for_a_pickle(path: Path) -> None:
    archive(path, b"\x80\x02]" + b"]a" * (50 << 20) + b".", compression=zipfile.ZIP_DEFLATED, compresslevel=1)


@hostile
def records_that_overlap(path: Path) -> None:
    """A thousand records that are all the same million bytes."""
    size, count = 1 << 20, 1000
    stored = b"".join(
        tensor(storage("ByteStorage", text(str(n)), size), 0, [size], [1]) + b"a" for n in range(count)
    )
    archive(path, in_dictionary(b"]" + stored), {"data/0": bytes(size)})
    with zipfile.ZipFile(path, "a") as file:
        first = file.getinfo("archive/data/0")
        for index in range(1, count):
            other = zipfile.ZipInfo(f"archive/data/{index}")
            for name in ("header_offset", "CRC", "compress_size", "file_size", "external_attr"):
                setattr(other, name, getattr(first, name))
            file.filelist.append(other)
        file._didModify = True  # type: ignore[attr-defined]


def with_directory(path: Path, position: int, value: bytes) -> None:
    """An honest file, with another value in the directory's entry of its first record."""
    content = saved(path)
    start = content.index(b"PK\x01\x02")
    content[start + position : start + position + len(value)] = value
    path.write_bytes(content)


IN_THE_DIRECTORY = {
    "a_record_that_is_encrypted": (8, struct.pack("<H", 1)),
    "a_record_of_an_absurd_size": (20, struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)),
    "a_record_that_unpacks_to_an_absurd_size": (24, struct.pack("<I", 0xFFFFFFF0)),
    "a_record_that_claims_to_be_a_folder": (38, struct.pack("<I", 0x10)),
    "a_record_behind_the_end": (42, struct.pack("<I", 0x7FFFFFFF)),
}
"""Where in the entry of a record, and what is written there: each another field."""

for name, (position, value) in IN_THE_DIRECTORY.items():
    FILES[name] = partial(with_directory, position=position, value=value)


@hostile
def a_directory_of_an_absurd_size(path: Path) -> None:
    content = saved(path)
    end = content.rindex(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(content)


@hostile
def a_comment_that_hides_another_archive(path: Path) -> None:
    archive(path.with_suffix(".inner"), pickle.dumps(evil(path), protocol=2))
    archive(path, in_dictionary(b"K\x01"))
    with zipfile.ZipFile(path, "a") as file:
        file.comment = path.with_suffix(".inner").read_bytes()
    path.with_suffix(".inner").unlink()


@hostile
def an_archive_within_an_archive(path: Path) -> None:
    inner = io.BytesIO()
    torch.save({"w": evil(path)}, inner)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/inner.pt", inner.getvalue())


@hostile
def a_byte_order_that_there_is_not(path: Path) -> None:
    archive(path, in_dictionary(b"K\x01"), {"byteorder": b"middle"})


@hostile
def a_version_that_there_is_not(path: Path) -> None:
    archive(path, in_dictionary(b"K\x01"), {"version": b"99999999999\n"})


@hostile
def a_manifest_without_end(path: Path) -> None:
    archive(path, in_dictionary(b"K\x01"), {"fabric.json": b"[" * 1_000_000})


# -- tensors and arrays -------------------------------------------------------------------------------------------


@hostile
def a_storage_that_claims_more_than_its_record(path: Path) -> None:
    one_tensor(path, storage("FloatStorage", text("0"), 10**6), 0, [10**6], [1])


@hostile
def a_storage_of_an_absurd_size(path: Path) -> None:
    one_tensor(path, storage("DoubleStorage", text("0"), 2**61), 0, [4], [1])


@hostile
def a_storage_of_a_negative_size(path: Path) -> None:
    one_tensor(path, storage("FloatStorage", text("0"), -4), 0, [4], [1])


@hostile
def a_storage_of_an_absurd_size_in_an_old_file(path: Path) -> None:
    stored = tensor(storage("FloatStorage", text("0"), 2**40), 0, [4], [1]).replace(b"tQ", b"NtQ", 1)
    head = (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True})
    heads = b"".join(pickle.dumps(part, protocol=2) for part in head)
    path.write_bytes(
        heads + in_dictionary(stored) + pickle.dumps(["0"], protocol=2) + struct.pack("<q", 2**40)
    )


@hostile
def a_shape_that_is_larger_than_its_storage(path: Path) -> None:
    one_tensor(path, storage("FloatStorage", text("0"), 4), 0, [10**6, 10**6], [10**6, 1])


@hostile
def a_shape_that_overflows(path: Path) -> None:
    one_tensor(path, storage("FloatStorage", text("0"), 4), 0, [2**32, 2**32], [1, 1])


@hostile
def strides_that_leave_the_storage(path: Path) -> None:
    one_tensor(path, storage("FloatStorage", text("0"), 4), 0, [2, 2], [2**40, 1])


@hostile
def negative_strides(path: Path) -> None:
    one_tensor(path, storage("FloatStorage", text("0"), 4), 3, [4], [-1])


@hostile
def an_offset_before_the_storage(path: Path) -> None:
    one_tensor(path, storage("FloatStorage", text("0"), 4), -(2**20), [4], [1])


@hostile
def sparse_indices_that_leave_the_tensor(path: Path) -> None:
    indices = torch.tensor([[10**9]])
    torch.save({"w": torch.sparse_coo_tensor(indices, torch.ones(1), (2,), check_invariants=False)}, path)


@hostile
def an_array_of_objects(path: Path) -> None:
    archive(path, pickle.dumps({"w": np.array([evil(path)], dtype=object)}, protocol=2))


def an_array(path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    """A file with an array that is given eight bytes."""
    state = (1, shape, dtype, False, b"A" * 8)
    array = Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=state)
    archive(path, pickle.dumps({"w": array}, protocol=2))


@hostile
def an_array_over_pointers(path: Path) -> None:
    an_array(path, (1,), Call(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 63)))


@hostile
def an_array_of_an_absurd_shape(path: Path) -> None:
    an_array(path, (10**9, 10**9), np.dtype("f8"))


@hostile
def an_array_that_repeats_nothing_without_end(path: Path) -> None:
    an_array(path, (10**12,), Call(np.dtype, "S0", state=(3, "|", None, None, None, 0, 1, 0)))


@hostile
def a_number_of_an_absurd_size(path: Path) -> None:
    scalar = Call(np._core.multiarray.scalar, Call(np.dtype, "S999999999999"), b"")
    archive(path, pickle.dumps({"w": scalar}, protocol=2))


# -- calls that are allowed, with arguments that are not ------------------------------------------------------------


def called(path: Path, function: str, *arguments: bytes) -> None:
    """A file in which a function is called."""
    archive(path, in_dictionary(names(function) + b"(" + b"".join(arguments) + b"tR"))


@hostile
def so_many_zeros(path: Path) -> None:
    called(path, "builtins.bytes", number(4 * GIB))


@hostile
def so_many_zeros_that_can_be_changed(path: Path) -> None:
    called(path, "builtins.bytearray", number(4 * GIB))


@hostile
def so_many_zeros_by_way_of_the_memo(path: Path) -> None:
    kept = text("y") + b"](" + number(4 * GIB) + b"q\x01e"
    archive(path, b"\x80\x02}(" + kept + text("z") + names("builtins.bytearray") + b"h\x01\x85Ru.")


@hostile
def so_much_memory_for_a_tensor(path: Path) -> None:
    called(path, "torch.Tensor", number(4 * GIB))


@hostile
def a_range_that_is_counted_out(path: Path) -> None:
    called(path, "builtins.set", names("builtins.range") + number(10**9) + b"\x85R")


@hostile
def a_range_that_is_counted_out_into_a_size(path: Path) -> None:
    called(path, "torch.Size", names("builtins.range") + number(10**9) + b"\x85R")


@hostile
def containers_that_unfold_without_end(path: Path) -> None:
    laughs: Any = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]
    archive(path, pickle.dumps({"w": laughs}, protocol=2))


@hostile
def containers_that_lie_too_deep(path: Path) -> None:
    archive(path, in_dictionary(b"]" * 100_000 + b"a" * 99_999))


@hostile
def a_container_that_holds_itself(path: Path) -> None:
    itself: list[Any] = []
    itself.append((itself,))
    archive(path, pickle.dumps({"w": itself}, protocol=2))


@hostile
def a_text_that_claims_to_be_longer(path: Path) -> None:
    archive(path, b"\x80\x02X" + struct.pack("<I", 0xFFFFFFFF) + b"a.")


@hostile
def a_stack_that_is_empty(path: Path) -> None:
    archive(path, b"\x80\x02R.")


# -- what is at the path --------------------------------------------------------------------------------------------


@hostile
def a_pipe(path: Path) -> None:
    os.mkfifo(path)


@hostile
def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@hostile
def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@hostile
def a_link_to_a_file_of_the_system(path: Path) -> None:
    path.symlink_to("/etc/hostname")


@hostile
def a_folder(path: Path) -> None:
    path.mkdir()
