"""A pipeline of fake stages on virtual time, with its wire and everything that breaks on it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from random import Random
from typing import TYPE_CHECKING

from simulation.clock import MS
from simulation.fake_stage import FakeStage, Payload
from simulation.oracle import Violation
from simulation.pretend_model import ADAPTERS, NUM_LAYERS, mix
from simulation.scenario import Break, PipelineShape, draw_break
from simulation.stage_memory import MemoryPart, StageMemory

from scheduler.core import PipelineFacts
from stagemesh.plan import Epoch, HopTiming, Step, StepResult

if TYPE_CHECKING:
    from simulation.world import World


class FakePipeline:
    """`slow`: by stage, how many times as long it takes."""

    def __init__(
        self, world: World, number: int, shape: PipelineShape, poison: Mapping[int, int]
    ) -> None:
        self.shape = shape
        self.is_known_to_core = False
        self.has_lost_result = False
        self.pipeline_id = f"p{number}"
        self.slow: dict[int, int] = {}
        self.num_losses = self.num_moves = 0
        # Its own: what happens on another pipeline must not change what happens here.
        self.random = Random(f"{world.seed} {self.pipeline_id}")
        self._world = world
        self._number = number
        self._poison = poison
        self._epoch = Epoch(1, 0)
        # Messages of an older connection are nobody's.
        self._connection = 0
        self._is_connected = False
        self._lost: set[int] = set()
        self._salts = count(number << 20)
        self._stages: list[FakeStage] = []
        self._steps: dict[int, Step] = {}  # under way, by number
        self._ready_ns: list[int] = []

    @property
    def facts(self) -> PipelineFacts:
        memories = [stage.memory for stage in self._stages]
        return PipelineFacts(
            pipeline_id=self.pipeline_id,
            epoch=self._epoch,
            num_stages=self.shape.num_stages,
            num_blocks=min(memory.num_blocks for memory in memories),
            block_size_tokens=self.shape.block_size,
            max_model_len=self.shape.max_model_len,
            model_identity="pretend",
            dynamic_rope_length=self._world.scenario.dynamic_rope,
            num_log_blocks=(*(memory.num_log_blocks for memory in memories[:-1]), 0),
            adapters=frozenset(ADAPTERS[1:]),
        )

    @property
    def is_serving(self) -> bool:
        return self._is_connected

    @property
    def num_tokens_executed(self) -> list[int]:
        return [stage.num_tokens_executed for stage in self._stages]

    # ---- life ----------------------------------------------------------------------------------

    def form(self) -> None:
        """New workers, nothing cached."""
        if self.is_known_to_core:
            return
        self._stages = [self._make_stage(stage) for stage in range(self.shape.num_stages)]
        self._join()
        self.is_known_to_core = True
        self._world.pipelines_changed()
        self._world.core.add_pipeline(self.facts, self._world.clock.now_ns)

    def break_epoch(self, broken: Break) -> None:
        """Messages under way are lost; in a while the stages come back, some as others."""
        if not self.is_known_to_core:
            return
        self._world.say(f"broken {broken}")
        self._lost |= set(broken.lost)
        if not self._is_connected:
            return  # on its way back already, with more lost than it knew
        self._connection += 1
        self._is_connected = False
        now_ns = self._world.clock.now_ns
        if broken.gives_up:
            self._world.fail_oldest_step(self.pipeline_id)
        self._world.core.suspend_pipeline(self.pipeline_id, now_ns)
        self._world.pipelines_changed()
        if broken.dissolves:
            self._leave()
            self._world.clock.after(broken.away_ns, self.form)
            return
        self._world.clock.after(broken.away_ns // 2, lambda: self._move(broken))
        self._world.clock.after(broken.away_ns, lambda: self._return(broken))

    def check_idle(self) -> None:
        held = [stage.num_held for stage in self._stages]
        if any(held):
            raise Violation(f"stages of {self.pipeline_id} hold sequences for ever: {held}")

    def _leave(self) -> None:
        self._world.say(f"leaves {self.pipeline_id}")
        self._lost.clear()
        self.is_known_to_core = False
        self._world.pipelines_changed()
        self._world.core.remove_pipeline(self.pipeline_id, self._world.clock.now_ns)
        self._world.take_events()

    def _move(self, broken: Break) -> None:
        """New workers join, and fetch the pages of those whose places they take."""
        in_use = self._world.core.blocks_in_use(self.pipeline_id)
        for stage in broken.moved:
            old, new = self._stages[stage], self._make_stage(stage, broken.num_blocks)
            block_ids = [block_id for block_id in in_use if block_id < new.memory.num_blocks]
            moved = MemoryPart.whole(old.memory).copy(block_ids)
            if not MemoryPart.whole(new.memory).take(moved, block_ids):
                self._lost.add(stage)
            self._stages[stage] = new
            self.num_moves += 1

    def _return(self, broken: Break) -> None:
        lost, self._lost = frozenset(self._lost), set()
        for stage in lost:
            self._stages[stage] = self._make_stage(stage, broken.num_blocks)
        self.num_losses += len(lost)
        self._join()
        self._world.say(f"epoch  {self.pipeline_id} {self._epoch.n} lost={sorted(lost)}")
        self._world.pipelines_changed()
        self._world.core.resume_pipeline(self.facts, lost, self._world.clock.now_ns)

    def _join(self) -> None:
        self._epoch = Epoch(1, self._epoch.n + 1)
        self._is_connected = True
        self.has_lost_result = False
        self._steps.clear()
        self._ready_ns = [0] * self.shape.num_stages
        facts = self.facts
        for number, stage in enumerate(self._stages):
            num_log_blocks = stage.memory.num_log_blocks
            part = MemoryPart(stage.memory, facts.num_blocks, num_log_blocks, from_end=False)
            stage.join(self._epoch, part, stage=number, num_stages=facts.num_stages, keep_kv=True)

    def _make_stage(self, stage: int, num_blocks: int = 0) -> FakeStage:
        shape = self.shape
        bounds = [0, *shape.cuts, NUM_LAYERS]
        is_logging = stage < len(shape.log_blocks)
        memory = StageMemory(
            range(bounds[stage], bounds[stage + 1]),
            num_blocks=num_blocks or shape.num_blocks,
            num_log_blocks=shape.log_blocks[stage] if is_logging else 0,
            block_size=shape.block_size,
            salt=mix(next(self._salts)),
        )
        return FakeStage(memory, self._world.scenario.dynamic_rope, self._poison)

    # ---- the wire ------------------------------------------------------------------------------

    def send(self, step: Step) -> None:
        if self._is_connected:
            self._steps[step.step] = step
            self._push(step, 0, [])

    def acknowledged(self, result: StepResult) -> None:
        """The core was told the result of a step."""
        if not self._is_connected or result.epoch != self._epoch:
            return  # it came too late
        if step := self._steps.pop(result.step, None):
            for stage in self._stages:
                stage.settle(step)

    def _push(self, step: Step, stage: int, payload: Payload) -> None:
        """To a stage: in order, one at a time."""
        connection, clock = self._connection, self._world.clock
        jitter = self.random.uniform(-self.shape.jitter, self.shape.jitter)
        latency_ns = round((1 + jitter) * self.shape.latencies_ns[stage] * self.slow.get(stage, 1))
        arrival_ns = max(clock.now_ns, self._ready_ns[stage]) + latency_ns
        self._ready_ns[stage] = arrival_ns
        clock.at(arrival_ns, lambda: self._arrive(connection, step, stage, payload))

    def _arrive(self, connection: int, step: Step, stage: int, payload: Payload) -> None:
        if connection != self._connection:
            return
        sent, rows = self._stages[stage].execute(step, payload)
        if stage + 1 < self.shape.num_stages:
            self._push(step, stage + 1, sent)
        else:
            timings = self._told_timings(step)
            self._answer(StepResult(step.pipeline_id, step.epoch, step.step, rows, timings))

    def _told_timings(self, step: Step) -> tuple[HopTiming, ...]:
        """Costs of a kind that no device has: a plan may be bad for them, but never wrong."""
        factor = 1 + (step.num_tokens * 7 + step.step) % 5
        return tuple(
            HopTiming(stage, compute_ns=factor * latency_ns)
            for stage, latency_ns in enumerate(self.shape.latencies_ns)
        )

    def _answer(self, result: StepResult) -> None:
        world, clock, random = self._world, self._world.clock, self.random
        if not world.is_over and random.random() < world.scenario.lost:
            self.has_lost_result = True
            connection = self._connection
            clock.after(random.randint(0, 5 * MS), lambda: self._notice_loss(connection))
            if random.random() < 0.5:  # lost, or too late
                clock.after(random.randint(5 * MS, 30 * MS), lambda: world.deliver(self, result))
            return
        world.deliver(self, result)
        if random.random() < world.scenario.doubled:
            clock.after(random.randint(0, 30 * MS), lambda: world.deliver(self, result))

    def _notice_loss(self, connection: int) -> None:
        if connection == self._connection:
            self.break_by_chance()

    def break_by_chance(self) -> None:
        """A break that no scenario foresaw."""
        now_ns = self._world.clock.now_ns
        self.break_epoch(draw_break(self.random, self.shape, now_ns, self._number))
