"""`stagemesh worker`: the same as `python -m stage_worker`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from stagemesh.cli.run_module import run_module
from stagemesh.errors import ConfigError


def run(argv: Sequence[str]) -> int:
    require_worker_extra()
    return run_module("stage_worker", argv)


def require_worker_extra() -> None:
    """Raises ConfigError where only what gateway and scheduler need is installed."""
    missing = [name for name in ("torch", "safetensors") if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(
            f"a worker needs {' and '.join(missing)}: pip install 'stagemesh[worker]'"
        )
