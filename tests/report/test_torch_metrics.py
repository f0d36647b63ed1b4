"""The measures as a torchmetrics class: the numbers of evaluate, whatever the batches, and those of torchmetrics."""

import numpy as np
import pytest
import torch
from depth_folders import prediction, truth

from ddfup.errors import ArgumentError
from ddfup.metrics import METRICS, Thresholds, evaluate, mean_figures
from ddfup.report.torch_metrics import DepthMetrics


def images(count=5, holes=True):
    truths = np.stack([truth(seed) for seed in range(count)])
    guesses = np.stack([prediction(truths[seed], seed, 0.02 * (seed + 1)) for seed in range(count)])
    if holes:
        truths[:, :3], guesses[1:, :, 5:9] = 0, np.nan
    return torch.from_numpy(guesses)[:, None], torch.from_numpy(truths)[:, None]


@pytest.mark.parametrize("sizes", [[5], [1] * 5, [2, 3], [4, 1]])
def test_batches_do_not_matter(sizes):
    guesses, truths = images()
    expected = mean_figures([evaluate(p[0], t[0]) for p, t in zip(guesses.numpy(), truths.numpy(), strict=True)])
    metric = DepthMetrics()
    for batch in zip(guesses.split(sizes), truths.split(sizes), strict=True):
        metric.update(*batch)
    found = {name: float(value) for name, value in metric.compute().items()}
    assert list(found) == list(METRICS)
    assert found == pytest.approx(expected, rel=1e-12)


def test_what_torchmetrics_has_itself_agrees():
    from torchmetrics import functional

    guesses, truths = (each[:1].double() for each in images(holes=False))
    span = float(truths.max() - truths.min())
    figures = DepthMetrics()(guesses, truths)
    # torchmetrics also counts windows that reach over the border, onto mirrored pixels.
    _, likeness = functional.image.structural_similarity_index_measure(
        guesses, truths, data_range=span, sigma=1.5, return_full_image=True
    )
    pairs = {
        "rmse": functional.mean_squared_error(guesses, truths, squared=False),
        "mae": functional.mean_absolute_error(guesses, truths),
        "psnr": functional.image.peak_signal_noise_ratio(guesses, truths, data_range=span),
        "ssim": likeness[:, :, 5:-5, 5:-5].mean(),
    }
    for name, value in pairs.items():
        assert float(figures[name]) == pytest.approx(float(value), rel=1e-6), name


def test_options_masks_and_reset():
    guesses, truths = images(2)
    valid = torch.zeros_like(truths, dtype=torch.bool)
    valid[:, :, 20:40] = True
    metric = DepthMetrics(max_depth=2.5, thresholds=Thresholds(bad=(0.02,)))
    metric.update(guesses, truths, valid)
    expected = mean_figures(
        evaluate(
            guesses[i, 0].numpy(),
            truths[i, 0].numpy(),
            valid=valid[i, 0].numpy(),
            max_depth=2.5,
            thresholds=Thresholds(bad=(0.02,)),
        )
        for i in range(2)
    )
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx(expected)
    metric.reset()
    metric.update(truths, truths)
    again = metric.compute()
    assert float(again["rmse"]) == 0
    # Infinite for a perfect image: it does not count, so nothing is left.
    assert torch.isnan(again["psnr"])


@pytest.mark.parametrize("shape", [(2, 60, 80), (2, 3, 60, 80), (1, 1, 60, 80)])
def test_shapes_are_checked(shape):
    _, truths = images(2)
    with pytest.raises(ArgumentError, match=r"preds must be \(N, 1, H, W\)"):
        DepthMetrics().update(torch.ones(shape), truths)
