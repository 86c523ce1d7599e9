"""The steps of a batch of sequences: their prompts in chunks, then one token each a step."""

from __future__ import annotations

import random
from collections.abc import Iterator

from stagemesh.plan import (
    BlockUpdate,
    Epoch,
    Row,
    RowResult,
    SequenceRun,
    SequenceState,
    Step,
)
from stagemesh.sampling import SamplingSpec

EPOCH = Epoch(1, 1)
PIPELINE = "benchmark"


class Plans:
    """Makes steps in order; blocks are in a shuffled order, as after hours of serving."""

    def __init__(
        self, num_stages: int, num_blocks: int, block_size_tokens: int, vocab: int
    ) -> None:
        self._num_stages = num_stages
        self._block_size = block_size_tokens
        self._random = random.Random(0)
        self._vocab = vocab
        self._free = list(range(num_blocks))
        self._random.shuffle(self._free)
        self._num_steps, self._num_sequences = 0, 0
        self._forget: tuple[SequenceRun, ...] = ()

    def step(self, rows: list[Row]) -> Step:
        forget, self._forget = self._forget, ()
        self._num_steps += 1
        return Step(PIPELINE, EPOCH, self._num_steps, tuple(rows), forget)

    def sequence(self, prompt_tokens: int, total_tokens: int, sampling: SamplingSpec) -> Planned:
        self._num_sequences += 1
        count = -(-total_tokens // self._block_size)
        blocks = [self._free.pop() for _ in range(count)]
        prompt = tuple(self._random.randrange(self._vocab) for _ in range(prompt_tokens))
        state = SequenceState(prompt, (), sampling, total_tokens)
        return Planned(self._num_sequences, self._num_stages, blocks, state)

    def end(self, sequences: list[Planned]) -> None:
        for sequence in sequences:
            self._free += sequence.blocks
        self._forget += tuple(SequenceRun(sequence.id, 0) for sequence in sequences)


class Planned:
    """A sequence: `length` positions of it have been executed."""

    def __init__(self, id_: int, num_stages: int, blocks: list[int], state: SequenceState) -> None:
        self.id = id_
        self.blocks = blocks
        self.length = 0
        self._num_stages = num_stages
        self._state = state
        self._last_token = 0

    def chunks(self, chunk_tokens: int) -> Iterator[Row]:
        """Rows of the prompt; the last one samples."""
        prompt = self._state.prompt_token_ids
        for start in range(0, len(prompt), chunk_tokens):
            tokens = prompt[start : start + chunk_tokens]
            end = start + len(tokens)
            self.length = end
            yield self._row(start, tokens, samples=end == len(prompt))

    def decode(self) -> Row:
        self.length += 1
        return self._row(self.length - 1, (self._last_token,), samples=True)

    def take(self, result: RowResult) -> None:
        assert result.error is None, result
        if result.sampled:
            self._last_token = result.sampled[0].token_id

    def _row(self, start: int, tokens: tuple[int, ...], *, samples: bool) -> Row:
        return Row(
            sequence_id=self.id,
            run=0,
            start=start,
            num_tokens=len(tokens),
            token_ids=tokens,
            block_updates=(BlockUpdate(0, tuple(self.blocks)),) if start == 0 else (),
            first_stage=0,
            end_stage=self._num_stages,
            sample_positions=(start + len(tokens) - 1,) if samples else (),
            state=self._state if start == 0 else None,
        )
