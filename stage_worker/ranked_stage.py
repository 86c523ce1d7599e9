"""A stage whose layers are split over ranks, as rank 0 has it: its part, and word to the others.

Used like a StageExecutor, on the device thread. Every rank executes every step; hidden states and
tokens are the same on all of them, and leave by this one. A step in which this rank fails and
another does not would leave that one waiting in a collective: then all are ended.

    n blocks of a batch
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from protos import ranks_pb2
from stage_worker.collectives import Group
from stage_worker.executor import StageExecutor, StageOutput
from stage_worker.executor_config import ExecutorConfig, ExecutorFacts
from stage_worker.expert_placement import PlacementBalance
from stage_worker.expert_rebalancing import ExpertRebalancing
from stage_worker.loading import load_weights, make_stage
from stage_worker.other_ranks import OtherRanks
from stage_worker.pages import PageStore
from stage_worker.rank_link import Payload
from stage_worker.rank_messages import joining_to_proto, load_to_proto
from stage_worker.rank_processes import RankProcesses
from stage_worker.ranked_pages import HeadLayout
from stage_worker.sharding import Shards
from stage_worker.tenancy import Joining
from stage_worker.warm_up import warm_up
from stagemesh import wire_steps
from stagemesh.errors import StageMeshError
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Step


class RankedStage:
    """`load` makes it."""

    def __init__(
        self, own: StageExecutor, others: OtherRanks, group: Group, weight_bytes: int
    ) -> None:
        self._own = own
        self._others = others
        # Every rank sees all tokens and chooses the same experts: what this one counts is true.
        self.experts = own.experts
        self._rebalancing: ExpertRebalancing | None = None
        self.spec: ModelSpec = own.spec
        self.wire_dtype = own.wire_dtype
        self.pages = PageStore(RankedBlocks(own, others, group.size), own.log)
        self.facts: ExecutorFacts = replace(
            own.facts,
            weight_bytes=weight_bytes,
            kv_block_bytes=own.facts.kv_block_bytes * group.size,
        )

    @classmethod
    @torch.inference_mode()
    def load(
        cls,
        config: ExecutorConfig,
        on_progress: Callable[[int, int], None],
        ranks: RankProcesses,
        group: Group,
    ) -> RankedStage:
        """All ranks read at once; then this one says how many blocks all of them have. Errors as
        of `load_stage`, of whichever rank."""
        others = OtherRanks(ranks)
        for rank in range(1, ranks.size):
            ranks.load_progress.begin(rank)
        others.tell(ranks_pb2.RankCommand(load=load_to_proto(config)))
        try:
            weights = load_weights(config, on_progress, group)
        except Exception:
            with contextlib.suppress(StageMeshError):
                others.answers()
            raise
        weight_bytes = weights.num_bytes + sum(reply.weight_bytes for reply, _ in others.answers())
        own = StageExecutor(make_stage(weights))
        make_pages = ranks_pb2.MakePages(num_blocks=own.facts.num_blocks)
        others.ask(ranks_pb2.RankCommand(make_pages=make_pages))
        stage = cls(own, others, group, weight_bytes)
        warm_up(stage, config.span)
        own.experts.forget_routing()
        if config.redundant_experts and own.spec.moe is not None:
            num_experts = own.spec.moe.num_experts
            balance = PlacementBalance(num_experts, group.size, config.redundant_experts)
            stage._rebalancing = ExpertRebalancing(
                balance, own.experts, others, ranks.fetch_reports
            )
        return stage

    @property
    def num_sequences(self) -> int:
        return self._own.num_sequences

    def join(self, joining: Joining) -> None:
        """As StageExecutor.join."""
        self._own.join(joining)
        self._others.ask(ranks_pb2.RankCommand(join=joining_to_proto(joining)))

    def forget(self) -> None:
        self._own.forget()
        self._others.ask(ranks_pb2.RankCommand(forget=ranks_pb2.ForgetPipelines()))

    def execute(self, step: Step, payload: Payload, payload_dtype: str) -> StageOutput:
        """As StageExecutor.execute."""
        if self._rebalancing is not None:
            self._rebalancing.before_step()
        command = ranks_pb2.RankCommand()
        wire_steps.write_step(command.step.step, step)
        command.step.payload_dtype = payload_dtype
        self._others.tell(command, payload)
        try:
            return self._own.execute(step, payload, payload_dtype)
        except Exception as error:
            self._others.check_failed_too(error)
            raise


class RankedBlocks:
    """The KvBlocks of all ranks as one, with all heads."""

    def __init__(self, own: StageExecutor, others: OtherRanks, size: int) -> None:
        self._cache = own.cache
        self._others = others
        self.dtype = own.cache.dtype
        self.kv_dtype = own.cache.kv_dtype
        self._layout = HeadLayout.of(own.cache, own.spec.head_dim)
        self._heads = [Shards(own.spec, rank, size).kv_heads for rank in range(size)]
        self._num_shares = own.spec.num_kv_heads // len(self._heads[0])

    @property
    def block_bytes(self) -> int:
        return self._cache.block_bytes * self._num_shares

    def read_blocks(self, places: Sequence[int]) -> Tensor:
        """[n, block_bytes]"""
        asked = ranks_pb2.RankCommand(read_blocks=ranks_pb2.ReadBlocks(places=places))
        self._others.tell(asked)
        parts = [self._cache.read_blocks(places)]
        for _, content in self._others.answers():
            parts.append(torch.frombuffer(content, dtype=torch.uint8).view(len(places), -1))
        # Where several ranks have the same heads, any of them will do.
        by_heads = {heads.start: part for heads, part in zip(self._heads, parts, strict=True)}
        return self._layout.join([by_heads[start] for start in sorted(by_heads)])

    def write_blocks(self, places: Sequence[int], pages: Tensor) -> None:
        """pages: [n, block_bytes]"""
        own, *theirs = [self._layout.take(pages, heads) for heads in self._heads]
        asked = ranks_pb2.RankCommand(write_blocks=ranks_pb2.WriteBlocks(places=places))
        self._others.tell_each(asked, [part.numpy().data.cast("B") for part in theirs])
        self._cache.write_blocks(places, own)
        self._others.answers()
