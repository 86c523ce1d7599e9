"""How often in a row a pipeline's epochs came to nothing, and what is concluded from it.

An epoch that got a step done is a success, whatever ends it.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.errors import PeerLost, StageMeshError, StaleEpoch

_FIRST_BACKOFF_NS = 50_000_000
_MAX_BACKOFF_NS = 5_000_000_000
# Epochs that ended with a step that was not executed: then neither it nor the KV is trusted.
_MAX_FAULTS = 3
# Epochs that ended by the loss of a member while the first step was under way. Chance may do that a
# few times; what kills its worker time and again is the step.
_MAX_CRASHES = 6


@dataclass(slots=True)
class Trials:
    num_failures: int = 0
    num_faults: int = 0
    num_crashes: int = 0

    def begin_anew(self) -> None:
        """Somebody else is there now: no reason to wait. What kills workers is counted on."""
        self.num_failures = 0

    def succeeded(self) -> None:
        self.num_failures = self.num_faults = self.num_crashes = 0

    def failed(self, error: StageMeshError, *, had_step: bool) -> int:
        """An epoch ended; returns for how long not to begin another."""
        backoff_ns = min(_MAX_BACKOFF_NS, _FIRST_BACKOFF_NS << min(self.num_failures, 10))
        self.num_failures += 1
        if had_step and isinstance(error, PeerLost | StaleEpoch):
            self.num_crashes += 1
        elif had_step:
            self.num_faults += 1
        return backoff_ns

    @property
    def is_kv_suspect(self) -> bool:
        return self.num_faults >= _MAX_FAULTS

    @property
    def is_step_hopeless(self) -> bool:
        """The step that is never done is to be given up, so that the others can go on."""
        return self.is_kv_suspect or self.num_crashes >= _MAX_CRASHES

    def gave_up(self) -> None:
        """The next step has its own chances."""
        self.num_crashes = 0
