"""How fast the kinds of linear layer are against torch's own in float32: shapes, rows, threads.

Kinds are run in turn, round by round, each over several copies of its weights so that no cache
holds them, as in a model. What is printed is how many times as fast as `F.linear` a kind is
(medians over rounds of ratios within a round), and the milliseconds of `F.linear` itself.

    python -m benchmarks.linear_kernels --threads 1 2 --rows 1 8 32 128 512
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from stage_worker import fbgemm, linear_onednn
from stage_worker.linear import Linear, LinearSource, PlainLinear
from stage_worker.linear_half import HalfLinear
from stage_worker.linear_int4 import Int4Linear
from stage_worker.linear_int8 import Int8Linear
from stage_worker.linear_onednn import OneDnnLinear, PackedLinear
from stage_worker.weight_source import FloatSource

# (outputs, inputs) of a Llama of 1.1B parameters: queries with keys and values, gate with up, down.
SHAPES = ("2560x2048", "11264x2048", "2048x5632")
# More than the caches of most processors.
_CYCLE_BYTES = 160e6
_SLICE_S = 0.02


@dataclass(frozen=True, slots=True)
class Kind:
    """`share`: memory against float32."""

    make: Callable[[LinearSource], Linear]
    share: float
    is_available: Callable[[], bool] = lambda: True


def _half(source: LinearSource) -> Linear:
    made = HalfLinear.make(source)
    assert made is not None
    return made


def _plain(source: LinearSource) -> Linear:
    return PlainLinear.make(source, torch.float32, torch.device("cpu"))


def _onednn(source: LinearSource) -> Linear:
    return OneDnnLinear.make(source, torch.float32, torch.device("cpu"))


BASE = "F.linear"
KINDS = {
    BASE: Kind(_plain, 1.0),
    "oneDNN": Kind(_onednn, 1.0, linear_onednn.is_available),
    "packed": Kind(PackedLinear.make, 1.0, linear_onednn.is_available),
    "16 bits": Kind(_half, 0.5, fbgemm.is_available),
    "int8": Kind(Int8Linear.make, 0.25, fbgemm.is_available),
    "int4-g64": Kind(lambda source: Int4Linear.make(source, 64), 0.14),
}


def copies(kind: Kind, num_outputs: int, num_inputs: int) -> Iterator[Linear]:
    """Endlessly; as many different ones as no cache holds."""
    weight_bytes = 4 * num_outputs * num_inputs * kind.share
    weight = (torch.randn(num_outputs, num_inputs) * 0.05).to(torch.float16)
    source = LinearSource([FloatSource(weight)], [], lambda num_bytes: None)
    return itertools.cycle([kind.make(source) for _ in range(2 + int(_CYCLE_BYTES / weight_bytes))])


def ms_per_call(layers: Iterator[Linear], x: torch.Tensor) -> float:
    started_s, num_calls = time.perf_counter(), 0
    while num_calls == 0 or time.perf_counter() - started_s < _SLICE_S:
        next(layers)(x)
        num_calls += 1
    return (time.perf_counter() - started_s) / num_calls * 1e3


def measure(
    layers: dict[str, Iterator[Linear]], num_rows: int, num_inputs: int, num_rounds: int
) -> tuple[float, dict[str, float]]:
    """(milliseconds of the base, how many times as fast the others are)"""
    x = torch.randn(num_rows, num_inputs)
    for cycle in layers.values():  # a first call sets kernels up
        next(cycle)(x)
    rounds = [
        {name: ms_per_call(cycle, x) for name, cycle in layers.items()} for _ in range(num_rounds)
    ]
    base_ms = statistics.median(taken[BASE] for taken in rounds)
    speed = {
        name: statistics.median(taken[BASE] / taken[name] for taken in rounds)
        for name in layers
        if name != BASE
    }
    return base_ms, speed


def print_table(shape: str, threads: Sequence[int], rows: Sequence[int], num_rounds: int) -> None:
    num_outputs, num_inputs = map(int, shape.split("x"))
    available = {name: kind for name, kind in KINDS.items() if kind.is_available()}
    layers = {name: copies(kind, num_outputs, num_inputs) for name, kind in available.items()}
    for num_threads in threads:
        torch.set_num_threads(num_threads)
        for num_rows in rows:
            base_ms, speed = measure(layers, num_rows, num_inputs, num_rounds)
            cells = [shape, str(num_threads), str(num_rows), f"{base_ms:.2f}"]
            cells += [f"{value:.2f}" for value in speed.values()]
            print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTPUTSxINPUTS")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    names = [name for name, kind in KINDS.items() if kind.is_available() and name != BASE]
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}\n")
    print("| outputs x inputs | threads | rows | F.linear ms | " + " | ".join(names) + " |")
    print("|" + "---|" * (4 + len(names)))
    with torch.inference_mode():
        for shape in args.shapes:
            print_table(shape, args.threads, args.rows, args.rounds)


if __name__ == "__main__":
    main()
