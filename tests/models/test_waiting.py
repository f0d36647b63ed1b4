"""No network makes the CPU wait for a GPU: none reads a value back or sends a tensor over.

Shown on PyTorch's "meta" device, where reading a value is an error and a tensor of the CPU's is seen.
"""

import pytest
import torch
from networks import tiny_ddfupnet, tiny_pyramid
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Elsewhere(TorchDispatchMode):
    """Notes every operation with a tensor that is not on the "meta" device."""

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += 1
        leaves = tree_leaves((args, kwargs, result))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type != "meta" for leaf in leaves):
            self.found.append(str(func))
        return result


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    # PyTorch refuses to be asked about autocast on this device.
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and asked(kind))


@pytest.mark.parametrize(
    ("make", "low", "high"),
    [
        (tiny_pyramid, (6, 8), (96, 128)),
        (tiny_pyramid, (31, 27), (64, 64)),
        (tiny_pyramid, (96, 128), (96, 128)),
        (lambda: tiny_ddfupnet(8), (12, 16), (96, 128)),
    ],
)
def test_nothing_is_read_back_or_sent_over(make, low, high):
    network = make().to("meta")
    depth = torch.empty(1, 1, *low, device="meta")
    guide = torch.empty(1, 3, *high, device="meta")
    with torch.inference_mode(), Elsewhere() as elsewhere:
        result = network(depth, guide, torch.empty(1, 1, *low, dtype=torch.bool, device="meta"))
    assert result.shape == (1, 1, *high)
    assert elsewhere.count > 100
    assert elsewhere.found == []


def test_what_waits_is_found():
    value = torch.empty(1, device="meta")
    with Elsewhere() as elsewhere:
        torch.arange(3).to("meta")
        with pytest.raises(RuntimeError, match="meta"):
            bool(value)
    assert elsewhere.found
