"""Quality of predicted depth against ground truth: one table of measures, one formula each; numpy and OpenCV only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import ArgumentError

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

# The window of Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
_SSIM_RADIUS = 5
_SSIM_SIGMA = 1.5
_SSIM_K1 = 0.01
_SSIM_K2 = 0.03


@dataclass(frozen=True)
class Metric:
    """What a measure's number means.

    Attributes:
        unit: ``depth`` (the unit of the depth maps), ``share`` (0 to 1), ``dB``, or ``number`` (no unit).
        better: Which end of the scale is good.
        label: Name for people.
        description: The definition in one sentence.
    """

    unit: Literal["depth", "share", "dB", "number"]
    better: Literal["lower", "higher"]
    label: str
    description: str


@dataclass(frozen=True)
class Thresholds:
    """Where the measures draw their lines.

    Attributes:
        bad: Errors above which a pixel is bad, in ``unit``.
        bad_relative: The same, as a share of the true depth.
        edge_jump: Two neighbours lie across a depth edge if they differ by more than this share of the nearer one.
        edge_distance: Pixels around an edge that count for ``edge_rmse``.
        unit: ``m``, or nothing for disparity; decides the names of the bad-pixel measures.
    """

    bad: tuple[float, ...] = (0.05, 0.10)
    bad_relative: tuple[float, ...] = (0.05,)
    edge_jump: float = 0.05
    edge_distance: int = 3
    unit: Literal["m", ""] = "m"

    def __post_init__(self) -> None:
        for name in ("bad", "bad_relative", "edge_jump"):
            values = np.atleast_1d(getattr(self, name)).tolist()
            for value in values:
                if not (math.isfinite(value) and value > 0):
                    raise ArgumentError(f"{name} must be above 0; got {value:g}")
            if len({f"{value:g}" for value in values}) < len(values):
                raise ArgumentError(f"{name} must hold different values; got {values}")
        if not 0 <= self.edge_distance <= 100:
            raise ArgumentError(f"edge_distance must be 0 to 100 pixels; got {self.edge_distance}")


def describe(thresholds: Thresholds | None = None) -> dict[str, Metric]:
    """Return the table of measures for these thresholds: name -> meaning, in the order of `evaluate`.

    Args:
        thresholds: None: the usual ones, whose table is `METRICS`.

    Example:
        >>> list(describe(Thresholds(bad=(0.025,), bad_relative=())))[6:8]
        ['bad_2.5cm', 'edge_rmse']
    """
    lines = thresholds or Thresholds()
    table = {
        "rmse": Metric("depth", "lower", "RMSE", "Root mean square error."),
        "mae": Metric("depth", "lower", "MAE", "Mean absolute error."),
        "abs_rel": Metric("number", "lower", "AbsRel", "Mean of absolute error / true depth."),
    }
    for power, name in enumerate(("1.25", "1.25²", "1.25³"), start=1):
        text = f"Share of pixels whose depth and true depth differ by a factor below {name}."
        table[f"delta{power}"] = Metric("share", "higher", f"δ < {name}", text)
    for limit in lines.bad:
        amount = f"{limit * 100:g} cm" if lines.unit else f"{limit:g}"
        text = f"Share of pixels that are wrong by more than {amount}."
        table[f"bad_{amount.replace(' ', '')}"] = Metric("share", "lower", f"Bad > {amount}", text)
    for limit in lines.bad_relative:
        text = f"Share of pixels that are wrong by more than {limit * 100:g} % of the true depth."
        table[f"bad_{limit * 100:g}pct"] = Metric("share", "lower", f"Bad > {limit * 100:g} %", text)
    text = (
        f"RMSE of the pixels within {lines.edge_distance} px of a depth edge, a jump between neighbours of more than "
        f"{lines.edge_jump * 100:g} % of the nearer one."
    )
    return table | {
        "edge_rmse": Metric("depth", "lower", "Edge RMSE", text),
        "psnr": Metric("dB", "higher", "PSNR", "Peak signal-to-noise ratio; peak = range of the true depth."),
        "ssim": Metric("number", "higher", "SSIM", "Structural similarity; data range = range of the true depth."),
        "valid_fraction": Metric("share", "higher", "Valid", "Share of the pixels with true depth that got a depth."),
    }


METRICS: dict[str, Metric] = describe()


def evaluate(
    prediction: Floats,
    truth: Floats,
    *,
    valid: Mask | None = None,
    max_depth: float | None = None,
    thresholds: Thresholds | None = None,
) -> dict[str, float]:
    """Return every measure of one depth map.

    Counted are the pixels with true depth (finite and above 0) and a finite prediction; ``valid_fraction`` says how
    many of the first have the second. ``ssim`` weighs its windows' statistics over the counted pixels, and takes the
    mean over those whose window lies inside the image: without holes this is the usual definition (Gaussian
    of 11 x 11 pixels, sigma 1.5).

    Args:
        prediction: (H, W) metres; not finite = no prediction, left out.
        truth: (H, W) metres; 0, negative or not finite = no measurement, left out.
        valid: (H, W) further restriction to where it is True.
        max_depth: Leave out pixels whose true depth is larger, metres.
        thresholds: Lines of the bad-pixel and edge measures; None: the usual ones.

    Returns:
        Name -> value, the names of ``describe(thresholds)``. NaN where not defined: ``edge_rmse`` without
        edges, ``ssim`` of images below 11 x 11, ``psnr`` and ``ssim`` of flat truth. ``psnr`` of a perfect
        prediction is infinite.

    Raises:
        ArgumentError: If shapes do not fit, or no pixel is left to count.

    Example:
        >>> figures = evaluate(np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]]))
        >>> figures["mae"], figures["delta1"], figures["bad_5cm"], figures["valid_fraction"]
        (1.0, 0.5, 0.5, 1.0)
    """
    lines = thresholds or Thresholds()
    if truth.ndim != 2:
        raise ArgumentError(f"truth must be (H, W); got shape {truth.shape}")
    if max_depth is not None:
        if not max_depth > 0:
            raise ArgumentError(f"max_depth must be above 0; got {max_depth:g}")
        near = truth <= max_depth
        valid = near if valid is None else valid & near
    counted, measured = _counted(prediction, truth, valid)
    true = truth[counted].astype(np.float64)
    guess = prediction[counted].astype(np.float64)
    wrong = np.abs(guess - true)
    mse = float(np.mean(wrong**2))
    values = [math.sqrt(mse), float(np.mean(wrong)), float(np.mean(wrong / true))]
    values += [float(np.mean((guess < true * 1.25**power) & (true < guess * 1.25**power))) for power in (1, 2, 3)]
    # Depths come as float32: an error of exactly 50 mm must not be above 50 mm by the rounding of its two ends.
    rounding = true * 2.0**-22
    values += [float(np.mean(wrong > limit + rounding)) for limit in lines.bad]
    values += [float(np.mean(wrong > limit * true + rounding)) for limit in lines.bad_relative]
    # The truth alone says where its edges are; what is counted is another matter.
    edge = near_edges(truth, jump=lines.edge_jump, distance=lines.edge_distance)[counted]
    values.append(math.sqrt(float(np.mean(wrong[edge] ** 2))) if edge.any() else math.nan)
    span = float(true.max() - true.min())
    if span > 0:
        values.append(10 * math.log10(span**2 / mse) if mse > 0 else math.inf)
        values.append(_ssim(prediction, truth, counted, span))
    else:
        values += [math.nan, math.nan]
    values.append(len(true) / int(measured.sum()))
    return dict(zip(describe(lines), values, strict=True))


def rmse(pred: Floats, gt: Floats, valid: Mask | None = None) -> float:
    """Root mean square error in the arrays' unit.

    Args:
        pred: Any shape; non-finite = no prediction, left out.
        gt: Same shape; 0, negative or non-finite = no measurement, left out.
        valid: Same shape; further restriction.

    Returns:
        The error, in the unit of the arguments.

    Raises:
        ArgumentError: If shapes differ or no pixel is left.

    Example:
        >>> rmse(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
        1.4142135623730951
    """
    counted, _ = _counted(pred, gt, valid)
    return math.sqrt(float(np.mean((pred[counted].astype(np.float64) - gt[counted]) ** 2)))


def near_edges(truth: Floats, *, jump: float = 0.05, distance: int = 3) -> Mask:
    """Return where a depth edge is near.

    Two pixels side by side or one above the other, both with true depth, lie across an edge if their depths differ
    by more than ``jump`` times the nearer one; both are edge pixels.

    Args:
        truth: (H, W) metres; 0, negative or not finite = no measurement.
        jump: Smallest jump of an edge, as a share of the nearer depth.
        distance: Largest Euclidean distance to an edge pixel, in pixels.

    Example:
        >>> near_edges(np.array([[1.0, 1.0, 2.0, 2.0, 2.0]]), distance=1)
        array([[ True,  True,  True,  True, False]])
    """
    import cv2

    # Comparisons with NaN are False: a pixel without depth makes no edge.
    depth = np.where(np.isfinite(truth) & (truth > 0), truth, np.nan).astype(np.float64)
    edge = np.zeros(depth.shape, np.uint8)
    for first, second in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
    ):
        a, b = depth[first], depth[second]
        across = np.abs(a - b) > jump * np.minimum(a, b)
        edge[first] |= across
        edge[second] |= across
    steps = np.arange(-distance, distance + 1)
    disc = (steps[:, None] ** 2 + steps**2 <= distance**2).astype(np.uint8)
    return np.asarray(cv2.dilate(edge, disc, borderType=cv2.BORDER_CONSTANT, borderValue=0), np.bool_)


def mean_figures(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each measure over images; values that are not finite do not count.

    Args:
        rows: Results of `evaluate`, all with the same names.

    Returns:
        Name -> mean over the images where it is finite; NaN if there are none.

    Example:
        >>> mean_figures([{"rmse": 1.0, "psnr": math.inf}, {"rmse": 3.0, "psnr": 20.0}])
        {'rmse': 2.0, 'psnr': 20.0}
    """
    images = list(rows)
    means = {}
    for name in images[0] if images else ():
        finite = [image[name] for image in images if math.isfinite(image[name])]
        means[name] = math.fsum(finite) / len(finite) if finite else math.nan
    return means


def _counted(prediction: Floats, truth: Floats, valid: Mask | None) -> tuple[Mask, Mask]:
    """Return the pixels that have both depths, and those that have true depth."""
    if prediction.shape != truth.shape:
        raise ArgumentError(f"pred must have the shape of gt = {truth.shape}; got {prediction.shape}")
    measured: Mask = np.isfinite(truth) & (truth > 0)
    if valid is not None:
        if valid.shape != truth.shape:
            raise ArgumentError(f"valid must have the shape of gt = {truth.shape}; got {valid.shape}")
        measured &= valid
    counted: Mask = measured & np.isfinite(prediction)
    if not counted.any():
        raise ArgumentError("no pixel is valid in both pred and gt", "check units and invalid values")
    return counted, measured


def _ssim(prediction: Floats, truth: Floats, counted: Mask, span: float) -> float:
    """Return the structural similarity; windows see counted pixels only."""
    import cv2

    inside = np.s_[_SSIM_RADIUS:-_SSIM_RADIUS, _SSIM_RADIUS:-_SSIM_RADIUS]
    kept = counted[inside]
    if min(truth.shape) <= 2 * _SSIM_RADIUS or not kept.any():
        return math.nan
    size = (2 * _SSIM_RADIUS + 1,) * 2

    def blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(cv2.GaussianBlur(values, size, _SSIM_SIGMA)[inside][kept], np.float64)

    weight = blurred(counted.astype(np.float64))
    x, y = (np.where(counted, values, 0).astype(np.float64) for values in (prediction, truth))
    mean_x, mean_y = blurred(x) / weight, blurred(y) / weight
    var_x = blurred(x * x) / weight - mean_x**2
    var_y = blurred(y * y) / weight - mean_y**2
    cov = blurred(x * y) / weight - mean_x * mean_y
    c1, c2 = (_SSIM_K1 * span) ** 2, (_SSIM_K2 * span) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return float(np.mean(likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))
