"""Guided depth upsampling with decoupled dynamic filters (Zhou et al., CVPR 2021).

``ddfup.Upsampler`` upsamples numpy arrays, ``ddfup.ddf`` and ``ddfup.ddf_up`` are the operations,
``ddfup.DDF`` and ``ddfup.DDFUp`` their modules. PyTorch is imported when one of them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddfup.inference import Upsampler
    from ddfup.models import ModelInfo, list_models, load_model
    from ddfup.models.layers import DDF, DDFUp
    from ddfup.ops import ddf, ddf_up

__version__ = "0.1.0"

__all__ = [
    "DDF",
    "DDFUp",
    "ModelInfo",
    "Upsampler",
    "__version__",
    "ddf",
    "ddf_up",
    "list_models",
    "load_model",
]

_HOMES = {
    "DDF": "ddfup.models.layers",
    "DDFUp": "ddfup.models.layers",
    "ModelInfo": "ddfup.models",
    "Upsampler": "ddfup.inference",
    "ddf": "ddfup.ops",
    "ddf_up": "ddfup.ops",
    "list_models": "ddfup.models",
    "load_model": "ddfup.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ddfup' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
