"""The state of a mesh as tables for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from protos import mesh_pb2, plan_pb2
from stagemesh.cli.stage_bars import StageBars, stage_times
from stagemesh.cli.worker_states import is_spare, state_word

_STATE_STYLES = {
    "serving": "green",
    "loading": "yellow",
    "draining": "yellow",
    "set": "bold red",
    "spare": "cyan",
    "idle": "dim",
}


def render(
    status: mesh_pb2.GetStatusResponse, before: mesh_pb2.GetStatusResponse | None = None
) -> RenderableType:
    """The bars of stages are of the time since `before`."""
    parts: list[RenderableType] = [_mesh(status), _workers(status)]
    parts += [_set_aside(worker) for worker in status.workers if worker.error]
    parts += [line for worker in status.workers if (line := _experts(worker)) is not None]
    for pipeline in status.pipelines:
        bars = StageBars(stage_times(pipeline, status, before))
        parts.append(Group(*_pipeline(pipeline), bars))
    return Group(*_spaced([*parts, _queue(status.queue)]))


def _spaced(parts: Iterable[RenderableType]) -> list[RenderableType]:
    return [each for part in parts for each in (part, Text())]


def _mesh(status: mesh_pb2.GetStatusResponse) -> Text:
    mesh = status.mesh
    line = Text()
    line.append(mesh.model or "no model yet", style="bold")
    line.append(
        "  serving" if mesh.serving else "  not serving", "green" if mesh.serving else "red"
    )
    if mesh.detail:
        line.append(f"  {mesh.detail}", style="yellow")
    if mesh.adapters:
        line.append(f"  adapters {', '.join(sorted(mesh.adapters))}")
    line.append(f"  context {mesh.max_model_len}" if mesh.max_model_len else "", style="dim")
    line.append(f"  gateways {status.num_gateways}", style="dim")
    line.append(f"  up {_duration(status.uptime_ns)}", style="dim")
    return line


def _workers(status: mesh_pb2.GetStatusResponse) -> Table:
    table = _table("worker", "state", "layers", "serves")
    for column in ("device", "address"):  # what a narrow terminal can do without
        table.add_column(column, overflow="ellipsis")
    table.add_column("pid", no_wrap=True)
    _number_columns(table, "weights MiB", "RSS MiB", "steps", "busy %")
    for worker in sorted(status.workers, key=lambda worker: _order(worker, status)):
        state = state_word(worker, status)
        stats = worker.stats
        table.add_row(
            worker.worker_id,
            Text(state, style=_STATE_STYLES.get(state.split()[0], "")),
            f"{worker.span.start}:{worker.span.end}" if worker.span.end else "",
            " ".join(p.pipeline_id for p in status.pipelines if worker.worker_id in p.worker_ids),
            f"{_device(worker)} {_dtype(worker.dtype)}".strip(),
            worker.address,
            str(worker.pid),
            _mib(worker.weight_bytes),
            _mib(stats.rss_anon_bytes),
            str(stats.steps_executed),
            _share(stats.compute_ns, stats.compute_ns + stats.idle_ns),
        )
    return table


def _order(
    worker: mesh_pb2.WorkerStatus, status: mesh_pb2.GetStatusResponse
) -> tuple[bool, int, str]:
    return is_spare(worker, status), worker.span.start, worker.worker_id


def _set_aside(worker: mesh_pb2.WorkerStatus) -> Text:
    line = Text(f"{worker.worker_id} is set aside: ", style="bold red")
    line.append(worker.error, style="")
    return line


def _experts(worker: mesh_pb2.WorkerStatus) -> Text | None:
    """How evenly the tokens of a worker's mixtures of experts are spread."""
    uneven = []
    for layer in worker.stats.routing:
        if total := sum(layer.tokens):
            busiest = max(range(len(layer.tokens)), key=layer.tokens.__getitem__)
            times_even = layer.tokens[busiest] * len(layer.tokens) / total
            uneven.append((times_even, layer.layer, busiest))
    if not uneven:
        return None
    times_even, layer_number, expert = max(uneven)
    mean = sum(each[0] for each in uneven) / len(uneven)
    line = Text(f"experts of {worker.worker_id}: ", style="bold")
    return line.append(
        f"the busiest has {mean:.1f} times an even share on average, {times_even:.1f} times in "
        f"layer {layer_number} (expert {expert})",
        style="",
    )


