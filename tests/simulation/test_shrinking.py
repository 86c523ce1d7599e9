"""A seed that fails is reduced to the little that it takes, as Python that can be kept."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count

import pytest
import simulation.arrivals
import simulation.mesh_scenario
import simulation.scenario
from simulation.fake_tenants import Tenants
from simulation.mesh_scenario import MeshScenario, draw_mesh
from simulation.mesh_world import MeshWorld
from simulation.scenario import Scenario
from simulation.seeds import check_seed, failure_of, shrink_failure
from simulation.shrink import AnyScenario, literal
from simulation.world import World

from scheduler.core import PipelineFacts, Request, RequestKey, SchedulerCore
from scheduler.holders import KvHolders
from scheduler.limits import MembershipLimits
from scheduler.workers import Worker
from stagemesh.plan import Span
from stagemesh.sampling import SamplingSpec

NAMES = {
    **vars(simulation.arrivals),
    **vars(simulation.scenario),
    **vars(simulation.mesh_scenario),
    "Request": Request,
    "RequestKey": RequestKey,
    "SamplingSpec": SamplingSpec,
    "MembershipLimits": MembershipLimits,
    "Span": Span,
}


def first_failure(make: type[World] | type[MeshWorld]) -> tuple[int, AnyScenario, Exception]:
    for seed in count():
        world = make(seed)
        error = failure_of(seed, world.scenario)
        if error is not None:
            return seed, world.scenario, error
    raise AssertionError("unreachable")


def test_a_stage_that_is_forgotten_takes_one_request_and_one_break(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resume = SchedulerCore.resume_pipeline

    def forget_one(
        self: SchedulerCore, facts: PipelineFacts, lost_stages: Collection[int], now_ns: int
    ) -> None:
        resume(self, facts, sorted(lost_stages)[1:], now_ns)

    with monkeypatch.context() as planted:
        planted.setattr(SchedulerCore, "resume_pipeline", forget_one)
        seed, scenario, error = first_failure(World)
        small = shrink_failure(seed, scenario, error)
        assert failure_of(seed, small) is not None
        with pytest.raises(AssertionError, match=f"make sim SEED={seed} (.|\n)*scenario=Scenario"):
            check_seed(World, seed)
    print(literal(small))
    assert isinstance(small, Scenario)
    assert len(small.arrivals) == 1
    assert len(small.breaks) == 1
    assert eval(literal(small), dict(NAMES)) == small
    assert failure_of(seed, small) is None


def test_a_mesh_is_made_small_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def holds(self: KvHolders, stage: int, worker: Worker) -> bool:
        return self.is_counted_on

    with monkeypatch.context() as planted:
        planted.setattr(KvHolders, "holds", holds)
        planted.setattr(Tenants, "has_kv_of", lambda self, pipeline_id, from_end: True)
        seed, scenario, error = first_failure(MeshWorld)
        small = shrink_failure(seed, scenario, error, max_runs=150)
        assert failure_of(seed, small) is not None
    print(literal(small))
    assert isinstance(small, MeshScenario)
    assert len(small.arrivals) <= 2
    assert len(small.faults) <= 2
    assert eval(literal(small), dict(NAMES)) == small
    assert failure_of(seed, small) is None


def test_a_literal_makes_the_same_scenario_again() -> None:
    from random import Random

    for seed in range(20):
        scenario = draw_mesh(Random(seed))
        assert eval(literal(scenario), dict(NAMES)) == scenario
