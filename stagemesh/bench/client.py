"""The seam between a load and the server that it is put on: one request in, its tokens out.

`grpc_client` and `http_client` implement it. Their errors are StageMeshErrors.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from stagemesh.bench.workload import Ask


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message with tokens. `num_tokens` None: the server does not say how many."""

    num_tokens: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """The server's own count, at the end."""

    prompt_tokens: int
    output_tokens: int
    cached_prompt_tokens: int | None = None


News = Delivery | Usage


@dataclass(frozen=True, slots=True)
class Served:
    """What is known of the server. `max_tokens`: of prompt and output together, 0 for unknown."""

    model: str
    max_tokens: int
    notes: tuple[str, ...] = ()


class Client(Protocol):
    """Sends requests to one server. Closing the iterator of `stream` cancels the request."""

    @property
    def served(self) -> Served: ...

    def prepare(self, ask: Ask) -> Any:
        """All that can be done before the request is due. Costs time, so never while measuring."""
        ...

    def stream(self, prepared: Any) -> AsyncGenerator[News, None]:
        """Raises StageMeshError where the request fails."""
        ...
