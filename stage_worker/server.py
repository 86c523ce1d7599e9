"""Wires a stage worker together and runs it until it is cancelled, shut down or at fault.

Health: "" serves while the scheduler has this worker, "stagemesh.v1.StageTransport" while it is in
an epoch that it has joined. The server is up before torch is: an address in use is told at once,
and health answers while a model is read.
"""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from protos import mesh_pb2
from stage_worker.device_thread import DeviceThread
from stage_worker.leaving import Leaving
from stage_worker.options import WorkerOptions
from stage_worker.own_address import OwnAddress
from stage_worker.page_service import PageService
from stage_worker.place import Patience
from stage_worker.rank_processes import start_ranks
from stage_worker.sharding import check_divides
from stage_worker.span_holder import SpanHolder
from stage_worker.stats import Stats
from stage_worker.worker import Parts, Worker
from stagemesh import __version__
from stagemesh.addresses import split_address
from stagemesh.errors import SpanError
from stagemesh.model_spec import ModelSpec
from stagemesh.page_stream import page_handlers
from stagemesh.plan import ModelSummary
from stagemesh.process import OnReady
from stagemesh.quantization import parse_quantization
from stagemesh.rpc import RpcServer
from stagemesh.transport import SERVICE_NAME, push_handlers
from stagemesh.wire import (
    PROTOCOL_VERSION,
    dtype_to_proto,
    model_summary_to_proto,
    span_to_proto,
)

DEVICE_STOP_TIMEOUT_S = 5.0
EXIT_HUNG = 70
"""Exit code of a process whose device hung. Starting it again may help."""

log = structlog.get_logger()


def _end_hard() -> None:
    os._exit(EXIT_HUNG)


async def serve(
    options: WorkerOptions,
    on_ready: OnReady | None = None,
    leaving: Leaving | None = None,
    *,
    end_hard: Callable[[], None] = _end_hard,
) -> None:
    """Runs one worker; `on_ready` gets its address and id before the scheduler is dialled, and
    `end_hard` must end the process, whose device hangs.

    Raises what is wrong with the options, the model, or the address, and why the scheduler refused.
    """
    spec = ModelSpec.from_directory(options.model)
    _check_span(options, spec)
    dtype = options.resolved_dtype(spec.dtype)
    # Refused before anything is begun.
    options.resolved_kv_dtype(dtype)
    split_address(options.listen)
    check_divides(spec, options.tensor_parallel, options.expert_parallel)
    ranks = start_ranks(options.tensor_parallel, options.rank_transport)
    server = RpcServer(options.listen)
    device = DeviceThread()

    def end_all_hard() -> None:
        if ranks is not None:
            ranks.kill()
        end_hard()

    try:
        async with asyncio.TaskGroup() as group:
            stats = Stats(ranks=ranks)
            holder = SpanHolder(options, dtype, device, ranks)
            worker = Worker(
                options.scheduler,
                Parts(device, holder, stats, group),
                functools.partial(_set_health, server),
                Patience(step_timeout_s=options.step_timeout_s),
            )
            membership = worker.membership
            handlers = push_handlers(
                membership, stats.traffic, ping_timeout_s=lambda: membership.patience.ping_timeout_s
            )
            pages = page_handlers(PageService(membership, device))
            server.server.add_generic_rpc_handlers((handlers, pages))
            bound = await server.start()
            own_address = OwnAddress(bound, options.advertise, options.scheduler)
            address = await own_address.now()
            summary = await holder.summarise()
            identity = _identity(options, address, summary, dtype)
            identity.adapters.update(holder.adapters)
            if on_ready is not None:
                on_ready({"address": address, "id": identity.worker_id})
            guards = [
                group.create_task(worker.guard_device(end_all_hard)),
                group.create_task(worker.guard_load(options.load_timeout_s, end_all_hard)),
            ]
            if ranks is not None:
                guards.append(group.create_task(worker.guard_ranks(ranks, end_all_hard)))
            leaving = leaving or Leaving()
            leaving.worker_runs(
                worker.control,
                is_needed=lambda: membership.has_kv,
                patience_s=options.drain_timeout_s,
            )
            await _run_and_leave(worker.run(identity, own_address), worker, leaving)
            for guard in guards:
                guard.cancel()
    finally:
        await server.stop(0)
        if not await device.stop(DEVICE_STOP_TIMEOUT_S):
            log.warning("the device is still at work; the process ends without waiting for it")
        if ranks is not None:
            ranks.kill()


async def _run_and_leave(run: Coroutine[Any, Any, None], worker: Worker, leaving: Leaving) -> None:
    """Says goodbye while the control stream is still there, if this is cancelled or told to go."""
    running = asyncio.create_task(run)
    impatience = asyncio.create_task(leaving.patience_ended())
    try:
        await asyncio.wait([running, impatience], return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not running.done():
            await worker.control.leave("told to stop")
        worker.membership.leave()
        impatience.cancel()
        running.cancel()
        await asyncio.wait([running, impatience])
    if not running.cancelled():
        running.result()


def _check_span(options: WorkerOptions, spec: ModelSpec) -> None:
    span = options.layers
    if span is not None and span.end > spec.num_layers:
        raise SpanError(
            f"--layers {span.start}:{span.end} is outside the model, which has "
            f"{spec.num_layers} layers"
        )


def _set_health(server: RpcServer, attached: bool, in_epoch: bool) -> None:
    server.set_serving(attached)
    server.set_serving(in_epoch, SERVICE_NAME)


def _identity(
    options: WorkerOptions, address: str, summary: ModelSummary, dtype: str
) -> mesh_pb2.RegisterWorker:
    port = split_address(address)[1]
    identity = mesh_pb2.RegisterWorker(
        protocol_version=PROTOCOL_VERSION,
        worker_id=options.worker_id or f"{socket.gethostname()}:{port}",
        incarnation=secrets.randbits(63),
        address=address,
        model=model_summary_to_proto(summary),
        device=options.device,
        dtype=dtype_to_proto(dtype),
        batch_invariant=options.batch_invariant,
        wire_dtype=dtype_to_proto(dtype if options.wire_dtype == "auto" else options.wire_dtype),
        kv_dtype=dtype_to_proto(options.resolved_kv_dtype(dtype)),
        quantization=str(parse_quantization(options.quantization)),
        pid=os.getpid(),
        stagemesh_version=__version__,
        max_kv_memory_bytes=options.max_kv_memory_bytes or 0,
        tensor_parallel=options.tensor_parallel,
    )
    if options.layers is not None:
        identity.fixed_span.CopyFrom(span_to_proto(options.layers))
    return identity
