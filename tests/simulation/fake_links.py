"""The scheduler's data streams: steps out to first stages, results in from last ones.

Does what scheduler/links.py does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulation.mesh_messages import Frame, Hello
from simulation.process import End

from stagemesh.errors import PeerLost, ProtocolError
from stagemesh.plan import Epoch, Step, StepResult

if TYPE_CHECKING:
    from simulation.fake_scheduler import FakeScheduler


class FakeLinks:
    def __init__(self, scheduler: FakeScheduler) -> None:
        self._scheduler = scheduler
        self._streams: dict[tuple[str, Epoch], End] = {}
        self._is_open: set[tuple[str, Epoch]] = set()
        self._results: dict[str, tuple[Epoch, End]] = {}

    # ---- steps ---------------------------------------------------------------------------------

    def open(self, pipeline_id: str, epoch: Epoch, address: str) -> None:
        scheduler = self._scheduler
        peer, accept = scheduler.world.acceptor_of(address)
        end = self._streams[pipeline_id, epoch] = scheduler.dial(peer, accept)
        end.on_message = lambda _: self._opened(pipeline_id, epoch)
        end.on_closed = lambda: self._broken(pipeline_id, epoch)
        end.send(Hello(pipeline_id, epoch, 0, "scheduler"))

    def close(self, pipeline_id: str, epoch: Epoch) -> None:
        self._is_open.discard((pipeline_id, epoch))
        if end := self._streams.pop((pipeline_id, epoch), None):
            end.close()

    def send(self, step: Step) -> None:
        key = (step.pipeline_id, step.epoch)
        if key in self._is_open:
            self._scheduler.world.saw_step(step)
            self._streams[key].send(Frame(step, []))

    def _opened(self, pipeline_id: str, epoch: Epoch) -> None:
        if (pipeline_id, epoch) in self._streams:
            self._is_open.add((pipeline_id, epoch))
            self._scheduler.membership.epochs.stream_opened(pipeline_id, epoch)
            self._scheduler.wake()

    def _broken(self, pipeline_id: str, epoch: Epoch) -> None:
        self.close(pipeline_id, epoch)
        scheduler = self._scheduler
        lost = PeerLost("the first stage is gone")
        scheduler.membership.epochs.stream_broken(pipeline_id, epoch, lost, scheduler.clock.now_ns)
        scheduler.wake()

    # ---- results -------------------------------------------------------------------------------

    def accept(self, end: End) -> None:
        end.on_message = lambda hello: self._accept(end, hello)

    def _accept(self, end: End, hello: Hello) -> None:
        pipeline = self._scheduler.membership.pipeline(hello.pipeline_id)
        is_current = pipeline is not None and pipeline.is_current(hello.epoch)
        accepted = self._results.get(hello.pipeline_id)
        if not is_current or (accepted is not None and accepted[0] == hello.epoch):
            end.close()
            return
        assert pipeline is not None
        assert hello.to_stage == pipeline.num_stages, f"{hello} came to the scheduler"
        self._results[hello.pipeline_id] = hello.epoch, end
        end.on_message = lambda result: self._take(end, hello, result)
        end.on_closed = lambda: self._results_end(hello)
        end.send(None)

    def _take(self, end: End, hello: Hello, result: StepResult) -> None:
        scheduler = self._scheduler
        assert result.epoch == hello.epoch, f"a result of {result.epoch} on a stream of {hello}"
        try:
            scheduler.result_came(result)
        except ProtocolError as error:
            scheduler.world.say(f"a result is refused: {error}")
            end.close()
            self._results_end(hello)
        scheduler.wake()

    def _results_end(self, hello: Hello) -> None:
        scheduler = self._scheduler
        lost = PeerLost("the last stage is gone")
        now_ns = scheduler.clock.now_ns
        scheduler.membership.epochs.stream_broken(hello.pipeline_id, hello.epoch, lost, now_ns)
        scheduler.wake()
