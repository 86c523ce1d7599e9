"""Options of a gateway process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stagemesh.errors import ConfigError
from stagemesh.option_values import Kind
from stagemesh.options import check_options, option


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """Raises ConfigError, naming the option."""

    model: Path = option(help="directory of the model, for its tokenizer and configuration")
    scheduler: str = option("127.0.0.1:50050", help="address of the scheduler, host:port")
    host: str = option("0.0.0.0", help="address to listen on")
    grpc_port: int = option(
        50051, help="port of gRPC; 0 picks a free one", minimum=0, maximum=65535
    )
    http_port: int = option(8000, help="port of HTTP; 0 picks a free one", minimum=0, maximum=65535)
    served_model_name: str = option("", help="name of the model in the APIs, else its directory's")
    gateway_id: str = option("", help="name of this gateway in logs and status")
    max_concurrent_requests: int = option(
        1024, help="generations held at a time; more are refused at once", minimum=1
    )
    max_body_bytes: int = option(
        8 * 2**20,
        help="largest HTTP body and gRPC message",
        kind=Kind.SIZE,
        minimum=1024,
        maximum=2**31 - 2**20,
    )
    default_timeout_s: float = option(
        600.0,
        help="deadline of requests that come without one, as all over HTTP do; 0: none",
        kind=Kind.DURATION,
        minimum=0.0,
    )
    max_unavailable_s: float | None = option(
        None,
        help="how long a request waits at most while no pipeline serves; else until its deadline",
        kind=Kind.DURATION,
        minimum=0.0,
    )
    slow_client_timeout_s: float = option(
        30.0,
        help="a client that takes nothing of its answer for so long has its request cancelled",
        kind=Kind.DURATION,
        minimum=1.0,
    )
    client_keepalive_s: float = option(
        10.0,
        help="how often connections of silent clients are probed; one that vanished without a word "
        "is found after 1.5 times this over gRPC, and after --slow-client-timeout more over HTTP",
        kind=Kind.DURATION,
        minimum=1.0,
    )
    drain_timeout_s: float = option(
        10.0,
        help="time for running requests to finish when the process is told to stop",
        kind=Kind.DURATION,
        minimum=0.0,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.grpc_port and self.grpc_port == self.http_port:
            raise ConfigError(f"--grpc-port and --http-port are both {self.grpc_port}")
