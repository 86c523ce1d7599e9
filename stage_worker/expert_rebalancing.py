"""Experts come to other ranks while a stage serves: what rank 0 does for it, between two steps.

A layer's new placement is chosen; all ranks fetch what they lack of it, beside the steps; once all
have it, all switch to it before the same step, or, where one could not read, give it up. No step
waits for a file. Where a read hangs on some rank nothing comes of it, and nothing else is begun.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import structlog

from protos import ranks_pb2
from stage_worker.expert_placement import Placement, PlacementBalance
from stage_worker.fetch_reports import FetchReports
from stage_worker.other_ranks import OtherRanks
from stage_worker.rank_messages import fetch_to_proto, placement_to_proto
from stage_worker.stage_experts import StageExperts
from stagemesh import wire
from stagemesh.errors import InternalError

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Change:
    """That is fetched, under that number of `reports`."""

    number: int
    layer: int
    placement: Placement
    begun_s: float


class ExpertRebalancing:
    """`experts` are rank 0's; `reports` are all ranks'."""

    def __init__(
        self,
        balance: PlacementBalance,
        experts: StageExperts,
        others: OtherRanks,
        reports: FetchReports,
    ) -> None:
        self._balance = balance
        self._experts = experts
        self._others = others
        self._reports = reports
        self._change: _Change | None = None

    def before_step(self) -> None:
        """Raises PeerLost, and InternalError where ranks would differ in what they have."""
        is_time = self._balance.count_step()
        if self._change is not None:
            self._look_at(self._change)
        elif is_time:
            self._choose()

    def _choose(self) -> None:
        found = self._balance.change(self._experts.routing())
        if found is None:
            return
        change = _Change(self._reports.begin(), *found, time.monotonic())
        fetch = fetch_to_proto(change.number, change.layer, change.placement)
        self._others.ask(ranks_pb2.RankCommand(fetch_experts=fetch))
        tell = partial(self._reports.tell, 0, change.number)
        self._experts.fetch(change.layer, change.placement, tell)
        self._change = change

    def _look_at(self, change: _Change) -> None:
        is_fetched = self._reports.outcome(change.number)
        if is_fetched is None:
            return
        self._change = None
        if is_fetched:
            self._switch(change)
        else:
            self._give_up(change)

    def _switch(self, change: _Change) -> None:
        """Ranks that differ in what they have would compute nonsense: where one cannot, all are
        ended."""
        place_experts = placement_to_proto(change.layer, change.placement)
        self._others.tell(ranks_pb2.RankCommand(place_experts=place_experts))
        try:
            self._experts.place(change.layer, change.placement)
            self._others.answers()
        except Exception as error:
            self._others.end_all()
            raise InternalError(f"experts could not be placed anew: {error!r}") from error
        self._balance.placed(change.layer, change.placement)
        took_s = round(time.monotonic() - change.begun_s, 3)
        log.info("experts are placed anew", layer=change.layer, took_s=took_s)

    def _give_up(self, change: _Change) -> None:
        dropped = self._others.ask(ranks_pb2.RankCommand(drop_experts=ranks_pb2.DropExperts()))
        errors = [self._experts.drop()]
        for reply, _ in dropped:
            failed = reply.HasField("fetch_error")
            errors.append(wire.error_from_proto(reply.fetch_error) if failed else None)
        self._balance.failed(change.layer)
        for rank, error in enumerate(errors):
            if error is not None:
                log.warning(
                    "experts could not be fetched and stay where they are",
                    layer=change.layer,
                    rank=rank,
                    reason=str(error),
                )
