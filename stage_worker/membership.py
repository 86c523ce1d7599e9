"""Which epoch a worker is in: follows the scheduler's commands, admits and refuses streams.

At most one epoch at a time, never one that is older than what was joined before, and never one of
an older term. What the pages hold belongs to one pipeline: the one that was joined last. It stays
while the scheduler is away or the epoch is over, until a join claims it (keep_kv), a join does not,
or layers are loaded.
"""

from __future__ import annotations

import asyncio

import structlog

from stage_worker.device_thread import DeviceThread
from stage_worker.epoch_member import EpochMember
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
        self._current: EpochMember | None = None
        # Whose pages these are, and on which span.
        self._kv_of: tuple[str, HeldSpan] | None = None
        # Of this term: the latest epoch of each pipeline that was joined.
        self._latest: dict[str, Epoch] = {}
        self._term = 0
        self._num_early = 0
        self._changed = asyncio.Event()

    @property
    def in_epoch(self) -> bool:
        """Whether steps can be executed: an epoch is joined and has not ended."""
        member = self._current
        return member is not None and member.joined and not member.ended

    @property
    def term(self) -> int:
        """Of the latest scheduler that was followed; 0 for none."""
        return self._term

    @property
    def has_kv(self) -> bool:
        """Whether a pipeline may count on what the pages hold."""
        return self._kv_of is not None

    def follow_term(self, term: int) -> None:
        """Raises StaleEpoch for a scheduler that was replaced by one this worker has met."""
        if term < self._term:
            raise StaleEpoch(f"a scheduler of term {term} was replaced by one of {self._term}")
        if term > self._term:
            self._term = term
            self._latest.clear()

    def join(self, place: Place, held: HeldSpan | None) -> None:
        """Begins an epoch, in place of the one before. What fails is reported, not raised."""
        try:
            self._check_newer(place)
            if held is None:
                raise ProtocolError("no layers are loaded here")
            if place.keep_kv and self._kv_of != (place.pipeline_id, held):
                raise ProtocolError(f"no KV of {place.pipeline_id} is held here")
        except StageMeshError as error:
            self._reports.broken(place, error, "")
            return
        self.leave()
        self._passed(place.pipeline_id, place.epoch)
        self._kv_of = place.pipeline_id, held
        member = EpochMember(
            place,
            held,
            self._device,
            self._stats,
            self.own_address,
            self._reports,
            self._wake,
            self.patience,
        )
        self._current = member
        self._group.create_task(member.run())

    def fail(self, error: StageMeshError) -> None:
        """Ends the current epoch and reports it."""
        if self._current is not None:
            self._current.fail(error)

    def leave(self, pipeline_id: str | None = None, epoch: Epoch | None = None) -> None:
        """Ends the current epoch, if it is the one named or none is; no step of it that is still
        queued will be executed."""
        member = self._current
        if member is None:
            return
        if epoch is None or (member.place.pipeline_id, member.place.epoch) == (pipeline_id, epoch):
            member.end()
            self._current = None
            self._wake()

    def forget_kv(self) -> None:
        """The pages are about to hold something else."""
        self.leave()
        self._kv_of = None

    def give_up(self, request: PagesRequest) -> HeldSpan:
        """Ends all epochs of the pipeline before that of the request, by which another worker takes
        the span over. Returns what holds the pages. Raises StaleEpoch and ProtocolError.
        """
        pipeline_id, epoch = request.pipeline_id, request.epoch
        self.follow_term(epoch.term)
        if epoch < self._latest_of(pipeline_id):
            raise StaleEpoch(f"{epoch} of {pipeline_id} is over here")
        if self._kv_of is None or self._kv_of[0] != pipeline_id:
            raise ProtocolError(f"no KV of {pipeline_id} is held here")
        held = self._kv_of[1]
        if held.span != request.span:
            raise ProtocolError(f"the KV here is of {held.span}, not {request.span}")
        if epoch == self._latest_of(pipeline_id) and self._current is not None:
            raise ProtocolError(f"{epoch} of {pipeline_id} was joined here")
        self.leave()
        self._passed(pipeline_id, epoch)
        return held

    def keeps_still(self, request: PagesRequest, held: HeldSpan) -> bool:
        """Whether nothing was joined or loaded since `give_up`."""
        is_latest = self._latest_of(request.pipeline_id) == request.epoch
        return is_latest and self._current is None and self._kv_of == (request.pipeline_id, held)

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
        self._member_of(hello).receive(message)

    async def broken(self, hello: Hello, error: StageMeshError | None) -> None:
        member = self._current
        if member is not None and _is_of(hello, member):
            reason = error or PeerLost(f"the stream from {hello.sender_id} ended")
            member.fail(reason, hello.sender_id)

    def _claim(self, hello: Hello) -> bool:
        """Whether the stream is accepted now; False where its epoch may still be joined."""
        member = self._current
        if member is None or not _is_of(hello, member):
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

    def _member_of(self, hello: Hello) -> EpochMember:
        if self._current is None or not _is_of(hello, self._current):
            raise StaleEpoch(f"{hello.epoch} of {hello.pipeline_id} has ended here")
        return self._current

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


def _is_of(hello: Hello, member: EpochMember) -> bool:
    return (hello.pipeline_id, hello.epoch) == (member.place.pipeline_id, member.place.epoch)
