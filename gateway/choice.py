"""One generation from acceptance to its end: reads the mesh's tokens, yields a client's events.

Ends in exactly one Summary or one StageMeshError, and is counted and logged once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import structlog

from gateway.held_request import HeldRequest, MeshFinish, Submission, Update
from gateway.mesh_client import MeshClient
from gateway.metrics import GatewayMetrics
from gateway.model import ServedModel
from gateway.output import OutputAssembler
from gateway.prepare import Prepared
from gateway.requests import Event, FinishReason, Summary, Timings, Usage
from stagemesh.errors import InternalError, RequestCancelled, StageMeshError

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """When a request was accepted, and when it is to have ended, by the event loop's clock.

    `margin_s`: see Submission.
    """

    at_ns: int
    deadline_s: float | None
    margin_s: float = 0.0

    @classmethod
    def now(cls, timeout_s: float | None, margin_s: float = 0.0) -> Acceptance:
        now_s = asyncio.get_running_loop().time()
        deadline_s = None if timeout_s is None else now_s + timeout_s
        return cls(time.monotonic_ns(), deadline_s, margin_s)


class Choice:
    """`prepared` is what is generated; read `events` once."""

    def __init__(
        self,
        prepared: Prepared,
        accepted: Acceptance,
        mesh: MeshClient,
        model: ServedModel,
        metrics: GatewayMetrics,
    ) -> None:
        self.prepared = prepared
        self._accepted = accepted
        self._mesh = mesh
        self._metrics = metrics
        self._eos_token_ids = model.eos_token_ids
        self._output = OutputAssembler(prepared, model.tokenizer)
        self._held: HeldRequest | None = None
        self._outcome: str | None = None
        self._first_token_ns = 0
        self._last_token_ns = 0
        self._last_token_id: int | None = None

    async def events(self) -> AsyncIterator[Event]:
        """Deltas, then one Summary. Raises the StageMeshError that ended the request instead.

        Deltas are merged when they are read slowly.
        """
        self._held = held = self._submit()
        try:
            while True:
                update = await held.read()
                if delta := self._output.push(update.tokens, update.prompt_logprobs):
                    self._observe(update)
                    yield delta
                if self._output.stop_text is not None:
                    held.close()
                    update = Update((), (), MeshFinish(stopped=True))
                if update.finish is not None:
                    if rest := self._output.finish():
                        yield rest
                    yield self._summarise(update.finish)
                    return
        except StageMeshError as error:
            self._end(error.code)
            raise
        except Exception as error:
            self._end(InternalError.code)
            _log.error("a request failed", exc_info=True)
            raise InternalError("the gateway failed at this request") from error
        finally:
            self.close()

    def close(self) -> None:
        """Ends the request in the mesh unless it has ended; harmless when repeated."""
        if self._held is not None:
            self._held.close()
        self._end(RequestCancelled.code)

    def _submit(self) -> HeldRequest:
        prepared = self.prepared
        return self._mesh.open(
            Submission(
                label=prepared.request.request_id,
                model=prepared.request.model,
                prompt_token_ids=prepared.prompt_token_ids,
                sampling=prepared.sampling,
                max_tokens=prepared.max_tokens,
                priority=prepared.request.priority,
                deadline_s=self._accepted.deadline_s,
                margin_s=self._accepted.margin_s,
                cache_salt=prepared.request.cache_salt,
                adapter=prepared.adapter,
            )
        )

    def _observe(self, update: Update) -> None:
        if not update.tokens:
            return
        now_ns = time.monotonic_ns()
        if not self._first_token_ns:
            self._first_token_ns = now_ns
            self._metrics.first_token_s.observe((now_ns - self._accepted.at_ns) / 1e9)
        else:
            each_s = (now_ns - self._last_token_ns) / 1e9 / len(update.tokens)
            for _ in update.tokens:
                self._metrics.inter_token_s.observe(each_s)
        self._last_token_ns = now_ns
        self._last_token_id = update.tokens[-1].token_id

    def _summarise(self, finish: MeshFinish) -> Summary:
        now_ns = time.monotonic_ns()
        reason = FinishReason.STOP if finish.stopped else FinishReason.LENGTH
        prepared, stop_text = self.prepared, self._output.stop_text
        by_token = finish.stopped and stop_text is None
        summary = Summary(
            finish_reason=reason,
            usage=Usage(
                prompt_tokens=len(prepared.prompt_token_ids),
                completion_tokens=self._output.num_tokens,
                cached_prompt_tokens=finish.admission.cached_prompt_tokens,
            ),
            timings=Timings(
                queue_ns=finish.admission.queue_ns,
                first_token_ns=(self._first_token_ns or now_ns) - self._accepted.at_ns,
                total_ns=now_ns - self._accepted.at_ns,
            ),
            request_id=prepared.request.request_id,
            seed=prepared.sampling.seed,
            stop_text=stop_text,
            stop_token_id=self._last_token_id if by_token else None,
        )
        self._count(summary)
        self._end(reason.value)
        return summary

    def _count(self, summary: Summary) -> None:
        usage, metrics = summary.usage, self._metrics
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_prompt_tokens.inc(usage.cached_prompt_tokens)
        metrics.queue_s.observe(summary.timings.queue_ns / 1e9)
        metrics.total_s.observe(summary.timings.total_ns / 1e9)

    def _end(self, outcome: str) -> None:
        """The first outcome counts."""
        if self._outcome is not None:
            return
        self._outcome = outcome
        self._metrics.requests.labels(outcome).inc()
        self._metrics.generated_tokens.inc(self._output.num_tokens)
        _log.info(
            "request ended",
            request_id=self.prepared.request.request_id,
            outcome=outcome,
            prompt_tokens=len(self.prepared.prompt_token_ids),
            completion_tokens=self._output.num_tokens,
            seconds=round((time.monotonic_ns() - self._accepted.at_ns) / 1e9, 4),
        )
