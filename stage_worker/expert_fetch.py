"""A rank's experts for a placement to come, read on a thread of their own while steps go on."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch

from stage_worker.device_thread import as_mesh_error
from stage_worker.devices import as_out_of_memory
from stage_worker.experts import DenseMlp
from stage_worker.thread_counts import one_thread
from stagemesh.errors import StageMeshError

THREAD_NAME = "experts"

Read: TypeAlias = Callable[[], Iterator[tuple[int, DenseMlp]]]
"""Makes experts, one after another."""
Tell: TypeAlias = Callable[[bool], None]
"""Is told whether all of them are there."""


class ExpertFetch:
    """Begins at once, and tells when it is over. `experts` are there then, or `error` says why not.

    A read that hangs never ends: then nothing is told, and nobody but the thread waits. Whoever
    wants no more of it forgets this object; the thread ends after the expert that it is at, and
    what it has read goes with it. It knows nothing of the stage.
    """

    def __init__(self, read: Read, tell: Tell) -> None:
        self.experts: dict[int, DenseMlp] = {}
        self.error: StageMeshError | None = None
        threading.Thread(
            target=_run, args=(weakref.ref(self), read, tell), name=THREAD_NAME, daemon=True
        ).start()


def _run(wanted: weakref.ref[ExpertFetch], read: Read, tell: Tell) -> None:
    found: dict[int, DenseMlp] = {}
    error: StageMeshError | None = None
    try:
        # Both are settings of a thread.
        with one_thread(), torch.inference_mode():
            for expert, mlp in read():
                if wanted() is None:
                    return
                found[expert] = mlp
    except Exception as raised:
        found, error = {}, as_mesh_error(as_out_of_memory(raised))
    fetch = wanted()
    if fetch is not None:
        fetch.experts, fetch.error = found, error
        tell(error is None)
