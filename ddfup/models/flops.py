"""How much a network computes, counted as the paper counts it: multiply-adds, the op included."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ddfup.ops  # noqa: F401  (registers the op that is counted)


def count_macs(network: nn.Module, *inputs: Tensor) -> int:
    """Count the multiply-adds of one forward pass: what the literature on ResNets, the paper too, calls FLOPs.

    Convolutions and matrix products as :mod:`torch.utils.flop_counter` counts them, halved, since it takes a
    multiply-add for two. The op: one multiply-add per output value and tap, K*K of them; mixing the two filters
    is not counted, the only reading under which the paper's 0.58 G of DDF-Up comes out. Sums, pooling,
    normalisation and activation count nothing.

    Args:
        network: Any module; left as it is.
        inputs: What it is called with. With network and inputs on the device "meta" nothing is computed.

    Returns:
        The number of multiply-adds.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> count_macs(nn.Conv2d(8, 16, 3, padding=1), torch.zeros(1, 8, 10, 10)) == 8 * 16 * 9 * 100
        True
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.ddfup.ddf: _op_flops})
    with torch.no_grad(), counter:
        network(*inputs)
    total: int = counter.get_total_flops()
    return total // 2


def _op_flops(
    _features: Any, _channel: Any, _spatial: Any, _scale: int, kernel_size: int, *_options: Any, out_shape: Any
) -> int:
    """Twice the multiply-adds of ``ddfup::ddf``, from the shape of its output; called by the counter."""
    values: int = math.prod(out_shape)
    return 2 * kernel_size**2 * values
