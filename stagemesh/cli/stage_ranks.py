"""How many ranks each stage of a mesh has, and which layers, where stages differ in that."""

from __future__ import annotations

from collections.abc import Sequence

from stagemesh.errors import ConfigError, SpanError
from stagemesh.plan import Span


def ranks_of_stages(texts: Sequence[str], num_stages: int) -> tuple[int, ...]:
    """`texts`: nothing, one number for all stages, or one for each. Raises ConfigError."""
    if not all(text.isdecimal() and int(text) > 0 for text in texts):
        raise ConfigError(f"--tensor-parallel must be numbers from 1 on, not {','.join(texts)}")
    if len(texts) not in (0, 1, num_stages):
        raise ConfigError(
            f"--tensor-parallel has {len(texts)} numbers for {num_stages} stages: give one for "
            "all, or one for each"
        )
    numbers = [int(text) for text in texts] or [1]
    return tuple(numbers * num_stages if len(numbers) == 1 else numbers)


def layers_by_ranks(ranks: Sequence[int], num_layers: int) -> tuple[Span, ...]:
    """In proportion to the ranks, at least one for each stage. Raises SpanError."""
    if len(ranks) > num_layers:
        raise SpanError(f"{len(ranks)} stages are too many for a model of {num_layers} layers")
    bounds = [0]
    for stage in range(1, len(ranks)):
        even = round(num_layers * sum(ranks[:stage]) / sum(ranks))
        bounds.append(min(max(even, bounds[-1] + 1), num_layers - len(ranks) + stage))
    bounds.append(num_layers)
    return tuple(map(Span, bounds, bounds[1:]))
