"""Ports that belong to a mesh for as long as it lives, also while the process behind one is dead.

A port of a dead process could otherwise become the near end of anybody's connection, and what is
started again could not have it back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import sys

from stagemesh.cli.up_options import UpOptions


class HeldPorts:
    """Close it when the mesh has ended."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def hold(self, host: str, port: int = 0) -> int:
        """The port, or a free one for 0, which from now on only a listener can take.

        A port that cannot be had is left to whoever wants to listen there: its error says more.
        """
        with contextlib.suppress(OSError):
            family, kind, protocol, _, where = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            holder = socket.socket(family, kind, protocol)
            self._sockets.append(holder)
            # Linux lets a listener bind beside it as long as this one does not listen itself.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(where)
            port = int(holder.getsockname()[1])
            if sys.platform != "linux":
                holder.close()
        return port

    def hold_fronts(self, options: UpOptions) -> UpOptions:
        """The options with numbers in place of ports that were left open."""
        return dataclasses.replace(
            options,
            grpc_port=self.hold(options.host, options.grpc_port),
            http_port=self.hold(options.host, options.http_port),
            scheduler_port=self.hold(options.host, options.scheduler_port),
        )

    def close(self) -> None:
        for holder in self._sockets:
            holder.close()
