"""What is minimised, and how a step changes the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddfup.training.config import OptimizationSection

# Error is counted in hundredths of the image's deviation: with plain metres the gradients sink below Adam's epsilon.
UNIT = 100.0
# The error of interpolation grows about with this power of the ratio (NYU: 3.4, 5.6 and 9.4 cm at 4, 8 and 16).
_ERROR_GROWTH = 0.7


def loss_function(
    prediction: Tensor,
    target: Tensor,
    std: Tensor,
    ratio: float,
    squared: float | Tensor,
    weight: Tensor | None = None,
    *,
    huber: float = 0.5,
) -> Tensor:
    """Mean over measured pixels of the absolute plus a weighted Huber error, in hundredths of ``std``.

    The field reports RMSE, which large errors at depth edges rule; the absolute error alone under-rates them.

    Args:
        prediction: (N, 1, H, W).
        target: (N, 1, H, W), 0 = no measurement.
        std: (N, 1, 1, 1), unit of the error.
        ratio: High-resolution over low-resolution length.
        squared: Weight of the Huber error, a number or ().
        weight: (N, 1, 1, 1) of the samples; None: all 1.
        huber: Deviations of depth up to which the Huber error is squared.
    """
    valid = target > 0
    error = (torch.where(valid, prediction - target, 0) / std).abs()
    # Linear beyond: a few far outliers (sky beside a roof) must not rule a step.
    bounded = torch.where(error < huber, error.square(), huber * (2 * error - huber))
    # Steps of all ratios weigh alike.
    scale = UNIT * (4 / ratio) ** _ERROR_GROWTH
    total = error + squared * bounded
    if weight is not None:
        total = total * weight
    loss: Tensor = scale * total.sum() / valid.sum().clamp(min=1)
    return loss


def learning_rate(step: int, section: OptimizationSection) -> float:
    """Linear warm-up, then cosine to a thousandth of the peak at the last step."""
    if step < section.warmup:
        return section.learning_rate * (step + 1) / section.warmup
    done = (step - section.warmup) / max(1, section.steps - section.warmup)
    return section.learning_rate * (1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def squared_weight(step: int, section: OptimizationSection) -> float:
    """Weight of the squared error: constant, then linear to its end value over the last quarter."""
    done = max(0.0, (step / section.steps - 0.75) * 4)
    return section.squared + (section.squared_end - section.squared) * done


def take_step(optimizer: torch.optim.AdamW, norm: Tensor) -> None:
    """Change the weights, unless the gradient is broken (one bad sample under autocast), which would poison them.

    A fused optimiser decides on the GPU: the CPU, which would have to wait for the norm, prepares the next step.

    Args:
        optimizer: Whose weights have gradients.
        norm: () of the gradient.
    """
    if optimizer.defaults["fused"]:
        # The way in which torch.amp.GradScaler tells it to leave a step out.
        optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(norm.isfinite()):
        optimizer.step()
