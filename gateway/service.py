"""The core of both fronts: admits requests, prepares them, and hands out choices to read.

Plain asyncio: knows neither grpc nor HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

from gateway.choice import Acceptance, Choice
from gateway.mesh_client import MeshClient
from gateway.metrics import GatewayMetrics
from gateway.model import ServedModel
from gateway.model_names import ModelNames
from gateway.prepare import Preparer, check_shape
from gateway.requests import GenerationRequest
from gateway.seeds import choice_seed
from stagemesh.errors import InvalidRequest, QueueFull, StageMeshError

_RETRY_AFTER_S = 1.0


class GenerationService:
    """At most `max_concurrent_requests` choices are held at a time; more are refused at once.

    `default_timeout_s` is the deadline of requests that come without one; None: they have none.
    """

    def __init__(
        self,
        model: ServedModel,
        mesh: MeshClient,
        metrics: GatewayMetrics,
        *,
        max_concurrent_requests: int,
        default_timeout_s: float | None = None,
    ) -> None:
        self.model = model
        self.names = ModelNames(model.name)
        self.names.learn(mesh.view)
        self.mesh = mesh
        self.metrics = metrics
        self._max_concurrent = max_concurrent_requests
        self._default_timeout_s = default_timeout_s
        self._num_admitted = 0
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="tokenise")
        self.preparer = Preparer(model, self._executor)

    @property
    def max_model_len(self) -> int:
        """Longest prompt and output together, by what the mesh says or else the model."""
        limit = self.mesh.view.max_model_len
        return min(limit, self.model.context_length) if limit else self.model.context_length

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def accept(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[Choice]]:
        """The choices of all requests, in order; nothing runs before their events are read.

        Leaving ends whatever still runs, in the whole mesh. Raises InvalidRequest, ModelNotFound,
        QueueFull.
        """
        with self._counting_refusals():
            for request in requests:
                self.names.adapter(request.model)
                check_shape(request)
            self._check_room(num_choices := sum(request.num_choices for request in requests))
        with self._admitted(num_choices):
            with self._counting_refusals():
                choices = [choice for request in requests for choice in await self._open(request)]
            try:
                yield choices
            finally:
                for choice in choices:
                    choice.close()

    async def _open(self, request: GenerationRequest) -> list[Choice]:
        timeout_s = self._default_timeout_s if request.timeout_s is None else request.timeout_s
        accepted = Acceptance.now(timeout_s, request.margin_s)
        adapter = self.names.adapter(request.model)
        prepared = await self.preparer.prepare(request, self.max_model_len)
        prepared = replace(prepared, adapter=adapter)
        seeds = (
            choice_seed(prepared.sampling.seed, number) for number in range(request.num_choices)
        )
        return [
            Choice(
                replace(prepared, sampling=replace(prepared.sampling, seed=seed)),
                accepted,
                self.mesh,
                self.model,
                self.metrics,
            )
            for seed in seeds
        ]

    def _check_room(self, num_choices: int) -> None:
        if num_choices > self._max_concurrent:
            raise InvalidRequest(
                f"the request asks for {num_choices} generations, at most "
                f"{self._max_concurrent} run at a time",
                param="n",
            )
        if self._num_admitted + num_choices > self._max_concurrent:
            raise QueueFull(
                f"the gateway holds {self._num_admitted} requests, at most {self._max_concurrent}",
                retry_after_s=_RETRY_AFTER_S,
            )

    @contextmanager
    def _admitted(self, num_choices: int) -> Iterator[None]:
        self._num_admitted += num_choices
        self.metrics.in_progress.inc(num_choices)
        try:
            yield
        finally:
            self._num_admitted -= num_choices
            self.metrics.in_progress.dec(num_choices)

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except StageMeshError as error:
            self.metrics.requests.labels(error.code).inc()
            raise
