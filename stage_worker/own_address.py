"""How others reach this worker: told by its operator, or found on the way to the scheduler.

What was found is found again when this host has another address than before.
"""

from __future__ import annotations

import asyncio

import structlog

from stagemesh.addresses import advertised_address, is_of_this_host, is_wildcard, split_address
from stagemesh.backoff import Backoff
from stagemesh.errors import PeerLost

log = structlog.get_logger()


class OwnAddress:
    """Of the server bound to `bound`; `advertise` is the operator's word, empty for none."""

    def __init__(self, bound: str, advertise: str, scheduler: str) -> None:
        self._bound = bound
        self._advertise = advertise
        self._scheduler = scheduler
        self._found = ""

    async def now(self) -> str:
        """Waits for a way to the scheduler: its host may come later, and this one's cable too."""
        is_found = is_wildcard(split_address(self._bound)[0]) and not self._advertise
        if not self._found or (is_found and not is_of_this_host(split_address(self._found)[0])):
            self._found = await self._find()
        return self._found

    async def _find(self) -> str:
        backoff = Backoff()
        told = False
        while True:
            try:
                return await asyncio.to_thread(
                    advertised_address, self._bound, self._advertise, self._scheduler
                )
            except PeerLost as error:
                if not told:
                    log.warning("no scheduler", scheduler=self._scheduler, reason=str(error))
                told = True
            await backoff.wait()