def _pipeline(pipeline: mesh_pb2.PipelineStatus) -> tuple[RenderableType, ...]:
    epoch = pipeline.epoch
    used = pipeline.num_blocks - pipeline.num_free_blocks
    line = Text()
    line.append(f"pipeline {pipeline.pipeline_id}", style="bold")
    line.append("  serving" if pipeline.serving else "  waiting for workers")
    line.append(
        f"  epoch {epoch.n}  running {pipeline.num_running}"
        f"  steps {pipeline.steps_done} (+{pipeline.steps_in_flight} in flight)"
        f"  KV {used}/{pipeline.num_blocks} blocks"
        f" ({_share(used, pipeline.num_blocks)} %, {pipeline.num_cached_blocks} cached)",
        style="dim",
    )
    if pipeline.HasField("mending"):
        line.append("\n")
        line.append(_mending(pipeline), style="" if pipeline.serving else "yellow")
    table = _table("stage", "worker")
    _number_columns(table, "receive ms", "queue ms", "compute ms", "serialise ms", "idle ms", "KiB")
    timings = {timing.stage: timing for timing in pipeline.mean_timings}
    for stage, worker_id in enumerate(pipeline.worker_ids):
        table.add_row(str(stage), worker_id or "(nobody)", *_hop(timings.get(stage)))
    return line, table


def _mending(pipeline: mesh_pb2.PipelineStatus) -> str:
    """How the pipeline went on after its epoch had ended, as far as it has come."""
    mending = pipeline.mending
    phases = (
        ("workers", mending.fill_ns),
        ("joining", mending.join_ns),
        ("rebuilding", mending.rebuild_ns),
    )
    times = [f"{name} {ns / 1e6:.0f} ms" for name, ns in phases if ns]
    if pipeline.num_lacking_tokens:
        times.append(f"{pipeline.num_lacking_tokens} tokens lacking")
    if mending.num_tokens_rebuilt:
        times.append(f"{mending.num_tokens_rebuilt} tokens rebuilt")
    if mending.num_blocks_moved:
        times.append(f"{mending.num_blocks_moved} blocks moved")
    is_over = pipeline.serving and not pipeline.num_lacking_tokens
    return f"{'mended' if is_over else 'mending'} ({mending.reason}): {', '.join(times) or '…'}"


def _hop(timing: plan_pb2.HopTiming | None) -> list[str]:
    if timing is None:
        return []
    times_ns = (
        timing.receive_ns,
        timing.queue_ns,
        timing.compute_ns,
        timing.serialise_ns,
        timing.idle_ns,
    )
    return [f"{ns / 1e6:.2f}" for ns in times_ns] + [f"{timing.received_bytes / 1024:.1f}"]


def _queue(queue: mesh_pb2.QueueStatus) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("requests", f"{queue.num_running} running", f"{queue.num_waiting} waiting")
    table.add_row(
        "since start",
        f"{queue.num_finished} finished",
        f"{queue.num_aborted} cancelled",
        f"{queue.num_failed} failed",
        f"{queue.num_refused} refused",
        f"{queue.num_preempted} preempted",
    )
    table.add_row(
        "tokens/s",
        f"{queue.generated_tokens_per_s:.1f} generated",
        f"{queue.prompt_tokens_per_s:.1f} prompt",
        f"{_share(queue.cached_prompt_tokens, queue.prompt_tokens)} % of prompts cached",
    )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _number_columns(table: Table, *columns: str) -> None:
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)


def _device(worker: mesh_pb2.WorkerStatus) -> str:
    ranks = worker.tensor_parallel
    return f"{worker.device} ×{ranks}" if ranks > 1 else str(worker.device)


def _dtype(dtype: plan_pb2.DType) -> str:
    return "" if not dtype else plan_pb2.DType.Name(dtype).removeprefix("DTYPE_").lower()


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f}" if num_bytes else ""


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}" if whole else "0"


def _duration(duration_ns: int) -> str:
    seconds = duration_ns // 10**9
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02}:{seconds % 60:02}"
