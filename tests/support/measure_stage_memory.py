"""Run as a program: loads spans of a checkpoint and prints the anonymous memory that each takes.

    python measure_stage_memory.py MODEL_DIR CASES

CASES is JSON: [[start, end, dtype, batch_invariant, quantization, rank, size], …]. Each case runs
in a fork of a process that has imported everything and holds nothing, as an idle worker does. A
line of JSON per case: {"idle", "loaded", "peak", "weights", "read"} in bytes, KV not yet there; the
peak spans a step too. "read" is what was looked at of matrices of floats.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stage_worker.executor import ExecutorConfig, StageExecutor
from stage_worker.tenancy import Joining
from stage_worker.weight_source import FloatSource
from stagemesh.plan import BlockUpdate, Epoch, Row, SequenceState, Span, Step
from stagemesh.quantization import parse_quantization
from stagemesh.sampling import SamplingSpec

NUM_TOKENS = 16


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell RssAnon")


class Peak:
    def __init__(self) -> None:
        self.value = 0

    def look(self, *_: int) -> None:
        self.value = max(self.value, anonymous_bytes())

    @contextmanager
    def watched(self) -> Iterator[None]:
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.002):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class LonelyRank:
    """A group whose other ranks are not there: sums are wrong, memory is right."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x] * self.size

    def gather(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        return None if self.rank else [x] * self.size


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Of each matrix what was read last."""
    read: dict[tuple[int, int], int] = {}
    dense = FloatSource.dense
    total = [0]

    def counted(self: FloatSource, start: int, end: int) -> torch.Tensor:
        rows = dense(self, start, end)
        read[rows.data_ptr(), end - start] = rows.numel() * rows.itemsize
        total[0] = sum(read.values())
        return rows

    FloatSource.dense = counted  # type: ignore[method-assign]
    try:
        yield total
    finally:
        FloatSource.dense = dense  # type: ignore[method-assign]


def measure(
    model_dir: Path,
    span: Span,
    dtype: str,
    batch_invariant: bool,
    quantization: str,
    rank: int,
    size: int,
) -> dict[str, int]:
    idle, peak = anonymous_bytes(), Peak()
    with peak.watched(), counted_reads() as read:
        config = ExecutorConfig(
            model_dir,
            span,
            "cpu",
            dtype,
            batch_invariant,
            16,
            None,
            1,
            quantization=parse_quantization(quantization),
        )
        stage = StageExecutor.load(config, peak.look, LonelyRank(rank, size))
        loaded = anonymous_bytes()
        execute_one_step(stage, span)
        peak.look()
    weights = stage.facts.weight_bytes
    return {
        "idle": idle,
        "loaded": loaded,
        "peak": peak.value,
        "weights": weights,
        "read": read[0],
    }


def execute_one_step(stage: StageExecutor, span: Span) -> None:
    first, last = span.start == 0, span.end == stage.spec.num_layers
    index = 0 if first else 1
    num_stages = index + 1 if last else index + 2
    blocks = stage.facts.blocks_for(1)
    stage.join(Joining(pipeline_id="p", stage=index, num_stages=num_stages, blocks=blocks))
    prompt = tuple(range(NUM_TOKENS))
    row = Row(
        sequence_id=1,
        run=0,
        start=0,
        num_tokens=NUM_TOKENS,
        token_ids=prompt,
        block_updates=(BlockUpdate(0, (0,)),),
        first_stage=0,
        end_stage=num_stages,
        sample_positions=(NUM_TOKENS - 1,),
        state=SequenceState(prompt, (), SamplingSpec(temperature=0.0), NUM_TOKENS + 1),
    )
    bytes_per_token = stage.spec.hidden_size * (4 if stage.dtype == "float32" else 2)
    payload = b"" if first else bytes(NUM_TOKENS * bytes_per_token)
    stage.execute(Step("p", Epoch(1, 1), 0, (row,)), payload, stage.dtype)


def main(model_dir: Path, cases: list[list[object]]) -> None:
    for start, end, dtype, batch_invariant, quantization, rank, size in cases:
        child = os.fork()
        if child == 0:
            span = Span(int(str(start)), int(str(end)))
            numerics = str(dtype), bool(batch_invariant), str(quantization)
            told = measure(model_dir, span, *numerics, int(str(rank)), int(str(size)))
            print(json.dumps(told), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"case {start, end, dtype, batch_invariant, quantization, rank, size} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
