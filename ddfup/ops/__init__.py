"""Decoupled dynamic filtering as differentiable PyTorch ops, which know nothing of depth or networks."""

from ddfup.ops.ddf import ddf, ddf_up

__all__ = ["ddf", "ddf_up"]
