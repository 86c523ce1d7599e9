"""The plan: what a pipeline executes and what it gives back, as frozen values.

The scheduler's core makes steps, stages execute them, the last stage answers with a result. The
fields mean what protos/plan.proto says of them; `stagemesh.wire` converts. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stagemesh.sampling import SamplingSpec
from stagemesh.values import value


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """One configuration of a pipeline. `term` is the scheduler's incarnation."""

    term: int
    n: int


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Layers [start, end)."""

    start: int
    end: int

    @property
    def num_layers(self) -> int:
        return self.end - self.start


@value
class SequenceRun:
    sequence_id: int
    run: int


@value
class BlockUpdate:
    """Blocks from `first_index` on replace what a table of one cache group held there."""

    first_index: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SequenceState:
    """All that the stages know of a sequence beside its KV; in the first row of a run and epoch.

    `adapter` is the identity of one that all stages hold, or empty.
    """

    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    sampling: SamplingSpec
    total_length: int
    adapter: str = ""


@value
class Row:
    """One sequence's part in a step: positions [start, start + num_tokens).

    `start` also truncates: whatever a stage holds of the sequence at or after it is overwritten.
    `token_ids` has num_tokens entries where `input_from_log_of_stage` is None, else none.
    `sample_positions` are absolute; the token sampled after position p stands at p + 1.
    Stages [first_stage, end_stage) execute the row; those before `first_writing_stage` have its KV
    and do not write it. Its input comes from the log of what the stage before `first_stage` sent
    where `input_from_log_of_stage` names it. State and block updates concern every stage.
    """

    sequence_id: int
    run: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    block_updates: tuple[BlockUpdate, ...]
    first_stage: int
    end_stage: int
    sample_positions: tuple[int, ...] = ()
    logprob_positions: tuple[int, ...] = ()
    input_from_log_of_stage: int | None = None
    state: SequenceState | None = None
    first_writing_stage: int = 0

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """One microbatch's pass through a pipeline. `step` counts from 0 within the epoch.

    Stages forget the sequences of `forget` first, then execute `rows`. `alone`: nothing else is
    under way in the pipeline, nor will be before the result; other stages are idle meanwhile.
    """

    pipeline_id: str
    epoch: Epoch
    step: int
    rows: tuple[Row, ...]
    forget: tuple[SequenceRun, ...] = ()
    alone: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@value
class SampledToken:
    """A token at absolute `position`, with log-probabilities where they were asked for.

    Log-probabilities are natural, at temperature 1, after penalties and bias, before filters.
    """

    position: int
    token_id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


NOT_FINITE = "not_finite"


@value
class RowResult:
    """What the last stage says of one row. `error` is None or NOT_FINITE."""

    sequence_id: int
    run: int
    sampled: tuple[SampledToken, ...] = ()
    prompt_logprobs: tuple[SampledToken, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class HopTiming:
    """Where a step's time went at one stage, in nanoseconds of that stage's own clock."""

    stage: int
    receive_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    serialise_ns: int = 0
    idle_ns: int = 0
    received_bytes: int = 0
    started_ns: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """The last stage's answer to a step: one RowResult per row, in the step's order."""

    pipeline_id: str
    epoch: Epoch
    step: int
    rows: tuple[RowResult, ...]
    timings: tuple[HopTiming, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What the scheduler must know of a model; sizes are of the tensors as stored.

    `part_hashes` maps "embedding", "layer.<i>", "norm", "head" to a hash of the tensor bytes.
    `dynamic_rope_length` is the length above which KV depends on a request's total length, or 0.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_position: int
    layer_bytes: int
    embedding_bytes: int
    head_bytes: int
    structure_hash: str
    part_hashes: Mapping[str, str] = field(default_factory=dict)
    dynamic_rope_length: int = 0
