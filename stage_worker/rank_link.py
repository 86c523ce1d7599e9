"""Messages between rank 0 of a worker and the others: as protos/ranks.proto says, over a socket."""

from __future__ import annotations

import socket
import struct
from typing import TypeVar

from protos import ranks_pb2
from stagemesh.errors import PeerLost

_LENGTHS = struct.Struct("<II")
Message = TypeVar("Message", ranks_pb2.RankCommand, ranks_pb2.RankReply)
Payload = bytes | bytearray | memoryview


def send(link: socket.socket, message: Message, payload: Payload = b"") -> None:
    """Waits for the other side to read where there is much of it. Raises PeerLost."""
    header = message.SerializeToString()
    content = memoryview(payload).cast("B")
    try:
        link.sendall(_LENGTHS.pack(len(header), len(content)) + header)
        if len(content):
            link.sendall(content)
    except OSError as error:
        raise PeerLost(f"a rank of this worker is gone: {error}") from error


def receive(link: socket.socket, kind: type[Message]) -> tuple[Message, bytearray]:
    """Waits for a message. Raises PeerLost where none will come."""
    header_len, payload_len = _LENGTHS.unpack(_exactly(link, _LENGTHS.size))
    return kind.FromString(bytes(_exactly(link, header_len))), _exactly(link, payload_len)


def _exactly(link: socket.socket, count: int) -> bytearray:
    content = bytearray(count)
    view, filled = memoryview(content), 0
    while filled < count:
        try:
            got = link.recv_into(view[filled:])
        except OSError as error:
            raise PeerLost(f"a rank of this worker is gone: {error}") from error
        if not got:
            raise PeerLost("a rank of this worker is gone")
        filled += got
    return content
