"""The checks of an accelerator: what its probe says, what its devices are, and that training on them is right."""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch

from fabric_core import Fabric
from fabric_core.plan import Request
from fabric_core.registry import default_registry
from fabric_core.requirements import missing_requirements
from fabric_core.resolve import resolve
from fabric_core.resolve.hardware import probe, probed
from fabric_core.specs import Inventory
from fabric_core.testing.conformance import PartConformance
from fabric_core.testing.fresh import ask
from fabric_core.testing.needs import need_plan
from fabric_core.testing.parts import part_of
from fabric_core.testing.programs import small_training
from fabric_core.testing.ranks import on_ranks

PROBED = """
import os, time
from dataclasses import asdict
from fabric_core.targets import import_target
from fabric_core.testing.programs.probing import first_tensor_after_fork
target, part, initialised, tensor = json.loads(sys.argv[1])
before = dict(os.environ)
began = time.process_time()
found = import_target(target, "the kit")()
seconds, with_torch = time.process_time() - began, "torch" in sys.modules
began = time.process_time()
again = import_target(target, "the kit")()
answer({
    "found": asdict(found) | {"available": found.available},
    "same": found == again,
    "seconds": (time.process_time() - began) if with_torch else seconds,
    "changed": sorted({key for key in before | dict(os.environ) if before.get(key) != os.environ.get(key)}),
    "fork": first_tensor_after_fork(part, found, initialised) if tensor and found.available else "",
})
"""


