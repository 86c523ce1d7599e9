"""Runs seeds and prints what happens in them: python tests/simulation/run.py SEED."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from simulation.mesh_world import MeshWorld  # noqa: E402
from simulation.seeds import check_seed  # noqa: E402
from simulation.world import World  # noqa: E402

WORLDS = {"core": World, "mesh": MeshWorld}


def main() -> None:
    parser = argparse.ArgumentParser(description="run the scheduler in the simulator")
    parser.add_argument("seed", type=int)
    parser.add_argument("--num-seeds", type=int, default=1, help="this seed and the ones after it")
    parser.add_argument("--world", choices=WORLDS, help="the core's, or the larger one; else both")
    parser.add_argument("--quiet", action="store_true", help="print failures only")
    arguments = parser.parse_args()
    num_failed = 0
    for name in [arguments.world] if arguments.world else WORLDS:
        for seed in range(arguments.seed, arguments.seed + arguments.num_seeds):
            if not arguments.quiet:
                print(f"---- {name} world, seed {seed}")
            try:
                check_seed(WORLDS[name], seed, trace=None if arguments.quiet else print)
            except AssertionError as error:
                num_failed += 1
                print(error)
    print(f"{arguments.num_seeds} seeds, {num_failed} failures")
    sys.exit(1 if num_failed else 0)


if __name__ == "__main__":
    main()
