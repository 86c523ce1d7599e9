"""The TOML file with options: one table per role, and keys at the top that roles share."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagemesh.errors import ConfigError

ROLES = ("up", "gateway", "scheduler", "worker", "generate", "chat", "status")
# What means the same to every role that has it; a role passes over the others' keys.
SHARED_KEYS = frozenset({"model", "scheduler", "log_level", "log_format"})


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and, for messages, where it stands."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class OptionFile:
    path: Path
    content: Mapping[str, Any]

    @classmethod
    def empty(cls) -> OptionFile:
        return cls(Path(), {})

    @classmethod
    def read(cls, path: Path) -> OptionFile:
        """Raises ConfigError for a file that cannot be read, is no TOML or has a foreign table."""
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--config {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {path}: {error}") from None
        file = cls(path, content)
        file._check_top()
        return file

    def settings(self, role: str, names: Sequence[str]) -> dict[str, Setting]:
        """What the file says for the options `names` of `role`. Raises ConfigError."""
        table = self.content.get(role, {}) if role in ROLES else {}
        for key in table:
            if key not in names:
                raise ConfigError(
                    f"unknown key {key!r} in [{role}] of {self.path}" + _near(key, names)
                )
        shared = {
            key: Setting(value, f"{key} in {self.path}")
            for key, value in self.content.items()
            if key in SHARED_KEYS and key in names
        }
        own = {
            key: Setting(value, f"{key} in [{role}] of {self.path}") for key, value in table.items()
        }
        return shared | own

    def _check_top(self) -> None:
        for key, value in self.content.items():
            if isinstance(value, dict):
                if key not in ROLES:
                    raise ConfigError(f"unknown table [{key}] in {self.path}" + _near(key, ROLES))
            elif key not in SHARED_KEYS:
                shared = ", ".join(sorted(SHARED_KEYS))
                raise ConfigError(
                    f"unknown key {key!r} at the top of {self.path}: only {shared} stand there, "
                    "other options in the table of their role, such as [worker]"
                )


def _near(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
