"""How full the pipeline is and how evenly tokens come, by the real core in virtual time.

No thread, socket or tensor is involved, so the numbers are the same on every machine; what a stage
takes for a step is a stated cost model (benchmarks/virtual/stages.py). Two models: `cpu`, a stage
on one or two cores, where prompts are dear; `gpu`, where a step costs mostly what it costs to read
the weights.

    python -m benchmarks.pipeline_fill
    python -m benchmarks.pipeline_fill --only mixed --stages 4
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from benchmarks.virtual.load import Arrival, Lengths, Load
from benchmarks.virtual.stages import Cost
from benchmarks.virtual.world import Scenario, World
from scheduler.core import SchedulerLimits

MODELS = {
    "cpu": Cost(20_000_000, 500_000, 200),
    "gpu": Cost(8_000_000, 20_000, 4),
}
# The slowest stage's cost by the others'.
_UNEQUAL = 1.5
# A message between hosts that are far from each other.
_FAR_NS = 15_000_000


def scenarios(stages: Sequence[int], max_step_tokens: int) -> Iterator[Scenario]:
    limits = SchedulerLimits(max_step_tokens=max_step_tokens)
    for model, cost in MODELS.items():
        for num_stages in stages:
            equal = (cost,) * num_stages
            unequal = (*equal[:-1], cost.scaled(_UNEQUAL))
            for shape, costs in (("equal", equal), ("unequal", unequal)):
                for name, load in _loads(model, num_stages).items():
                    title = f"{name} {model} {num_stages} {shape}"
                    yield Scenario(title, costs, load, limits)
                    if name == "mixed" and shape == "equal":
                        yield Scenario(f"{title} far", costs, load, limits, hop_ns=_FAR_NS)


def _loads(model: str, num_stages: int) -> dict[str, Load]:
    num = 16 * num_stages
    short, outputs = Lengths(8), Lengths(200, 1.5)
    prompts = Lengths(256 if model == "cpu" else 1024, 2.0, 4096)
    long_prompts = tuple(Arrival(round(at_s * 1e9), 2048, 50) for at_s in (15.0, 25.0, 35.0, 45.0))
    return {
        # A number of streams that is no multiple of the stages.
        "decode": Load(short, Lengths(4000), num_at_once=num + 1),
        "mixed": Load(prompts, outputs, num_at_once=num, closed=True),
        "long": Load(short, Lengths(4000), num_at_once=num + 1, extra=long_prompts),
        "poisson": Load(prompts, outputs, rate_per_s=1.2 if model == "cpu" else 4.0),
    }


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def row(world: World) -> list[str]:
    scenario = world.scenario
    begin_ns, end_ns = round(scenario.warm_up_s * 1e9), round(scenario.duration_s * 1e9)
    slowest = max(range(len(scenario.costs)), key=lambda i: scenario.costs[i].base_ns)
    gaps = [
        (b - a) / 1e6
        for stream in world.streams
        for a, b in zip(stream.tokens_ns, stream.tokens_ns[1:], strict=False)
        if b >= begin_ns
    ]
    tpots = [
        sum(stream.gaps_ns) / len(stream.gaps_ns) / 1e6
        for stream in world.streams
        if stream.gaps_ns and stream.tokens_ns[-1] >= begin_ns
    ]
    firsts = [
        (stream.tokens_ns[0] - stream.arrived_ns) / 1e6
        for stream in world.streams
        if stream.tokens_ns and stream.arrived_ns >= begin_ns
    ]
    num_tokens = sum(at_ns >= begin_ns for stream in world.streams for at_ns in stream.tokens_ns)
    return [
        scenario.name,
        f"{100 * world.stages.busy_share(slowest, begin_ns, end_ns):.1f}",
        f"{num_tokens / ((end_ns - begin_ns) / 1e9):.0f}",
        *(f"{percentile(tpots, share):.0f}" for share in (0.5, 0.99)),
        *(f"{percentile(gaps, share):.0f}" for share in (0.5, 0.99, 1.0)),
        *(f"{percentile(firsts, share):.0f}" for share in (0.5, 0.99)),
    ]


HEADS = (
    *("scenario", "busy %", "tokens/s", "TPOT p50", "p99"),
    *("ITL p50", "p99", "max", "TTFT p50", "p99"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--max-step-tokens", type=int, default=512)
    parser.add_argument("--only", default="", help="scenarios with this in their names")
    args = parser.parse_args()
    print("| " + " | ".join(HEADS) + " |")
    print("|" + "---|" * len(HEADS))
    for scenario in scenarios(args.stages, args.max_step_tokens):
        if args.only in scenario.name:
            print("| " + " | ".join(row(World(scenario).run())) + " |", flush=True)


if __name__ == "__main__":
    main()
