"""Pages between pretend workers: whoever takes a stage over fetches them from whoever held it.

Does what stage_worker/page_service.py and page_fetch.py do. Being asked ends what the holder has of
the pipeline's epochs; if pages are not there, or late, the stage is rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from simulation.clock import S
from simulation.mesh_messages import PagesRequest, PagesSent
from simulation.process import End

if TYPE_CHECKING:
    from simulation.fake_member import Member
    from simulation.fake_worker import FakeWorker

_SILENCE_NS = 2 * S


def give_pages(worker: FakeWorker, end: End, request: PagesRequest) -> None:
    stage = worker.give_up(request)
    if stage is None:
        end.close()
        return

    def read() -> None:
        # A join that came meanwhile may have used them for something else.
        if not worker.keeps_still(request, stage):
            end.close()
            return
        end.send(PagesSent(stage.part.copy(request.block_ids)))

    worker.on_device(worker.shape.compute_ns, read)


class PageFetch:
    """One fetch; `done` is told once whether all pages came and are where they belong."""

    def __init__(self, worker: FakeWorker, member: Member, done: Callable[[bool], None]) -> None:
        self._worker = worker
        self._member = member
        self._done = done
        self._is_over = False
        place = member.place
        peer, accept = worker.world.acceptor_of(place.pages_from)
        self._end = worker.dial(peer, accept)
        self._end.on_message = self._came
        self._end.on_closed = lambda: self._finish(False)
        span = worker.loaded.span if worker.loaded else None
        assert span is not None
        self._end.send(PagesRequest(place.pipeline_id, place.epoch, span, place.page_block_ids))
        worker.after(_SILENCE_NS, self._give_up)

    def _came(self, sent: PagesSent) -> None:
        self._worker.on_device(self._worker.shape.compute_ns, lambda: self._write(sent))

    def _write(self, sent: PagesSent) -> None:
        if not self._is_over and not self._member.ended:
            block_ids = self._member.place.page_block_ids
            self._finish(self._member.stage.part.take(sent.pages, block_ids))

    def _give_up(self) -> None:
        self._finish(False)

    def _finish(self, has_pages: bool) -> None:
        if not self._is_over:
            self._is_over = True
            self._end.close()
            self._done(has_pages)
