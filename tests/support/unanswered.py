"""Files of a model that do not answer, as those of a disk that hangs."""

from __future__ import annotations

import os
from pathlib import Path


class Unanswered:
    """A model whose files do not answer: a pipe in their place, whose readers wait for somebody who
    writes."""

    def __init__(self, model: Path) -> None:
        self._weights = model / "model.safetensors"
        self._aside = self._weights.with_suffix(".aside")
        self._pipe = Path(f"{self._weights}.index.json")
        os.mkfifo(self._pipe)
        self._weights.rename(self._aside)

    def writer(self) -> int | None:
        """A file to write to, where somebody reads: who does waits then until it is closed."""
        try:
            return os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return None

    def end(self) -> None:
        """Of the file, for whoever reads now."""
        writer = self.writer()
        if writer is not None:
            os.close(writer)

    def restore(self) -> None:
        """Readers of before still wait."""
        self._aside.rename(self._weights)
