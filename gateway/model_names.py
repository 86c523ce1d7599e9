"""What a request may call its model: the one that is served, or an adapter that the mesh holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import structlog

from stagemesh.errors import ModelNotFound

_log = structlog.get_logger(__name__)
_NUM_NAMED = 8


class AdaptersView(Protocol):
    """What the scheduler says of the mesh, as far as it is about names."""

    @property
    def model(self) -> str: ...

    @property
    def adapters(self) -> Mapping[str, str]: ...


class ModelNames:
    """Names that are taken. Adapters stay known while the scheduler is away, or has no worker yet:
    their requests wait for it like those of the model alone."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._adapters: dict[str, str] = {}

    @property
    def adapters(self) -> list[str]:
        return sorted(self._adapters)

    def learn(self, view: AdaptersView) -> None:
        """A view that knows no model says nothing."""
        if not view.model:
            return
        if self.model in view.adapters:
            _log.error("an adapter has the name of the model and cannot be chosen", name=self.model)
        self._adapters = {n: i for n, i in view.adapters.items() if n != self.model}

    def adapter(self, name: str) -> str:
        """The identity of the adapter called so; empty for the model itself, also without a name.

        Raises ModelNotFound.
        """
        if not name or name == self.model:
            return ""
        if name in self._adapters:
            return self._adapters[name]
        raise ModelNotFound(f"no model {name!r} here; {self._served()} served")

    def _served(self) -> str:
        names = [self.model, *self.adapters]
        more = [f"{len(names) - _NUM_NAMED} more"] if len(names) > _NUM_NAMED else []
        *others, last = [*(repr(name) for name in names[:_NUM_NAMED]), *more]
        return f"{', '.join(others)} and {last} are" if others else f"{last} is"
