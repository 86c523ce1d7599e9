"""LoRA adapters as options name them: NAME=DIR. Their files are read by stage workers only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stagemesh.errors import ConfigError

CONFIG = "adapter_config.json"


def parse_adapters(texts: Iterable[str], model_name: str) -> dict[str, Path]:
    """Directories by name. Raises ConfigError for what is no NAME=DIR, for a name that comes twice
    or is the model's, and for a directory without an adapter."""
    found: dict[str, Path] = {}
    for text in texts:
        name, separator, directory = (part.strip() for part in text.partition("="))
        if not (separator and name and directory):
            raise ConfigError(f"--adapter must be NAME=DIR, not {text!r}")
        if name == model_name:
            raise ConfigError(f"--adapter {name}: the model itself has this name")
        if name in found:
            raise ConfigError(f"--adapter {name} is given twice")
        found[name] = Path(directory).expanduser().resolve()
        if not (found[name] / CONFIG).is_file():
            raise ConfigError(
                f"--adapter {name}={directory}: no adapter there ({CONFIG} is wanted)"
            )
    return found
