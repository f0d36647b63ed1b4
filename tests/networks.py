"""Networks and inputs that the tests of models, inference and training share: tiny, but not trivial."""

import torch

from ddfup.models.ddfupnet import DDFUpNet, DDFUpNetConfig
from ddfup.models.pyramid import GuidedPyramid, PyramidConfig

TINY_PYRAMID = PyramidConfig(
    feature_channels=(4, 6, 8, 8),
    guide_channels=(6, 8, 8),
    trunk_channels=8,
    trunk_blocks=2,
    context_channels=4,
)


def roughen(network, seed=0, gain=30.0):
    """Give an untrained network weights that matter: noise on all, a large result layer (the last one)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise * (float(parameter.std()) if parameter.numel() > 1 else 0.1) + 0.02 * noise)
        list(network.parameters())[-2].mul_(gain)
    return network.eval()


def tiny_pyramid(seed=0, **changes):
    torch.manual_seed(seed)
    network = GuidedPyramid(PyramidConfig(**{**vars(TINY_PYRAMID), **changes}))
    with torch.no_grad():
        # Little trust in the measurement, or at a ratio of 1 it would come out again whatever the weights are.
        network.consistency.estimate.bias[-2:] = -1.5
    roughen(network, seed)
    with torch.no_grad():
        # Variances that differ a thousandfold from pixel to pixel would magnify rounding as much.
        rows = network.result.weight.shape[0] // 3
        network.result.weight[-rows:] *= 0.1
    return network


def tiny_ddfupnet(scale=2, seed=0, **changes):
    torch.manual_seed(seed)
    config = DDFUpNetConfig(**{"scale": scale, "channels": 8, "guide_channels": 4, **changes})
    network = DDFUpNet(config)
    with torch.no_grad():
        # PyTorch's initial weights let the signal fade away over the layers.
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.mul_(2)
    return network.eval()


def pair(low, high, *, n=1, seed=0):
    """A depth map (N, 1, h, w) in whole units of 0 to 1000 and a guide (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, low[0]), torch.linspace(0, 1, low[1]), indexing="ij")
    depth = 300 + 200 * y + 100 * x + 300 * ((x + y).sin() > 0.5) + 30 * torch.rand((n, 1, *low), generator=generator)
    return depth.round(), torch.rand((n, 3, *high), generator=generator)
