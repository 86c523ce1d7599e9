"""Ranks 1 and up of a worker, as its device thread commands them. What they say is on their side of
the link: `stage_worker.follower`.
"""

from __future__ import annotations

from collections.abc import Sequence

from protos import ranks_pb2
from stage_worker import rank_link
from stage_worker.rank_link import Payload
from stage_worker.rank_processes import RankProcesses
from stagemesh import wire
from stagemesh.errors import InternalError, StageMeshError

_OUTCOME_TIMEOUT_S = 5.0


class OtherRanks:
    """Every command but a step is answered, before the next one is told."""

    def __init__(self, ranks: RankProcesses) -> None:
        self._ranks = ranks

    def tell(self, command: ranks_pb2.RankCommand, payload: Payload = b"") -> None:
        """Raises PeerLost."""
        for link in self._ranks.links:
            rank_link.send(link, command, payload)

    def tell_each(self, command: ranks_pb2.RankCommand, payloads: Sequence[Payload]) -> None:
        for link, payload in zip(self._ranks.links, payloads, strict=True):
            rank_link.send(link, command, payload)

    def answers(self) -> list[tuple[ranks_pb2.RankReply, bytearray]]:
        """Of every rank to the last command. Raises the first error of them, or PeerLost."""
        found = [rank_link.receive(link, ranks_pb2.RankReply) for link in self._ranks.links]
        for reply, _ in found:
            if reply.HasField("error"):
                raise wire.error_from_proto(reply.error)
        return found

    def ask(self, command: ranks_pb2.RankCommand) -> list[tuple[ranks_pb2.RankReply, bytearray]]:
        self.tell(command)
        return self.answers()

    def end_all(self) -> None:
        """And so the worker: it watches them."""
        self._ranks.kill_processes()

    def check_failed_too(self, error: Exception) -> None:
        """Ends all ranks, and so the worker, unless each has found fault with the step."""
        for link in self._ranks.links:
            link.settimeout(_OUTCOME_TIMEOUT_S)
        try:
            self.ask(ranks_pb2.RankCommand(say_outcome=ranks_pb2.SayOutcome()))
        except StageMeshError as theirs:
            if type(theirs) is type(error):
                return
        finally:
            for link in self._ranks.links:
                link.settimeout(None)
        self.end_all()
        raise InternalError(f"one rank failed and others did not: {error!r}") from error
