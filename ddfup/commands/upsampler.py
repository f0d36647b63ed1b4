"""The network behind the options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddfup.inference import Upsampler


def make_upsampler(model: str | None, device: str, precision: str, tile: str) -> Upsampler:
    """Load the network that the options name."""
    from ddfup.inference import Upsampler
    from ddfup.models import DEFAULT_MODEL

    return Upsampler(
        model or DEFAULT_MODEL, device=device, precision=precision, tile=int(tile) if tile.isdigit() else tile
    )
