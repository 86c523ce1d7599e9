"""Runs one seed and prints everything that happened in it: python tests/simulation/run.py SEED."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from simulation.mesh_world import MeshWorld  # noqa: E402
from simulation.world import World  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="run the scheduling core in the simulator")
    parser.add_argument("seed", type=int)
    parser.add_argument("--num-seeds", type=int, default=1, help="this seed and the ones after it")
    parser.add_argument("--quiet", action="store_true", help="print failures only")
    parser.add_argument("--mesh", action="store_true", help="the larger world, with membership")
    arguments = parser.parse_args()
    failed = 0
    for seed in range(arguments.seed, arguments.seed + arguments.num_seeds):
        try:
            make = MeshWorld if arguments.mesh else World
            make(seed, trace=None if arguments.quiet else print).run()
        except AssertionError as error:
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {error}")
        else:
            if not arguments.quiet:
                print(f"seed {seed} is fine")
    print(f"{arguments.num_seeds} seeds, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
