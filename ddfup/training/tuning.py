"""The tuning error: what a run reports on the way, measured on frames that it does not learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ddfup.degrade import degrade
from ddfup.metrics import rmse
from ddfup.training.data import Frame

# Protocol of the field for NYU: a border of 6 pixels is left out.
_TUNE_BORDER = 6
_TUNE_FACTORS = (4, 8, 16)


def tuning_pairs(frames: Sequence[Frame], count: int) -> list[Frame]:
    """Choose ``count`` frames, spread evenly over the set."""
    step = max(1, math.ceil(len(frames) / max(1, count)))
    return list(frames[::step])[:count]


def tuning_error(network: nn.Module, frames: list[Frame], device: torch.device) -> dict[str, float]:
    """Mean over frames of the RMSE in centimetres, for bicubic and nearest low resolution at every factor.

    Args:
        network: Called on whole images.
        frames: With depth in metres.
        device: Where the network is.
    """
    # A network for one factor is measured at that factor only.
    own = getattr(network.config, "scale", None)
    errors: dict[str, float] = {}
    for kind in ("bicubic", "nearest"):
        for factor in _TUNE_FACTORS if own is None else (own,):
            values = []
            for frame in frames:
                h, w = (length - length % factor for length in frame.depth.shape)
                gt = frame.depth[:h, :w]
                # A copy: what is degraded by Pillow must not be written to, which PyTorch warns of.
                low = torch.tensor(degrade(gt, factor, kind))[None, None].to(device)
                guide = torch.from_numpy(frame.guide[:h, :w]).to(device).permute(2, 0, 1)[None].float() / 255
                with torch.no_grad():
                    prediction = network(low, guide, low > 0)[0, 0].cpu().numpy()
                b = slice(_TUNE_BORDER, -_TUNE_BORDER)
                values.append(100 * rmse(prediction[b, b], gt[b, b]))
            errors[f"{kind} x{factor}"] = float(np.mean(values))
    return errors
