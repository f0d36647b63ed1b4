"""Losses and gradients of batches on a GPU, recorded once batches of the same sizes come again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ddfup.graphs import Graph, Key, key_of

# The first batch of a size is computed as it is, so that libraries have what they need for it.
_SEEN = 2
# Sizes that are recorded; each keeps its gradients, all share the memory of one batch.
_MOST = 64

# Loss and, for every parameter, its gradient or None.
Gradients = tuple[Tensor, tuple[Tensor | None, ...]]


class RecordedGradients:
    """Computes gradients, in a third of the time where the CPU would be what a GPU waits for.

    Args:
        compute: From the tensors of a batch to its loss, whose gradients it leaves at the parameters; with nothing on
            its way that makes the CPU wait.
        parameters: Of the network.
        record: What records; for tests.
    """

    def __init__(
        self,
        compute: Callable[..., Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        record: Callable[[Callable[..., Gradients], Sequence[Tensor]], Callable[..., Gradients]] | None = None,
    ) -> None:
        self._compute, self._parameters = compute, parameters
        self._seen: Counter[tuple[Key, float]] = Counter()
        self._recorded: dict[tuple[Key, float], Callable[..., Gradients]] = {}
        self._record = self._graph if record is None else record
        self._pool: object = None
        self._possible = True

    def __call__(self, *inputs: Tensor, ratio: float) -> Tensor:
        """Leave the gradients at the parameters, as nobody else may have them.

        Args:
            inputs: What changes from batch to batch, on the GPU.
            ratio: Number that the computation depends on; it is recorded as it is.

        Returns:
            The loss, (), in memory that the next batch writes to.
        """
        key = key_of(inputs), ratio
        self._seen[key] += 1
        ready = key in self._recorded or len(self._recorded) < _MOST
        if not self._possible or self._seen[key] < _SEEN or not ready:
            return self._gradients(*inputs, ratio=ratio)[0]
        if key not in self._recorded:
            try:
                self._recorded[key] = self._record(lambda *tensors: self._gradients(*tensors, ratio=ratio), inputs)
            except RuntimeError:
                # Too little memory for what is kept, or a driver that does not let it: no reason to fail.
                self._possible = False
                self._recorded.clear()
                return self._gradients(*inputs, ratio=ratio)[0]
        loss, gradients = self._recorded[key](*inputs)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _gradients(self, *inputs: Tensor, ratio: float) -> Gradients:
        for parameter in self._parameters:
            # Added to, they would not be the recording's own.
            parameter.grad = None
        loss = self._compute(*inputs, ratio=ratio)
        return loss, tuple(parameter.grad for parameter in self._parameters)

    def _graph(self, function: Callable[..., Gradients], inputs: Sequence[Tensor]) -> Graph[Gradients]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return Graph(function, inputs, pool=self._pool)
