"""Recorded gradients, with something in the place of a GPU that records; what a GPU does is in test_gpu.py."""

import pytest
import torch
from torch import nn

from ddfup import graphs
from ddfup.training import recording
from ddfup.training.recording import RecordedGradients


@pytest.fixture(autouse=True)
def may_record():
    graphs._refused.clear()
    yield
    graphs._refused.clear()


@pytest.fixture
def network():
    torch.manual_seed(0)
    # The last layer takes no part.
    return nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(2, 2)])


def loss_of(network):
    def compute(x, *, ratio):
        loss = ratio * network[1](network[0](x).relu()).square().mean()
        loss.backward()
        return loss.detach()

    return compute


def replaying(made, network):
    """Stand-in for a recorder whose results lie in memory of their own, written to by every call."""

    def record(function, inputs):
        made.append(inputs)
        loss, gradients = function(*inputs)
        loss, gradients = loss.clone(), tuple(None if g is None else g.clone() for g in gradients)

        def replay(*inputs):
            before = [parameter.grad for parameter in network.parameters()]
            new_loss, new_gradients = function(*inputs)
            loss.copy_(new_loss)
            for own, new in zip(gradients, new_gradients, strict=True):
                assert (own is None) == (new is None)
                if own is not None:
                    own.copy_(new)
            # A graph writes to its own memory and knows of no parameters.
            for parameter, grad in zip(network.parameters(), before, strict=True):
                parameter.grad = grad
            return loss, gradients

        return replay

    return record


def expected(network, x, ratio):
    network.zero_grad(set_to_none=True)
    loss = ratio * network[1](network[0](x).relu()).square().mean()
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def check(network, recorded, x, ratio=1.0):
    wanted, gradients = expected(network, x, ratio)
    torch.testing.assert_close(recorded(x, ratio=ratio), wanted)
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradient)


def test_sizes_that_come_again_are_recorded(network):
    made = []
    recorded = RecordedGradients(loss_of(network), list(network.parameters()), record=replaying(made, network))
    for count, rows in ((0, 5), (0, 6), (1, 5), (1, 5), (2, 6), (2, 5)):
        check(network, recorded, torch.randn(rows, 3))
        assert len(made) == count


def test_the_ratio_is_part_of_a_recording(network):
    made = []
    recorded = RecordedGradients(loss_of(network), list(network.parameters()), record=replaying(made, network))
    for ratio in (2.0, 3.0, 2.0, 3.0, 2.0, 3.0):
        check(network, recorded, torch.randn(5, 3), ratio)
    assert len(made) == 2


def test_no_more_sizes_are_recorded_than_there_is_room_for(network, monkeypatch):
    monkeypatch.setattr(recording, "_MOST_BATCHES", 1)
    made = []
    recorded = RecordedGradients(loss_of(network), list(network.parameters()), record=replaying(made, network))
    for rows in (5, 5, 6, 6, 6, 5):
        check(network, recorded, torch.randn(rows, 3))
    assert len(made) == 1


def test_what_cannot_be_recorded_is_computed(network):
    asked = []

    def refuse(function, inputs):
        asked.append(inputs)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    recorded = RecordedGradients(loss_of(network), list(network.parameters()), record=refuse)
    for _ in range(4):
        check(network, recorded, torch.randn(5, 3))
    assert len(asked) == 1


def test_recordings_give_way_where_memory_is_short(network):
    made, short, compute = [], [], loss_of(network)

    def failing(x, *, ratio):
        if len(x) == 7 and not short:
            short.append(x)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return compute(x, ratio=ratio)

    recorded = RecordedGradients(failing, list(network.parameters()), record=replaying(made, network))
    for rows in (5, 5, 7, 7, 5):
        check(network, recorded, torch.randn(rows, 3))
    # The batch of 7 was computed again when the recording of 5 was gone, and nothing has been recorded since.
    assert len(made) == 1 and len(short) == 1


def test_too_little_memory_with_nothing_recorded_is_an_error(network):
    def failing(x, *, ratio):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    recorded = RecordedGradients(failing, list(network.parameters()), record=replaying([], network))
    with pytest.raises(torch.OutOfMemoryError):
        recorded(torch.randn(5, 3), ratio=1.0)
