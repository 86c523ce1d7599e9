"""Which epochs a worker is in: follows the scheduler's commands, admits and refuses streams.

At most two epochs at a time, of two pipelines whose blocks are at either end of the pages; never
one that is older than what was joined before of its pipeline, and never one of an older term. What
a pipeline's pages hold stays (see kv_claims) while the scheduler is away or the epoch is over,
until a join claims it (keep_kv), a join does not, another pipeline joins in its place, or layers
are loaded. Which of its blocks are valid is not known here: the scheduler has one pipeline shrink
before the other grows into what it had. All that is seen to is that no two epochs that run have a
block in common.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from stage_worker.device_thread import DeviceThread
from stage_worker.epoch_member import EpochMember
from stage_worker.kv_claims import KvClaim, KvClaims
from stage_worker.place import EpochReports, Patience, Place
from stage_worker.span_holder import HeldSpan
from stage_worker.stats import Stats
from stagemesh.errors import PeerLost, ProtocolError, StageMeshError, StaleEpoch
from stagemesh.page_frames import PagesRequest
from stagemesh.plan import Epoch
from stagemesh.transport import Hello, Message

# A neighbour that was told of an epoch before this worker was may dial this early.
EARLY_HELLO_TIMEOUT_S = 30.0
MAX_EARLY_HELLOS = 16
# Pipelines whose latest epoch is remembered.
MAX_PIPELINES = 256

log = structlog.get_logger()


class Membership:
    """A stagemesh.transport.PushHandler. `group` runs the epochs."""

    def __init__(
        self,
        group: asyncio.TaskGroup,
        device: DeviceThread,
        stats: Stats,
        reports: EpochReports,
        patience: Patience,
    ) -> None:
        self.own_address = ""  # what neighbours are told; known once the server is bound
        self.patience = patience
        self._group = group
        self._device = device
        self._stats = stats
        self._reports = reports
        # One at each end of the pages, at most; they may have ended.
        self._members: list[EpochMember] = []
        self._claims = KvClaims()
        # Of this term: the latest epoch of each pipeline that was joined.
        self._latest: dict[str, Epoch] = {}
        self._term = 0
        self._num_early = 0
        self._changed = asyncio.Event()

    @property
    def in_epoch(self) -> bool:
        """Whether steps can be executed: an epoch is joined and has not ended."""
        return any(member.joined and not member.ended for member in self._members)

    @property
    def term(self) -> int:
        """Of the latest scheduler that was followed; 0 for none."""
        return self._term

    @property
    def has_kv(self) -> bool:
        """Whether a pipeline may count on what the pages hold."""
        return bool(self._claims)

    def follow_term(self, term: int) -> None:
        """Raises StaleEpoch for a scheduler that was replaced by one this worker has met."""
        if term < self._term:
            raise StaleEpoch(f"a scheduler of term {term} was replaced by one of {self._term}")
        if term > self._term:
            self._term = term
            self._latest.clear()

    def join(self, place: Place, held: HeldSpan | None) -> None:
        """Begins an epoch, in place of the one that the pipeline had here, and of the one at this
        end of the pages. What fails is reported, not raised."""
        try:
            self._check_newer(place)
            claim = self._claim_of(place, held)
        except StageMeshError as error:
            self._reports.broken(place, error, "")
            return
        self._end(m for m in self._members if not _is_beside(m, claim))
        self._passed(place.pipeline_id, place.epoch)
        self._claims.take(claim)
        member = EpochMember(
            place,
            claim,
            self._device,
            self._stats,
            self.own_address,
            self._reports,
            self._wake,
            self.patience,
        )
        self._members.append(member)
        self._group.create_task(member.run())

    def fail(self, error: StageMeshError) -> None:
        """Ends all epochs and reports them."""
        for member in self._members:
            member.fail(error)

    def leave(self, pipeline_id: str | None = None, epoch: Epoch | None = None) -> None:
        """Ends the epoch that is named, or all; no step of it that is still queued will be
        executed."""
        key = (pipeline_id, epoch)
        self._end(m for m in self._members if epoch is None or m.place.key == key)

    def forget_kv(self) -> None:
        """The pages are about to hold something else."""
        self.leave()
        self._claims.clear()

    def give_up(self, request: PagesRequest) -> KvClaim:
        """Ends all epochs of the pipeline before that of the request, by which another worker takes
        the span over. Returns what the pipeline has here. Raises StaleEpoch and ProtocolError.
        """
        pipeline_id, epoch = request.pipeline_id, request.epoch
        self.follow_term(epoch.term)
        if epoch < self._latest_of(pipeline_id):
            raise StaleEpoch(f"{epoch} of {pipeline_id} is over here")
        claim = self._claims.of(pipeline_id)
        if claim is None:
            raise ProtocolError(f"no KV of {pipeline_id} is held here")
        if claim.held.span != request.span:
            raise ProtocolError(f"the KV here is of {claim.held.span}, not {request.span}")
        members = self._members_of(pipeline_id)
        if epoch == self._latest_of(pipeline_id) and members:
            raise ProtocolError(f"{epoch} of {pipeline_id} was joined here")
        self._end(members)
        self._passed(pipeline_id, epoch)
        return claim

    def keeps_still(self, request: PagesRequest, claim: KvClaim) -> bool:
        """Whether since `give_up` the pipeline has not joined again, nothing was loaded, and no
        other pipeline has taken what was its own."""
        pipeline_id = request.pipeline_id
        is_latest = self._latest_of(pipeline_id) == request.epoch
        is_idle = not self._members_of(pipeline_id)
        return is_latest and is_idle and self._claims.of(pipeline_id) == claim

    async def accept(self, hello: Hello) -> None:
        """Waits a while for an epoch that this worker may not have heard of yet."""
        if self._num_early >= MAX_EARLY_HELLOS:
            raise ProtocolError(f"{MAX_EARLY_HELLOS} streams of unknown epochs wait already")
        self._num_early += 1
        try:
            async with asyncio.timeout(EARLY_HELLO_TIMEOUT_S):
                while not self._claim(hello):
                    changed = self._changed
                    await changed.wait()
        except TimeoutError:
            raise StaleEpoch(f"{hello.epoch} of {hello.pipeline_id} was not joined here") from None
        finally:
            self._num_early -= 1

    async def receive(self, hello: Hello, message: Message) -> None:
        member = self._member_of(hello)
        if member is None:
            raise StaleEpoch(f"{hello.epoch} of {hello.pipeline_id} has ended here")
        member.receive(message)

    async def broken(self, hello: Hello, error: StageMeshError | None) -> None:
        member = self._member_of(hello)
        if member is not None:
            reason = error or PeerLost(f"the stream from {hello.sender_id} ended")
            member.fail(reason, hello.sender_id)

    def _claim(self, hello: Hello) -> bool:
        """Whether the stream is accepted now; False where its epoch may still be joined."""
        member = self._member_of(hello)
        if member is None:
            if hello.epoch.term < self._term or hello.epoch <= self._latest_of(hello.pipeline_id):
                raise StaleEpoch(f"{hello.epoch} of {hello.pipeline_id} is over here")
            return False
        if member.ended:
            raise StaleEpoch(f"{hello.epoch} of {hello.pipeline_id} has ended here")
        if hello.to_stage != member.place.stage:
            raise ProtocolError(
                f"a stream to stage {hello.to_stage} came to stage {member.place.stage}"
            )
        if member.has_incoming:
            raise ProtocolError(f"stage {member.place.stage} has its incoming stream already")
        if not member.accepting:
            return False
        member.has_incoming = True
        return True

    def _member_of(self, hello: Hello) -> EpochMember | None:
        key = (hello.pipeline_id, hello.epoch)
        return next((member for member in self._members if member.place.key == key), None)

    def _members_of(self, pipeline_id: str) -> list[EpochMember]:
        return [member for member in self._members if member.place.pipeline_id == pipeline_id]

    def _claim_of(self, place: Place, held: HeldSpan | None) -> KvClaim:
        """What the pipeline has here from now on. Raises ProtocolError where it cannot be had."""
        if held is None:
            raise ProtocolError("no layers are loaded here")
        blocks = held.facts.blocks_for(
            place.num_blocks, from_end=place.from_end, num_log_blocks=place.num_log_blocks
        )
        claim = KvClaim(place.pipeline_id, held, blocks)
        if place.keep_kv and not self._claims.has_kv(claim):
            raise ProtocolError(f"no KV of {place.pipeline_id} is held here")
        for member in self._members:
            in_the_way = _is_beside(member, claim) and member.claim.blocks.meets(blocks)
            if in_the_way and not member.ended:
                raise ProtocolError(
                    f"blocks of {place.pipeline_id} are those of {member.place.pipeline_id}, which "
                    f"is in {member.place.epoch} here"
                )
        return claim

    def _end(self, members: Iterable[EpochMember]) -> None:
        for member in list(members):
            member.end()
            self._members.remove(member)
        self._wake()

    def _check_newer(self, place: Place) -> None:
        self.follow_term(place.epoch.term)
        latest = self._latest_of(place.pipeline_id)
        if place.epoch <= latest:
            raise StaleEpoch(f"{place.epoch} of {place.pipeline_id} is not newer than {latest}")

    def _latest_of(self, pipeline_id: str) -> Epoch:
        return self._latest.get(pipeline_id, Epoch(0, 0))

    def _passed(self, pipeline_id: str, epoch: Epoch) -> None:
        """No epoch up to this one is joined any more."""
        self._latest.pop(pipeline_id, None)
        self._latest[pipeline_id] = epoch
        while len(self._latest) > MAX_PIPELINES:
            del self._latest[next(iter(self._latest))]

    def _wake(self) -> None:
        """Hellos that wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()


def _is_beside(member: EpochMember, claim: KvClaim) -> bool:
    """Whether it is of another pipeline, at the other end."""
    return member.place.pipeline_id != claim.pipeline_id and member.claim.from_end != claim.from_end
