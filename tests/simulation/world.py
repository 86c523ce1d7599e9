"""Virtual time around the real core: clients, pipelines of fake stages, and what goes wrong.

One seed draws everything. After every event the core plans, its events are held against the
oracle, and its integrity is checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from random import Random

from simulation.arrivals import Arrival
from simulation.clock import MS, Clock
from simulation.fake_pipeline import FakePipeline
from simulation.oracle import Oracle, Violation
from simulation.scenario import Scenario, draw

from scheduler.core import Finished, RequestKey, SchedulerCore
from stagemesh.errors import ContextLengthExceeded, PeerLost, QueueFull, StepOutOfOrder
from stagemesh.plan import Row, StepResult

_MAX_EVENTS = 100_000


# Checking the integrity after every event would take more time than all the rest.
_EVENTS_PER_CHECK = 5


class World:
    def __init__(
        self,
        seed: int,
        *,
        scenario: Scenario | None = None,
        check_integrity: bool = True,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.scenario = scenario or draw(self.random)
        self.clock = Clock()
        self.core = SchedulerCore(self.scenario.limits)
        self.oracle = Oracle(self.scenario.dynamic_rope)
        self.is_over = False  # faults have stopped
        self.num_wrong_orders = 0
        self.rebuilds: Counter[str] = Counter()  # rows, by how they bring KV back
        self.on_end: Callable[[], None] = lambda: None  # a request has ended
        self._check_integrity = check_integrity
        self._trace = trace
        self._dead_gateways: set[int] = set()
        self._wake_ns: int | None = None
        poison = {
            a.request.sampling.seed: a.poison
            for a in self.scenario.arrivals
            if a.poison is not None
        }
        self.pipelines = {
            f"p{number}": FakePipeline(self, number, shape, poison)
            for number, shape in enumerate(self.scenario.shapes)
        }

    # ---- time ----------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        if self._trace:
            self._trace(f"{self.clock.now_ns / MS:10.3f} ms  {text}")

    def run(self) -> World:
        """Until nothing happens any more. Raises AssertionError (Violation, BrokenPlan, …)."""
        for pipeline in self.pipelines.values():
            self.clock.at(pipeline.random.choice((0, 5 * MS)), pipeline.form)
        self._expect_faults()
        for arrival in self.scenario.arrivals:
            self._expect(arrival)
        for number in range(_MAX_EVENTS):
            if self.clock.is_empty:
                self._check_end()
                return self
            self.clock.step()
            self.turn()
            if self._check_integrity and number % _EVENTS_PER_CHECK == 0:
                self.core.check_integrity()
        raise Violation("it never ends")

    def turn(self) -> None:
        """What a driver does after anything has happened."""
        self.take_events()
        for step in self.core.schedule(self.clock.now_ns):
            rows = ", ".join(map(_describe, step.rows))
            self.say(f"step  {step.pipeline_id} {step.epoch.n}.{step.step}: {rows} {step.forget}")
            self.rebuilds.update(kind for row in step.rows for kind in _rebuild_kinds(row))
            self.pipelines[step.pipeline_id].send(step)
        self.take_events()
        self.oracle.check_ended(self.clock.now_ns)
        wake_ns = self.core.next_deadline_ns()
        if wake_ns is not None and wake_ns != self._wake_ns:
            self._wake_ns = wake_ns
            self.clock.at(wake_ns, lambda: None)

    def _expect_faults(self) -> None:
        scenario, pipelines = self.scenario, list(self.pipelines.values())
        for broken in scenario.breaks:
            pipeline = pipelines[broken.pipeline]
            self.clock.at(broken.at_ns, partial(pipeline.break_epoch, broken))
        for slow in scenario.slowness:
            slowed = pipelines[slow.pipeline].slow
            self.clock.at(slow.at_ns, partial(slowed.update, {slow.stage: slow.factor}))
            self.clock.at(slow.at_ns + slow.for_ns, partial(slowed.update, {slow.stage: 1}))
        for at_ns, gateway in scenario.gateway_deaths:
            self.clock.at(at_ns, partial(self._gateway_dies, gateway))
        self.clock.at(scenario.end_ns, self._end_faults)

    # ---- clients -------------------------------------------------------------------------------

    def _expect(self, arrival: Arrival) -> None:
        key, start_ns = arrival.request.key, arrival.at_ns
        self.oracle.arrived(arrival)
        self.clock.at(start_ns, lambda: self._submit(arrival, arrival.request.attempt))
        if arrival.abort_after_ns is not None:
            self.clock.at(start_ns + arrival.abort_after_ns, lambda: self._abort(key))
        if arrival.again_after_ns is not None:
            self.clock.at(
                start_ns + arrival.again_after_ns,
                lambda: self._submit(arrival, self.oracle.last_attempt(key)),
            )
        if arrival.next_attempt_after_ns is not None:
            self.clock.at(
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
            self.core.submit(request, self.clock.now_ns)
        except ContextLengthExceeded as error:
            if not len(request.prompt_token_ids) >= self.oracle.max_capacity > 0:
                raise Violation(f"{request.label} was refused: {error}") from error
        except QueueFull as error:
            is_full = num_waiting >= self.scenario.limits.max_waiting_requests
            is_hopeless = request.deadline_ns is not None  # as far as the core can tell
            if output or not (is_full or is_hopeless):
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
        self.core.abort(key, self.clock.now_ns, attempt)

    def _gateway_dies(self, gateway: int) -> None:
        self.say(f"gateway {gateway} dies")
        self._dead_gateways.add(gateway)
        self.oracle.gateway_died(gateway)
        self.core.abort_gateway(gateway, self.clock.now_ns)

    # ---- results and checks --------------------------------------------------------------------

    def deliver(self, pipeline: FakePipeline, result: StepResult) -> None:
        tokens = [(row.sequence_id, [t.token_id for t in row.sampled]) for row in result.rows]
        self.say(f"result {result.pipeline_id} {result.epoch.n}.{result.step}: {tokens}")
        try:
            self.core.on_result(result, self.clock.now_ns)
        except StepOutOfOrder as error:
            if not pipeline.has_lost_result:
                raise Violation(f"a result in order was refused: {error}") from error
            self.num_wrong_orders += 1
            pipeline.break_by_chance()
        else:
            pipeline.acknowledged(result)

    def fail_oldest_step(self, pipeline_id: str) -> None:
        """As a driver does with a step that breaks every epoch."""
        self.say(f"fails  {pipeline_id}: oldest step")
        self.oracle.may_fail = True
        self.core.fail_oldest_step(
            pipeline_id, PeerLost("a step breaks its epochs"), self.clock.now_ns
        )
        self.take_events()
        self.oracle.may_fail = False

    def pipelines_changed(self) -> None:
        known = [pipeline for pipeline in self.pipelines.values() if pipeline.is_known_to_core]
        present = [pipeline.facts.capacity_tokens for pipeline in known]
        self.oracle.capacities_ever.update(present)
        self.oracle.max_capacity = max(present, default=0)
        self.oracle.is_serving = any(pipeline.is_serving for pipeline in known)

    def _end_faults(self) -> None:
        self.is_over = True
        for pipeline in self.pipelines.values():
            if not pipeline.is_known_to_core:
                pipeline.form()

    def take_events(self) -> None:
        for event in self.core.take_events():
            self.say(f"event {event}")
            self.oracle.take(event, self.clock.now_ns)
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


def _describe(row: Row) -> str:
    stages = f" stages {row.first_stage}({row.first_writing_stage}):{row.end_stage}"
    return f"{row.sequence_id}/{row.run}[{row.start}:{row.start + row.num_tokens}]{stages}"


def _rebuild_kinds(row: Row) -> Iterator[str]:
    """How a row brings back what stages lost, if it does."""
    if row.input_from_log_of_stage is not None:
        yield "from a log"
    if row.first_writing_stage > row.first_stage:
        yield "computed without writing"
    if row.end_stage - max(row.first_stage, row.first_writing_stage) > 1 and row.first_stage > 0:
        yield "several stages at once"
