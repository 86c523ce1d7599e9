"""What whoever starts a mesh sees of it: progress while it loads, logs, and who is lost."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from protos import mesh_pb2
from stagemesh.cli.log_lines import LEVEL_STYLES, shower
from stagemesh.cli.up_options import UpOptions
from stagemesh.cli.worker_states import is_spare
from stagemesh.errors import StageMeshError
from stagemesh.process import LOG_FORMATS

_STATES = {
    mesh_pb2.WORKER_STATE_UNSPECIFIED: "starting",
    mesh_pb2.WORKER_STATE_IDLE: "registered",
    mesh_pb2.WORKER_STATE_LOADING: "loading",
    mesh_pb2.WORKER_STATE_READY: "loaded",
    mesh_pb2.WORKER_STATE_SERVING: "serving",
}


@dataclass(slots=True)
class _Row:
    role: str
    pid: int
    state: str = "starting"
    layers: str = ""
    fraction: float = 0.0


class UpView:
    """A table that fills on a terminal, one log line per change elsewhere. Use as a context."""

    def __init__(self, options: UpOptions) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._on_terminal = self._console.is_terminal
        as_json = LOG_FORMATS[options.log_format]
        self._as_json = not self._on_terminal if as_json is None else as_json
        self._level = options.log_level
        level = options.log_level or ("warning" if self._on_terminal else "info")
        self._show_line = shower(level, self._as_json, self._show)
        self._rows: dict[str, _Row] = {}
        self._names: dict[int, str] = {}
        self._live: Live | None = None
        self.after_restart: Callable[[], None] = lambda: None
        self._log: Any = structlog.get_logger()

    def begin(self) -> None:
        if self._on_terminal and not self._as_json:
            self._live = Live(console=self._console, transient=True, refresh_per_second=10)
            self._live.start()

    def end_progress(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def on_line(self, process: str, line: str) -> None:
        self._show_line(process, line)

    def on_started(self, process: str, role: str, pid: int) -> None:
        self._rows[process] = _Row(role, pid)
        self._names[pid] = process
        self._changed(process, "starting")

    def on_ready(self, process: str) -> None:
        if self._rows[process].role != "worker":  # the scheduler tells of these
            self._rows[process].state = "serving"
            self._changed(process, "serving")

    def on_progress(self, status: mesh_pb2.GetStatusResponse) -> None:
        for worker in status.workers:
            process = self._names.get(worker.pid)
            if process is None:
                continue
            row = self._rows[process]
            state = "spare" if is_spare(worker, status) else _STATES.get(worker.state, "")
            row.layers = f"{worker.span.start}:{worker.span.end}" if worker.span.end else ""
            row.fraction = _fraction(worker)
            if row.state != state:
                row.state = state
                self._changed(process, state, layers=row.layers)
        self._refresh()

    def on_stopping(self) -> None:
        self.end_progress()
        if self._on_terminal:
            self._console.print("stopping …", style="dim")
            if self._level is None:
                # Neighbours that see each other go warn of it.
                self._show_line = shower("error", self._as_json, self._show)
        else:
            self._log.info("stopping")

    def on_lost(self, process: str, error: StageMeshError) -> None:
        self._tell("error", f"{process} is lost: {error}", process)

    def on_left(self, process: str) -> None:
        self._tell("info", f"{process} has left", process)

    def on_restarting(self, process: str, why: str, pause_s: float) -> None:
        when = "now" if pause_s < 1.0 else f"in {pause_s:.0f} s"
        self._tell("warning", f"{process} is started again {when}, since it {why}", process)

    def on_restarted(self, process: str, pid: int) -> None:
        self._rows[process].pid = pid
        self._names[pid] = process
        self._tell("info", f"{process} is back, pid {pid}", process)
        self.after_restart()

    def _tell(self, level: str, message: str, process: str) -> None:
        """What concerns whoever runs the mesh, whatever level of the services' logs is shown."""
        if self._as_json:
            getattr(self._log, level)(message, process=process)
        else:
            self._show(Text(message, style=LEVEL_STYLES[level]))

    def _changed(self, process: str, state: str, **facts: object) -> None:
        if self._live is None:
            known = {key: value for key, value in facts.items() if value}
            self._log.info(f"{process} is {state}", process=process, **known)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for process, row in self._rows.items():
            bar: ProgressBar | str = ""
            if row.role == "worker":
                bar = ProgressBar(total=1.0, completed=row.fraction, width=30)
            layers = f"layers {row.layers}" if row.layers else ""
            style = "green" if row.state in ("serving", "spare") else "yellow"
            table.add_row(process, Text(row.state, style=style), layers, bar)
        return table

    def _show(self, line: str | Text) -> None:
        try:
            if isinstance(line, Text):
                self._console.print(line, soft_wrap=True)
            else:
                print(line, file=sys.stderr, flush=True)
        except OSError as error:
            if error.errno != errno.ENOSPC:  # a full disk costs lines of the log, no more
                raise


def _fraction(worker: mesh_pb2.WorkerStatus) -> float:
    if worker.state in (mesh_pb2.WORKER_STATE_READY, mesh_pb2.WORKER_STATE_SERVING):
        return 1.0
    return float(worker.load_fraction)
