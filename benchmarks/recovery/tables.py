"""What was measured, as tables for people."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.recovery.random_model import ModelShape
from benchmarks.recovery.trial import Recovery


@dataclass(frozen=True, slots=True)
class Found:
    """One trial of one way."""

    mode: str
    recovery: Recovery

    def line(self) -> str:
        r = self.recovery
        return (
            f"{self.mode} {r.context_tokens}: {r.total_s * 1e3:.0f} ms = detect "
            f"{r.detect_s * 1e3:.0f} + fill {r.fill_s * 1e3:.0f} + join {r.join_s * 1e3:.0f} + "
            f"rebuild {r.rebuild_s * 1e3:.0f} + resume {r.resume_s * 1e3:.0f}; "
            f"{r.num_tokens_rebuilt} tokens, compute {r.compute_s * 1e3:.0f} ms "
            f"and {r.others_s * 1e3:.0f} ms on the others "
            f"(a prefill: {r.baseline.prefill_total_s * 1e3:.0f} ms), "
            f"{'same' if r.same_tokens else 'OTHER'} tokens"
        )


_TIMES: dict[str, Callable[[Recovery], float]] = {
    "total": lambda r: r.total_s,
    "detect": lambda r: r.detect_s,
    "fill": lambda r: r.fill_s,
    "join": lambda r: r.join_s,
    "rebuild": lambda r: r.rebuild_s,
    "resume": lambda r: r.resume_s,
}


def tables(found: Iterable[Found], shape: ModelShape, num_stages: int) -> str:
    """Medians, and of the total also the worst."""
    by_row: dict[tuple[str, int], list[Recovery]] = defaultdict(list)
    for each in found:
        by_row[each.mode, each.recovery.context_tokens].append(each.recovery)
    lines = [
        "| way | context | trials | worst ms | "
        + " | ".join(f"{name} ms" for name in _TIMES)
        + " | compute ms | by others ms | of a prefill | with others | same tokens |",
        "|" + "---|" * (len(_TIMES) + 9),
        *(_row(mode, context, trials) for (mode, context), trials in by_row.items()),
        "",
        _prefills(by_row.values()),
        "",
        _bytes(shape, num_stages),
    ]
    return "\n".join(lines)


def _row(mode: str, context: int, trials: Sequence[Recovery]) -> str:
    compute_s = _median(trials, lambda r: r.compute_s)
    others_s = _median(trials, lambda r: r.others_s)
    prefill_s = _median(trials, lambda r: r.baseline.prefill_total_s)
    cells = [
        mode,
        str(context),
        str(len(trials)),
        f"{max(r.total_s for r in trials) * 1e3:.0f}",
        *(f"{_median(trials, time) * 1e3:.0f}" for time in _TIMES.values()),
        f"{compute_s * 1e3:.0f}",
        f"{others_s * 1e3:.0f}",
        f"{compute_s / prefill_s:.2f}",
        f"{(compute_s + others_s) / prefill_s:.2f}",
        f"{sum(r.same_tokens for r in trials)}/{len(trials)}",
    ]
    return "| " + " | ".join(cells) + " |"


def _median(trials: Sequence[Recovery], value: Callable[[Recovery], float]) -> float:
    return statistics.median(map(value, trials))


def _prefills(rows: Iterable[Sequence[Recovery]]) -> str:
    """What a prefill of each context takes by itself."""
    by_context: dict[int, list[Recovery]] = defaultdict(list)
    for row in rows:
        for recovery in row:
            by_context[recovery.context_tokens].append(recovery)
    lines = ["| context | prefill, compute ms | to its first token ms | ms per token |"]
    lines.append("|" + "---|" * 4)
    for context, trials in by_context.items():
        numbers = (
            _median(trials, lambda r: r.baseline.prefill_total_s),
            _median(trials, lambda r: r.baseline.first_token_s),
            _median(trials, lambda r: r.baseline.between_tokens_s),
        )
        lines.append(f"| {context} | " + " | ".join(f"{n * 1e3:.1f}" for n in numbers) + " |")
    return "\n".join(lines)


def _bytes(shape: ModelShape, num_stages: int) -> str:
    layers = shape.num_layers / num_stages
    return (
        f"Bytes per token: KV {shape.kv_bytes_per_token * layers:.0f} in a stage of {layers:g} "
        f"layers, log {shape.log_bytes_per_token} at a boundary between stages."
    )
