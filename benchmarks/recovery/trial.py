"""One recovery, measured: a lone stream of a given context, a worker killed, the next token.

Times come from three clocks that never mix: the client sees when tokens come and asks the scheduler
every few milliseconds how its pipeline is; the scheduler says itself how long each phase of its
mending took; the workers count the time in which they computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from benchmarks.recovery.load import Ask, Load, asks
from benchmarks.recovery.part import Part, until
from benchmarks.recovery.parts_mesh import PartsMesh, Status
from protos import mesh_pb2, mesh_pb2_grpc

# Before the kill, and after it before the stream is cancelled.
TOKENS_BEFORE = 12
TOKENS_AFTER = 4
_BASELINE_TOKENS = TOKENS_BEFORE + TOKENS_AFTER
_WATCH_S = 0.003


@dataclass(frozen=True, slots=True)
class Baseline:
    """Of an undisturbed request, in seconds of compute by stage, and its tokens."""

    ask: Ask
    prefill_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    first_token_s: float
    between_tokens_s: float
    token_ids: tuple[int, ...]

    @property
    def prefill_total_s(self) -> float:
        return sum(self.prefill_s)


@dataclass(frozen=True, slots=True)
class Recovery:
    """`compute_s` is what the rebuild computed on the workers that took the places, `others_s` on
    those that kept theirs: the difference of two runs, so that there is noise in it."""

    context_tokens: int
    total_s: float
    detect_s: float
    fill_s: float
    join_s: float
    rebuild_s: float
    compute_s: float
    others_s: float
    num_tokens_rebuilt: int
    same_tokens: bool
    baseline: Baseline

    @property
    def resume_s(self) -> float:
        """What is left: the step of the next token, its way to the client, and the client's own
        delay in looking."""
        known = self.detect_s + self.fill_s + self.join_s + self.rebuild_s
        return max(0.0, self.total_s - known)


async def measure_baseline(mesh: PartsMesh, context: int, seed: int) -> Baseline:
    """The mesh must not share prefixes: the same prompt is computed twice."""
    (ask,) = asks(1, seed, prompt_tokens=(context,), max_tokens=_BASELINE_TOKENS)
    before = await settled(mesh)
    async with Load(mesh.target, [Ask(ask.prompt, 1)]) as load:
        await load.finish()
    after_prefill = await settled(mesh)
    async with Load(mesh.target, [ask]) as load:
        await load.finish()
    stream, after = load.streams[0], await settled(mesh)
    assert stream.error is None, stream.error
    prefill_s = compute_by_stage(before, after_prefill)
    both_s = compute_by_stage(after_prefill, after)
    return Baseline(
        ask=ask,
        prefill_s=prefill_s,
        decode_s=tuple(
            max(0.0, both - prefill) / (_BASELINE_TOKENS - 1)
            for both, prefill in zip(both_s, prefill_s, strict=True)
        ),
        first_token_s=stream.times_s[0] - stream.started_s,
        between_tokens_s=(stream.times_s[-1] - stream.times_s[0]) / (_BASELINE_TOKENS - 1),
        token_ids=tuple(stream.token_ids),
    )


async def measure_recovery(
    mesh: PartsMesh, baseline: Baseline, stages: Sequence[int], *, freeze: bool = False
) -> Recovery:
    """Kills the workers of `stages` while spares hold the same layers; `mesh` is whole again
    afterwards."""
    await mesh.until(lambda s: _have_spares(s, stages), "spares that have loaded the layers")
    before = await settled(mesh)
    victims = [mesh.at(before, stage) for stage in stages]
    endless = Ask(baseline.ask.prompt, baseline.ask.max_tokens + 1000)
    async with Load(mesh.target, [endless]) as load:
        await load.until_tokens(TOKENS_BEFORE)
        stream = load.streams[0]
        # Whoever looks takes time from two cores: not while the prompt is computed.
        async with watching(mesh, before.pipelines[0].epoch.n) as watch:
            killed_s = strike(victims, freeze)
            seen = len(stream.token_ids)
            # Tokens that were under way when the worker died still come; one that comes after the
            # epoch ended is of the next.
            noticed_s = await watch.until_noticed()
            await until(lambda: stream.times_s[-1] >= noticed_s, "the next token")
        next_s = next(when for when in stream.times_s if when >= noticed_s)
        await load.until_tokens(seen + TOKENS_AFTER)
    after = await settled(mesh)
    for part in victims:
        part.kill()
    num_before = sum(when < noticed_s for when in stream.times_s)
    mending = after.pipelines[0].mending
    known = baseline.token_ids[: len(stream.token_ids)]
    compute_s, others_s = _rebuild_compute_s(
        before, after, baseline, num_before, len(stream.token_ids)
    )
    recovery = Recovery(
        context_tokens=len(baseline.ask.prompt),
        total_s=next_s - killed_s,
        detect_s=noticed_s - killed_s,
        fill_s=mending.fill_ns / 1e9,
        join_s=mending.join_ns / 1e9,
        rebuild_s=mending.rebuild_ns / 1e9,
        compute_s=compute_s,
        others_s=others_s,
        num_tokens_rebuilt=mending.num_tokens_rebuilt,
        same_tokens=tuple(stream.token_ids[: len(known)]) == known,
        baseline=baseline,
    )
    await mesh.restore()
    return recovery


def _have_spares(status: Status, stages: Sequence[int]) -> bool:
    ids = status.pipelines[0].worker_ids
    spans = {worker.worker_id: (worker.span.start, worker.span.end) for worker in status.workers}
    loaded = [
        spans[worker.worker_id]
        for worker in status.workers
        if worker.worker_id not in ids and worker.state == mesh_pb2.WORKER_STATE_READY
    ]
    return all(spans[ids[stage]] in loaded for stage in stages)


def strike(victims: Sequence[Part], freeze: bool) -> float:
    """When it was done."""
    struck_s = time.monotonic()
    for part in victims:
        part.freeze() if freeze else part.kill()
    return struck_s


def _rebuild_compute_s(
    before: Status, after: Status, baseline: Baseline, num_before: int, num_tokens: int
) -> tuple[float, float]:
    """(by those that took a place, by the others): all that was computed, less the first prefill
    and the ordinary steps."""
    then, now = compute_by_worker(before), compute_by_worker(after)
    new_s = others_s = 0.0
    for stage, (old, new) in enumerate(
        zip(before.pipelines[0].worker_ids, after.pipelines[0].worker_ids, strict=True)
    ):
        computed_s, decode_s = now[new] - then.get(new, 0.0), baseline.decode_s[stage]
        if old == new:
            others_s += computed_s - baseline.prefill_s[stage] - (num_tokens - 1) * decode_s
        else:
            new_s += computed_s - (num_tokens - num_before) * decode_s
    return new_s, others_s


def compute_by_worker(status: Status) -> Mapping[str, float]:
    return {worker.worker_id: worker.stats.compute_ns / 1e9 for worker in status.workers}


def compute_by_stage(before: Status, after: Status) -> tuple[float, ...]:
    """Of a time in which nobody's place changed."""
    then, now = compute_by_worker(before), compute_by_worker(after)
    return tuple(now[name] - then[name] for name in after.pipelines[0].worker_ids)


