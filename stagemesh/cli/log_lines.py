"""Lines that services log, shown again by the process that supervises them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from stagemesh.logs import LEVELS

LEVEL_STYLES = {"debug": "dim", "info": "", "warning": "yellow", "error": "bold red"}
_ALWAYS_SHOWN = "error"


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a service; a line that nobody gave a level has "error"."""

    level: str
    time: str
    message: str
    fields: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> LogLine:
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if not isinstance(content, dict) or "message" not in content:
            return cls(_foreign_level(text), "", text, {})
        level, time = str(content.pop("level", "info")), str(content.pop("time", ""))
        return cls(level, time, str(content.pop("message")), content)

    def at_least(self, level: str) -> bool:
        known = self.level if self.level in LEVELS else _ALWAYS_SHOWN
        return LEVELS.index(known) >= LEVELS.index(level)

    def for_people(self, process: str) -> Text:
        line = Text(f"{self.time[11:19]} " if self.time else "", style="dim")
        line.append(f"{process:<10} ", style="cyan")
        line.append(self.message, style=LEVEL_STYLES.get(self.level, ""))
        exception = self.fields.get("exception")
        for key, value in self.fields.items():
            if key not in ("exception", "role"):
                line.append(f" {key}={value}", style="dim")
        if exception:
            line.append(f"\n{exception}", style="dim")
        return line

    def for_programs(self, process: str) -> str:
        head = {"time": self.time, "level": self.level, "process": process}
        return json.dumps({**head, **self.fields, "message": self.message})


def _foreign_level(text: str) -> str:
    """C++ libraries begin a line with the letter of its level: "I1121 03:38:09 …"."""
    match = re.match(r"([IWEF])\d{4} \d\d:\d\d:\d\d", text)
    return {"I": "debug", "W": "warning"}.get(match[1], "error") if match else _ALWAYS_SHOWN


def shower(
    level: str, as_json: bool, show: Callable[[str | Text], None]
) -> Callable[[str, str], None]:
    """A function of (process, line) that shows the line if it is at least of `level`."""

    def on_line(process: str, text: str) -> None:
        line = LogLine.parse(text)
        if line.at_least(level):
            show(line.for_programs(process) if as_json else line.for_people(process))

    return on_line
