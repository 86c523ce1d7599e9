"""What every peer's script is: the same commands, measurements and JSON, whatever engine is inside.

    python -m benchmarks.peers.NAME convert --model DIR --out DIR --dtype float32
    python -m benchmarks.peers.NAME run --model DIR --out DIR --dtype float32 --threads 2
    python -m benchmarks.peers.NAME serve …     # measures what it is asked for, line by line

Standard library only: it runs in the environments of all peers.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BATCHES = (1, 8, 32)
DECODE_PROMPT_TOKENS = 8
NEW_TOKENS = 32
PREFILL_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one batch: until all first tokens were there, and what came while all were decoding."""

    prefill_s: float
    decode_tokens: float
    decode_s: float

    @classmethod
    def of_steps(cls, batch: int, ends_s: Sequence[float]) -> Timing:
        """From the ends of steps that make a token for all of the batch, since it was sent."""
        return cls(ends_s[0], batch * (len(ends_s) - 1), ends_s[-1] - ends_s[0])


class Engine(ABC):
    """One engine with the model loaded. Greedy, nothing ends before `new_tokens`."""

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        """All prompts at once, each of the same length."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """Ends what the engine has started."""


@dataclass(frozen=True, slots=True)
class Options:
    """Where the checkpoint is, where the peer's own form of it is or shall be, and how to run:
    `stages` processes that hold a part of the model each, with so many threads each, or
    `lone_threads`, if not 0, where the others have nothing to do: StageMesh alone has those."""

    model: Path
    out: Path
    dtype: str
    threads: int
    stages: int = 1
    lone_threads: int = 0


class Peer(ABC):
    """An engine that a user would take. `dtypes` are the types that it can compute with;
    `is_divisible`: its model can be spread over several processes."""

    name: str
    dtypes: Sequence[str]
    is_divisible = False

    @abstractmethod
    def convert(self, options: Options) -> None:
        """Makes the peer's own form of the checkpoint at `options.out`."""

    @abstractmethod
    def load(self, options: Options) -> Engine: ...

    @abstractmethod
    def versions(self) -> Mapping[str, str]:
        """Of the packages that matter."""


class Measurer:
    """Measures an engine. Prompts are random and never the same twice: caches must not help."""

    def __init__(self, engine: Engine, vocab_size: int, seed: int) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._rng = random.Random(seed)

    def measure(self, batch: int, prompt_tokens: int, new_tokens: int) -> Timing:
        return self._engine.generate(
            [self._prompt(prompt_tokens) for _ in range(batch)], new_tokens
        )

    def _prompt(self, num_tokens: int) -> list[int]:
        return [self._rng.randrange(3, self._vocab_size) for _ in range(num_tokens)]


def main(peer: Peer, argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.peers.{peer.name}")
    parser.add_argument("command", choices=("convert", "run", "serve", "versions"))
    parser.add_argument("--model", type=Path, default=Path())
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--dtype", choices=peer.dtypes, default=peer.dtypes[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--lone-threads", type=int, default=0)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--prompt-tokens", type=int, default=DECODE_PROMPT_TOKENS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--prefill", type=int, default=PREFILL_TOKENS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    options = Options(
        args.model, args.out, args.dtype, args.threads, args.stages, args.lone_threads
    )
    if options.stages > 1 and not peer.is_divisible:
        parser.error(f"{peer.name} runs a model in one process")
    if args.command == "versions":
        print(json.dumps(dict(peer.versions())))
    elif args.command == "convert":
        peer.convert(options)
    else:
        _with_engine(peer, options, args)


def _with_engine(peer: Peer, options: Options, args: argparse.Namespace) -> None:
    vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
    started_s = time.perf_counter()
    engine = peer.load(options)
    try:
        measurer = Measurer(engine, vocab_size, args.seed)
        if args.command == "serve":
            _say({"loaded_s": time.perf_counter() - started_s})
            _serve(measurer)
        else:
            _say({"peer": peer.name, "dtype": options.dtype} | _run(measurer, args))
    finally:
        engine.close()


def _run(measurer: Measurer, args: argparse.Namespace) -> dict[str, Any]:
    decode = {}
    for batch in args.batches:
        measurer.measure(batch, args.prompt_tokens, 2)  # warm-up
        timing = measurer.measure(batch, args.prompt_tokens, args.new_tokens)
        decode[str(batch)] = timing.decode_tokens / timing.decode_s
    prefill = measurer.measure(1, args.prefill, 1)
    return {"decode_tokens_per_s": decode, "prefill_tokens_per_s": args.prefill / prefill.prefill_s}


def _serve(measurer: Measurer) -> None:
    """Answers each line of JSON on standard input with one, until there are no more."""
    for line in sys.stdin:
        _say(asdict(measurer.measure(**json.loads(line))))


# Engines print what they like to standard output; an answer is a line that begins so.
ANSWER = "ANSWER "


def _say(answer: Mapping[str, Any]) -> None:
    print(ANSWER + json.dumps(answer), flush=True)
