"""The DDF-ResNets as timm knows models: importing this registers them, and needs timm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ddfup.models.resnet import ddf_resnet

NAMES = [f"ddf_{combine}_resnet{depth}" for combine in ("mul", "add") for depth in (18, 50, 101)]
# timm adds what it registers here.
__all__ = ["NAMES"]

# No weights to download; how the authors' networks want their images.
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "conv1",
            "classifier": "fc",
            "license": "mit",
        }
        for name in NAMES
    }
)


def _entry(name: str) -> Callable[..., nn.Module]:
    """Make the function that timm calls for a name; its options are those of ``ddf_resnet`` and timm's own."""
    _, combine, resnet = name.split("_")
    make = partial(ddf_resnet, int(resnet.removeprefix("resnet")), combine=combine)

    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        network: nn.Module = build_model_with_cfg(make, name, pretrained, **options)
        return network

    entry.__name__ = entry.__qualname__ = name
    return entry


for _name in NAMES:
    globals()[_name] = register_model(_entry(_name))
