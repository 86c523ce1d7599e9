"""What a rank of a worker does that is not the first one: what rank 0 says.

It executes the same steps with its own part of the weights and of the KV, and meets the others in
every layer. It decides nothing, logs nothing and answers nobody outside, and dies of the first
thing that goes wrong here and not there: rank 0 sees that.
"""

from __future__ import annotations

import gc
import socket
from functools import partial

from protos import ranks_pb2
from stage_worker import rank_link
from stage_worker.collectives import Group
from stage_worker.executor import StageExecutor
from stage_worker.fetch_reports import FetchReports
from stage_worker.load_watch import LoadProgress
from stage_worker.loading import LoadedWeights, load_weights, make_stage
from stage_worker.rank_messages import (
    fetch_from_proto,
    joining_from_proto,
    load_from_proto,
    placement_from_proto,
)
from stage_worker.ranked_pages import blocks_from_bytes, bytes_of_blocks
from stagemesh import wire, wire_steps
from stagemesh.errors import PeerLost, ProtocolError, StageMeshError


class Follower:
    """Obeys the commands that come by `link`."""

    def __init__(
        self, link: socket.socket, group: Group, progress: LoadProgress, reports: FetchReports
    ) -> None:
        self._link = link
        self._group = group
        self._progress = progress
        self._reports = reports
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
            self._held().join(joining_from_proto(command.join))
        elif kind == "forget":
            self._held().forget()
        elif kind == "say_outcome":
            if self._outcome is not None:
                raise self._outcome
        elif kind == "read_blocks":
            return bytes_of_blocks(self._held().cache, command.read_blocks.places)
        elif kind == "write_blocks":
            blocks_from_bytes(self._held().cache, command.write_blocks.places, payload)
        else:
            self._move_experts(command, reply)
        return bytearray()

    def _move_experts(self, command: ranks_pb2.RankCommand, reply: ranks_pb2.RankReply) -> None:
        """Raises StageMeshError."""
        kind, experts = command.WhichOneof("command"), self._held().experts
        if kind == "fetch_experts":
            number, layer, placement = fetch_from_proto(command.fetch_experts)
            experts.fetch(layer, placement, partial(self._reports.tell, self._group.rank, number))
        elif kind == "place_experts":
            experts.place(*placement_from_proto(command.place_experts))
        elif kind == "drop_experts":
            error = experts.drop()
            if error is not None:
                reply.fetch_error.CopyFrom(wire.error_to_proto(error))
        else:
            raise AssertionError(f"unknown command {kind}")

    def _load(self, told: ranks_pb2.LoadShard) -> LoadedWeights:
        """In place of what was held."""
        self._weights = self._stage = None
        gc.collect()  # it may hang in cycles, and its memory is wanted
        config, rank = load_from_proto(told), self._group.rank
        try:
            return load_weights(config, lambda *_: self._progress.advance(rank), self._group)
        finally:
            self._progress.end(rank)

    def _held(self) -> StageExecutor:
        if self._stage is None:
            raise ProtocolError("no layers are loaded on this rank")
        return self._stage
