"""The scheduling core: who runs next, decided in one place.

It does no I/O and has no clock: requests, results and the time come in by calls, steps and events
go out as values. Whoever drives it (the asyncio driver, the simulator, the planner) sends every
step in the order in which `schedule` gave it, and hands back the results in that order.
"""

from __future__ import annotations

from collections.abc import Collection

from scheduler.core.events import EndReason, Finished, Tokens
from scheduler.core.forecast import check_deadline
from scheduler.core.hopeless import too_long, why_hopeless
from scheduler.core.in_flight import StepInFlight
from scheduler.core.integrity import check_core
from scheduler.core.limits import SchedulerLimits
from scheduler.core.moving import RECONSIDER_NS
from scheduler.core.pipeline import Pipeline, PipelineFacts
from scheduler.core.planner import Planner
from scheduler.core.request import Request, RequestKey
from scheduler.core.results import match_result, row_error
from scheduler.core.roster import Roster
from scheduler.core.sequence import PROBE, Sequence
from scheduler.core.stats import CoreStats, core_stats
from stagemesh.errors import (
    ContextLengthExceeded,
    MeshUnavailable,
    QueueFull,
    RequestDeadlineExceeded,
    StageMeshError,
)
from stagemesh.plan import RowResult, Step, StepResult


class SchedulerCore:
    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._roster = Roster()
        self._pipelines: dict[str, Pipeline] = {}
        self._planner = Planner(limits, self._roster, self._pipelines)
        self._max_capacity = 0  # of all pipelines, in tokens; 0 without one
        self._now_ns = 0

    # ---- requests ------------------------------------------------------------------------------

    def submit(self, request: Request, now_ns: int) -> None:
        """Accepts a request. An attempt that is not higher than one known is ignored.

        Raises QueueFull, also for a deadline that cannot be met at the rates measured, and
        ContextLengthExceeded; then nothing is kept of the request.
        """
        self._now_ns = now_ns
        if request.attempt <= self._roster.last_attempt(request.key):
            return
        try:
            self._check_admissible(request)
        except StageMeshError:
            self._roster.counters.num_refused += 1
            raise
        older = self._roster.live.get(request.key)
        if older is not None:
            self._end(older, EndReason.ABORTED)
        sequence = self._roster.accept(request, now_ns)
        self._end_if_done(sequence)
        self._end_if_hopeless(sequence)

    def abort(self, key: RequestKey, now_ns: int, attempt: int | None = None) -> None:
        """Ends a request, if it lives and `attempt` is not older; its blocks are free at once."""
        self._now_ns = now_ns
        sequence = self._roster.live.get(key)
        if sequence and (attempt is None or attempt >= sequence.request.attempt):
            self._end(sequence, EndReason.ABORTED)

    def abort_gateway(self, gateway: int, now_ns: int) -> None:
        """Ends all requests of a gateway that is gone."""
        self._now_ns = now_ns
        self._roster.end_gateway(gateway, now_ns)

    # ---- pipelines -----------------------------------------------------------------------------

    def add_pipeline(self, facts: PipelineFacts, now_ns: int) -> None:
        """A pipeline serves from now on. Its id must be free."""
        assert facts.pipeline_id not in self._pipelines, f"{facts.pipeline_id} is there already"
        self._now_ns = now_ns
        self._pipelines[facts.pipeline_id] = Pipeline(facts, self._limits, now_ns)
        self._pipelines_changed()

    def remove_pipeline(self, pipeline_id: str, now_ns: int) -> None:
        """A pipeline and its KV are gone; its requests catch up elsewhere, or when it is back.

        An unknown id is ignored."""
        self._now_ns = now_ns
        pipeline = self._pipelines.pop(pipeline_id, None)
        if pipeline is None:
            return
        for sequence in pipeline.running.values():
            sequence.table.discard()
            if not sequence.is_probe:
                sequence.begin_run()
                self._roster.queue.add(sequence)
        self._pipelines_changed()

    def suspend_pipeline(self, pipeline_id: str, now_ns: int) -> None:
        """The epoch ended: what was in flight is planned again once the pipeline is resumed.

        An unknown id is ignored."""
        self._now_ns = now_ns
        if pipeline := self._pipelines.get(pipeline_id):
            pipeline.suspend(now_ns)
            for sequence in [each for each in pipeline.running.values() if each.is_probe]:
                pipeline.dismiss(sequence)

    def resume_pipeline(
        self, facts: PipelineFacts, lost_stages: Collection[int], now_ns: int
    ) -> None:
        """A suspended pipeline, cut as before, begins the epoch of `facts`.

        The KV of `lost_stages` is rebuilt from what other stages have; `num_blocks` may differ.
        """
        self._now_ns = now_ns
        pipeline = self._pipelines[facts.pipeline_id]
        assert pipeline.is_suspended, f"{facts.pipeline_id} was not suspended"
        assert facts.num_stages == pipeline.facts.num_stages
        assert facts.block_size_tokens == pipeline.facts.block_size_tokens
        pipeline.resume(facts, lost_stages, self._planner.preempt, now_ns)
        self._pipelines_changed()

    def blocks_in_use(self, pipeline_id: str) -> tuple[int, ...]:
        """Blocks whose content is worth moving to another worker: owned or cached ones."""
        pipeline = self._pipelines.get(pipeline_id)
        return pipeline.pool.blocks_in_use() if pipeline else ()

    def fail_oldest_step(self, pipeline_id: str, error: StageMeshError, now_ns: int) -> None:
        """Ends the requests of a step that no epoch gets done, so that the others can go on."""
        self._now_ns = now_ns
        pipeline = self._pipelines.get(pipeline_id)
        if pipeline is None or not pipeline.in_flight:
            return
        for sequence in pipeline.in_flight[0].current_sequences():
            self._end(sequence, EndReason.ERROR, error)

    def probe(self, pipeline_id: str, now_ns: int) -> bool:
        """Has one token go through the whole of an idle pipeline; all that comes of it is a step.

        Returns whether it was planned: not while steps are in flight, which show as much.
        """
        self._now_ns = now_ns
        pipeline = self._pipelines.get(pipeline_id)
        if pipeline is None or pipeline.is_suspended or pipeline.running or pipeline.in_flight:
            return False
        pipeline.admit(self._roster.number(PROBE, now_ns), [])
        return True

    # ---- steps ---------------------------------------------------------------------------------

    def schedule(self, now_ns: int) -> list[Step]:
        """Every step that may be sent now, in order. Expires deadlines first."""
        self._now_ns = now_ns
        for sequence in self._roster.expired(now_ns):
            self._end(sequence, EndReason.ERROR, self._lateness())
        return self._planner.plan(now_ns)

    def on_result(self, result: StepResult, now_ns: int) -> None:
        """Takes a step's answer. What belongs to an older epoch or was answered before is dropped.

        Raises ProtocolError for an answer out of order or to something else than was asked; then
        nothing of it is taken, and the epoch should be ended.
        """
        self._now_ns = now_ns
        pipeline = self._pipelines.get(result.pipeline_id)
        in_flight = match_result(pipeline, result) if pipeline else None
        if pipeline is None or in_flight is None:
            return
        pipeline.step_done(result.timings, now_ns)
        num_generated = self._take_rows(pipeline, in_flight, result.rows)
        self._roster.counters.tokens_generated(num_generated, now_ns)

    def take_events(self) -> list[Tokens | Finished]:
        """What happened since the last call, in order."""
        return self._roster.take_events()

    def next_deadline_ns(self) -> int | None:
        """When `schedule` must be called at the latest, if nothing else happens."""
        at_ns = self._roster.next_deadline_ns()
        if not self._planner.pipelines_to_leave():
            return at_ns
        reconsider_ns = self._now_ns + RECONSIDER_NS
        return reconsider_ns if at_ns is None else min(at_ns, reconsider_ns)

    def stats(self, now_ns: int | None = None) -> CoreStats:
        """Rates are of the seconds before `now_ns`; None: before the last call that had a time."""
        now_ns = self._now_ns if now_ns is None else now_ns
        return core_stats(self._roster, self._pipelines.values(), now_ns)

    def check_integrity(self) -> None:
        """Raises AssertionError if a block is leaked or wrongly shared, a counter out of order, a
        request in two places, … Cost grows with everything that is held: for tests, and when idle.
        """
        check_core(self._pipelines.values(), self._roster)

    # ---- inside --------------------------------------------------------------------------------

    def _check_admissible(self, request: Request) -> None:
        # A resumed request was admitted before: refusing it now would cut its stream.
        if request.output_token_ids:
            return
        num_tokens = len(request.prompt_token_ids)
        if 0 < self._max_capacity <= num_tokens:
            raise ContextLengthExceeded(too_long(num_tokens, self._max_capacity), param="prompt")
        num_waiting = len(self._roster.queue)
        if num_waiting >= self._limits.max_waiting_requests:
            raise QueueFull(
                f"{num_waiting} requests are waiting, no more are taken",
                retry_after_s=self._roster.counters.retry_after_s(num_waiting, self._now_ns),
            )
        pipelines, max_tokens = self._pipelines.values(), self._limits.max_step_tokens
        check_deadline(request, self._roster.queue, pipelines, max_tokens, self._now_ns)

    def _lateness(self) -> StageMeshError:
        if all(pipeline.is_suspended for pipeline in self._pipelines.values()):
            return MeshUnavailable("no pipeline served before the deadline", retry_after_s=1.0)
        return RequestDeadlineExceeded("the deadline has passed")

    def _pipelines_changed(self) -> None:
        """What waits may have become hopeless, or be no longer so."""
        pipelines = self._pipelines.values()
        self._max_capacity = max((p.facts.capacity_tokens for p in pipelines), default=0)
        for sequence in self._roster.queue:
            self._end_if_done(sequence)
            self._end_if_hopeless(sequence)

    def _take_rows(
        self, pipeline: Pipeline, done: StepInFlight, answers: Collection[RowResult]
    ) -> int:
        """How many tokens were generated."""
        num_generated = 0
        for sequence, row, answer in zip(done.sequences, done.step.rows, answers, strict=True):
            if sequence.run != row.run or sequence.has_ended:
                continue  # it was given up since
            if answer.error is not None:
                self._fail(pipeline, sequence, answer.error)
            elif sequence.is_probe:
                self._planner.preempt(sequence)
            elif sequence.sequence_id not in done.rebuilds:
                num_generated += len(answer.sampled)
                self._take_row(pipeline, sequence, row.end, answer)
        return num_generated

    def _take_row(
        self, pipeline: Pipeline, sequence: Sequence, end: int, answer: RowResult
    ) -> None:
        """The sequence is computed up to `end`."""
        sequence.num_computed = end
        if answer.prompt_logprobs:
            sequence.prompt_logprobs += answer.prompt_logprobs
        if self._limits.prefix_cache and pipeline.has_new_block(sequence):
            pipeline.name_computed_blocks(sequence)
        for token in answer.sampled:
            self._roster.deliver(sequence, token)
            pipeline.turns.token_came(sequence)
            num_tokens = len(sequence.tokens)
            if num_tokens >= sequence.max_length or token.token_id in sequence.stop_token_ids:
                self._end_if_done(sequence)

    def _end_if_done(self, sequence: Sequence) -> None:
        """Ends the sequence if its last token was its last."""
        num_tokens = len(sequence.tokens)
        if num_tokens == sequence.num_prompt_tokens:
            return
        pipeline = sequence.pipeline
        max_length = pipeline.capacity_tokens if pipeline else self._max_capacity
        if sequence.tokens[-1] in sequence.stop_token_ids:
            self._end(sequence, EndReason.STOP_TOKEN)
        elif num_tokens >= sequence.request.total_length or num_tokens == max_length:
            self._end(sequence, EndReason.LENGTH)

    def _end_if_hopeless(self, sequence: Sequence) -> None:
        """Ends what would wait for ever."""
        pipelines = self._pipelines.values()
        if not sequence.has_ended and (
            error := why_hopeless(sequence, pipelines, self._max_capacity)
        ):
            self._end(sequence, EndReason.ERROR, error)

    def _fail(self, pipeline: Pipeline, sequence: Sequence, error: str) -> None:
        """A row could not be computed; what it may have spoilt is given to nobody else."""
        pipeline.forget_content(sequence.table.block_ids())
        self._end(sequence, EndReason.ERROR, row_error(error))

    def _end(
        self, sequence: Sequence, reason: EndReason, error: StageMeshError | None = None
    ) -> None:
        if sequence.is_probe:
            self._planner.preempt(sequence)
            return
        self._roster.end(sequence, reason, self._now_ns, error)
