"""Streams against a gateway, each token with its time, compared with an undisturbed run.

A request is greedy or seeded, so that it has one right answer; `Truth` learns it while nothing is
broken. A stream is right if it has exactly those tokens and that text, in order, once, and one
summary.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc

DEFAULT_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `seed` None is greedy."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int | None = None

    def request(self) -> pb.GenerateRequest:
        sampling = pb.SamplingParams(temperature=0.0)
        if self.seed is not None:
            # Penalties count prompt and output apart, which a resubmission must keep apart.
            sampling = pb.SamplingParams(
                temperature=1.0, seed=self.seed, top_p=0.95, frequency_penalty=0.1
            )
        return pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=self.prompt),
            sampling=sampling,
            stopping=pb.StoppingCriteria(max_tokens=self.max_tokens, ignore_eos=True),
        )


def asks(
    num: int,
    seed: int,
    *,
    prompt_tokens: Sequence[int] = (5, 12, 40, 90, 17, 150),
    max_tokens: int = 48,
    vocab_size: int = 2048,
) -> list[Ask]:
    """Every other one is greedy; lengths go round; every sixth begins as the one before it does,
    which shares its blocks."""
    rng = random.Random(seed)
    made: list[Ask] = []
    for n in range(num):
        length = prompt_tokens[n % len(prompt_tokens)]
        prompt = tuple(rng.randrange(3, vocab_size) for _ in range(length))
        if n % 6 == 5:
            prompt = made[-1].prompt + prompt[:length]
        made.append(Ask(prompt, max_tokens, None if n % 2 == 0 else rng.randrange(2**32)))
    return made


@dataclass
class Stream:
    """What came of one request so far. `error` says how it went wrong, `code` is gRPC's status."""

    ask: Ask
    started_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    text: str = ""
    error: str | None = None
    code: grpc.StatusCode | None = None
    trailers: dict[str, str] = field(default_factory=dict)
    finished: bool = False

    def take(self, response: pb.GenerateResponse) -> None:
        if self.finished:
            self.error = "a message after the summary"
        elif response.WhichOneof("event") == "summary":
            self.finished = True
            if response.summary.usage.completion_tokens != len(self.token_ids):
                self.error = "the summary counts other tokens than came"
        else:
            self._take_delta(response.delta)

    def _take_delta(self, delta: pb.TokenDelta) -> None:
        if delta.token_ids and delta.index != len(self.token_ids):
            self.error = f"token {delta.index} where {len(self.token_ids)} was next"
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.times_s += [time.monotonic()] * len(delta.token_ids)

    def longest_gap_s(self) -> float:
        """Between two tokens, or before the first."""
        before = [self.started_s, *self.times_s]
        return max((b - a for a, b in zip(before, self.times_s, strict=False)), default=0.0)


async def run_stream(
    stub: pb_grpc.TextGenerationStub, ask: Ask, stream: Stream, timeout_s: float | None
) -> None:
    """Never raises for what the mesh does: that is in `stream`."""
    stream.started_s = time.monotonic()
    try:
        async for response in stub.Generate(ask.request(), timeout=timeout_s):
            stream.take(response)
    except grpc.aio.AioRpcError as error:
        stream.code = error.code()
        stream.error = f"{error.code().name}: {error.details()}"
        trailers = error.trailing_metadata() or ()
        stream.trailers = {key: value for key, value in trailers if isinstance(value, str)}
        return
    if not stream.finished and stream.error is None:
        stream.error = "the stream ended without a summary"


class Truth:
    """The right answers, learnt from a mesh that nobody disturbs meanwhile."""

    def __init__(self) -> None:
        self._answers: dict[Ask, tuple[list[int], str]] = {}

    async def learn(self, target: str, wanted: Iterable[Ask]) -> None:
        unknown = [ask for ask in dict.fromkeys(wanted) if ask not in self._answers]
        async with Load(target, unknown) as load:
            await load.finish()
        for stream in load.streams:
            assert stream.error is None, f"undisturbed, and yet: {stream.error}"
            assert len(stream.token_ids) == stream.ask.max_tokens
            self._answers[stream.ask] = (stream.token_ids, stream.text)

    def tokens(self, ask: Ask) -> list[int]:
        return self._answers[ask][0]

    def fault(self, stream: Stream) -> str | None:
        """What is wrong with a stream that should have ended well."""
        if stream.error is not None:
            return f"after {len(stream.token_ids)} tokens: {stream.error}"
        return self.difference(stream) or (None if stream.finished else "unfinished")

    def difference(self, stream: Stream) -> str | None:
        """Where the tokens that came are not the right ones."""
        tokens, text = self._answers[stream.ask]
        for position, token in enumerate(stream.token_ids):
            if position >= len(tokens) or token != tokens[position]:
                return f"token {position} is {token}, not {tokens[position : position + 1]}"
        if stream.finished and stream.text != text:
            return "the same tokens with another text"
        return None

    def faults(self, streams: Iterable[Stream]) -> list[str]:
        found = ((n, self.fault(stream)) for n, stream in enumerate(streams))
        return [f"stream {n}: {fault}" for n, fault in found if fault is not None]


class Load:
    """All of `wanted` at once; the first `repeat` of them begin again as soon as they are done,
    until `finish`.

    `streams` are the latest of each, `done` all that ended.
    """

    def __init__(
        self,
        target: str,
        wanted: Iterable[Ask],
        *,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        repeat: int = 0,
    ) -> None:
        self.streams = [Stream(ask) for ask in wanted]
        self.done: list[Stream] = []
        self._num_rounds = [0] * len(self.streams)
        self._target = target
        self._timeout_s = timeout_s
        self._repeat = repeat
        self._tasks: list[asyncio.Task[None]] = []
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._target)
        stub = pb_grpc.TextGenerationStub(self._channel)
        self._tasks = [
            asyncio.create_task(self._run(stub, number)) for number in range(len(self.streams))
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert self._channel is not None
        await self._channel.close()

    @property
    def num_tokens(self) -> int:
        under_way = (stream for stream in self.streams if not _has_ended(stream))
        return sum(len(stream.token_ids) for stream in (*self.done, *under_way))

    async def until_tokens(self, each: int, timeout_s: float = 60.0) -> None:
        """Until every stream has so many tokens or has ended once."""
        deadline = time.monotonic() + timeout_s
        while any(
            len(stream.token_ids) < each and num_rounds == 0
            for stream, num_rounds in zip(self.streams, self._num_rounds, strict=True)
        ):
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {each} tokens each"
            await asyncio.sleep(0.005)

    async def until_more_tokens(self, num: int, timeout_s: float = 60.0) -> None:
        """Until so many more have come, of all streams together."""
        wanted, deadline = self.num_tokens + num, time.monotonic() + timeout_s
        while self.num_tokens < wanted:
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {num} more tokens"
            await asyncio.sleep(0.005)

    async def finish(self) -> None:
        """Until all have ended, well or not. A repeated load begins no new ones."""
        self._repeat = 0
        await asyncio.gather(*self._tasks)

    async def _run(self, stub: pb_grpc.TextGenerationStub, number: int) -> None:
        while True:
            stream = self.streams[number]
            await run_stream(stub, stream.ask, stream, self._timeout_s)
            self.done.append(stream)
            self._num_rounds[number] += 1
            if number >= self._repeat:
                return
            self.streams[number] = Stream(stream.ask)


def _has_ended(stream: Stream) -> bool:
    return stream.finished or stream.error is not None
