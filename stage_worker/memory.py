"""How much memory a device has left, and giving back what was freed."""

from __future__ import annotations

import ctypes
import gc

import torch

from stage_worker.host_memory import available_host_bytes


def available_bytes(device: torch.device) -> int:
    """Memory that could be allocated now on `device`."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return available_host_bytes()


def trim() -> None:
    """Returns freed memory to CUDA devices, and to the system where glibc is the C library."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was not used
    trim_host()


def trim_host() -> None:
    """Returns what was freed to the system, where glibc is the C library; takes milliseconds."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
