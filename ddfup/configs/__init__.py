"""The training configurations that come with the package, one TOML file per model."""

from __future__ import annotations

from pathlib import Path


def bundled_configs() -> dict[str, Path]:
    """Return the bundled training configurations, by name."""
    return {path.stem: path for path in sorted(Path(__file__).resolve().parent.glob("*.toml"))}
