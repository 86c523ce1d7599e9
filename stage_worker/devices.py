"""Devices that a stage may be loaded on: which there are, and whether their memory has room."""

from __future__ import annotations

import torch

from stage_worker.memory import available_bytes
from stagemesh.errors import ConfigError, OutOfMemory


def find_device(name: str) -> torch.device:
    """Of "cpu", "cuda" or "cuda:N"; raises ConfigError where there is none."""
    if name not in ("cpu", "cuda") and not name.startswith("cuda:"):
        raise ConfigError(f"device must be cpu or cuda, not {name!r}")
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this torch finds no CUDA device")
    index = name.removeprefix("cuda").removeprefix(":") or "0"
    if not index.isdecimal() or int(index) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    # Of the thread that loads, which is the one that executes: kernels are started on it.
    torch.cuda.set_device(int(index))
    return torch.device("cuda", int(index))


def check_fits(weight_bytes: int, device: torch.device) -> None:
    """Raises OutOfMemory."""
    available = available_bytes(device)
    if weight_bytes > available:
        raise OutOfMemory(
            f"the span's weights take {weight_bytes} bytes, {available} are available on {device}"
        )


def as_out_of_memory(error: Exception) -> Exception:
    """torch says that memory ran out in words only, on the CPU."""
    told = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in told:
        return OutOfMemory(f"not enough memory to load the span: {told.splitlines()[0]}")
    return error
