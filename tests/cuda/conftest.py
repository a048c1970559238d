"""What the tests of fabric_cuda pretend, because no GPU may be here: a management library, streams and events.

Everything that is pretended is in this file. Tests marked ``cuda`` pretend nothing, and run where there is a GPU.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_cuda.accelerators import nvml, visible

UUIDS = ("GPU-11111111-aaaa", "GPU-22222222-bbbb", "GPU-11119999-cccc")
"""The cards of the pretended machine, along its bus. On the first, a process computes; of the second, half is taken."""

LIBRARY = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } load_t;
static const char *uuids[] = {"%s", "%s", "%s"};
static long place(void *handle) { return (long)handle - 1; }
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)(long)(index + 1); return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    for (long i = 0; i < 3; i++) if (!strcmp(uuids[i], uuid)) { *handle = (void *)(i + 1); return 0; }
    return 6;
}
int nvmlDeviceGetUUID(void *handle, char *text, unsigned room) { strncpy(text, uuids[place(handle)], room); return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned room) { strncpy(text, "Pretended 100", room); return 0; }
int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) { return 3; }
int nvmlDeviceGetComputeMode(void *handle, unsigned *mode) { *mode = 0; return 0; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, void *infos) {
    *count = place(handle) == 0; return *count ? 7 : 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory) {
    memory->total = 1000; memory->free = place(handle) == 1 ? 500 : 900; memory->used = 1000 - memory->free; return 0;
}
int nvmlDeviceGetUtilizationRates(void *handle, load_t *load) { load->gpu = 70; load->memory = 30; return 0; }
int nvmlDeviceGetTemperature(void *handle, unsigned sensor, unsigned *degrees) { *degrees = 55; return 0; }
int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) { return 3; }
"""


@pytest.fixture(scope="session")
def pretended_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A management library in C, as the real one is loaded and called; it makes up three devices."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("not run: no C compiler for a pretended management library")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(LIBRARY % UUIDS)
    built = folder / "libnvidia-ml.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", "-o", built, folder / "nvml.c"], check=True, timeout=60
    )
    return built


@pytest.fixture
def management(pretended_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pretended library, where the real one would be found."""
    monkeypatch.setattr(nvml, "LIBRARY", str(pretended_library))
    for name in (*visible.HIDING, visible.ORDER):
        monkeypatch.delenv(name, raising=False)
    nvml._opened.cache_clear()
    yield
    nvml._opened.cache_clear()


class Recorder:
    """Streams and events that copy at once, on the CPU, and note what a device would have been told."""

    def __init__(self) -> None:
        self.notes: list[Any] = []
        self.streams = 0
        self.inside = "main"

    def stream(self, _: Any = None) -> Any:
        self.streams += 1
        recorder, name = self, f"side {self.streams}"

        class Stream:
            def record_event(self) -> str:
                recorder.notes.append(("event", name))
                return f"event of {name}"

        made = Stream()
        made.name = name  # type: ignore[attr-defined]
        return made

    def current(self, _: Any = None) -> Any:
        recorder = self

        class Current:
            def wait_event(self, event: str) -> None:
                recorder.notes.append(("waits for", event))

        return Current()

    @contextmanager
    def entered(self, stream: Any) -> Iterator[None]:
        before, self.inside = self.inside, stream.name
        yield
        self.inside = before


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A device that is only written down: what is copied to it stays on the CPU."""
    found = Recorder()
    monkeypatch.setattr(torch.cuda, "Stream", found.stream)
    monkeypatch.setattr(torch.cuda, "stream", found.entered)
    monkeypatch.setattr(torch.cuda, "current_stream", found.current)

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        found.notes.append(("pinned", found.inside))
        return tensor.clone()

    def record(tensor: torch.Tensor, stream: Any) -> None:
        found.notes.append(("kept for", type(stream).__name__))

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are counted as not run where there is none."""
    skip = pytest.mark.skip(reason="not run: no GPU here")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture
def python() -> Callable[..., str]:
    """Run some code in a fresh interpreter, and give back what it printed."""
    import sys

    def run(code: str, **variables: str) -> str:
        import os

        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
