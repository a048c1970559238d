"""``fabric.save(wait=False)``: the training goes on, the file holds the moment of the call, and no error is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from fabric_core import CheckpointError, Fabric, Strategy, StrategySpec
from fabric_core.parts.torch_file import TorchFile

PATIENCE = 60.0  # seconds


class Gated(TorchFile):
    """Writes when it is let, and as it is told."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def save(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        assert self.gate.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        super().save(path, checkpoint)


class Bound(Strategy):
    """One that cannot save while the training goes on."""

    spec = StrategySpec("bound", "", supports=("cpu",))


@pytest.fixture
def files() -> Gated:
    return Gated()


@pytest.fixture
def fabric(files: Gated) -> Iterator[Fabric]:
    made = Fabric(accelerator="cpu", plugins=[files])
    made.launch()
    yield made
    files.gate.set()
    files.error = None
    made.close()


@pytest.fixture
def failed(fabric: Fabric, files: Gated, tmp_path: Path) -> Path:
    """A file whose save has failed, and nobody has been told."""
    fabric.save(tmp_path / "lost.ckpt", {"step": 1})
    files.error = OSError("No space left on device")
    fabric.save(tmp_path / "lost.ckpt", {"step": 2}, wait=False)
    fabric._saving._background._thread.join()  # type: ignore[union-attr]
    files.error = None
    return tmp_path / "lost.ckpt"


