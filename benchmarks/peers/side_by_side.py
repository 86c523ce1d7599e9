"""Two engines in turn, each loaded once: what noise there is on the machine meets both.

An engine is a process that answers a line of JSON with one (`protocol`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from benchmarks.peers.environments import REPO
from benchmarks.peers.protocol import ANSWER


class EngineFailed(Exception):
    """The process of an engine ended instead of answering."""


class EngineProcess(AbstractContextManager["EngineProcess"]):
    def __init__(self, command: Sequence[str], threads: int) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # How its threads wait is the engine's own choice: the other one is not asked meanwhile.
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
            },
        )
        try:
            self.loaded = self._answer()
        except EngineFailed:
            self._close()
            raise

    def measure(self, batch: int, prompt_tokens: int, new_tokens: int) -> Mapping[str, float]:
        asked = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Mapping[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                answer: Mapping[str, float] = json.loads(line.removeprefix(ANSWER))
                return answer
        raise EngineFailed(f"{self._process.args!r} ended with {self._process.wait()}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        """No more is asked, which ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True, slots=True)
class Measured:
    """One thing measured of both, a value per round in tokens a second."""

    what: str
    peer: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Ours by the peer's: the median of the rounds, each of which is two runs in turn."""
        return statistics.median(b / a for a, b in zip(self.peer, self.ours, strict=True))

    def as_dict(self) -> dict[str, Any]:
        return {"what": self.what, "peer": self.peer, "ours": self.ours, "ratio": self.ratio}


@dataclass(frozen=True, slots=True)
class Wanted:
    batches: Sequence[int]
    prompt_tokens: int
    new_tokens: int
    prefill_tokens: int
    rounds: int


def compare(
    peer: EngineProcess,
    ours: EngineProcess,
    wanted: Wanted,
    on_measured: Callable[[Measured], None] = lambda measured: None,
) -> list[Measured]:
    """Decoding at each batch size, and the prefill of one prompt; who begins changes by round.

    `on_measured` is told whenever something was measured of both once more.
    """
    found = [Measured(f"decode, batch {batch}") for batch in wanted.batches]
    prefill = Measured(f"prefill of {wanted.prefill_tokens}")
    for number in range(wanted.rounds):
        for batch, measured in zip(wanted.batches, found, strict=True):
            for engine, values in _in_turn(peer, ours, measured, number):
                if number == 0:
                    engine.measure(batch, wanted.prompt_tokens, 2)  # warm-up
                timing = engine.measure(batch, wanted.prompt_tokens, wanted.new_tokens)
                if not timing["decode_s"]:
                    raise EngineFailed("there was no time in which all of the batch decoded")
                values.append(timing["decode_tokens"] / timing["decode_s"])
            on_measured(measured)
        for engine, values in _in_turn(peer, ours, prefill, number):
            timing = engine.measure(1, wanted.prefill_tokens, 1)
            values.append(wanted.prefill_tokens / timing["prefill_s"])
        on_measured(prefill)
    return [*found, prefill]


def _in_turn(
    peer: EngineProcess, ours: EngineProcess, measured: Measured, number: int
) -> list[tuple[EngineProcess, list[float]]]:
    pair = [(peer, measured.peer), (ours, measured.ours)]
    return pair if number % 2 == 0 else pair[::-1]
