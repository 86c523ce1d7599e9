"""How much memory there is, and giving back what was freed.

Looks at the machine and at the control group, whichever has less left.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Memory that could be allocated now on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_machine_bytes(), _cgroup_bytes())


def trim() -> None:
    """Returns freed memory to the system, where the C library knows how (glibc)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _machine_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**62


def _cgroup_bytes() -> int:
    """What the process's own control group (v2, as containers see it) leaves.

    Pages of files, such as those of the model, count as used there but make room when asked to.
    """
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return 2**62
    stat = dict(line.split(maxsplit=1) for line in lines if " " in line)
    used -= sum(int(stat.get(key, 0)) for key in ("active_file", "inactive_file"))
    return 2**62 if limit == "max" else max(0, int(limit) - used)
