"""Where the model that comes with StageMesh lies: in a checkout or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from stagemesh.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
_PLACES = (_PACKAGE / "demo_model", _PACKAGE.parent / "models" / "demo")


def demo_model_dir() -> Path:
    """Raises ConfigError where the model was left out of the installation."""
    for place in _PLACES:
        if (place / "config.json").is_file():
            return place
    raise ConfigError("the demo model is not installed here: name a model with --model DIR")
