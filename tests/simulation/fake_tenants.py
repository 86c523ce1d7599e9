"""The pipelines that a pretend worker serves, at most one from each end of its memory.

Does what stage_worker/membership.py does: whose pages lie at which end, and in which epoch each
pipeline is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulation.fake_stage import FakeStage
from simulation.mesh_messages import PagesRequest
from simulation.stage_memory import StageMemory

from scheduler.messages import JoinEpoch
from stagemesh.plan import Epoch

if TYPE_CHECKING:
    from simulation.fake_member import Member


class Tenants:
    """Of one memory. By end: False is the start."""

    def __init__(self, memory: StageMemory, dynamic_rope: int) -> None:
        self.stages: dict[bool, FakeStage] = {}
        self._memory = memory
        self._dynamic_rope = dynamic_rope
        self._kv_of: dict[bool, str] = {}
        self._members: dict[bool, Member] = {}

    @property
    def members(self) -> list[Member]:
        """Of epochs that have not ended here."""
        return [member for member in self._members.values() if not member.ended]

    def member(self, pipeline_id: str, epoch: Epoch) -> Member | None:
        members = self._members.values()
        return next((each for each in members if each.key == (pipeline_id, epoch)), None)

    def has_kv_of(self, pipeline_id: str, *, from_end: bool) -> bool:
        return self._kv_of.get(from_end) == pipeline_id

    def leave(self, pipeline_id: str | None = None, epoch: Epoch | None = None) -> None:
        """Ends all epochs, or those of a pipeline, or one."""
        for end, member in list(self._members.items()):
            place = member.place
            if pipeline_id in (None, place.pipeline_id) and epoch in (None, place.epoch):
                member.end()
                del self._members[end]

    def make_way(self, place: JoinEpoch) -> FakeStage:
        """Whatever else is at that end is nobody's any more; what there is of the pipeline stays.

        Raises AssertionError where the other end's pipeline is in the way.
        """
        end = place.from_end
        self.leave(place.pipeline_id)
        if older := self._members.pop(end, None):
            older.end()
        self._check_apart(place)
        if self._kv_of.get(not end) == place.pipeline_id:
            del self._kv_of[not end], self.stages[not end]
        if self._kv_of.get(end) != place.pipeline_id or end not in self.stages:
            self.stages[end] = FakeStage(self._memory, self._dynamic_rope, {})
        self._kv_of[end] = place.pipeline_id
        return self.stages[end]

    def let_in(self, member: Member) -> None:
        self._members[member.place.from_end] = member

    def give_up(self, request: PagesRequest) -> FakeStage | None:
        """Ends the pipeline's epochs before that of the request; what holds its pages."""
        ends = [end for end, whose in self._kv_of.items() if whose == request.pipeline_id]
        if not ends or self.member(request.pipeline_id, request.epoch):
            return None
        self.leave(request.pipeline_id)
        return self.stages[ends[0]]

    def keeps_still(self, stage: FakeStage) -> bool:
        is_there = any(each is stage for each in self.stages.values())
        return is_there and not any(each.stage is stage for each in self._members.values())

    def _check_apart(self, place: JoinEpoch) -> None:
        """A worker refuses what would meet the other end's running epoch."""
        for other in (member.place for member in self.members):
            num_blocks = place.num_blocks + other.num_blocks
            num_log_blocks = place.num_log_blocks + other.num_log_blocks
            assert num_blocks <= self._memory.num_blocks, f"{place} meets {other}"
            assert num_log_blocks <= self._memory.num_log_blocks, (
                f"{place} meets {other} in the log"
            )
