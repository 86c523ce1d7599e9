"""One request as the gateway holds it: what was asked, what came so far, who waits for more.

The state that survives the scheduler: prompt and output so far are enough to submit it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from stagemesh.errors import ProtocolError, StageMeshError
from stagemesh.plan import SampledToken
from stagemesh.sampling import SamplingSpec

# Read at once: a client that was slow to read gets messages of a size that its library takes.
_MAX_READ_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Submission:
    """What the scheduler is told. `deadline_s` is a time of the event loop's clock, or None.

    A request that still waits for a mesh that does not serve ends `margin_s` before its deadline,
    so that its client hears of it before its own clock rings.
    """

    label: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingSpec
    max_tokens: int
    priority: int = 0
    deadline_s: float | None = None
    margin_s: float = 0.0
    cache_salt: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Admission:
    """What the mesh told when the request first ran. Whatever it does again changes none of it."""

    cached_prompt_tokens: int = 0
    queue_ns: int = 0


@dataclass(frozen=True, slots=True)
class MeshFinish:
    """How the mesh ended a request: at a stop token or, with `stopped` False, at a length."""

    stopped: bool
    admission: Admission = Admission()


@dataclass(frozen=True, slots=True)
class Update:
    """What came since the last read, or a part of it; `finish` in the last one."""

    tokens: tuple[SampledToken, ...]
    prompt_logprobs: tuple[SampledToken, ...]
    finish: MeshFinish | None


class Owner(Protocol):
    """Whoever feeds the request, the mesh client, as the request's reader needs it."""

    def release(self, held: HeldRequest) -> None: ...


@dataclass(slots=True, eq=False)
class HeldRequest:
    """Tokens are fed on one side and read on the other, merged where the reader is slow.

    Holds at most the request's own max_tokens, however slowly it is read.
    """

    number: int
    submission: Submission
    owner: Owner
    attempt: int = 0
    # The scheduler has the current attempt.
    submitted: bool = False
    # It is not refused any more: it had to wait before it could be submitted.
    has_waited: bool = False
    output_ids: list[int] = field(default_factory=list)
    ended: bool = False
    _admission: Admission | None = None
    _timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    _unread: list[SampledToken] = field(default_factory=list)
    _prompt_logprobs: tuple[SampledToken, ...] = ()
    _finish: MeshFinish | None = None
    _error: StageMeshError | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    # ---- the feeding side ----

    def take(
        self,
        index: int,
        tokens: Sequence[SampledToken],
        prompt_logprobs: Sequence[SampledToken],
    ) -> None:
        """Adds tokens from position `index` of the output on; those known already are dropped.

        Raises ProtocolError where tokens are missing in between.
        """
        if self.ended:
            return
        known = len(self.output_ids) - index
        if known < 0:
            raise ProtocolError(
                f"tokens from {index} on, where {len(self.output_ids)} had come: some are missing"
            )
        fresh = tokens[known:]
        self.output_ids += [token.token_id for token in fresh]
        self._unread += fresh
        self._prompt_logprobs = self._prompt_logprobs or tuple(prompt_logprobs)
        self._news.set()

    def admitted(self, admission: Admission) -> None:
        """The first word counts."""
        self._admission = self._admission or admission

    def finish(self, stopped: bool) -> None:
        if not self.ended:
            self._finish = MeshFinish(stopped, self._admission or Admission())
            self._end()

    def fail(self, error: StageMeshError) -> None:
        """The first of several ends counts; tokens that came before are still read."""
        if not self.ended:
            self._error = error
            self._end()

    def finish_by_tokens(self) -> None:
        """Ends the request where its tokens are complete: the mesh's word for it was lost."""
        if self.output_ids and self.output_ids[-1] in self.submission.sampling.stop_token_ids:
            self.finish(stopped=True)
        elif len(self.output_ids) >= self.submission.max_tokens:
            self.finish(stopped=False)

    def sampling_to_resume(self) -> SamplingSpec:
        """Prompt log-probabilities are not computed again once they have come."""
        sampling = self.submission.sampling
        return replace(sampling, num_prompt_logprobs=None) if self.output_ids else sampling

    def ring_at(self, name: str, when_s: float, ring: Callable[[], None]) -> None:
        """Calls `ring` then, unless the request has ended. A timer replaces another of its name."""
        self.unring(name)
        if not self.ended:
            self._timers[name] = asyncio.get_running_loop().call_at(when_s, ring)

    def unring(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()

    def _end(self) -> None:
        self.ended = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._news.set()

    # ---- the reading side ----

    async def read(self) -> Update:
        """Waits for news. Raises the StageMeshError that ended the request, after its tokens."""
        await self._news.wait()
        tokens = tuple(self._unread[:_MAX_READ_TOKENS])
        del self._unread[:_MAX_READ_TOKENS]
        if self._error is not None and not tokens:
            raise self._error
        if self._unread:
            return Update(tokens, self._prompt_logprobs, None)
        if not self.ended:
            self._news.clear()
        return Update(tokens, self._prompt_logprobs, self._finish)

    def close(self) -> None:
        """Whoever read wants no more: ends the request in the mesh unless it has ended."""
        self.owner.release(self)
