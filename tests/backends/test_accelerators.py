"""The accelerators: probes in fresh processes, with a PyTorch that pretends, and with a device of PyTorch's own making.

No accelerator is needed. What no pretence can show is left to machines that have one: that counting the devices of a
real driver does not initialise it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_backends import hooks
from fabric_backends.accelerators import probes
from fabric_backends.accelerators.current import current_type
from fabric_backends.accelerators.generic import TorchAccelerator
from fabric_backends.accelerators.mps import MPSAccelerator
from fabric_backends.launchers.hazards import refuse_unsafe_fork
from fabric_core import DevicesError, Inventory, Registry, Request, UnsupportedError
from fabric_core.resolve import resolve

PRETENDER = """
import os
from types import SimpleNamespace

DEVICES = {devices!r}
if DEVICES is None:
    raise OSError("libcudart.so.12: cannot open shared object file")


def current_accelerator():
    if {none_raises!r}:
        raise RuntimeError("Cannot access accelerator device when none is available.")
    return SimpleNamespace(type={device_type!r}) if {device_type!r} else None


accelerator = SimpleNamespace(current_accelerator=current_accelerator)
backends = SimpleNamespace(mps=SimpleNamespace(is_available=lambda: DEVICES > 0))


def get_device_module(device_type):
    assert device_type == {device_type!r}
    return SimpleNamespace(device_count=lambda: DEVICES)
"""


class Machine:
    """A machine with a PyTorch that pretends to have been built for something, and to find so many devices.

    Attributes:
        folder: Goes in front of the import path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ: dict[str, str] = {}
        self.before = ""

    def install_torch(
        self,
        version: str = "cuda: Optional[str] = None\nhip: Optional[str] = None\n",
        device_type: str | None = None,
        devices: int | None = 0,
        none_raises: bool = False,
    ) -> None:
        package = self.folder / "torch"
        package.mkdir()
        (package / "version.py").write_text(f"from typing import Optional\n__version__ = '9'\n{version}")
        (package / "__init__.py").write_text(
            PRETENDER.format(devices=devices, none_raises=none_raises, device_type=device_type)
        )

    def install(self, distribution: str, entry_points: str) -> None:
        info = self.folder / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)

    def show_trace(self, of: str) -> None:
        """Let a device file of a kind be there; those of the real machine are looked at no more."""
        (self.folder / f"device_of_{of}").touch()

    def ask(self, code: str) -> Any:
        """The value of ``answer`` after the code has run in a fresh process, where `probes` is imported."""
        script = textwrap.dedent(f"""
            import sys
            from fabric_backends.accelerators import probes

            probes.TRACES = {{build: (({str(self.folder)!r} + "/device_of_" + build,), "-") for build in probes.TRACES}}
            {self.before}
            assert "torch" not in sys.modules
        """)
        script += textwrap.dedent(code) + "\nimport json\nprint(json.dumps(answer))\n"
        environ = {
            key: value for key, value in os.environ.items() if not key.startswith(("FABRIC_", "TORCH_"))
        }
        environ |= {"PYTHONPATH": str(self.folder), **self.environ}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def probe(self, name: str = "torch_accelerator") -> tuple[list[int], str, bool]:
        """What a probe finds, what it says, and whether it imported PyTorch."""
        code = f"found = probes.{name}()\nanswer = [found.indices, found.note, 'torch' in sys.modules]"
        indices, note, imported = self.ask(code)
        return indices, note, imported

    def plan(self, **request: Any) -> list[Any]:
        """The accelerator of a plan, its options, and the devices; or the error."""
        return self.ask(f"""
            from fabric_core import FabricError, Registry, Request
            from fabric_core.resolve import resolve
            try:
                plan = resolve(Request(**{request!r}), Registry())
                answer = [plan.accelerator.name, dict(plan.accelerator.options), list(plan.devices)]
            except FabricError as error:
                answer = [type(error).__name__, str(error)]
        """)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


CUDA = "cuda: Optional[str] = '12.4'\nhip: Optional[str] = None\n"
ROCM = "cuda: Optional[str] = None\nhip: Optional[str] = '6.2.41133'\n"
XPU = "cuda: Optional[str] = None\nxpu: Optional[str] = '20250000'\n"


# -- is there a reason to import PyTorch? ------------------------------------------------------------------------------