class AcceleratorConformance(PartConformance):
    """Checks of an accelerator. Where there is none, those that need one are skipped.

    Attributes:
        device_type: What ``torch.device`` calls it; by default the part's name.
        hiding: Environment variables under which no device is to be found, if there are any.
        initialised: ``"package.module:function"`` that tells whether this process has initialised a device, where
            PyTorch has such a function. A fork that works is looked for in any case.
        dtypes: What its tensors may be; by default the usual ones. Leave out what the device does not have.
        most: The largest difference of losses and parameters to the same training on the CPU. 1e-4 by default.
    """

    kind = "accelerator"

    device_type: ClassVar[str | None] = None
    hiding: ClassVar[Mapping[str, str]] = {}
    initialised: ClassVar[str | None] = None
    dtypes: ClassVar[tuple[str, ...]] = (
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "uint8",
        "bool",
    )
    most: ClassVar[float] = 1e-4

    # -- the probe ------------------------------------------------------------------------------------------------

    def test_the_probe_answers_with_a_well_formed_inventory(self) -> None:
        """Indices, the default, other names: what ``devices=`` is resolved with."""
        found = self._found()
        indices = found.indices
        assert isinstance(indices, tuple), f"indices are {indices!r}, no tuple"
        assert all(isinstance(index, int) and index >= 0 for index in indices), f"indices are {indices}"
        assert len(set(indices)) == len(indices), f"a device is listed twice: {indices}"
        assert set(found.names.values()) <= set(indices), (
            f"names mean devices that are not there: {dict(found.names)}"
        )
        if found.default is not None:
            most = found.default if found.virtual else len(indices)
            assert 0 < found.default <= most, f"'auto' would take {found.default} of {len(indices)} device(s)"

    def test_absent_hardware_is_an_answer_with_a_reason(self) -> None:
        """No exception; and a sentence that tells a user why there is nothing."""
        hidden = self._probed(self.hiding)["found"] if self.hiding else None
        for found in filter(None, (hidden, vars(self._found()) | {"available": self._found().available})):
            assert found["available"] or found["note"], (
                "there is no device, and the inventory has no note that says why"
            )
        if hidden is not None:
            assert not hidden["available"], (
                f"{dict(self.hiding)} do not hide the devices: {hidden['indices']}"
            )

    def test_the_probe_is_quick_and_says_the_same_again(self) -> None:
        """It runs whenever the best device is looked for. Importing PyTorch does not count."""
        answer = self._probed()
        assert answer["same"], "asked twice, the probe answers differently"
        assert answer["seconds"] < 0.5, f"the probe takes {answer['seconds']:.2f} s of CPU time"

    def test_the_probe_changes_no_environment_variable(self) -> None:
        """Other probes, and started processes, would see it."""
        changed = self._probed()["changed"]
        assert not changed, f"the probe changes {', '.join(changed)}"

    def test_a_fork_after_the_probe_can_use_the_device(self) -> None:
        """A probe that initialises the device makes notebooks, loaders and launchers that fork fail."""
        self._need_device()
        if not isinstance(self.spec.probe, str):
            pytest.skip("its probe is a function that is imported already; a fresh process cannot find it")
        failure = self._probed()["fork"]
        assert not failure, failure

    def test_auto_takes_it_when_it_is_the_best_and_not_only_there_by_name(self) -> None:
        """By its own probe and priority; what stands in for the real devices is passed over."""
        found = self._found()
        if not found.available:
            pytest.skip(f"there is no device here: {found.note}")
        own = self.spec
        better = [
            offer.full_name
            for offer in default_registry().offers(self.kind)
            if offer.spec.priority > own.priority and self._is_there(probed(offer).inventory)  # type: ignore[attr-defined]
        ]
        chosen = resolve(Request(environ={}), default_registry()).accelerator.spec
        if found.only_by_name:
            assert chosen != own, "accelerator='auto' takes it, though it is only there by name"
        elif not better:
            assert chosen == own, f"accelerator='auto' takes {chosen.name!r} instead"

    # -- its devices ----------------------------------------------------------------------------------------------

    def test_every_index_is_a_device_of_the_stated_type(self) -> None:
        """``device(index)`` is what tensors are moved to."""
        for index, device in self._devices().items():
            assert isinstance(device, torch.device), f"device({index}) is {device!r}"
            assert device.type == self._type, f"device({index}) is {device}, not of the type {self._type!r}"
            wanted = (None, 0, index) if self._found().virtual else (index,)
            assert device.index in wanted, f"device({index}) is {device}"

    def test_setup_makes_the_device_the_current_one(self) -> None:
        """Tensors that are made on the type alone lie on this rank's device."""
        accelerator = self._made()
        for device in self._devices().values():
            accelerator.setup_device(device)
            found = torch.ones(1, device=self._type).device
            assert found.index in (None, device.index), (
                f"after setup_device({device}), tensors lie on {found}"
            )

    def test_tensors_come_back_as_they_went(self) -> None:
        """Of every dtype, also empty, without dimensions, and not contiguous."""
        for device in self._devices().values():
            for name in self.dtypes:
                dtype = getattr(torch, name)
                whole = torch.arange(12).reshape(3, 4).to(dtype)
                for tensor in (whole, whole.t(), whole[:, ::2], whole[:0], whole[1, 2]):
                    there = tensor.to(device)
                    back = there.to("cpu")
                    assert (there.dtype, there.shape) == (dtype, tensor.shape), (
                        f"{name} arrives as {there.dtype}"
                    )
                    assert torch.equal(back, tensor), f"a tensor of {name} comes back changed from {device}"

    def test_a_process_group_backend_that_it_names_exists(self) -> None:
        """Otherwise the first job of two processes fails."""
        backend = self._made().process_group_backend
        if backend is None:
            pytest.skip("it leaves the backend to the strategy")
        available = torch.distributed.is_available() and torch.distributed.is_backend_available(backend)
        assert available, f"the process group backend {backend!r} is not there"

    # -- batches --------------------------------------------------------------------------------------------------

    def test_batches_arrive_on_the_device_in_their_order(self) -> None:
        """The same ones, none lost, none twice, whatever runs ahead."""
        for device in self._devices().values():
            given: list[Any] = [
                (torch.full((4,), number), {"deep": [torch.tensor(number), "text"]}) for number in range(9)
            ]
            arrived = list(self._moved(iter(given), device))
            assert len(arrived) == len(given), f"of {len(given)} batches {len(arrived)} arrive"
            for mine, theirs in zip(arrived, given, strict=True):
                assert mine[0].device.type == self._type, f"a batch is left on {mine[0].device}"
                assert torch.equal(mine[0].cpu(), theirs[0]), "batches arrive in another order, or changed"
                assert torch.equal(mine[1]["deep"][0].cpu(), theirs[1]["deep"][0])
                assert mine[1]["deep"][1] == "text"

    def test_a_loop_that_ends_early_leaves_nothing_waiting(self) -> None:
        """A break in the middle of an endless loader, and another loop afterwards."""
        for device in self._devices().values():
            for _ in range(2):
                taken = []
                for batch in self._moved(map(torch.tensor, itertools.count()), device):
                    taken.append(int(batch))
                    if len(taken) == 3:
                        break
                assert taken == [0, 1, 2], f"the first batches are {taken}"

    def test_an_exception_of_the_loader_reaches_the_loop(self) -> None:
        """It is the same one; batches that were read ahead may be lost with it."""

        def failing() -> Iterator[torch.Tensor]:
            yield torch.tensor(0)
            yield torch.tensor(1)
            raise OSError("the disk is gone")

        for device in self._devices().values():
            taken: list[int] = []
            with pytest.raises(OSError, match="the disk is gone"):
                taken.extend(map(int, self._moved(failing(), device)))
            assert taken == [0, 1][: len(taken)], f"the batches before it are {taken}"

    # -- training -------------------------------------------------------------------------------------------------

    def test_a_training_equals_the_same_on_the_cpu(self) -> None:
        """One process, by name, against a plain loop on the CPU."""
        self._need_device()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Fabric(accelerator=self._asked(), devices=1) as fabric:
                fabric.launch()
                trained = small_training.train(fabric)
                assert fabric.device.type == self._type
        self._compare(trained)

    def test_a_training_on_two_devices_equals_the_same_on_the_cpu(self) -> None:
        """Two processes, by name, each on a device of its own."""
        self._need_device()
        found = self._found()
        if not (found.virtual or len(found.indices) > 1):
            pytest.skip("there is one device only")
        need_plan(accelerator=self.name)
        arguments = {"fabric": {"accelerator": self.name, "devices": 2}}
        for trained in on_ranks("fabric_core.testing.programs.small_training", arguments):
            self._compare(trained)

    def test_it_works_in_a_copy_of_a_process_where_its_spec_says_so(self) -> None:
        """What ``forkable=True`` promises: ranks may be copies of a process that has imported PyTorch."""
        self._need_device()
        if not self.spec.forkable:
            pytest.skip("its spec does not say forkable=True")
        need_plan(accelerator=self.name)
        arguments = {"fabric": {"accelerator": self.name, "devices": 1}}
        options = {"processes": 1, "accelerator": self.name, "start": "warm"}
        for trained in on_ranks("fabric_core.testing.programs.small_training", arguments, **options):
            self._compare(trained)

    def test_it_is_torn_down_twice_without_complaint(self) -> None:
        """It is, where a job fails while it is closed."""
        accelerator = self._made()
        accelerator.teardown()
        accelerator.teardown()

    # -- how it is asked ------------------------------------------------------------------------------------------

    @property
    def _type(self) -> str:
        return self.device_type or self.spec.name

    def _found(self) -> Inventory:
        missing = missing_requirements(self.spec)
        if missing:
            pytest.skip(f"it needs {', '.join(missing)}")
        return probe(self.spec)

    def _is_there(self, found: Inventory) -> bool:
        return found.available and not found.only_by_name

    def _need_device(self) -> None:
        found = self._found()
        if not found.available:
            pytest.skip(f"there is no device here: {found.note}")

    def _made(self) -> Any:
        self._need_device()
        return self.make()

    def _devices(self) -> dict[int, torch.device]:
        """Every device by its index; of processes that count as devices, the first three."""
        accelerator, found = self._made(), self._found()
        return {index: accelerator.device(index) for index in (range(3) if found.virtual else found.indices)}

    def _moved(self, batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
        from fabric_core.data.collections import move_to_device

        accelerator = self._made()
        moved: Iterator[Any] = accelerator.move_batches(
            batches, lambda batch: move_to_device(batch, device), device
        )
        return moved

    def _asked(self) -> Any:
        return part_of(self.kind, self.name, self.options)

    def _compare(self, trained: dict[str, Any]) -> None:
        differ = small_training.distance(trained, small_training.plain())
        assert differ <= self.most, f"it differs from the training on the CPU by {differ:.1e}"

    def _probed(self, environ: Mapping[str, str] | None = None) -> Any:
        """What the probe says in a fresh process."""
        target = self.spec.probe
        self._found()
        if not isinstance(target, str):
            pytest.skip("its probe is a function that is imported already; a fresh process cannot find it")
        asked = [target, (self.name, dict(self.options)), self.initialised, environ is None]
        return _ask_once(json.dumps(asked), json.dumps(dict(environ or {})))


@functools.cache
def _ask_once(asked: str, environ: str) -> Any:
    return ask(PROBED, asked, environ=json.loads(environ))
