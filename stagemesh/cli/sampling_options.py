"""Options of the commands that ask for text: which gateway, how to sample, when to stop."""

from __future__ import annotations

from dataclasses import dataclass

from protos import text_generation_pb2 as pb
from stagemesh.cli.client import GATEWAY
from stagemesh.options import check_options, option
from stagemesh.sampling import MAX_SEED

MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """None: what the model or the gateway has as its default."""

    target: str = option(GATEWAY, help="gRPC address of the gateway")
    model: str = option("", help="name of an adapter, or of the model [the model]")
    max_tokens: int | None = option(
        None, help="tokens to generate at most", minimum=1, maximum=MAX_UINT32
    )
    temperature: float | None = option(None, help="0 is greedy", minimum=0)
    top_k: int | None = option(
        None, help="candidates at most, 0 for all", minimum=0, maximum=MAX_UINT32
    )
    top_p: float | None = option(None, help="probability of the candidates together", maximum=1)
    seed: int | None = option(
        None, help="the same seed gives the same tokens", minimum=0, maximum=MAX_SEED
    )
    stop: tuple[str, ...] = option((), help="texts that end the output, separated by commas")

    def __post_init__(self) -> None:
        check_options(self)

    def request(self) -> pb.GenerateRequest:
        """A request without its prompt."""
        return pb.GenerateRequest(
            model=self.model,
            sampling=pb.SamplingParams(
                temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed
            ),
            stopping=pb.StoppingCriteria(max_tokens=self.max_tokens, stop=self.stop),
        )
