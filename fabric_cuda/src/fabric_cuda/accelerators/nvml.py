"""NVIDIA's management library: what the driver knows of its devices, without starting to use one of them.

Only functions and structures of its stable interface are used, as its header `nvml.h` declares them. Where the
library is missing or silent (other vendors, some small boards), there is no answer, and that is no error.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import byref, c_char_p, c_uint, c_ulonglong, c_void_p, create_string_buffer
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvidia-ml.so.1"

DEFAULT_MODE = 0
"""Any number of processes may compute on the device (``NVML_COMPUTEMODE_DEFAULT``)."""

PROHIBITED_MODE = 2
"""No process may (``NVML_COMPUTEMODE_PROHIBITED``)."""

_TEMPERATURE_OF_GPU = 0
_TOO_SMALL = 7  # NVML_ERROR_INSUFFICIENT_SIZE: there is something, and no room was given for it
_TEXT = 96  # NVML_DEVICE_UUID_V2_BUFFER_SIZE, which is enough for names too


class NVMLError(Exception):
    """The library does not answer a question about a device."""


class _Memory(ctypes.Structure):
    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", c_uint), ("memory", c_uint)]


@dataclass(frozen=True)
class Load:
    """How busy a device is.

    Attributes:
        compute_percent: Of the last moments, how much a kernel was running.
        memory_percent: Likewise, how much memory was being read or written.
    """

    compute_percent: int
    memory_percent: int


class NVML:
    """The library, ready for questions. Devices are told apart by their UUID (``"GPU-…"``).

    Raises:
        OSError: It is not installed.
        NVMLError: It is, but finds no driver.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._ask("nvmlInit_v2")

    def uuids(self) -> tuple[str, ...]:
        """Of every device of the machine, in the order of the PCI bus."""
        count = c_uint()
        self._ask("nvmlDeviceGetCount_v2", byref(count))
        found = []
        for index in range(count.value):
            handle = c_void_p()
            self._ask("nvmlDeviceGetHandleByIndex_v2", c_uint(index), byref(handle))
            found.append(self._text("nvmlDeviceGetUUID", handle))
        return tuple(found)

    def name(self, uuid: str) -> str:
        """What the maker calls it."""
        return self._text("nvmlDeviceGetName", self._handle(uuid))

    def is_divided(self, uuid: str) -> bool:
        """Whether it is divided into several devices (MIG)."""
        current, pending = c_uint(), c_uint()
        try:
            self._ask("nvmlDeviceGetMigMode", self._handle(uuid), byref(current), byref(pending))
        except NVMLError:  # a device that cannot be divided
            return False
        return bool(current.value)

    def compute_mode(self, uuid: str) -> int:
        """Which processes may compute on it; `DEFAULT_MODE` and `PROHIBITED_MODE` are two of the modes."""
        return self._number("nvmlDeviceGetComputeMode", uuid)

    def processes(self, uuid: str) -> int:
        """How many processes compute on it. Those of other containers may not be counted."""
        count = c_uint(0)
        arguments = (self._handle(uuid), byref(count), None)
        self._ask("nvmlDeviceGetComputeRunningProcesses_v3", *arguments, allowed=_TOO_SMALL)
        return count.value

    def free_memory(self, uuid: str) -> int:
        """In bytes."""
        return int(self._memory(uuid).free)

    def total_memory(self, uuid: str) -> int:
        """In bytes."""
        return int(self._memory(uuid).total)

    def load(self, uuid: str) -> Load:
        """How busy it was during the last moments."""
        found = _Utilization()
        self._ask("nvmlDeviceGetUtilizationRates", self._handle(uuid), byref(found))
        return Load(found.gpu, found.memory)

    def temperature(self, uuid: str) -> int:
        """In degrees Celsius."""
        return self._number("nvmlDeviceGetTemperature", uuid, c_uint(_TEMPERATURE_OF_GPU))

    def power(self, uuid: str) -> float:
        """In watts."""
        return self._number("nvmlDeviceGetPowerUsage", uuid) / 1000

    def _memory(self, uuid: str) -> Any:
        found = _Memory()
        self._ask("nvmlDeviceGetMemoryInfo", self._handle(uuid), byref(found))
        return found

    def _handle(self, uuid: str) -> c_void_p:
        handle = c_void_p()
        self._ask("nvmlDeviceGetHandleByUUID", c_char_p(uuid.encode()), byref(handle))
        return handle

    def _text(self, function: str, handle: c_void_p) -> str:
        buffer = create_string_buffer(_TEXT)
        self._ask(function, handle, buffer, c_uint(_TEXT))
        return buffer.value.decode()

    def _number(self, function: str, uuid: str, *arguments: Any) -> int:
        found = c_uint()
        self._ask(function, self._handle(uuid), *arguments, byref(found))
        return found.value

    def _ask(self, name: str, *arguments: Any, allowed: int = 0) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise NVMLError(f"{LIBRARY} is too old: it has no {name}")
        code = function(*arguments)
        if code not in (0, allowed):
            raise NVMLError(f"{name} answered with the error {code}")


def library() -> NVML | None:
    """The library; ``None`` when it is not installed, or finds no driver."""
    return _opened(os.getpid())


@functools.cache
def _opened(pid: int) -> NVML | None:  # noqa: ARG001 - a fork has to open it again
    try:
        return NVML()
    except (OSError, NVMLError):
        return None
