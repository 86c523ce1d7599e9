"""What a rank of a worker does that is not the first one: what rank 0 says.

It executes the same steps with its own part of the weights and of the KV, and meets the others in
every layer. It decides nothing, logs nothing and answers nobody outside, and dies of the first
thing that goes wrong here and not there: rank 0 sees that.
"""

from __future__ import annotations

import gc
import socket
from pathlib import Path

from protos import ranks_pb2
from stage_worker import rank_link
from stage_worker.block_ranges import BlockRange, PipelineBlocks
from stage_worker.collectives import Group
from stage_worker.executor import StageExecutor
from stage_worker.load_watch import LoadProgress
from stage_worker.loading import ExecutorConfig, LoadedWeights, load_weights, make_stage
from stage_worker.ranked_pages import blocks_from_bytes, bytes_of_blocks
from stagemesh import wire, wire_steps
from stagemesh.errors import PeerLost, ProtocolError, StageMeshError
from stagemesh.quantization import parse_quantization


class Follower:
    """Obeys the commands that come by `link`."""

    def __init__(self, link: socket.socket, group: Group, progress: LoadProgress) -> None:
        self._link = link
        self._group = group
        self._progress = progress
        self._weights: LoadedWeights | None = None
        self._stage: StageExecutor | None = None
        self._outcome: StageMeshError | None = None  # of the last step

    def run(self) -> None:
        """Until rank 0 is gone."""
        while True:
            try:
                command, payload = rank_link.receive(self._link, ranks_pb2.RankCommand)
            except PeerLost:
                return
            if command.HasField("step"):
                self._outcome = self._try_step(command.step, payload)
                continue
            reply, pages = ranks_pb2.RankReply(), bytearray()
            try:
                pages = self._obey(command, payload, reply)
            except StageMeshError as error:
                reply.error.CopyFrom(wire.error_to_proto(error))
            rank_link.send(self._link, reply, pages)

    def _try_step(self, command: ranks_pb2.RankStep, payload: bytearray) -> StageMeshError | None:
        """What is wrong with a step is wrong on every rank, before any of them computes."""
        try:
            step = wire_steps.step_from_proto(command.step)
            self._held().execute(step, payload, command.payload_dtype)
        except StageMeshError as error:
            return error
        return None

    def _obey(
        self, command: ranks_pb2.RankCommand, payload: bytearray, reply: ranks_pb2.RankReply
    ) -> bytearray:
        """Returns the pages that were asked for. Raises StageMeshError."""
        kind = command.WhichOneof("command")
        if kind == "load":
            self._weights = self._load(command.load)
            reply.weight_bytes = self._weights.num_bytes
        elif kind == "make_pages":
            assert self._weights is not None
            self._stage = StageExecutor(make_stage(self._weights, command.make_pages.num_blocks))
            self._weights = None
        elif kind == "join":
            self._join(command.join)
        elif kind == "forget":
            self._held().forget()
        elif kind == "say_outcome":
            if self._outcome is not None:
                raise self._outcome
        elif kind == "read_blocks":
            return bytes_of_blocks(self._held().cache, command.read_blocks.places)
        elif kind == "write_blocks":
            blocks_from_bytes(self._held().cache, command.write_blocks.places, payload)
        elif kind == "place_experts":
            placed = command.place_experts
            placement = tuple(tuple(rank.experts) for rank in placed.ranks)
            self._held().experts.place(placed.layer, placement)
        else:
            raise AssertionError(f"unknown command {kind}")
        return bytearray()

    def _load(self, load: ranks_pb2.LoadShard) -> LoadedWeights:
        """In place of what was held."""
        self._weights = self._stage = None
        gc.collect()  # it may hang in cycles, and its memory is wanted
        rank = self._group.rank
        try:
            return load_weights(_config(load), lambda *_: self._progress.advance(rank), self._group)
        finally:
            self._progress.end(rank)

    def _join(self, join: ranks_pb2.JoinPipeline) -> None:
        self._held().join(
            pipeline_id=join.pipeline_id,
            stage=join.stage,
            num_stages=join.num_stages,
            blocks=PipelineBlocks(_range(join.kv), _range(join.log)),
            keep_kv=join.keep_kv,
        )

    def _held(self) -> StageExecutor:
        if self._stage is None:
            raise ProtocolError("no layers are loaded on this rank")
        return self._stage


def _range(message: ranks_pb2.BlockRange) -> BlockRange:
    return BlockRange(message.capacity, message.num_blocks, message.from_end)


def _config(load: ranks_pb2.LoadShard) -> ExecutorConfig:
    return ExecutorConfig(
        model_dir=Path(load.model_dir),
        span=wire.span_from_proto(load.span),
        device=load.device,
        dtype=load.dtype,
        batch_invariant=load.batch_invariant,
        block_size_tokens=load.block_size_tokens,
        wire_dtype=load.wire_dtype,
        kv_dtype=load.kv_dtype,
        quantization=parse_quantization(load.quantization),
        lone_threads=load.lone_threads,
        adapters={identity: Path(path) for identity, path in load.adapters.items()},
        expert_parallel=load.expert_parallel,
        redundant_experts=load.redundant_experts,
    )
