"""Checkpoints on a store that speaks S3, written and read by two processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_task import seeded

from fabric_core import CheckpointError, Fabric
from fabric_core.converting import consolidate, consolidated

pytest.importorskip("s3fs", reason="s3fs is not installed")
server = pytest.importorskip("moto.server", reason="moto is not installed")

PROGRAM = f"""
import warnings
warnings.simplefilter("default")  # what the client of the store deprecates is its own business
sys.path.insert(0, {str(Path(__file__).parent / "programs")!r})
from sharded_task import *
from fabric_core import remote

def training(strategy, seed, **options):
    fabric = fabric_for(strategy, **options)
    model = seeded(seed)
    model, optimizer = fabric.setup(model, adam(model))
    return fabric, {{"model": model, "optimizer": optimizer, "step": seed}}

def advance(fabric, state):
    for inputs, targets in loader(fabric, 2):
        fabric.backward(mse_loss(state["model"](inputs), targets))
        state["optimizer"].step()
        state["optimizer"].zero_grad()

def weights(state):
    return whole(state["model"].state_dict())

found = {{}}
BLOCKS = {{"auto_wrap_policy": {{Block}}}}
for name, options in (("ddp", {{}}), ("fsdp", BLOCKS)):
    url = f"s3://bucket/{{name}}/run"
    fabric, state = training(name, 7, **options)
    advance(fabric, state)
    fabric.save(url, state)
    saved = weights(state)
    advance(fabric, state)
    fabric.load(url, state)
    found[name, "came back"] = all(torch.equal(value, saved[key]) for key, value in weights(state).items())
    advance(fabric, state)
    fabric.save(url, state, wait=False)
    fabric.wait_for_save()
    found[name, "second"] = weights(state)
    # the line of one rank is cut in the middle
    put = remote.Remote._put
    def cut(self, file, place):
        if rank == (1 if name == "fsdp" else 0):
            raise ConnectionError("the line is cut")
        put(self, file, place)
    remote.Remote._put = cut
    advance(fabric, state)
    found[name, "cut"] = error_of(fabric.save, url, state)
    remote.Remote._put = put
    fabric.load(url, state)
    found[name, "after"] = all(torch.equal(v, found[name, "second"][k]) for k, v in weights(state).items())
    found[name, "missing"] = error_of(fabric.load, "s3://bucket/none", state)
    found[name, "no bucket"] = error_of(fabric.save, "s3://no-such-bucket-here/x", state)
    fabric.load("s3://bucket/ddp/run", state)
    found[name, "of ddp"] = all(torch.equal(v, found["ddp", "second"][k]) for k, v in weights(state).items())
    checkpoints = fabric.checkpoints(f"s3://bucket/{{name}}/managed", keep=1, keep_best=("loss", "min"))
    for step, loss in enumerate((1.0, 3.0, 2.0)):
        checkpoints.save(state, step, metrics={{"loss": loss + rank}}, wait=step > 0)
    found[name, "managed"] = [(each.path, each.metrics) for each in checkpoints]
    found[name, "best"] = checkpoints.best(verify=True)
    managed = weights(state)
    advance(fabric, state)
    found[name, "resumed"] = fabric.checkpoints(f"s3://bucket/{{name}}/managed").resume({{"model": state["model"]}})
    found[name, "left"] = repr(found[name, "resumed"])
    found[name, "resumed"] = found[name, "resumed"]["optimizer"]["param_groups"] if rank == 1 else None
    found[name, "goes on"] = all(torch.equal(v, managed[k]) for k, v in weights(state).items())
    fabric.close()
answer(found)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[dict[str, str]]:
    """The variables by which a store with one bucket is reached."""
    store = server.ThreadedMotoServer(port=0, verbose=False)
    store.start()
    _, port = store.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    store.stop()


@pytest.fixture
def here(address: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store, for this process."""
    import s3fs

    for name, value in address.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return s3fs.S3FileSystem()


@pytest.fixture
def found(here: Any, address: dict[str, str], shared_programs: Any) -> list[dict[Any, Any]]:
    here.mkdir("bucket")
    answers: list[dict[Any, Any]] = shared_programs.answers_of(PROGRAM, timeout=110, **address)
    return answers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_strategy_writes_to_a_store_and_reads_from_it(found: list[dict[Any, Any]], here: Any) -> None:
    for answers in found:
        for name in ("ddp", "fsdp"):
            assert answers[name, "came back"]
            assert answers[name, "after"], "a save that failed has harmed the checkpoint"
            assert answers[name, "of ddp"]
            assert answers[name, "cut"][0] == "CheckpointError"
            assert "the line is cut" in answers[name, "cut"][1]
            assert "untouched" in answers[name, "cut"][1]
            assert answers[name, "missing"][0] == "CheckpointError"
            assert "nothing of that name" in answers[name, "missing"][1]
            assert answers[name, "no bucket"][0] == "CheckpointError"
            folder = f"s3://bucket/{name}/managed"
            assert answers[name, "managed"] == [
                (f"{folder}/step-000000000", {"loss": 1.0}),
                (f"{folder}/step-000000002", {"loss": 2.0}),
            ]
            assert answers[name, "best"] == f"{folder}/step-000000000"
            assert answers[name, "goes on"]
        assert "not read yet" in answers["fsdp", "left"]
    assert found[1]["fsdp", "resumed"][0]["params"] == found[1]["ddp", "resumed"][0]["params"]
    consolidate("s3://bucket/fsdp/managed/step-000000002", "s3://bucket/one.pt")
    assert consolidated("s3://bucket/one.pt")["step"] == 7
    files = [path.removeprefix("bucket/") for path in here.find("bucket")]
    assert "one.pt" in files
    rotated = {path.split("/")[2] for path in files if path.startswith("fsdp/managed/")}
    assert rotated == {".step.owner", *(f"step-00000000{name}" for name in ("0", "0.json", "2", "2.json"))}
    assert "ddp/run" in files
    manifest = json.loads(here.cat_file("bucket/fsdp/run/fabric.json"))
    assert (manifest["world_size"], manifest["plan"]["strategy"]) == (2, "fsdp")
    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.launch()
        for name in ("ddp", "fsdp"):
            model = seeded(1)
            fabric.load(f"s3://bucket/{name}/run", {"model": model})
            second = found[0][name, "second"]
            assert all(torch.equal(value, second[key]) for key, value in model.state_dict().items())
        with pytest.raises(CheckpointError, match="nothing of that name"):
            fabric.load("s3://bucket/none")
