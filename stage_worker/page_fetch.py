"""Gets a stage's pages from the worker that held it before, while an epoch is being joined."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import structlog

from stage_worker.device_thread import DeviceThread
from stage_worker.place import Place
from stage_worker.stats import Stats
from stage_worker.watchdog import FIRST_STEP_LIMIT_S
from stagemesh.errors import PeerLost, StageMeshError
from stagemesh.page_frames import PageBatch, PagesRequest
from stagemesh.page_stream import fetch_pages
from stagemesh.plan import Span

log = structlog.get_logger()


async def fetch_into(
    write: Callable[[PageBatch], None],
    span: Span,
    place: Place,
    device: DeviceThread,
    stats: Stats,
    ping_timeout_s: float,
) -> bool:
    """Whether the place named pages and all of them came, and `write` has put them in their place.

    A failure is no end of the epoch: the stage is rebuilt then.
    """
    origin = place.pages
    if origin is None:
        return False
    request = PagesRequest(place.pipeline_id, place.epoch, span, origin.block_ids)
    missing = set(origin.block_ids)
    try:
        batches = fetch_pages(origin.address, request, ping_timeout_s=ping_timeout_s)
        async with contextlib.aclosing(batches):
            async for batch in batches:
                job = functools.partial(write, batch)
                await device.run(job, name="pages", limit_s=FIRST_STEP_LIMIT_S)
                stats.blocks_received += len(batch.block_ids)
                missing.difference_update(batch.block_ids)
        if missing:
            raise PeerLost(f"{len(missing)} pages did not come")
    except StageMeshError as error:
        log.warning("pages could not be fetched", source=origin.address, reason=str(error))
        return False
    return True
