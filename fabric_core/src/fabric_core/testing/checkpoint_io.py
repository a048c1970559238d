"""The checks of a checkpoint io: the same bits come back, and at any moment the old file or the new one is there."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fabric_core import Fabric
from fabric_core.errors import CheckpointError, UnsafeCheckpointError
from fabric_core.testing.conformance import PartConformance
from fabric_core.testing.fresh import run_side_by_side
from fabric_core.testing.places import KEPT
from fabric_core.testing.programs import small_training

HARMED = 40
"""How many places of a file are harmed, one at a time."""


class CheckpointIOConformance(PartConformance):
    """Checks of a checkpoint io.

    Attributes:
        suffix: What the names of its files end with; ``".ckpt"`` by default.
        kills: How many times a process is killed while it saves. 24 by default.
        dtypes: Of which tensors a checkpoint may consist. By default, those that PyTorch's own files keep.
        big_integers: Whether whole numbers beyond 64 bits come back. True by default.
        keeps_sharing: Whether two tensors that share memory do so afterwards, so that the file holds it once. True by
            default.
        executes_nothing: Whether ``weights_only=True`` refuses a file that would execute code. True by default; state
            False only for a format that cannot hold code at all.
    """

    kind = "checkpoint io"

    suffix: ClassVar[str] = ".ckpt"
    kills: ClassVar[int] = 24
    dtypes: ClassVar[tuple[str, ...]] = (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
    big_integers: ClassVar[bool] = True
    keeps_sharing: ClassVar[bool] = True
    executes_nothing: ClassVar[bool] = True

    # -- what comes back ------------------------------------------------------------------------------------------

    def test_tensors_come_back_with_the_same_bits(self, tmp_path: Path) -> None:
        """Of every dtype: with and without dimensions, empty, not contiguous, NaN and infinite."""
        given: dict[str, torch.Tensor] = {}
        for name in self.dtypes:
            whole = torch.arange(24).reshape(4, 6).to(getattr(torch, name))
            given |= {f"{name} {way}": tensor for way, tensor in _ways(whole)}
        given["special"] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
        found = self._there_and_back({"tensors": given}, tmp_path)["tensors"]
        assert list(found) == list(given), "names are lost, or come in another order"
        for name, tensor in given.items():
            back = found[name]
            assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape), (
                f"{name} comes back as {back.dtype}"
            )
            assert _bits(back) == _bits(tensor), f"the values of {name} are changed"
            assert back.device.type == "cpu", f"{name} is not on the CPU"

    def test_plain_values_come_back_as_what_they_were(self, tmp_path: Path) -> None:
        """Numbers, texts in any script, None, truth values, and containers in each other, each of its own type."""
        given: dict[Any, Any] = {
            "none": None,
            "truth": [True, False],
            "numbers": [0, -1, 2**63 - 1, -(2**63), 0.1, -0.0, float("inf"), 1e-320],
            "schlüssel/鍵.weight": "Wörter, 言葉, \n\t\0 and 'quotes'",
            "deep": {"list": [1, [2, (3, {"four": (4,)})]], "empty": [{}, [], (), ""]},
            7: "a key that is a number",
        }
        if self.big_integers:
            given["big"] = [2**64, -(2**200)]
        found = self._there_and_back(given, tmp_path)
        assert found == given
        assert repr(found) == repr(given), "something comes back as another type"

    def test_a_training_comes_back(self, tmp_path: Path) -> None:
        """What ``fabric.save`` collects: the state of a model and of its optimizer, which goes on the same."""
        module = small_training.model()
        optimizer = torch.optim.AdamW(module.parameters())
        sum(parameter.sum() for parameter in module.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
        state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
        found = self._there_and_back(state, tmp_path)
        module.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        again = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
        assert _exact(again) == _exact(state)

    def test_what_is_loaded_is_independent_of_the_file(self, tmp_path: Path) -> None:
        """Tensors can be changed, and the file replaced or removed, without one changing the other."""
        path = self._path(tmp_path)
        given = {"x": torch.arange(5.0)}
        io = self.make()
        io.save(path, given)
        first = io.load(path)
        first["x"] += 1
        assert torch.equal(io.load(path)["x"], given["x"]), "changing what was loaded changes the file"
        second = io.load(path)
        io.save(path, {"x": torch.zeros(5)})
        io.remove(path)
        assert torch.equal(second["x"], given["x"]), "what was loaded changes with the file"

    def test_tensors_that_share_memory_take_it_once(self, tmp_path: Path) -> None:
        """Tied weights: a file of them twice would be as large again, and would untie them."""
        if not self.keeps_sharing:
            pytest.skip("the class states that it does not keep this")
        weight = torch.randn(256, 256)
        found = self._there_and_back({"one": weight, "other": weight.t()}, tmp_path)
        found["one"][0, 1] = 7.0
        assert found["other"][1, 0] == 7.0, "tensors that share memory come back apart"

    def test_a_small_part_of_a_big_tensor_is_all_there(self, tmp_path: Path) -> None:
        """And so is a tensor of some megabytes."""
        big = torch.arange(1_500_000, dtype=torch.float64)
        found = self._there_and_back({"big": big, "part": big[10:12]}, tmp_path)
        assert torch.equal(found["big"], big)
        assert torch.equal(found["part"], big[10:12])

    def test_saving_changes_nothing_of_what_is_saved(self, tmp_path: Path) -> None:
        """Training goes on with it."""
        given = {"x": torch.randn(3, requires_grad=True), "list": [1, {"y": torch.ones(2)}]}
        before = _exact(given)
        self.make().save(self._path(tmp_path), given)
        assert _exact(given) == before

    # -- files ----------------------------------------------------------------------------------------------------

    def test_missing_folders_are_made(self, tmp_path: Path) -> None:
        """As deep as it has to be."""
        path = self._path(tmp_path / "not" / "there yet")
        self.make().save(path, {"x": 1})
        assert self.make().load(path) == {"x": 1}

    def test_an_existing_file_is_replaced_and_nothing_else_is_left(self, tmp_path: Path) -> None:
        """Also by a smaller one; and no temporary file stays beside it."""
        path, io = self._path(tmp_path), self.make()
        neighbour = tmp_path / f"neighbour{self.suffix}"
        neighbour.write_text("not ours")
        io.save(path, {"x": torch.ones(10_000)})
        io.save(path, {"x": 2})
        assert io.load(path) == {"x": 2}
        assert {entry.name for entry in tmp_path.iterdir()} == {path.name, neighbour.name}
        assert neighbour.read_text() == "not ours"

    def test_remove_deletes_it_and_may_be_called_again(self, tmp_path: Path) -> None:
        """One that is gone already is no error."""
        path, io = self._path(tmp_path), self.make()
        io.save(path, {"x": 1})
        io.remove(path)
        assert list(tmp_path.iterdir()) == [], "something of it is left"
        io.remove(path)

    def test_a_checkpoint_that_is_not_there_is_a_clear_error(self, tmp_path: Path) -> None:
        """Which names the path; also where the folder is missing."""
        for path in (self._path(tmp_path), self._path(tmp_path / "nowhere")):
            with pytest.raises(CheckpointError) as raised:
                self.make().load(path)
            assert path.name in str(raised.value), f"the error does not name the path: {raised.value}"
            assert not path.parent.joinpath("nowhere").exists()

    # -- damage ---------------------------------------------------------------------------------------------------

    def test_a_truncated_file_is_refused(self, tmp_path: Path) -> None:
        """Wherever it ends: what a full disk or a broken copy leaves."""
        for path, content in self._harmed(tmp_path):
            for length in [
                0,
                1,
                len(content) - 1,
                *_seeded().sample(range(len(content)), min(HARMED, len(content)) // 2),
            ]:
                path.write_bytes(content[:length])
                harm = f"it ends after {length} of {len(content)} bytes"
                assert self._is_refused(tmp_path), f"{path.name} is loaded, though {harm}"

    def test_flipped_bits_are_noticed(self, tmp_path: Path) -> None:
        """Anywhere: weights that are wrong and load are worse than a file that does not."""
        expected = _exact(_a_state())
        for path, content in self._harmed(tmp_path):
            for place in _seeded().sample(range(len(content)), min(HARMED, len(content))):
                harmed = bytearray(content)
                harmed[place] ^= 1 << place % 8
                path.write_bytes(harmed)
                with contextlib.suppress(CheckpointError), _quiet():
                    found = _exact(self.make().load(self._path(tmp_path)))
                    assert found == expected, (
                        f"byte {place} of {path.name} is wrong, and it is loaded changed"
                    )

    def test_garbage_is_refused(self, tmp_path: Path) -> None:
        """A file that somebody else has written there."""
        path = self._path(tmp_path)
        for content in (b"", b"not a checkpoint", bytes(range(256)) * 20, b"PK\x03\x04" + b"\0" * 100):
            path.write_bytes(content)
            assert self._is_refused(tmp_path), f"it loads something from {content[:20]!r}"

    def test_code_in_a_checkpoint_is_not_executed(self, tmp_path: Path) -> None:
        """``weights_only``, the default, refuses what asks for more than values."""
        if not self.executes_nothing:
            pytest.skip("the class states that its format cannot hold code")
        path, witness = self._path(tmp_path), tmp_path / "executed"
        with _quiet():
            self.make().save(path, {"x": torch.ones(1), "evil": _Evil(str(witness))})
            with pytest.raises(UnsafeCheckpointError):
                self.make().load(path)
        assert not witness.exists(), "loading a checkpoint executes code that is in it"

    # -- when saving fails ----------------------------------------------------------------------------------------

    def test_what_cannot_be_saved_leaves_the_old_file(self, tmp_path: Path) -> None:
        """A value that cannot be written is one clear error, and no half of a file."""
        path, io = self._path(tmp_path), self.make()
        io.save(path, {"x": 1})
        with pytest.raises(CheckpointError), _quiet():
            io.save(path, {"x": torch.ones(1000), "y": (number for number in range(3))})
        assert io.load(path) == {"x": 1}
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "half of a file is left"

    def test_a_folder_that_cannot_be_written_to_is_a_clear_error(self, tmp_path: Path) -> None:
        """Where a file is in the way of the folder; and, but for the superuser, where writing is forbidden."""
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(CheckpointError):
            self.make().save(self._path(tmp_path / "file"), {"x": 1})
        if not hasattr(os, "geteuid") or os.geteuid() == 0:
            return
        folder = tmp_path / "read only"
        folder.mkdir()
        self.make().save(self._path(folder), {"x": 1})
        folder.chmod(0o500)
        try:
            with pytest.raises(CheckpointError):
                self.make().save(self._path(folder), {"x": 2})
            assert self.make().load(self._path(folder)) == {"x": 1}
        finally:
            folder.chmod(0o700)

    def test_a_full_disk_is_a_clear_error_and_leaves_the_old_file(self, tmp_path: Path) -> None:
        """In a process that may not write so much."""
        found = self._in_a_process("full", tmp_path)
        assert found["error"] == "CheckpointError", f"a full disk is {found['error']}: {found['message']}"
        assert found["old is intact"], "after a full disk, the old file is gone or damaged"
        assert found["entries"] == 1, "after a full disk, half of a file is left"

    def test_a_process_killed_during_a_save_leaves_the_old_or_the_new_file(self, tmp_path: Path) -> None:
        """``kill -9`` at random moments, many times: never a torn file, and what is left does not pile up."""
        found = self._in_a_process("kill", tmp_path)
        assert found["damaged"] == [], f"after a kill, the checkpoint is torn: {found['damaged'][0]}"
        assert found["advanced"] > 1, "no save was ever completed, so that nothing was shown"
        assert found["left"] == [], "what killed saves have left stays, though two days old: it piles up"

    # -- use ------------------------------------------------------------------------------------------------------

    def test_fabric_saves_and_loads_with_it_by_name(self, tmp_path: Path) -> None:
        """A model and its optimizer, through the verbs."""
        self.make()
        path = self._path(tmp_path)
        with _quiet(), Fabric(accelerator="cpu", devices=1, plugins=[self._asked()]) as fabric:
            fabric.launch()
            trained = small_training.model()
            model, optimizer = fabric.setup(trained, small_training.optimizer(trained))
            before = {name: value.clone() for name, value in model.state_dict().items()}
            fabric.save(path, {"model": model, "optimizer": optimizer, "step": 5})
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            state = {"model": model, "optimizer": optimizer, "step": 0}
            fabric.load(path, state)
            assert state["step"] == 5
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_it_is_torn_down_twice_without_complaint(self) -> None:
        """It is, where a job fails while it is closed."""
        io = self.make()
        io.teardown()
        io.teardown()

    # -- how it is asked ------------------------------------------------------------------------------------------

    def _path(self, folder: Path) -> Path:
        return folder / f"state{self.suffix}"

    def _there_and_back(self, state: Mapping[Any, Any], folder: Path) -> dict[Any, Any]:
        """Saved by one object and loaded by another."""
        with _quiet():
            self.make().save(self._path(folder), state)
            found: dict[Any, Any] = self.make().load(self._path(folder))
        return found

    def _is_refused(self, folder: Path) -> bool:
        """Whether loading is a `CheckpointError`; any other error goes through."""
        try:
            with _quiet():
                self.make().load(self._path(folder))
        except CheckpointError:
            return True
        return False

    def _harmed(self, folder: Path) -> Iterator[tuple[Path, bytes]]:
        """Every file of a checkpoint with its content, to be harmed and restored, one at a time."""
        path = self._path(folder)
        self.make().save(path, _a_state())
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        for file in files:
            content = file.read_bytes()
            yield file, content
            file.write_bytes(content)

    def _asked(self) -> Any:
        from fabric_core.testing.parts import part_of

        return part_of(self.kind, self.name, self.options)

    def _in_a_process(self, what: str, folder: Path) -> Any:
        if sys.platform == "win32":
            pytest.skip("processes are forked here, which this system cannot")
        self.make()
        arguments = {
            "what": what,
            "part": (self.kind, self.name, dict(self.options)),
            "path": str(self._path(folder)),
            "kills": self.kills,
        }
        environ = {name: os.environ[name] for name in KEPT if name in os.environ}
        return run_side_by_side("fabric_core.testing.programs.interrupted_saves", arguments, [environ])[0]


def _a_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weights": torch.randn(40, 40, generator=generator),
        "ids": torch.arange(50),
        "step": 12,
        "name": "a run",
    }


def _ways(whole: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield "whole", whole
    yield "transposed", whole.t()
    yield "strided", whole[::2, 1::3]
    yield "without dimensions", whole[1, 2]
    yield "empty", whole[:0]
    yield "expanded", whole[:1].expand(3, 6)


def _exact(value: Any) -> Any:
    """The same with tensors as what they are to the last bit, so that ``==`` compares all of it."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.requires_grad, _bits(value)
    if isinstance(value, Mapping):
        return {key: _exact(each) for key, each in value.items()}
    return [type(value), *map(_exact, value)] if isinstance(value, list | tuple) else value


def _bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def _seeded() -> random.Random:
    return random.Random(0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Evil:
    """Asks for a function call when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")
