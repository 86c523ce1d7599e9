"""Addresses as text: "host:port", "[v6]:port"; which ones to listen on and which to tell others.

A server may listen on a wildcard ("0.0.0.0:50052"); what it tells others must name one host.
"""

from __future__ import annotations

import errno
import socket

from stagemesh.errors import ConfigError, PeerLost

_WILDCARDS = {"", "*", "0.0.0.0", "::"}


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port"; raises ConfigError that quotes the address."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{address!r} is no address: host:port is wanted, port 0 to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"{address!r} is no address: write an IPv6 host in brackets")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_wildcard(host: str) -> bool:
    return host in _WILDCARDS


def is_of_this_host(host: str) -> bool:
    """Whether the address, in numbers, is one of this host's own now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def advertised_address(bound: str, advertise: str, towards: str) -> str:
    """What others should dial to reach a server that is bound to `bound`.

    `advertise` is the operator's word: "host:port", or a host alone where the port is the bound
    one. Without it a wildcard becomes this host's own address on the way to `towards` (host:port;
    its name is looked up, which may block). Raises ConfigError; PeerLost where there is no way to
    `towards` now.
    """
    host, port = split_address(bound)
    if advertise:
        if ":" not in advertise or advertise.endswith("]"):
            return join_address(advertise.strip("[]"), port)
        named_host, named_port = split_address(advertise)
        return join_address(named_host, named_port or port)
    if is_wildcard(host):
        host = _own_host_towards(towards)
    return join_address(host, port)


def _own_host_towards(address: str) -> str:
    """The local address that packets to `address` would leave from; nothing is sent."""
    host, port = split_address(address)
    try:
        family, kind, protocol, _, peer = socket.getaddrinfo(
            host, port or 1, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(peer)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise PeerLost(
            f"no way to {address} ({error}), so it is not known which address of this host others "
            "can reach; --advertise names one"
        ) from error
