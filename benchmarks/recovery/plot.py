"""Draws what `python -m benchmarks.recovery --out` found: phases of a recovery, by way and context.

    python -m benchmarks.recovery.plot recovery.json benchmarks/recovery.svg

Needs matplotlib: pip install 'stagemesh[bench]'.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PHASES = ("detect_s", "fill_s", "join_s", "rebuild_s", "resume_s")
COLOURS = ("#4c566a", "#a3be8c", "#ebcb8b", "#5e81ac", "#b48ead")
Trials = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


def read(path: Path) -> Trials:
    """Recoveries by way and context."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for each in json.loads(path.read_text()):
        recovery = each["recovery"]
        known_s = sum(recovery[phase] for phase in PHASES[:-1])
        recovery["resume_s"] = max(0.0, recovery["total_s"] - known_s)
        found[each["mode"], recovery["context_tokens"]].append(recovery)
    return found


def draw(trials: Trials, out: Path) -> None:
    from matplotlib.figure import Figure

    contexts = sorted({context for _, context in trials})
    figure = Figure(figsize=(4.0 * len(contexts), 3.6), layout="constrained")
    for index, context in enumerate(contexts):
        axes = figure.add_subplot(1, len(contexts), index + 1)
        modes = [mode for mode, other in trials if other == context]
        bottoms = [0.0] * len(modes)
        for phase, colour in zip(PHASES, COLOURS, strict=True):
            heights = [_median_ms(trials[mode, context], phase) for mode in modes]
            axes.bar(modes, heights, bottom=bottoms, color=colour, label=phase.removesuffix("_s"))
            bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
        axes.set_title(f"{context} tokens of context")
        axes.set_ylabel("ms from kill to next token, medians of phases" if index == 0 else "")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PHASES), frameon=False)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _median_ms(trials: Sequence[Mapping[str, Any]], phase: str) -> float:
    return 1e3 * float(statistics.median(trial[phase] for trial in trials))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("found", type=Path)
    parser.add_argument("out", type=Path, help="an .svg or .png")
    args = parser.parse_args()
    draw(read(args.found), args.out)


if __name__ == "__main__":
    main()
