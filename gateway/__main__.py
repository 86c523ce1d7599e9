"""`python -m gateway`: one gateway process."""

from __future__ import annotations

import asyncio
import sys

import uvloop

from gateway.options import GatewayOptions
from gateway.server import serve
from stagemesh.process import run_service


def main() -> int:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    return run_service("gateway", GatewayOptions, serve)


if __name__ == "__main__":
    sys.exit(main())
