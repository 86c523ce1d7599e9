"""Where the time of a step goes: seconds of its parts, each without those that are parts of it."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from stage_worker.batch import BatchBuilder
from stage_worker.cpu_attention import CpuAttention
from stage_worker.decoder import Decoder
from stage_worker.linear import PlainLinear
from stage_worker.linear_half import HalfLinear
from stage_worker.linear_int4 import Int4Linear
from stage_worker.linear_int8 import Int8Linear
from stage_worker.linear_onednn import OneDnnLinear, PackedLinear
from stage_worker.results import RowSampler

LINEAR, ATTENTION, LAYERS, PLAN, TOKENS, REST = PARTS = (
    "linear layers",
    "attention",
    "rest of the layers",
    "metadata",
    "tokens",
    "all else",
)
_LINEARS = (PlainLinear, HalfLinear, Int4Linear, Int8Linear, OneDnnLinear, PackedLinear)
_METHODS: list[tuple[type, str, str]] = [
    *((kind, "__call__", LINEAR) for kind in _LINEARS if "__call__" in vars(kind)),
    (CpuAttention, "attend", ATTENTION),
    (Decoder, "forward", LAYERS),
    (BatchBuilder, "build", PLAN),
    (RowSampler, "results", TOKENS),
]


class Clock:
    """`seconds` by part, of one thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner_s = [0.0]

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._inner_s.append(0.0)
            started_s = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                took_s = time.perf_counter() - started_s
                self.seconds[part] += took_s - self._inner_s.pop()
                self._inner_s[-1] += took_s

        return wrapped


@contextlib.contextmanager
def timed_parts() -> Iterator[Clock]:
    """Within it, the parts of every stage's steps are told to the clock."""
    clock = Clock()
    with contextlib.ExitStack() as patches:
        for kind, name, part in _METHODS:
            timed = clock.timed(part, vars(kind)[name])
            patches.enter_context(mock.patch.object(kind, name, timed))
        yield clock