def trained(steps: int, batches: torch.Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The plain loop: a model with buffers, and an optimizer with a state."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for batch in batches[:steps]:
        mse_loss(model(batch), batch.sum(1, keepdim=True)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_the_file_holds_the_moment_of_the_call_and_the_training_ends_as_a_plain_one(
    fabric: Fabric, files: Gated, tmp_path: Path
) -> None:
    batches = torch.randn(6, 16, 4)
    expected, expected_optimizer = trained(3, batches)
    finally_expected, _ = trained(6, batches)
    raw, raw_optimizer = trained(0, batches)
    model, optimizer = fabric.setup(raw, raw_optimizer)
    history: list[int] = []
    for number, batch in enumerate(batches, 1):
        fabric.backward(mse_loss(model(batch), batch.sum(1, keepdim=True)))
        optimizer.step()
        optimizer.zero_grad()
        history.append(number)
        if number == 3:
            files.gate.clear()
            state = {"model": model, "optimizer": optimizer, "history": history, "last": batch}
            fabric.save(tmp_path / "3.ckpt", state, wait=False)
            batch.zero_()
            assert not (tmp_path / "3.ckpt").exists()
    files.gate.set()
    found = fabric.load(tmp_path / "3.ckpt")  # waits
    assert found["history"] == [1, 2, 3]
    assert found["last"].abs().sum() > 0
    for name, value in expected.state_dict().items():
        assert torch.equal(found["model"][name], value), name
    for number, entries in expected_optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            assert torch.equal(found["optimizer"]["state"][number][name], value), (number, name)
    for name, value in finally_expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_save_that_is_not_waited_for_writes_the_same_file(fabric: Fabric, tmp_path: Path) -> None:
    whole = torch.arange(1000.0)
    state = {
        "tied": {"one": whole, "other": whole, "row": whole[10:20], "column": whole.view(10, 100).t()},
        "parameter": nn.Parameter(torch.ones(3)),
        "needs gradients": torch.ones(2, requires_grad=True) * 2,
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.empty(0, 3),
        "number": torch.tensor(7),
        "sparse": torch.eye(3).to_sparse(),
        "values": (1, 2.5, None, {3: [4.0]}),
    }
    fabric.save(tmp_path / "waited.ckpt", state)
    fabric.save(tmp_path / "not.ckpt", state, wait=False)
    waited, found = fabric.load(tmp_path / "waited.ckpt"), fabric.load(tmp_path / "not.ckpt")
    torch.testing.assert_close(found, waited, rtol=0, atol=0)
    assert type(found["parameter"]) is nn.Parameter
    assert found["needs gradients"].requires_grad
    assert (tmp_path / "not.ckpt").stat().st_size < 1.05 * (tmp_path / "waited.ckpt").stat().st_size
    one, row = found["tied"]["one"], found["tied"]["row"]
    row.zero_()
    assert one[10:20].abs().sum() == 0  # it is one memory, as before


def test_tensors_inside_of_objects_are_copied_too(fabric: Fabric, files: Gated, tmp_path: Path) -> None:
    class Average:
        """An object whose state is not a copy of what it has."""

        def __init__(self) -> None:
            self.held = {"mean": torch.ones(2), "scale": nn.Parameter(torch.ones(1)), "steps": [1]}

        def state_dict(self) -> dict[str, Any]:
            return self.held

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.held = state

    average = Average()
    files.gate.clear()
    fabric.save(tmp_path / "a.ckpt", {"average": average}, wait=False)
    with torch.no_grad():
        average.held["mean"].zero_()
        average.held["scale"].zero_()
    average.held["steps"].append(2)
    files.gate.set()
    found = fabric.load(tmp_path / "a.ckpt")["average"]
    assert found["mean"].tolist() == [1, 1]
    assert found["scale"].tolist() == [1]
    assert found["steps"] == [1]


def test_memory_is_used_again_by_the_next_save(fabric: Fabric, tmp_path: Path) -> None:
    written: list[int] = []
    save = fabric.strategy.surroundings.checkpoint_io.save

    def noted(path: Path, checkpoint: Mapping[str, Any]) -> None:
        written.append(checkpoint["values"].data_ptr())
        save(path, checkpoint)

    fabric.strategy.surroundings.checkpoint_io.save = noted  # type: ignore[method-assign]
    for number in range(3):
        fabric.save(tmp_path / "a.ckpt", {"values": torch.full((100_000,), number)}, wait=False)
    fabric.wait_for_save()
    assert len(set(written)) == 1
    assert fabric.load(tmp_path / "a.ckpt")["values"].unique().tolist() == [2]


def test_a_second_save_waits_for_the_first(fabric: Fabric, files: Gated, tmp_path: Path) -> None:
    files.gate.clear()
    fabric.save(tmp_path / "1.ckpt", {"step": 1}, wait=False)
    opener = threading.Timer(0.2, files.gate.set)
    opener.start()
    fabric.save(tmp_path / "2.ckpt", {"step": 2}, wait=False)
    assert (tmp_path / "1.ckpt").exists()
    opener.join()
    fabric.wait_for_save()
    assert (tmp_path / "2.ckpt").exists()


def test_a_path_means_the_folder_of_the_call(
    fabric: Fabric, files: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    files.gate.clear()
    fabric.save("here.ckpt", {"step": 1}, wait=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    files.gate.set()
    fabric.wait_for_save()
    assert (tmp_path / "here.ckpt").exists()


CALLS: dict[str, Callable[[Fabric, Path], Any]] = {
    "save": lambda fabric, path: fabric.save(path.with_name("next.ckpt"), {"step": 3}),
    "load": lambda fabric, path: fabric.load(path),
    "load_raw": lambda fabric, path: fabric.load_raw(path, nn.Linear(1, 1)),
    "wait_for_save": lambda fabric, path: fabric.wait_for_save(),
    "close": lambda fabric, path: fabric.close(),
}


@pytest.mark.parametrize("verb", CALLS)
def test_an_error_comes_out_of_the_next_call_and_once(fabric: Fabric, failed: Path, verb: str) -> None:
    with pytest.raises(CheckpointError, match=r"lost\.ckpt.* wait=False, was not written: .*No space left"):
        CALLS[verb](fabric, failed)
    assert not failed.with_name("next.ckpt").exists()
    fabric.wait_for_save() if verb == "close" else CALLS["save"](fabric, failed)
    other = Fabric(accelerator="cpu")
    assert other.load(failed) == {"step": 1}  # what was there before
    other.close()


def test_closing_gives_back_everything_also_when_a_save_has_failed(fabric: Fabric, failed: Path) -> None:
    ended: list[str] = []
    fabric.strategy.teardown = lambda: ended.append("strategy")  # type: ignore[method-assign]
    with pytest.raises(CheckpointError):
        fabric.close()
    assert ended == ["strategy"]
    fabric.close()


def test_an_exception_of_the_program_is_not_replaced_by_that_of_a_save(files: Gated, tmp_path: Path) -> None:
    def program() -> None:
        with Fabric(accelerator="cpu", plugins=[files]) as fabric:
            fabric.save(tmp_path / "a.ckpt", {"step": 1}, wait=False)
            raise ZeroDivisionError

    files.error = OSError("No space left on device")
    with pytest.warns(UserWarning, match="No space left"), pytest.raises(ZeroDivisionError):
        program()


def test_the_copy_lies_on_the_host_whatever_the_default_device_is(fabric: Fabric, tmp_path: Path) -> None:
    values = torch.arange(5.0)
    with torch.device("meta"):
        fabric.save(tmp_path / "a.ckpt", {"values": values, "tied": values[1:]}, wait=False)
        fabric.wait_for_save()
    assert torch.equal(fabric.load(tmp_path / "a.ckpt")["values"], values)


def test_what_cannot_be_copied_is_an_error_at_once(fabric: Fabric, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be copied.*lock.*wait=True"):
        fabric.save(tmp_path / "a.ckpt", {"lock": threading.Lock()}, wait=False)
    assert list(tmp_path.iterdir()) == []
    fabric.wait_for_save()


def test_a_strategy_that_cannot_writes_at_once_and_warns_once(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", strategy=Bound())
    with pytest.warns(UserWarning, match="'bound' cannot save while the training goes on"):
        fabric.save(tmp_path / "a.ckpt", {"step": 1}, wait=False)
    assert (tmp_path / "a.ckpt").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fabric.save(tmp_path / "b.ckpt", {"step": 2}, wait=False)
    assert fabric.load(tmp_path / "b.ckpt") == {"step": 2}
    fabric.close()


# -- the end of the program --------------------------------------------------------------------------------------------

ENDS = """
import json, os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
import torch
from fabric_core import Fabric
from fabric_core.parts.torch_file import TorchFile

class Slow(TorchFile):
    def save(self, path, checkpoint):
        if checkpoint["step"]:
            time.sleep(0.5)
        if checkpoint["step"] == "lost":
            raise OSError("No space left on device")
        with ThreadPoolExecutor(1) as pool:  # as files of shards have their checksums computed
            pool.submit(super().save, path, checkpoint).result()

def end(how):
    fabric = Fabric(accelerator="cpu", plugins=[Slow()])
    fabric.save(f"{how}.ckpt", {"step": 0})
    fabric.save(f"{how}.ckpt", {"step": "lost" if how == "a lost save" else 1, "values": torch.ones(5)}, wait=False)
    if how == "sys.exit":
        sys.exit(3)
    if how == "an exception":
        raise ZeroDivisionError
    if how == "with":
        with fabric:
            pass
    if hasattr(signal, how):
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(60)

torch.set_num_threads(1)  # a fork has no pool of threads
Fabric(accelerator="cpu").save("warm.ckpt", {"step": 0})  # all is imported before the forks
children = {}
for how in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{how}.err", os.O_CREAT | os.O_WRONLY), 2)
        break
    children[child] = how
if child == 0:
    end(how)
else:
    print(json.dumps({children[child]: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], Path]:
    """Programs that end while a save goes on, by how they end: their exit codes, and the folder of their files."""
    folder = tmp_path_factory.mktemp("ends")
    hows = (
        "the last line",
        "with",
        "sys.exit",
        "an exception",
        "a lost save",
        "SIGINT",
        "SIGTERM",
        "SIGKILL",
    )
    command = [sys.executable, "-W", "error", "-c", ENDS, *hows]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(ended.stdout), folder


@pytest.mark.parametrize(
    ("how", "code"),
    [("the last line", 0), ("with", 0), ("sys.exit", 3), ("an exception", 1), ("SIGINT", -2)],
)
def test_the_end_of_the_program_waits_for_the_save(
    ends: tuple[dict[str, int], Path], how: str, code: int
) -> None:
    codes, folder = ends
    assert codes[how] == code
    assert TorchFile().load(folder / f"{how}.ckpt")["step"] == 1


@pytest.mark.parametrize(("how", "code"), [("SIGTERM", -15), ("SIGKILL", -9)])
def test_a_program_that_is_killed_leaves_the_checkpoint_before(
    ends: tuple[dict[str, int], Path], how: str, code: int
) -> None:
    codes, folder = ends
    assert codes[how] == code
    assert TorchFile().load(folder / f"{how}.ckpt") == {"step": 0}


def test_a_save_that_fails_at_the_end_of_the_program_is_told(ends: tuple[dict[str, int], Path]) -> None:
    _, folder = ends
    assert "No space left on device" in (folder / "a lost save.err").read_text()
    assert TorchFile().load(folder / "a lost save.ckpt") == {"step": 0}
