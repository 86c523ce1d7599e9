"""One request on its way: its tokens, and how far its KV follows them.

There are no phases. `num_computed <= num_scheduled <= num_tokens`; what can be scheduled is
`num_tokens - num_scheduled`, whether that is a prompt, the token sampled last, or everything again
after a preemption.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scheduler.core.prefix import HashChain, root_hash
from scheduler.core.request import Request, RequestKey
from scheduler.core.table import BlockTable
from stagemesh.plan import SampledToken, SequenceRun, SequenceState
from stagemesh.sampling import SamplingSpec

if TYPE_CHECKING:
    from scheduler.core.pipeline import Pipeline, PipelineFacts


# Asked for by no gateway (incarnations are not negative), and worse ranked than whatever is.
PROBE = Request(
    key=RequestKey(-1, 0),
    attempt=0,
    label="probe",
    prompt_token_ids=(0,),
    output_token_ids=(),
    sampling=SamplingSpec(),
    max_tokens=1,
    priority=2**31,
)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request that was accepted and has not ended.

    KV of positions [0, num_computed) is valid on every stage of `pipeline`; rows for
    [num_computed, num_scheduled) are in flight. A new `run` begins whenever the KV is given up.
    """

    request: Request
    sequence_id: int
    arrival: int
    submitted_ns: int
    tokens: list[int] = field(init=False)
    # A token that only shows whether a pipeline answers; nobody asked for it.
    is_probe: bool = field(init=False)
    num_prompt_tokens: int = field(init=False)
    # With so many tokens it ends at the latest, where it runs.
    max_length: int = field(init=False)
    stop_token_ids: tuple[int, ...] = field(init=False)
    run: int = 0
    num_computed: int = 0
    num_scheduled: int = 0
    pipeline: Pipeline | None = None
    table: BlockTable = field(default_factory=BlockTable)
    # Blocks at the table's beginning that are full, computed and known to the prefix index.
    num_named: int = 0
    # The next row carries the sequence's state: it is the first of a run or of an epoch.
    needs_state: bool = True
    # A row of this run was planned, so stages may hold something of it.
    is_known_to_stages: bool = False
    has_ended: bool = False
    admitted_ns: int | None = None
    num_cached_prompt_tokens: int = 0
    prompt_logprobs: list[SampledToken] = field(default_factory=list)
    _chains: dict[tuple[str, int, int], HashChain] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_token_ids, *self.request.output_token_ids]
        self.is_probe = self.request is PROBE
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.max_length = self.request.total_length
        self.stop_token_ids = self.request.sampling.stop_token_ids

    @property
    def key(self) -> RequestKey:
        return self.request.key

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the lower."""
        return (self.request.priority, self.arrival)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that can be scheduled."""
        return len(self.tokens) - self.num_scheduled

    @property
    def is_short_of_blocks(self) -> bool:
        """Nothing of it is in flight, and its table has no room for the next token."""
        return (
            self.num_scheduled == self.num_computed
            and self.pipeline is not None
            and (
                self.num_scheduled == self.table.num_entries * self.pipeline.facts.block_size_tokens
            )
        )

    @property
    def sequence_run(self) -> SequenceRun:
        return SequenceRun(self.sequence_id, self.run)

    @property
    def wanted_prompt_logprobs(self) -> range:
        """Prompt positions whose log-probabilities are still to come.

        A request that brings output has had them with the first of it.
        """
        wanted = self.request.sampling.num_prompt_logprobs is not None
        if not wanted or self.request.output_token_ids:
            return range(0)
        return range(len(self.prompt_logprobs), self.num_prompt_tokens - 1)

    @property
    def max_hit_tokens(self) -> int:
        """How much of a cached prefix may be taken over.

        The last token is always computed, since its logits are wanted, and so is every position
        whose log-probabilities are.
        """
        wanted = self.wanted_prompt_logprobs
        return wanted.start if wanted else self.num_tokens - 1

    def state(self) -> SequenceState:
        prompt = self.request.prompt_token_ids
        return SequenceState(
            prompt_token_ids=prompt,
            output_token_ids=tuple(self.tokens[len(prompt) :]),
            sampling=self.request.sampling,
            total_length=self.request.total_length,
            adapter=self.request.adapter,
        )

    def chain(self, facts: PipelineFacts) -> HashChain:
        """Names of this sequence's blocks in pipelines of this model and block size."""
        total_length = self.request.total_length
        if not 0 < facts.dynamic_rope_length < total_length:
            total_length = 0
        key = (facts.model_identity, facts.block_size_tokens, total_length)
        chain = self._chains.get(key)
        if chain is None:
            request = self.request
            root = root_hash(
                facts.model_identity, request.adapter, request.cache_salt, total_length
            )
            chain = self._chains[key] = HashChain(root, facts.block_size_tokens)
        return chain

    def run_on(self, pipeline: Pipeline) -> None:
        """From now on, or from now on with another capacity."""
        self.pipeline = pipeline
        self.max_length = min(self.request.total_length, pipeline.capacity_tokens)

    def begin_run(self) -> None:
        """The KV was given up and the table is empty: results of rows in flight will be dropped."""
        self.run += 1
        self.pipeline = None
        self.num_computed = self.num_scheduled = self.num_named = 0
        self.needs_state = True
        self.is_known_to_stages = False

    def rewind(self) -> None:
        """Rows in flight are lost, the KV that was acknowledged stays: plan them again."""
        self.num_scheduled = self.num_computed
        self.needs_state = True
