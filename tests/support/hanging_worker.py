"""Run as a program: a stage worker whose device hangs in the fifth step that it executes."""

from __future__ import annotations

import sys
import threading
from typing import Any

from stage_worker.__main__ import main
from stage_worker.executor import StageExecutor, StageOutput
from stagemesh.plan import Step

NUM_GOOD_STEPS = 4


def hang_in_the_fifth_step() -> None:
    execute = StageExecutor.execute

    def execute_or_hang(self: StageExecutor, step: Step, *payload: Any) -> StageOutput:
        if step.step == NUM_GOOD_STEPS:
            threading.Event().wait()
        return execute(self, step, *payload)

    StageExecutor.execute = execute_or_hang  # type: ignore[method-assign]


if __name__ == "__main__":
    hang_in_the_fifth_step()
    sys.exit(main())
