"""Gives a stage's pages to the worker that takes its place: a stagemesh.page_stream.PageSource.

Being asked ends what this worker still has of the pipeline's epochs; another pipeline that it
serves goes on. Pages are read batch by batch, each in its turn on the device; if they are used for
something else meanwhile, the rest is refused.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator

import structlog

from stage_worker.device_thread import DeviceThread
from stage_worker.membership import Membership
from stage_worker.watchdog import FIRST_STEP_LIMIT_S
from stagemesh.errors import QueueFull, StaleEpoch
from stagemesh.page_frames import PageBatch, PagesRequest

BATCH_BYTES = 4 * 2**20
MAX_STREAMS = 4

log = structlog.get_logger()


class PageService:
    def __init__(self, membership: Membership, device: DeviceThread) -> None:
        self._membership = membership
        self._device = device
        self._num_streams = 0

    async def pages(self, request: PagesRequest) -> AsyncGenerator[PageBatch]:
        if self._num_streams >= MAX_STREAMS:
            raise QueueFull(f"{MAX_STREAMS} workers are given pages already")
        claim = self._membership.give_up(request)
        store = claim.held.executor.pages
        block_ids = claim.blocks.order(request.block_ids)
        per_batch = max(1, BATCH_BYTES // (store.kv_block_bytes + store.log_block_bytes))
        log.info("gives pages", pipeline=request.pipeline_id, num_blocks=len(block_ids))
        self._num_streams += 1
        try:
            for start in range(0, len(block_ids), per_batch):
                # A join that comes from here on is behind this batch on the device.
                if not self._membership.keeps_still(request, claim):
                    raise StaleEpoch(f"the pages of {request.pipeline_id} are used again here")
                some = block_ids[start : start + per_batch]
                read = functools.partial(store.read, some, claim.blocks)
                yield await self._device.run(read, name="pages", limit_s=FIRST_STEP_LIMIT_S)
        finally:
            self._num_streams -= 1
