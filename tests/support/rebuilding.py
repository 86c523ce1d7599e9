"""Plans the rebuilding of stages that were lost, as the scheduler might."""

from __future__ import annotations

from dataclasses import dataclass, field

from support.stages import Chain, Live

from stagemesh.plan import Row


@dataclass
class Rebuilder:
    """Plans as the scheduler might: what a stage lacks first, in order, then what is next.

    `lost` are rebuilt one after another, each sequence at its own pace.
    """

    chain: Chain
    chunk: int
    lost: list[int]
    use_log: bool
    alive: list[Live]
    _done: dict[tuple[int, int], int] = field(default_factory=dict)
    _until: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for live in self.alive:
            live.first = True
            self._until[live.sequence_id] = live.computed

    def next_row(self, live: Live) -> Row:
        for stage in self.lost:
            done = self._done.get((live.sequence_id, stage), 0)
            if done < self._until[live.sequence_id]:
                return self._rebuild(live, stage, done)
        return live.row(len(self.chain.stages), self.chunk)

    def _rebuild(self, live: Live, stage: int, done: int) -> Row:
        first = self._source(live, stage, done)
        end = done + 1
        limit = min(self._until[live.sequence_id], done + self.chunk)
        while end < limit and self._source(live, stage, end) == first:
            end += 1
        self._done[live.sequence_id, stage] = end
        return live.rebuild_row(done, end, range(first, stage + 1), stage)

    def _source(self, live: Live, stage: int, position: int) -> int:
        """The stage from which on this position must be computed again."""
        block = live.blocks[position // self.chain.block_size_tokens]
        while stage > 0 and not (
            self.use_log and block < self.chain.blocks(stage - 1).log.num_blocks
        ):
            stage -= 1
        return stage

    def step(self, num_rows: int) -> None:
        """One step of at most `num_rows` rows; who had one goes to the end of the queue."""
        chosen = self.alive[:num_rows]
        rows = [self.next_row(live) for live in chosen]
        for live, row, result in zip(chosen, rows, self.chain.execute(rows), strict=True):
            whole = (0, len(self.chain.stages), 0)
            if (row.first_stage, row.end_stage, row.first_writing_stage) == whole:
                live.take(row, result)
            else:
                assert (result.sampled, result.prompt_logprobs, result.error) == ((), (), None)
                live.first = False
        self.alive = [live for live in (*self.alive[num_rows:], *chosen) if not live.done]
