"""The larger world: a scheduler with its real Membership, pretend workers and gateways, and faults.

One seed draws everything. Clients' streams are held against their right answers as they come; when
the faults are over, everything must end and the mesh must serve.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from random import Random

from simulation.arrivals import Arrival
from simulation.clock import MS, Clock, S
from simulation.fake_gateway import FakeGateway
from simulation.fake_scheduler import FakeScheduler
from simulation.fake_worker import FakeWorker
from simulation.mesh_scenario import SCHEDULER, Fault, MeshScenario, draw_mesh, gateway_name
from simulation.oracle import Violation
from simulation.pretend_model import NUM_LAYERS, VOCAB_SIZE
from simulation.process import End, Process
from simulation.quiet import quiet

from stagemesh.errors import InvalidRequest
from stagemesh.plan import ModelSummary, Step

# Time for everything to end once everybody is there for good.
_PATIENCE_NS = 120 * S
_EVENTS_PER_CHECK = 16
_MAX_EVENTS_AT_ONCE = 10_000
# A stream that breaks is noticed at once.
_GATEWAY_GONE_NS = 100 * MS
# No process starts sooner than that; longer than any message is under way.
_START_NS = 100 * MS


class MeshWorld:
    def __init__(
        self,
        seed: int,
        *,
        scenario: MeshScenario | None = None,
        check_integrity: bool = True,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.seed = seed
        self.scenario = scenario or draw_mesh(Random(seed))
        self.clock = Clock()
        self.model = _model(self.scenario)
        self.met: Counter[str] = Counter()
        self._gone: set[str] = set()
        self._check_integrity = check_integrity
        self._trace = trace
        self._incarnations, self._terms = count(1), count(1)
        self.schedulers: list[FakeScheduler] = []
        self.scheduler = self._start_scheduler()
        self.gateways = {
            name: FakeGateway(self, name, next(self._incarnations))
            for name in map(gateway_name, range(self.scenario.num_gateways))
        }
        self.workers = {
            shape.name: FakeWorker(self, shape, next(self._incarnations))
            for shape in self.scenario.workers
        }

    def say(self, text: str) -> None:
        if self._trace:
            self._trace(f"{self.clock.now_ns / MS:10.3f} ms  {text}")

    def acceptor_of(self, address: str) -> tuple[Process, Callable[[End], None]]:
        """Whoever listens there now."""
        if address == SCHEDULER:
            return self.scheduler, self.scheduler.links.accept
        worker = self.workers[address]
        return worker, worker.accept_stream

    def saw_step(self, step: Step) -> None:
        rows = ", ".join(
            f"{row.sequence_id}/{row.run}[{row.start}:{row.start + row.num_tokens}]"
            f" stages {row.first_stage}({row.first_writing_stage}):{row.end_stage}"
            for row in step.rows
        )
        self.say(f"step   {step.pipeline_id} {step.epoch.n}.{step.step}: {rows} {step.forget}")
        self.met["rows from a log"] += sum(row.first_stage > 0 for row in step.rows)
        self.met["rows without writing"] += sum(
            row.first_writing_stage > row.first_stage for row in step.rows
        )

    # ---- time ----------------------------------------------------------------------------------

    def run(self) -> MeshWorld:
        """Until all is over. Raises AssertionError (Violation, BrokenPlan, …)."""
        with quiet():
            for worker in self.workers.values():
                worker.after(worker.shape.start_ns, worker.start)
            for gateway in self.gateways.values():
                gateway.start()
            for arrival in self.scenario.arrivals:
                name = gateway_name(arrival.request.key.gateway % self.scenario.num_gateways)
                self.clock.at(arrival.at_ns, partial(self._arrives, name, arrival))
            for fault in self.scenario.faults:
                self.clock.at(fault.at_ns, partial(self._strike, fault))
            self._run_to_the_end()
        return self

    def _run_to_the_end(self) -> None:
        end_ns, moved = self.scenario.end_ns, (0, 0)
        for number in count():
            self.clock.step()
            moved = moved if self.clock.now_ns == moved[0] else (self.clock.now_ns, number)
            if number - moved[1] > _MAX_EVENTS_AT_ONCE:
                raise Violation("time stands still: one turn follows another for ever")
            for scheduler in self.schedulers:
                scheduler.turn()
            if self._check_integrity and number % _EVENTS_PER_CHECK == 0:
                self.scheduler.core.check_integrity()
            if self.clock.now_ns < end_ns:
                continue
            reason = self._why_not_over()
            if reason is None:
                self.scheduler.core.check_integrity()
                return
            if self.clock.now_ns > end_ns + _PATIENCE_NS:
                raise Violation(f"it never ends: {reason}")

    def _why_not_over(self) -> str | None:
        for gateway in self.gateways.values():
            for held in gateway.held.values():
                if not held.has_ended:
                    return f"{held.request.label} of {gateway.name} waits for the mesh"
        stats = self.scheduler.core.stats()
        if stats.num_running or stats.num_waiting:
            return f"requests live that nobody waits for: {stats}"
        if not stats.pipelines:
            return f"no pipeline: {[p.phase for p in self.scheduler.membership.pipelines]}"
        for pipeline in stats.pipelines:
            if pipeline.steps_in_flight or pipeline.num_free_blocks != pipeline.num_blocks:
                return f"steps or blocks are left: {pipeline}"
        if not any(pipeline.is_serving for pipeline in self.scheduler.membership.pipelines):
            return "nothing serves"
        for worker in self.workers.values():
            members = worker.members if worker.is_alive else []
            if any(member.stage.num_held for member in members):
                return f"{worker.name} holds sequences"
        return None

    # ---- clients and faults --------------------------------------------------------------------

    def _arrives(self, name: str, arrival: Arrival) -> None:
        gateway = self.gateways[name]
        gateway.happens(lambda: gateway.open(arrival))

    def _strike(self, fault: Fault) -> None:
        self.say(f"fault  {fault}")
        process = self._process(fault.who)
        if not process.is_alive:
            return
        self.met[fault.kind] += 1
        match fault.kind:
            case "crash":
                process.die()
                if isinstance(process, FakeGateway):
                    incarnation, scheduler = process.incarnation, self.scheduler
                    self.clock.after(
                        _GATEWAY_GONE_NS, lambda: self._check_gone(scheduler, incarnation)
                    )
                self.clock.after(_START_NS + fault.for_ns, lambda: self._restart(fault.who))
            case "gone" if self._can_do_without(fault.who):
                process.die()
                self._gone.add(fault.who)
            case "gone":
                pass
            case "freeze":
                process.freeze()
                self.clock.after(fault.for_ns, process.thaw)
            case "usurp":
                process.freeze()
                self.scheduler = self._start_scheduler()
                self.clock.after(fault.for_ns, process.thaw)
                self.clock.after(fault.for_ns + 3 * S, process.die)
            case "control":
                assert isinstance(process, FakeWorker | FakeGateway)
                process.control_breaks()
            case _:
                assert isinstance(process, FakeWorker)
                self._strike_worker(process, fault)

    def _check_gone(self, scheduler: FakeScheduler, incarnation: int) -> None:
        """Nobody computes for a gateway that is no more."""
        is_free = scheduler.is_alive and not scheduler.is_frozen
        if is_free and any(key.gateway == incarnation for key in scheduler.core._roster.live):
            raise Violation("requests of a gateway that died live on")

    def _can_do_without(self, who: str) -> bool:
        """Others are left, and the scheduler knows what has to be held: it takes over what has
        served, and waits for who is missing to what has not."""
        others = (each for each in self.workers.values() if each.name not in self._gone | {who})
        has_served = any(each.has_served for each in self.scheduler.membership.pipelines)
        return has_served and any(each.is_alive for each in others)

    def _strike_worker(self, worker: FakeWorker, fault: Fault) -> None:
        match fault.kind:
            case "slow":
                worker.slow = 10
                self.clock.after(fault.for_ns, lambda: setattr(worker, "slow", 1))
            case "hang":
                worker.hangs(fault.for_ns)
            case "fault":
                worker.num_faults += 1
            case "drain" | "move":
                self._drain(worker, stay=fault.kind == "move")
            case "sigterm":
                worker.drain()
            case "silence" if worker.members:
                worker.random.choice(worker.members).goes_silent()
            case "data" if worker.members:
                worker.random.choice(worker.members).breaks()

    def _drain(self, worker: FakeWorker, *, stay: bool) -> None:
        scheduler = self.scheduler

        def drain() -> None:
            with contextlib.suppress(InvalidRequest):
                now_ns = self.clock.now_ns
                scheduler.membership.drain(worker.name, stay=stay, now_ns=now_ns)
                scheduler.wake()

        scheduler.happens(drain)

    def worker_exited(self, worker: FakeWorker) -> None:
        """In good order; somebody starts it again."""
        self.say(f"exit   {worker.name}")
        self.clock.after(_START_NS, lambda: self._restart(worker.name))

    def _process(self, who: str) -> Process:
        if who == SCHEDULER:
            return self.scheduler
        return self.workers[who] if who in self.workers else self.gateways[who]

    def _start_scheduler(self) -> FakeScheduler:
        """Each has a higher term than those before."""
        self.schedulers = [each for each in self.schedulers if each.is_alive]
        scheduler = FakeScheduler(self, next(self._terms))
        self.schedulers.append(scheduler)
        return scheduler

    def _restart(self, who: str) -> None:
        if self._process(who).is_alive or who in self._gone:
            return
        self.say(f"again  {who}")
        if who == SCHEDULER:
            self.scheduler = self._start_scheduler()
        elif who in self.workers:
            worker = FakeWorker(self, self.workers[who].shape, next(self._incarnations))
            self.workers[who] = worker
            worker.start()
        else:
            self.gateways[who] = FakeGateway(self, who, next(self._incarnations))
            self.gateways[who].start()


def _model(scenario: MeshScenario) -> ModelSummary:
    return ModelSummary(
        name="pretend",
        architecture="Pretend",
        num_layers=NUM_LAYERS,
        hidden_size=1,
        vocab_size=VOCAB_SIZE,
        max_position=scenario.max_model_len,
        layer_bytes=100,
        embedding_bytes=10,
        head_bytes=10,
        structure_hash="pretend",
        dynamic_rope_length=scenario.dynamic_rope,
    )