def test_a_probe_on_this_machine_imports_no_pytorch_and_takes_less_than_5_ms(tmp_path: Path) -> None:
    code = """
        import time
        names = ("mps", "torch_accelerator", *hooks.DEVICE_TYPES)
        asked = [getattr(probes, name) for name in names]
        times = []
        for probe in asked:
            start = time.process_time()
            assert not probe().available
            times.append(1000 * (time.process_time() - start))
        answer = {"times": times, "torch": "torch" in sys.modules, "all": sorted(sys.modules)}
    """
    machine = Machine(tmp_path)
    machine.before = "from fabric_backends import hooks"
    if torch.version.cuda or torch.version.hip or getattr(torch.version, "xpu", None):
        pytest.skip("this PyTorch is built for a device")
    best = min((machine.ask(code) for _ in range(5)), key=lambda answer: sum(answer["times"]))
    assert best["torch"] is False
    assert sum(best["times"]) < 5.0
    assert not {"numpy", "torch", "ctypes", "subprocess"} & set(best["all"])


def test_a_pytorch_for_cpus_is_not_imported(machine: Machine) -> None:
    machine.install_torch()
    machine.show_trace("cuda")
    assert machine.probe() == (
        [],
        "nothing here suggests a device that the installed PyTorch could use",
        False,
    )


@pytest.mark.parametrize(("build", "version"), [("cuda", CUDA), ("hip", ROCM), ("xpu", XPU)])
def test_a_pytorch_for_a_device_is_asked_where_there_is_a_trace_of_one(
    machine: Machine, build: str, version: str
) -> None:
    machine.install_torch(version, device_type="cuda", devices=2)
    assert machine.probe()[2] is False
    machine.show_trace(build)
    assert machine.probe() == ([0, 1], "2 cuda device(s)", True)


