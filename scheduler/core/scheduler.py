"""The scheduling core: who runs next, decided in one place.

It does no I/O and has no clock: requests, results and the time come in by calls, steps and events
go out as values. Whoever drives it (the asyncio driver, the simulator, the planner) sends every
step in the order in which `schedule` gave it, and hands back the results in that order.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import count

from scheduler.core.admission import AdmissionRound
from scheduler.core.batch import plan_step
from scheduler.core.counters import Counters
from scheduler.core.deadlines import Deadlines
from scheduler.core.events import EndReason, Finished, Tokens
from scheduler.core.integrity import check_core
from scheduler.core.limits import SchedulerLimits
from scheduler.core.pipeline import Pipeline, PipelineFacts, RowInFlight
from scheduler.core.queue import WaitingQueue
from scheduler.core.request import Request, RequestKey
from scheduler.core.results import match_result
from scheduler.core.sequence import Sequence
from scheduler.core.stats import CoreStats, pipeline_stats
from stagemesh.errors import (
    ContextLengthExceeded,
    InternalError,
    MeshUnavailable,
    NotFiniteError,
    QueueFull,
    RequestDeadlineExceeded,
    StageMeshError,
)
from stagemesh.plan import NOT_FINITE, Epoch, RowResult, SampledToken, Step, StepResult

_MAX_ENDED_REMEMBERED = 8192


class SchedulerCore:
    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._pipelines: dict[str, Pipeline] = {}
        self._queue = WaitingQueue()
        self._live: dict[RequestKey, Sequence] = {}
        # The last attempt of requests that ended lately: a submission may come twice.
        self._ended: OrderedDict[RequestKey, int] = OrderedDict()
        self._deadlines = Deadlines()
        self._counters = Counters()
        self._events: list[Tokens | Finished] = []
        self._numbers = count(1)
        self._now_ns = 0

    # ---- requests ------------------------------------------------------------------------------

    def submit(self, request: Request, now_ns: int) -> None:
        """Accepts a request. An attempt that is not higher than one known is ignored.

        Raises QueueFull and ContextLengthExceeded; then nothing is kept of the request.
        """
        self._now_ns = now_ns
        older = self._live.get(request.key)
        if request.attempt <= (
            older.request.attempt if older else self._ended.get(request.key, -1)
        ):
            return
        try:
            self._check_admissible(request)
        except StageMeshError:
            self._counters.num_refused += 1
            raise
        if older is not None:
            self._end(older, EndReason.ABORTED)
        self._accept(request)

    def abort(self, key: RequestKey, now_ns: int, attempt: int | None = None) -> None:
        """Ends a request, if it lives and `attempt` is not older; its blocks are free at once."""
        self._now_ns = now_ns
        sequence = self._live.get(key)
        if sequence and (attempt is None or attempt >= sequence.request.attempt):
            self._end(sequence, EndReason.ABORTED)

    def abort_gateway(self, gateway: int, now_ns: int) -> None:
        """Ends all requests of a gateway that is gone."""
        self._now_ns = now_ns
        for key in [key for key in self._live if key.gateway == gateway]:
            self._end(self._live[key], EndReason.ABORTED)
        for key in [key for key in self._ended if key.gateway == gateway]:
            del self._ended[key]

    # ---- pipelines -----------------------------------------------------------------------------

    def add_pipeline(self, facts: PipelineFacts, now_ns: int) -> None:
        """A pipeline serves from now on. Its id must be free."""
        self._now_ns = now_ns
        assert facts.pipeline_id not in self._pipelines, f"{facts.pipeline_id} is there already"
        self._pipelines[facts.pipeline_id] = Pipeline(facts, self._limits.max_steps_in_flight)
        self._end_unplaceable()

    def remove_pipeline(self, pipeline_id: str, now_ns: int) -> None:
        """A pipeline and its KV are gone; its requests catch up elsewhere, or when it is back."""
        self._now_ns = now_ns
        pipeline = self._pipelines.pop(pipeline_id, None)
        if pipeline is None:
            return
        for sequence in pipeline.running.values():
            sequence.table.discard()
            sequence.begin_run()
            self._queue.add(sequence)
        self._end_unplaceable()

    def restart_epoch(self, pipeline_id: str, epoch: Epoch, now_ns: int) -> None:
        """The same workers begin a new epoch with their KV; what was in flight is planned again."""
        self._now_ns = now_ns
        self._pipelines[pipeline_id].restart(epoch)

    # ---- steps ---------------------------------------------------------------------------------

    def schedule(self, now_ns: int) -> list[Step]:
        """Every step that may be sent now, in order. Expires deadlines first."""
        self._now_ns = now_ns
        for sequence in self._deadlines.expired(now_ns):
            self._end(sequence, EndReason.ERROR, RequestDeadlineExceeded("the deadline has passed"))
        steps: list[Step] = []
        while made := self._schedule_round():
            steps += made
        return steps

    def on_result(self, result: StepResult, now_ns: int) -> None:
        """Takes a step's answer. What belongs to an older epoch or was answered before is dropped.

        Raises ProtocolError for an answer out of order or to something else than was asked; then
        nothing of it is taken, and the epoch should be ended.
        """
        self._now_ns = now_ns
        pipeline = self._pipelines.get(result.pipeline_id)
        step = match_result(pipeline, result) if pipeline else None
        if pipeline is None or step is None:
            return
        pipeline.step_done(result.timings)
        for row, answer in zip(step.rows, result.rows, strict=True):
            if row.is_current:
                self._take_row(pipeline, row, answer)

    def take_events(self) -> list[Tokens | Finished]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def next_deadline_ns(self) -> int | None:
        """When `schedule` must be called at the latest, if nothing else happens."""
        return self._deadlines.next_ns()

    def stats(self, now_ns: int | None = None) -> CoreStats:
        """Rates are of the seconds before `now_ns`; None: before the last call that had a time."""
        now_ns = self._now_ns if now_ns is None else now_ns
        counters = self._counters
        return CoreStats(
            num_waiting=len(self._queue),
            num_running=len(self._live) - len(self._queue),
            num_accepted=counters.num_accepted,
            num_finished=counters.num_finished,
            num_refused=counters.num_refused,
            num_aborted=counters.num_aborted,
            num_failed=counters.num_failed,
            num_preempted=counters.num_preempted,
            generated_tokens=counters.generated_tokens,
            prompt_tokens=counters.prompt_tokens,
            cached_prompt_tokens=counters.cached_prompt_tokens,
            generated_tokens_per_s=counters.generated_rate.per_second(now_ns),
            prompt_tokens_per_s=counters.prompt_rate.per_second(now_ns),
            pipelines=tuple(pipeline_stats(p) for p in self._pipelines.values()),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if a block is leaked or wrongly shared, a counter out of order, a
        request in two places, … Cost grows with everything that is held: for tests, and when idle.
        """
        check_core(self._pipelines.values(), self._queue, self._live.values(), self.stats())

    # ---- inside --------------------------------------------------------------------------------

    def _check_admissible(self, request: Request) -> None:
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        if self._pipelines and num_tokens >= self._max_capacity and not request.output_token_ids:
            raise ContextLengthExceeded(self._too_long(num_tokens), param="prompt")
        # A resumed request was admitted before: refusing it now would cut its stream.
        if not request.output_token_ids and len(self._queue) >= self._limits.max_waiting_requests:
            retry_after_s = self._counters.retry_after_s(len(self._queue), self._now_ns)
            raise QueueFull(
                f"{len(self._queue)} requests are waiting, no more are taken",
                retry_after_s=retry_after_s,
            )

    @property
    def _max_capacity(self) -> int:
        return max((p.facts.capacity_tokens for p in self._pipelines.values()), default=0)

    def _too_long(self, num_tokens: int) -> str:
        return (
            f"{num_tokens} tokens leave no room for output in the longest context, "
            f"{self._max_capacity} tokens"
        )

    def _accept(self, request: Request) -> None:
        number = next(self._numbers)
        sequence = Sequence(request, number, number, self._now_ns)
        self._counters.num_accepted += 1
        self._live[request.key] = sequence
        self._deadlines.add(sequence)
        self._queue.add(sequence)
        reason = self._ending(sequence)
        if reason is not None:
            self._end(sequence, reason)

    def _ending(self, sequence: Sequence) -> EndReason | None:
        """Why the sequence ends after its present last token, if it does."""
        request = sequence.request
        if sequence.num_output_tokens == 0:
            return None
        if sequence.tokens[-1] in request.sampling.stop_token_ids:
            return EndReason.STOP_TOKEN
        pipeline = sequence.pipeline
        max_length = pipeline.facts.capacity_tokens if pipeline else self._max_capacity
        is_at_end = 0 < max_length <= sequence.num_tokens
        if sequence.num_output_tokens >= request.max_tokens or is_at_end:
            return EndReason.LENGTH
        return None

    def _end_unplaceable(self) -> None:
        """Ends those that would wait for ever, since no pipeline holds one token more of them."""
        for sequence in self._queue if self._pipelines else ():
            if sequence.num_tokens >= self._max_capacity:
                has_run = sequence.admitted_ns is not None
                error = MeshUnavailable if has_run else ContextLengthExceeded
                self._end(sequence, EndReason.ERROR, error(self._too_long(sequence.num_tokens)))

    def _schedule_round(self) -> list[Step]:
        """At most one step for each pipeline."""
        self._admit()
        steps = []
        for pipeline in self._pipelines.values():
            if pipeline.num_step_slots > 0:
                step = plan_step(pipeline, self._limits, self._preempt)
                if step is not None:
                    steps.append(step)
        return steps

    def _admit(self) -> None:
        if not self._queue:
            return
        admission = AdmissionRound(self._pipelines.values(), self._limits, self._preempt)
        for sequence in self._queue:
            if admission.is_over:
                return
            if admission.admit(sequence):
                self._queue.remove(sequence)
                self._note_admitted(sequence)

    def _note_admitted(self, sequence: Sequence) -> None:
        if sequence.admitted_ns is not None:
            return
        sequence.admitted_ns = self._now_ns
        num_prompt = sequence.num_prompt_tokens
        sequence.num_cached_prompt_tokens = min(sequence.num_computed, num_prompt)
        self._counters.prompt_admitted(num_prompt, sequence.num_cached_prompt_tokens, self._now_ns)

    def _preempt(self, sequence: Sequence) -> None:
        """Gives the sequence's blocks up; it waits again and will compute them anew."""
        assert sequence.pipeline is not None
        sequence.pipeline.dismiss(sequence)
        sequence.begin_run()
        self._queue.add(sequence)
        self._counters.num_preempted += 1

    def _take_row(self, pipeline: Pipeline, row: RowInFlight, answer: RowResult) -> None:
        sequence = row.sequence
        if answer.error is not None:
            self._fail(pipeline, sequence, answer.error)
            return
        sequence.num_computed = row.end
        sequence.prompt_logprobs.extend(answer.prompt_logprobs)
        if self._limits.prefix_cache:
            pipeline.name_computed_blocks(sequence)
        for token in answer.sampled:
            self._take_token(sequence, token)

    def _take_token(self, sequence: Sequence, token: SampledToken) -> None:
        index = sequence.num_output_tokens
        is_first = index == len(sequence.request.output_token_ids)
        prompt_logprobs = tuple(sequence.prompt_logprobs) if is_first else ()
        sequence.tokens.append(token.token_id)
        self._counters.token_generated(self._now_ns)
        self._events.append(
            Tokens(sequence.key, sequence.request.attempt, index, (token,), prompt_logprobs)
        )
        reason = self._ending(sequence)
        if reason is not None:
            self._end(sequence, reason)

    def _fail(self, pipeline: Pipeline, sequence: Sequence, error: str) -> None:
        """A row could not be computed; what it may have spoilt is given to nobody else."""
        pipeline.forget_content(sequence.table.block_ids())
        if error == NOT_FINITE:
            self._end(
                sequence,
                EndReason.ERROR,
                NotFiniteError("the model's numbers became NaN or infinite for this request"),
            )
        else:
            self._end(sequence, EndReason.ERROR, InternalError(f"a stage failed: {error}"))

    def _end(
        self, sequence: Sequence, reason: EndReason, error: StageMeshError | None = None
    ) -> None:
        """The one way out, for every accepted request."""
        if sequence.pipeline is None:
            self._queue.remove(sequence)
        else:
            sequence.pipeline.dismiss(sequence)
        sequence.has_ended = True
        del self._live[sequence.key]
        self._remember_ended(sequence)
        self._deadlines.sequence_ended(sequence)
        self._counters.request_ended(reason, self._now_ns)
        admitted_ns = self._now_ns if sequence.admitted_ns is None else sequence.admitted_ns
        self._events.append(
            Finished(
                key=sequence.key,
                attempt=sequence.request.attempt,
                reason=reason,
                error=error,
                completion_tokens=sequence.num_output_tokens,
                cached_prompt_tokens=sequence.num_cached_prompt_tokens,
                queue_ns=admitted_ns - sequence.submitted_ns,
            )
        )

    def _remember_ended(self, sequence: Sequence) -> None:
        self._ended[sequence.key] = sequence.request.attempt
        self._ended.move_to_end(sequence.key)
        if len(self._ended) > _MAX_ENDED_REMEMBERED:
            self._ended.popitem(last=False)