async def settled(mesh: PartsMesh) -> Status:
    """Idle, and every member's heartbeat tells of all that it did."""
    await mesh.until_idle()
    status = await mesh.status()
    while True:
        # Two heartbeats that say the same; between two looks, never instead of one.
        await asyncio.sleep(0.4)
        again = await mesh.status()
        if compute_by_worker(again) == compute_by_worker(status):
            return again
        status = again


class Watch:
    """Who looks at the first pipeline every few milliseconds, until its epoch is over."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._noticed_s: float | None = None

    async def until_noticed(self) -> float:
        await until(lambda: self._noticed_s is not None, "the fault to be noticed")
        assert self._noticed_s is not None
        return self._noticed_s

    async def run(self, channel: grpc.aio.Channel) -> None:
        stub = mesh_pb2_grpc.SchedulerStub(channel)
        while self._noticed_s is None:
            status: Status = await stub.GetStatus(mesh_pb2.GetStatusRequest())
            now_s = time.monotonic()
            (pipeline,) = status.pipelines
            if pipeline.epoch.n > self._epoch or not pipeline.serving:
                self._noticed_s = now_s
            await asyncio.sleep(_WATCH_S)


@contextlib.asynccontextmanager
async def watching(mesh: PartsMesh, epoch: int) -> AsyncIterator[Watch]:
    async with grpc.aio.insecure_channel(mesh.scheduler.facts["address"]) as channel:
        await channel.channel_ready()
        watch = Watch(epoch)
        task = asyncio.create_task(watch.run(channel))
        try:
            yield watch
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
