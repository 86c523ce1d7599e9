"""How much memory the host has left: the machine or the control group, whichever has less.

Does not import torch, so that a worker can say it while its device is at work.
"""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_host_bytes() -> int:
    """Memory that could be allocated now. What was allocated and never touched counts as free."""
    return min(_machine_bytes(), _cgroup_bytes())


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
