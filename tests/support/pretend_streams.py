"""Requests in mid-decode, to be disturbed."""

from __future__ import annotations

from support.pretend_gateway import PretendGateway, PretendMesh, prompt_of
from support.pretend_workers import until

NUM_REQUESTS = 6
EVERYBODY = range(NUM_REQUESTS)


async def streams(mesh: PretendMesh, max_tokens: int = 100) -> PretendGateway:
    gateway = await mesh.gateway()
    for number in EVERYBODY:
        await gateway.submit(number, prompt_of(number, 40), max_tokens)
    await until(lambda: all(len(gateway.tokens[n]) > 3 for n in EVERYBODY), "tokens of all")
    return gateway
