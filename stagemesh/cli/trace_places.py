"""When what a trace tells of happened, all on the scheduler's clock.

Stages tell durations only: each step's are counted from when the stage was told of the epoch. So
all that is not known of a stage is where its clock stands against the scheduler's, one number per
stage and epoch. No step reaches a stage before it has left the one before, and none is answered
before it has left the last: over many steps that leaves a narrow window for this number. Stage i of
S is put (i + 1) / (S + 1) into its window, as if all messages took the same time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protos import mesh_pb2, plan_pb2


@dataclass(frozen=True, slots=True)
class PlacedHop:
    """A step at one stage; times are the scheduler's, in nanoseconds from the trace's beginning.

    received -> queued -> computed from `start_ns` to `end_ns` -> serialised until `sent_ns`.
    """

    stage: int
    received_ns: float
    queued_ns: float
    start_ns: float
    end_ns: float
    sent_ns: float


@dataclass(frozen=True, slots=True)
class PlacedStep:
    step: mesh_pb2.TracedStep
    hops: tuple[PlacedHop, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """Where a stage's clock may stand: what is to be added to its times."""

    low_ns: float
    high_ns: float

    def at(self, share: float) -> float:
        """Clocks that drift may turn the window around: its middle is the best guess then."""
        if self.low_ns > self.high_ns:
            share = 0.5
        return self.low_ns + share * (self.high_ns - self.low_ns)


def place(steps: Iterable[mesh_pb2.TracedStep]) -> list[PlacedStep]:
    """In the order given; steps without timings of their stages have no hops."""
    steps = list(steps)
    epochs: dict[tuple[str, int, int], list[mesh_pb2.TracedStep]] = defaultdict(list)
    for step in steps:
        if step.timings:
            epochs[_epoch(step)].append(step)
    offsets = {key: _offsets([list(s.timings) for s in of], of) for key, of in epochs.items()}
    return [PlacedStep(step, _hops(step, offsets.get(_epoch(step), ()))) for step in steps]


def _epoch(step: mesh_pb2.TracedStep) -> tuple[str, int, int]:
    return step.pipeline_id, step.epoch.term, step.epoch.n


def _offsets(
    timings: Sequence[Sequence[plan_pb2.HopTiming]], steps: Sequence[mesh_pb2.TracedStep]
) -> tuple[float, ...]:
    """One per stage of an epoch."""
    num_stages = min(map(len, timings))
    windows = []
    for stage in range(num_stages):
        lows, highs = [], []
        for step, hops in zip(steps, timings, strict=True):
            upstream_ns = sum(map(_inside_ns, hops[:stage]))
            downstream_ns = sum(map(_inside_ns, hops[stage + 1 :]))
            lows.append(step.sent_ns + upstream_ns - _received_ns(hops[stage]))
            highs.append(step.done_ns - downstream_ns - _sent_ns(hops[stage]))
        windows.append(Window(max(lows), min(highs)))
    return tuple(window.at((stage + 1) / (num_stages + 1)) for stage, window in enumerate(windows))


def _hops(step: mesh_pb2.TracedStep, offsets: tuple[float, ...]) -> tuple[PlacedHop, ...]:
    return tuple(
        PlacedHop(
            stage=hop.stage,
            received_ns=offset + _received_ns(hop),
            queued_ns=offset + hop.started_ns - hop.queue_ns,
            start_ns=offset + hop.started_ns,
            end_ns=offset + hop.started_ns + hop.compute_ns,
            sent_ns=offset + _sent_ns(hop),
        )
        for hop, offset in zip(step.timings, offsets, strict=False)
    )


def _received_ns(hop: plan_pb2.HopTiming) -> int:
    """On the stage's clock: when the first frame was there."""
    return int(hop.started_ns - hop.queue_ns - hop.receive_ns)


def _sent_ns(hop: plan_pb2.HopTiming) -> int:
    return int(hop.started_ns + hop.compute_ns + hop.serialise_ns)


def _inside_ns(hop: plan_pb2.HopTiming) -> int:
    return _sent_ns(hop) - _received_ns(hop)
