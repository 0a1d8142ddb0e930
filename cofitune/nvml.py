"""What a GPU's memory holds, asked of its driver: unlike CUDA, NVML needs no context, which takes memory itself.

Imports no torch.
"""

from __future__ import annotations

import ctypes
from typing import Any

LIBRARY = "libnvidia-ml.so.1"  # a part of NVIDIA's driver


class _Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def free_gpu_memory(uuid: str, library: Any = None) -> int | None:
    """Bytes of a GPU, or of a part of one (MIG), that no process uses; None where the driver does not say.

    Args:
        uuid: as CUDA writes it, without the kind before it.
        library: NVML, loaded; None: the driver's.
    """
    try:
        nvml = library or ctypes.CDLL(LIBRARY)
        if nvml.nvmlInit_v2() != 0:
            return None
        try:
            return _free(nvml, uuid)
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no such library: another maker's GPU; no such function: a very old driver
        return None


def _free(nvml: Any, uuid: str) -> int | None:
    handle, memory = ctypes.c_void_p(), _Memory()
    for kind in ("GPU", "MIG"):
        name = f"{kind}-{uuid}".encode()
        if nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) == 0:
            done = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
            return int(memory.free) if done == 0 else None
    return None
