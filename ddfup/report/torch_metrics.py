"""The measures of ddfup.metrics for training loops and evaluation code built on torchmetrics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ddfup.errors import ArgumentError
from ddfup.metrics import Thresholds, describe, evaluate


class DepthMetrics(Metric):
    """Mean of every measure over images, as a report states it, whatever the batches.

    The formulas are those of :func:`ddfup.metrics.evaluate`. Those that torchmetrics has itself (mean squared and
    absolute error, PSNR, SSIM) agree with it on single images without holes, but for the border that it pads for
    SSIM; torchmetrics knows no masks, and its means over batches weigh pixels, so they change with the batches.

    Args:
        max_depth: Leave out pixels whose true depth is larger, metres.
        thresholds: Lines of the bad-pixel and edge measures; None: the usual ones.

    Example:
        >>> metric = DepthMetrics()
        >>> metric.update(torch.full((2, 1, 4, 4), 2.5), torch.full((2, 1, 4, 4), 2.0))
        >>> metric.compute()["mae"]
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, *, max_depth: float | None = None, thresholds: Thresholds | None = None, **base: Any) -> None:
        super().__init__(**base)
        self.max_depth = max_depth
        self.thresholds = thresholds
        self.names = list(describe(thresholds))
        for state in ("total", "images"):
            self.add_state(state, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, valid: Tensor | None = None) -> None:
        """Measure a batch.

        Args:
            preds: (N, 1, H, W) metres; not finite = no prediction.
            target: (N, 1, H, W) metres; 0, negative or not finite = no measurement.
            valid: (N, 1, H, W) bool, further restriction.

        Raises:
            ArgumentError: If shapes do not fit, or an image has no pixel to count.
        """
        for name, tensor in (("target", target), ("preds", preds), ("valid", valid)):
            if tensor is not None and (tensor.ndim != 4 or tensor.shape[1] != 1 or tensor.shape != target.shape):
                raise ArgumentError(
                    f"{name} must be (N, 1, H, W), all alike, target {tuple(target.shape)}; got {tuple(tensor.shape)}"
                )
        masks = [None] * len(preds) if valid is None else list(valid[:, 0].cpu().numpy())
        for pred, truth, mask in zip(preds[:, 0], target[:, 0], masks, strict=True):
            figures = evaluate(
                pred.detach().float().cpu().numpy(),
                truth.detach().float().cpu().numpy(),
                valid=mask,
                max_depth=self.max_depth,
                thresholds=self.thresholds,
            )
            values = torch.tensor([figures[name] for name in self.names], dtype=torch.float64)
            finite = values.isfinite()
            self.total += torch.where(finite, values, 0).to(self.total.device)
            self.images += finite.to(self.images)

    def compute(self) -> dict[str, Tensor]:
        """Return name -> mean over the images where the measure is defined; NaN where it is nowhere."""
        means = torch.where(self.images > 0, self.total / self.images, math.nan)
        return dict(zip(self.names, means, strict=True))
