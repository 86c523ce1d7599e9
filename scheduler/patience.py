"""How long a pipeline has lacked somebody, without any candidate, since it last was whole.

A candidate that comes and goes again does not set it back. Sans-IO; looked at often.
"""

from __future__ import annotations

_RETRY_NS = 5_000_000_000


class Patience:
    def __init__(self, max_ns: int) -> None:
        self._max_ns = max_ns
        self._bound_ns = max_ns
        self._lacked_ns = 0
        self._seen_ns = 0
        self._is_lacking = False

    def look(self, now_ns: int, *, is_lacking: bool, is_whole: bool) -> bool:
        """Whether it is over. `is_lacking`: somebody is missing whom nobody is about to replace."""
        if self._is_lacking:
            self._lacked_ns += now_ns - self._seen_ns
        self._seen_ns, self._is_lacking = now_ns, is_lacking
        if is_whole:
            self._lacked_ns, self._bound_ns = 0, self._max_ns
        return is_lacking and self._lacked_ns >= self._bound_ns

    def was_in_vain(self) -> None:
        """Nothing could be done about it; perhaps later."""
        self._bound_ns = self._lacked_ns + _RETRY_NS

    def wakeup_ns(self) -> int | None:
        """When it will be over, if nothing else happens."""
        if not self._is_lacking:
            return None
        return self._seen_ns + max(0, self._bound_ns - self._lacked_ns)
