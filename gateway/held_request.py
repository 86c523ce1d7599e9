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


@dataclass(frozen=True, slots=True)
class Submission:
    """What the scheduler is told. `deadline_s` is a time of the event loop's clock, or None."""

    label: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingSpec
    max_tokens: int
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class MeshFinish:
    """How the mesh ended a request: at a stop token or, with `stopped` False, at a length."""

    stopped: bool
    cached_prompt_tokens: int = 0
    queue_ns: int = 0


@dataclass(frozen=True, slots=True)
class Update:
    """All that came since the last read; `finish` in the last one."""

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
    submitted: bool = False
    output_ids: list[int] = field(default_factory=list)
    ended: bool = False
    _deadline: asyncio.TimerHandle | None = None
    _wait: asyncio.TimerHandle | None = None
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

    def finish(self, finish: MeshFinish) -> None:
        if not self.ended:
            self._finish = finish
            self._end()

    def fail(self, error: StageMeshError) -> None:
        """The first of several ends counts; tokens that came before are still read."""
        if not self.ended:
            self._error = error
            self._end()

    def remainder(self) -> MeshFinish | None:
        """How the request has ended by the tokens alone, where the mesh's word for it was lost."""
        if self.output_ids and self.output_ids[-1] in self.submission.sampling.stop_token_ids:
            return MeshFinish(stopped=True)
        if len(self.output_ids) >= self.submission.max_tokens:
            return MeshFinish(stopped=False)
        return None

    def sampling_to_resume(self) -> SamplingSpec:
        """Prompt log-probabilities are not computed again once they have come."""
        sampling = self.submission.sampling
        return replace(sampling, num_prompt_logprobs=None) if self.output_ids else sampling

    def at_deadline(self, ring: Callable[[], None]) -> None:
        """Calls `ring` at the submission's deadline, where it has one, unless ended by then."""
        if self.submission.deadline_s is not None:
            self._deadline = _call_at(self.submission.deadline_s, ring)

    def wait(self, delay_s: float, ring: Callable[[], None]) -> None:
        """Not submitted for now: calls `ring` after `delay_s`, unless something comes between."""
        self.submitted = False
        self.stop_waiting()
        self._wait = _call_at(asyncio.get_running_loop().time() + delay_s, ring)

    def stop_waiting(self) -> None:
        if self._wait is not None:
            self._wait.cancel()

    def _end(self) -> None:
        self.ended = True
        self.stop_waiting()
        if self._deadline is not None:
            self._deadline.cancel()
        self._news.set()

    # ---- the reading side ----

    async def read(self) -> Update:
        """Waits for news. Raises the StageMeshError that ended the request, after its tokens."""
        await self._news.wait()
        tokens, self._unread = tuple(self._unread), []
        if self._error is not None and not tokens:
            raise self._error
        if not self.ended:
            self._news.clear()
        return Update(tokens, self._prompt_logprobs, self._finish)

    def close(self) -> None:
        """Whoever read wants no more: ends the request in the mesh unless it has ended."""
        self.owner.release(self)


def _call_at(when_s: float, ring: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_at(when_s, ring)