@pytest.mark.parametrize(("vendor", "found"), [("0x10de", True), ("0x1002", False)])
def test_a_device_on_the_pci_bus_is_a_trace(
    tmp_path: Path, vendor: str, found: bool, monkeypatch: Any
) -> None:
    (tmp_path / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr(probes, "PCI_VENDORS", str(tmp_path / "*"))
    monkeypatch.setitem(probes.TRACES, "cuda", ((), "0x10de"))
    assert bool(probes._trace("cuda")) is found


def test_a_pytorch_that_is_imported_already_is_asked_in_any_case(machine: Machine) -> None:
    machine.install_torch(device_type="cuda", devices=1)
    code = "import torch\nanswer = probes.torch_accelerator().indices"
    assert machine.ask(code) == [0]


def test_a_package_that_announces_a_device_is_a_reason(machine: Machine) -> None:
    machine.install_torch(device_type="npu", devices=1)
    machine.install("torch-npu", "[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    assert machine.probe("npu") == ([0], "1 npu device(s)", True)
    machine.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    assert machine.probe("npu")[2] is False


def test_a_broken_foreign_package_is_no_reason_and_no_obstacle(machine: Machine) -> None:
    machine.install_torch()
    machine.install("undecodable", "")
    (machine.folder / "undecodable-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe\x00[[[")
    (machine.folder / "empty-1.0.dist-info").touch()
    (machine.folder / "strange-1.0.dist-info" / "entry_points.txt").mkdir(parents=True)
    assert machine.probe()[2] is False


@pytest.mark.parametrize("none_raises", [False, True], ids=["answers None", "raises, as 2.6 does"])
def test_a_pytorch_without_an_accelerator_is_an_answer(machine: Machine, none_raises: bool) -> None:
    machine.install_torch(CUDA, none_raises=none_raises)
    machine.show_trace("cuda")
    assert machine.probe() == ([], "the installed PyTorch is built without an accelerator", True)


# -- whose device is it? -----------------------------------------------------------------------------------------------


def test_a_gpu_that_no_other_distribution_serves_is_not_left_idle(machine: Machine) -> None:
    machine.install_torch(CUDA, device_type="cuda", devices=2)
    machine.show_trace("cuda")
    machine.environ["FABRIC_PLUGINS_DENY"] = "fabric-cuda"
    for asked in ("auto", "gpu", "torch_accelerator"):
        assert machine.plan(accelerator=asked) == ["torch_accelerator", {}, [0, 1]]


@pytest.mark.parametrize("device_type", hooks.DEVICE_TYPES)
def test_a_device_with_a_name_is_found_by_that_name_alone(machine: Machine, device_type: str) -> None:
    machine.install_torch(device_type=device_type, devices=1)
    machine.install("vendor", "[torch.backends]\nvendor = vendor:load\n")
    for asked in ("auto", "gpu", device_type, device_type.upper()):
        assert machine.plan(accelerator=asked) == [device_type, {"device_type": device_type}, [0]]
    other = next(name for name in hooks.DEVICE_TYPES if name != device_type)
    for asked in (other, "torch_accelerator"):
        error, message = machine.plan(accelerator=asked)
        assert error == "DevicesError"
        assert f"the accelerator of the installed PyTorch is {device_type!r}" in message


def test_hardware_that_pytorch_does_not_find_is_named(machine: Machine) -> None:
    machine.install_torch(XPU, device_type="xpu", devices=0)
    machine.show_trace("xpu")
    assert machine.plan()[0] == "cpu"
    error, message = machine.plan(accelerator="xpu")
    assert error == "DevicesError"
    assert "built for 'xpu', but finds no such device" in message


def test_a_pytorch_that_cannot_be_imported_does_not_become_the_cpu_in_silence(machine: Machine) -> None:
    machine.install_torch(CUDA, devices=None)
    machine.show_trace("cuda")
    error, message = machine.plan()
    assert error == "BrokenPluginError"
    assert "libcudart.so.12" in message


def test_an_apple_gpu_is_found_by_its_own_name_and_never_by_the_general_one(machine: Machine) -> None:
    machine.install_torch(device_type="mps", devices=1)
    assert machine.probe("mps") == ([], "this is no Apple computer with an M chip", False)
    machine.before = "import platform; sys.platform, platform.machine = 'darwin', lambda: 'arm64'"
    assert machine.probe("mps") == ([0], "", True)
    assert machine.ask("import torch\nanswer = probes.torch_accelerator().indices") == []
    for asked in ("auto", "gpu", "mps"):
        assert machine.plan(accelerator=asked) == ["mps", {}, [0]]
    assert machine.plan(accelerator="mps", strategy="ddp")[0] == "UnsupportedError"
    assert machine.plan(strategy="ddp")[0] == "cpu"


def test_every_probe_and_every_class_of_the_manifest_is_there() -> None:
    for spec in hooks.fabric_accelerators():
        module, _, name = str(spec.probe).partition(":")
        assert module == probes.__name__
        assert callable(getattr(probes, name))
    with pytest.raises(AttributeError, match="has no attribute 'cuda'"):
        probes.cuda  # noqa: B018


# -- the accelerators themselves ---------------------------------------------------------------------------------------


def test_a_general_accelerator_without_a_device_is_an_error() -> None:
    if torch.accelerator.current_accelerator() is not None:
        pytest.skip("there is one")
    for asked in (None, "xpu"):
        with pytest.raises(DevicesError, match=r"the accelerator of the installed PyTorch is None"):
            TorchAccelerator(asked)


def test_apples_gpu_that_is_passed_as_an_instance_meets_the_same_checks(monkeypatch: Any) -> None:
    monkeypatch.setattr(probes, "mps", lambda: Inventory((0,)))
    assert MPSAccelerator().device(0) == torch.device("mps", 0)
    with pytest.raises(UnsupportedError, match="cannot work with the accelerator 'mps'"):
        resolve(Request(accelerator=MPSAccelerator(), strategy="ddp"), Registry())


OWN_DEVICE = """
import torch
from torch.utils import backend_registration as registration


class Module(registration._DummyBackendModule):
    current = 0

    def device_count(self):
        return 3


class Guard(registration._DummyDeviceGuard):
    def set_device(self, index):
        Module.current = index


def load():
    registration._setup_privateuseone_for_python_backend("mine", backend_module=Module(), device_guard=Guard())
    torch.distributed.Backend.default_device_backend_map["mine"] = "gloo"
"""


def test_a_device_that_a_package_adds_to_the_real_pytorch_is_found_and_built(machine: Machine) -> None:
    """From the package's announcement to the parts of a plan, with PyTorch's own registration of foreign devices."""
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch cannot register a device from Python")
    (machine.folder / "mine.py").write_text(OWN_DEVICE)
    machine.install("mine", "[torch.backends]\nmine = mine:load\n")
    answer = machine.ask("""
        from fabric_core import Registry, Request
        from fabric_core.build import build
        from fabric_core.resolve import resolve
        plan = resolve(Request(devices=[2]), Registry())
        parts = build(plan)
        import torch
        device = parts.strategy.root_device
        answer = [plan.accelerator.name, plan.devices, str(device), parts.accelerator.process_group_backend]
    """)
    assert answer == ["torch_accelerator", [2], "mine:2", "gloo"]


def test_the_current_device_is_chosen_by_its_index(monkeypatch: Any) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    accelerator = TorchAccelerator("xpu")
    accelerator.setup_device(accelerator.device(3))
    assert chosen == [3]
    assert (accelerator.process_group_backend, accelerator.binds_process_group) == ("xccl", False)


def test_a_pytorch_2_6_without_an_accelerator_raises_and_that_is_an_answer(monkeypatch: Any) -> None:
    def current_accelerator() -> Any:
        raise RuntimeError("Can't detect accelerator.")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert current_type() is None
    refuse_unsafe_fork()
    with pytest.raises(DevicesError, match="is None"):
        TorchAccelerator("xpu")
