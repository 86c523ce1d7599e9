"""Virtual time around the real core: clients, pipelines of fake stages, and what goes wrong.

One seed draws everything. After every event the core plans, its events are held against the
oracle, and its integrity is checked.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from random import Random

from simulation.fake_pipeline import FakePipeline
from simulation.oracle import Oracle, Violation
from simulation.scenario import MS, Arrival, Scenario, draw

from scheduler.core import Finished, RequestKey, SchedulerCore
from stagemesh.errors import ContextLengthExceeded, PeerLost, QueueFull, StepOutOfOrder
from stagemesh.plan import StepResult

_MAX_EVENTS = 100_000


@dataclass(frozen=True, slots=True, order=True)
class _Event:
    at_ns: int
    number: int
    what: Callable[[], None]


class World:
    def __init__(
        self,
        seed: int,
        *,
        scenario: Scenario | None = None,
        check_integrity: bool = True,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.random = Random(seed)
        self.scenario = scenario or draw(self.random)
        self.now_ns = 0
        self.core = SchedulerCore(self.scenario.limits)
        self.oracle = Oracle(self.scenario.dynamic_rope)
        self.is_over = False  # faults have stopped
        self.num_wrong_orders = 0
        self.on_end: Callable[[], None] = lambda: None  # a request has ended
        self._check_integrity = check_integrity
        self._trace = trace
        self._events: list[_Event] = []
        self._numbers = count()
        self._dead_gateways: set[int] = set()
        self._wake_ns: int | None = None
        poison = {
            a.request.sampling.seed: a.poison
            for a in self.scenario.arrivals
            if a.poison is not None
        }
        self.pipelines = {
            f"p{i}": FakePipeline(self, f"p{i}", shape, poison)
            for i, shape in enumerate(self.scenario.shapes)
        }

    # ---- time ----------------------------------------------------------------------------------

    def at(self, at_ns: int, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, _Event(max(at_ns, self.now_ns), next(self._numbers), what))

    def after(self, delay_ns: int, what: Callable[[], None]) -> None:
        self.at(self.now_ns + delay_ns, what)

    def say(self, text: str) -> None:
        if self._trace:
            self._trace(f"{self.now_ns / MS:10.3f} ms  {text}")

    def run(self) -> World:
        """Until nothing happens any more. Raises AssertionError (Violation, BrokenPlan, …)."""
        for pipeline in self.pipelines.values():
            self.at(self.random.choice((0, 5 * MS)), pipeline.form)
        for arrival in self.scenario.arrivals:
            self._expect(arrival)
        for at_ns, gateway in self.scenario.gateway_deaths:
            self.at(at_ns, lambda gateway=gateway: self._gateway_dies(gateway))
        self.at(self.scenario.end_ns, self._end_faults)
        for _ in range(_MAX_EVENTS):
            if not self._events:
                self._check_end()
                return self
            event = heapq.heappop(self._events)
            self.now_ns = event.at_ns
            event.what()
            self.turn()
        raise Violation("it never ends")

    def turn(self) -> None:
        """What a driver does after anything has happened."""
        self.take_events()
        for step in self.core.schedule(self.now_ns):
            rows = ", ".join(
                f"{r.sequence_id}/{r.run}[{r.start}:{r.start + r.num_tokens}]" for r in step.rows
            )
            self.say(f"step  {step.pipeline_id} {step.epoch.n}.{step.step}: {rows} {step.forget}")
            self.pipelines[step.pipeline_id].send(step)
        self.take_events()
        if self._check_integrity:
            self.core.check_integrity()
        self.oracle.check_ended(self.now_ns)
        wake_ns = self.core.next_deadline_ns()
        if wake_ns is not None and wake_ns != self._wake_ns:
            self._wake_ns = wake_ns
            self.at(wake_ns, lambda: None)

    # ---- clients -------------------------------------------------------------------------------

    def _expect(self, arrival: Arrival) -> None:
        key, start_ns = arrival.request.key, arrival.at_ns
        self.oracle.arrived(arrival)
        self.at(start_ns, lambda: self._submit(arrival, arrival.request.attempt))
        if arrival.abort_after_ns is not None:
            self.at(start_ns + arrival.abort_after_ns, lambda: self._abort(key))
        if arrival.again_after_ns is not None:
            self.at(
                start_ns + arrival.again_after_ns,
                lambda: self._submit(arrival, self.oracle.last_attempt(key)),
            )
        if arrival.next_attempt_after_ns is not None:
            self.at(
                start_ns + arrival.next_attempt_after_ns,
                lambda: self._submit(arrival, self.oracle.last_attempt(key) + 1),
            )

    def _submit(self, arrival: Arrival, attempt: int) -> None:
        """Later attempts bring the output that the client has, as after a failover."""
        key = arrival.request.key
        if key.gateway in self._dead_gateways or attempt < 0:
            return
        output = self.oracle.delivered(key)
        request = replace(arrival.request, attempt=attempt, output_token_ids=output)
        num_waiting = self.core.stats().num_waiting
        self.say(f"submit {request.label}.{attempt}: {len(request.prompt_token_ids)} + {output}")
        try:
            self.core.submit(request, self.now_ns)
        except ContextLengthExceeded as error:
            if not len(request.prompt_token_ids) >= self.oracle.max_capacity > 0:
                raise Violation(f"{request.label} was refused: {error}") from error
        except QueueFull as error:
            if num_waiting < self.scenario.limits.max_waiting_requests or output:
                raise Violation(f"{request.label} was refused: {error}") from error
            if not error.retry_after_s or error.retry_after_s <= 0:
                raise Violation("no hint when to come again") from error
        else:
            if self.oracle.is_new(request):
                self.oracle.accepted(request)

    def _abort(self, key: RequestKey) -> None:
        attempt = self.random.choice((None, self.oracle.last_attempt(key), 0))
        self.say(f"abort {key} attempt {attempt}")
        self.oracle.aborted(key, attempt)
        self.core.abort(key, self.now_ns, attempt)

    def _gateway_dies(self, gateway: int) -> None:
        self.say(f"gateway {gateway} dies")
        self._dead_gateways.add(gateway)
        self.oracle.gateway_died(gateway)
        self.core.abort_gateway(gateway, self.now_ns)

    # ---- results and checks --------------------------------------------------------------------

    def deliver(self, pipeline: FakePipeline, result: StepResult) -> None:
        tokens = [(row.sequence_id, [t.token_id for t in row.sampled]) for row in result.rows]
        self.say(f"result {result.pipeline_id} {result.epoch.n}.{result.step}: {tokens}")
        try:
            self.core.on_result(result, self.now_ns)
        except StepOutOfOrder as error:
            if not pipeline.has_lost_result:
                raise Violation(f"a result in order was refused: {error}") from error
            self.num_wrong_orders += 1
            pipeline.break_epoch()

    def fail_oldest_step(self, pipeline_id: str) -> None:
        """As a driver does with a step that breaks every epoch."""
        self.say(f"fails  {pipeline_id}: oldest step")
        self.oracle.may_fail = True
        self.core.fail_oldest_step(pipeline_id, PeerLost("a step breaks its epochs"), self.now_ns)
        self.take_events()
        self.oracle.may_fail = False

    def pipelines_changed(self) -> None:
        present = [p.shape.capacity for p in self.pipelines.values() if p.is_known_to_core]
        self.oracle.capacities_ever.update(present)
        self.oracle.max_capacity = max(present, default=0)

    def _end_faults(self) -> None:
        self.is_over = True
        for pipeline in self.pipelines.values():
            if not pipeline.is_known_to_core:
                pipeline.form()

    def take_events(self) -> None:
        for event in self.core.take_events():
            self.say(f"event {event}")
            self.oracle.take(event, self.now_ns)
            if isinstance(event, Finished):
                self.on_end()

    def _check_end(self) -> None:
        if self.oracle.live:
            raise Violation(f"never ended: {[s.name for s in self.oracle.live.values()]}")
        stats = self.core.stats()
        for pipeline in stats.pipelines:
            if pipeline.num_free_blocks != pipeline.num_blocks or pipeline.num_running:
                raise Violation(f"blocks were leaked: {pipeline}")
            if pipeline.steps_in_flight:
                raise Violation(f"steps are in flight for ever: {pipeline}")
        if stats.num_running or stats.num_waiting:
            raise Violation(f"the counters are not back to zero: {stats}")
        for fake in self.pipelines.values():
            fake.check_idle()
