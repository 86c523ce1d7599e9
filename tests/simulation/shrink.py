"""Makes a failing scenario small: whatever can be left out while it still fails is left out.

Knows scenarios as frozen dataclasses with tuples in them; both worlds' scenarios will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any, TypeVar

from simulation.arrivals import Arrival
from simulation.mesh_scenario import SCHEDULER, MeshScenario
from simulation.scenario import Scenario

from scheduler.core import SchedulerLimits
from stagemesh.sampling import SamplingSpec

T = TypeVar("T")
AnyScenario = Scenario | MeshScenario


def shrink(
    scenario: AnyScenario, fails: Callable[[AnyScenario], bool], max_runs: int
) -> AnyScenario:
    """A smaller scenario that fails as well, after at most so many runs."""
    runs = iter(range(max_runs))

    def still_fails(candidate: AnyScenario) -> bool:
        return next(runs, None) is not None and fails(candidate)

    while True:
        before = scenario
        for name in ("arrivals", "breaks", "faults", "slowness", "gateway_deaths"):
            if hasattr(scenario, name):
                scenario = _with_fewer(scenario, name, still_fails)
        scenario = _first_that_fails(_with_fewer_places(scenario), scenario, still_fails)
        for index in range(len(scenario.arrivals)):
            scenario = _with_simpler_arrival(scenario, index, still_fails)
        for candidate in list(_plainer(scenario)):
            merged = replace(scenario, **candidate)  # type: ignore[arg-type]
            scenario = merged if merged != scenario and still_fails(merged) else scenario
        if scenario == before or next(runs, None) is None:
            return scenario


def _with_fewer(
    scenario: AnyScenario, name: str, fails: Callable[[AnyScenario], bool]
) -> AnyScenario:
    """Drops halves of a tuple, then quarters, … then single entries."""
    size = len(getattr(scenario, name))
    while size >= 1:
        start = 0
        while start < len(getattr(scenario, name)):
            entries = getattr(scenario, name)
            rest = entries[:start] + entries[start + size :]
            candidate = replace(scenario, **{name: rest})
            if (rest or name != "arrivals") and fails(candidate):
                scenario = candidate
            else:
                start += size
        size //= 2
    return scenario


def _with_fewer_places(scenario: AnyScenario) -> Iterator[AnyScenario]:
    """Without one worker or pipeline, and what was to happen to it."""
    if isinstance(scenario, MeshScenario):
        num_needed = scenario.membership.num_stages or 1
        for worker in scenario.workers if len(scenario.workers) > num_needed else ():
            workers = tuple(each for each in scenario.workers if each is not worker)
            faults = tuple(fault for fault in scenario.faults if fault.who != worker.name)
            yield replace(scenario, workers=workers, faults=faults)
        if scenario.num_gateways > 1:
            known = {SCHEDULER, "gateway0", *(worker.name for worker in scenario.workers)}
            faults = tuple(fault for fault in scenario.faults if fault.who in known)
            yield replace(scenario, num_gateways=1, faults=faults)
    elif len(scenario.shapes) > 1:
        last = len(scenario.shapes) - 1
        yield replace(
            scenario,
            shapes=scenario.shapes[:last],
            breaks=tuple(each for each in scenario.breaks if each.pipeline < last),
            slowness=tuple(each for each in scenario.slowness if each.pipeline < last),
        )


def _with_simpler_arrival(
    scenario: AnyScenario, index: int, fails: Callable[[AnyScenario], bool]
) -> AnyScenario:
    def with_arrival(arrival: Arrival) -> AnyScenario:
        arrivals = (*scenario.arrivals[:index], arrival, *scenario.arrivals[index + 1 :])
        return replace(scenario, arrivals=arrivals)

    simpler = list(_simpler_arrivals(scenario.arrivals[index]))
    return _first_that_fails(map(with_arrival, simpler), scenario, fails)


def _simpler_arrivals(arrival: Arrival) -> Iterator[Arrival]:
    request = arrival.request
    yield Arrival(arrival.at_ns, request)
    yield replace(arrival, at_ns=0)
    plain = SamplingSpec(seed=request.sampling.seed)
    for change in (
        {"prompt_token_ids": request.prompt_token_ids[: len(request.prompt_token_ids) // 2]},
        {"prompt_token_ids": request.prompt_token_ids[:-1]},
        {"max_tokens": request.max_tokens // 2},
        {"max_tokens": request.max_tokens - 1},
        {"sampling": plain, "cache_salt": "", "adapter": ""},
        {"priority": 0, "deadline_ns": None, "attempt": 0},
    ):
        is_possible = change.get("prompt_token_ids", "some") and change.get("max_tokens", 1)
        if is_possible:
            yield replace(arrival, request=replace(request, **change))


def _plainer(scenario: AnyScenario) -> Iterator[dict[str, object]]:
    yield {"limits": SchedulerLimits()}
    yield {"dynamic_rope": 0}
    if isinstance(scenario, Scenario):
        yield {"lost": 0.0}
        yield {"doubled": 0.0}


def _first_that_fails(
    candidates: Iterator[AnyScenario],
    scenario: AnyScenario,
    fails: Callable[[AnyScenario], bool],
) -> AnyScenario:
    found = (each for each in candidates if each != scenario and fails(each))
    return next(found, scenario)


def _default(field: Field[Any]) -> object:
    make = field.default_factory
    return field.default if make is MISSING else make()


def literal(value: Any, indent: str = "") -> str:
    """Python that makes the value again, without what is so by default."""
    if is_dataclass(value):
        changed = [
            f"{field.name}={literal(given, indent + '    ')}"
            for field in fields(value)
            if (given := getattr(value, field.name)) != _default(field)
        ]
        return f"{type(value).__name__}({', '.join(changed)})"
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        inside = indent + "    "
        entries = "".join(f"{inside}{literal(entry, inside)},\n" for entry in value)
        return f"(\n{entries}{indent})"
    return repr(value)
