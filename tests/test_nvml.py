"""The driver is asked through its C interface; a stand-in of the same functions answers here, where there is no GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from cofitune import nvml

FREE, DAMAGED = 70 * 2**30, b"GPU-damaged"
DEVICES = {b"GPU-one": 1, b"MIG-part": 2, DAMAGED: 3}
Pointer = ctypes.POINTER(ctypes.c_void_p)
Numbers = ctypes.POINTER(ctypes.c_ulonglong)


def _driver(starts: bool = True) -> Any:
    """Functions with NVML's names and arguments, called as those of a library are."""
    calls: list[str] = []

    def start() -> int:
        calls.append("start")
        return 0 if starts else 9

    def stop() -> int:
        calls.append("stop")
        return 0

    def find(name: bytes, handle: Any) -> int:
        handle[0] = DEVICES.get(name, 0)
        return 0 if name in DEVICES else 6

    def tell(handle: int, memory: Any) -> int:
        memory[0], memory[1], memory[2] = 80 * 2**30, FREE + handle, 10 * 2**30
        return 15 if handle == DEVICES[DAMAGED] else 0

    integer = ctypes.c_int
    return SimpleNamespace(
        calls=calls,
        nvmlInit_v2=ctypes.CFUNCTYPE(integer)(start),
        nvmlShutdown=ctypes.CFUNCTYPE(integer)(stop),
        nvmlDeviceGetHandleByUUID=ctypes.CFUNCTYPE(integer, ctypes.c_char_p, Pointer)(find),
        nvmlDeviceGetMemoryInfo=ctypes.CFUNCTYPE(integer, ctypes.c_void_p, Numbers)(tell),
    )


class _Loose:
    """The stand-in as ctypes gives a library: pointers to any structure are taken."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._driver, name)
        kinds: dict[str, Any] = {"nvmlDeviceGetHandleByUUID": Pointer, "nvmlDeviceGetMemoryInfo": Numbers}
        if name not in kinds:
            return function
        return lambda first, pointer: function(first, ctypes.cast(pointer, kinds[name]))


@pytest.mark.parametrize(("uuid", "free"), [("one", FREE + 1), ("part", FREE + 2), ("other", None), ("damaged", None)])
def test_a_gpu_or_a_part_of_one_is_asked_by_its_name(uuid: str, free: int | None) -> None:
    driver = _driver()
    assert nvml.free_gpu_memory(uuid, _Loose(driver)) == free
    assert driver.calls == ["start", "stop"]


def test_without_a_driver_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "LIBRARY", "libno-such-driver.so.1")
    assert nvml.free_gpu_memory("one") is None
    assert nvml.free_gpu_memory("one", _Loose(_driver(starts=False))) is None
    assert nvml.free_gpu_memory("one", SimpleNamespace(nvmlInit_v2=lambda: 0, nvmlShutdown=lambda: 0)) is None
