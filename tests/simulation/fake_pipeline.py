"""A pipeline of fake stages on virtual time, with its wire and everything that breaks on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from simulation.fake_stage import FakeStage
from simulation.oracle import Violation
from simulation.pretend_model import NUM_LAYERS
from simulation.scenario import MS, PipelineShape

from scheduler.core import PipelineFacts
from stagemesh.plan import Epoch, Step, StepResult

if TYPE_CHECKING:
    from simulation.world import World


class FakePipeline:
    def __init__(
        self, world: World, pipeline_id: str, shape: PipelineShape, poison: Mapping[int, int]
    ) -> None:
        self.shape = shape
        self.is_known_to_core = False
        self.has_lost_result = False
        self._world = world
        self._pipeline_id = pipeline_id
        self._poison = poison
        self._epoch = Epoch(1, 0)
        # Messages of an older connection are nobody's.
        self._connection = 0
        self._is_connected = False
        self._stages: list[FakeStage] = []
        self._ready_ns: list[int] = []

    # ---- life ----------------------------------------------------------------------------------

    def form(self) -> None:
        """New workers, nothing cached."""
        if self.is_known_to_core:
            return
        self._stages = self._make_stages()
        self._join(keep_kv=False)
        self.is_known_to_core = True
        self._world.pipelines_changed()
        self._world.core.add_pipeline(self._facts(), self._world.now_ns)
        mean_break_ns = self._world.scenario.faults.mean_break_ns
        if mean_break_ns is not None:
            delay_ns = round(self._world.random.expovariate(1) * mean_break_ns)
            self._world.after(delay_ns, self._break_by_chance)

    def _facts(self) -> PipelineFacts:
        return PipelineFacts(
            pipeline_id=self._pipeline_id,
            epoch=self._epoch,
            num_stages=self.shape.num_stages,
            num_blocks=self.shape.num_blocks,
            block_size_tokens=self.shape.block_size,
            max_model_len=self.shape.max_model_len,
            model_identity="pretend",
            dynamic_rope_length=self._world.scenario.dynamic_rope,
        )

    def break_epoch(self) -> None:
        """Messages under way are lost; in a while the members come back, with or without KV."""
        if not self._is_connected:
            return
        self._world.say(f"broken {self._pipeline_id}")
        self._connection += 1
        self._is_connected = False
        keep_kv = self._world.random.random() < 0.6
        if keep_kv and self._world.random.random() < self._world.scenario.faults.given_up:
            self._world.fail_oldest_step(self._pipeline_id)
        self._world.core.suspend_pipeline(self._pipeline_id, self._world.now_ns)
        if not keep_kv and self._world.random.random() < 0.5:
            self._leave()
        self._world.after(self._world.random.randint(0, 10 * MS), lambda: self._return(keep_kv))

    def check_idle(self) -> None:
        held = [stage.num_held for stage in self._stages]
        if any(held):
            raise Violation(f"stages of {self._pipeline_id} hold sequences for ever: {held}")

    def _break_by_chance(self) -> None:
        if not self._world.is_over:
            self.break_epoch()
            mean_break_ns = self._world.scenario.faults.mean_break_ns or 0
            self._world.after(
                round(self._world.random.expovariate(1) * mean_break_ns), self._break_by_chance
            )

    def _leave(self) -> None:
        self._world.say(f"leaves {self._pipeline_id}")
        self.is_known_to_core = False
        self._world.pipelines_changed()
        self._world.core.remove_pipeline(self._pipeline_id, self._world.now_ns)
        self._world.take_events()

    def _return(self, keep_kv: bool) -> None:
        if self._is_connected:
            return
        if keep_kv:
            self._join(keep_kv=True)
            self._world.core.resume_pipeline(self._facts(), (), self._world.now_ns)
            return
        if self.is_known_to_core:
            self._leave()
        self._stages = self._make_stages()
        self.form()

    def _join(self, *, keep_kv: bool) -> None:
        self._epoch = Epoch(1, self._epoch.n + 1)
        self._world.say(f"epoch  {self._pipeline_id} {self._epoch.n} keep_kv={keep_kv}")
        self._is_connected = True
        self.has_lost_result = False
        self._ready_ns = [0] * self.shape.num_stages
        for stage in self._stages:
            stage.join(self._epoch, keep_kv=keep_kv)

    def _make_stages(self) -> list[FakeStage]:
        bounds = [0, *self.shape.cuts, NUM_LAYERS]
        return [
            FakeStage(
                stage,
                range(bounds[stage], bounds[stage + 1]),
                is_last=stage == self.shape.num_stages - 1,
                num_blocks=self.shape.num_blocks,
                block_size=self.shape.block_size,
                dynamic_rope=self._world.scenario.dynamic_rope,
                poison=self._poison,
                salt=self._epoch.n,
            )
            for stage in range(self.shape.num_stages)
        ]

    # ---- the wire ------------------------------------------------------------------------------

    def send(self, step: Step) -> None:
        if self._is_connected:
            self._push(step, 0, [[] for _ in step.rows])

    def _push(self, step: Step, stage: int, hidden: list[list[int | None]]) -> None:
        """To a stage: in order, one at a time."""
        connection = self._connection
        jitter = self._world.random.uniform(-self.shape.jitter, self.shape.jitter)
        latency_ns = round((1 + jitter) * self.shape.latencies_ns[stage])
        arrival_ns = max(self._world.now_ns, self._ready_ns[stage]) + latency_ns
        self._ready_ns[stage] = arrival_ns
        self._world.at(arrival_ns, lambda: self._arrive(connection, step, stage, hidden))

    def _arrive(
        self, connection: int, step: Step, stage: int, hidden: list[list[int | None]]
    ) -> None:
        if connection != self._connection:
            return
        outs, rows = self._stages[stage].execute(step, hidden)
        if stage + 1 < self.shape.num_stages:
            self._push(step, stage + 1, outs)
        else:
            self._answer(StepResult(step.pipeline_id, step.epoch, step.step, rows))

    def _answer(self, result: StepResult) -> None:
        world, faults = self._world, self._world.scenario.faults
        if not world.is_over and world.random.random() < faults.lost:
            self.has_lost_result = True
            connection = self._connection
            world.after(world.random.randint(0, 5 * MS), lambda: self._notice_loss(connection))
            if world.random.random() < 0.5:  # lost, or too late
                late_ns = world.random.randint(5 * MS, 30 * MS)
                world.after(late_ns, lambda: self._deliver(result))
            return
        self._deliver(result)
        if world.random.random() < faults.doubled:
            world.after(world.random.randint(0, 10 * MS), lambda: self._deliver(result))

    def _notice_loss(self, connection: int) -> None:
        if connection == self._connection:
            self.break_epoch()

    def _deliver(self, result: StepResult) -> None:
        self._world.deliver(self, result)
