"""How much memory a device has left, and giving back what was freed."""

from __future__ import annotations

import ctypes
import gc

import torch

from stage_worker.host_memory import available_host_bytes


def available_bytes(device: torch.device) -> int:
    """Memory that could be allocated now on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_host_bytes()


def trim() -> None:
    """Returns freed memory to the system, where the C library knows how (glibc)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
