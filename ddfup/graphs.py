"""Work for a GPU, recorded as CUDA graphs once the same sizes come again.

The CPU takes longer to ask for the hundreds of kernels of a network than a GPU takes to run them, unless pictures are
large. A recorded graph asks for all of them at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

# Sizes of which a network's calls are kept, each with the memory of one call: a batch's pictures, upright and lying.
_MOST = 2

# Shapes, strides and types of all inputs.
Key = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]


def key_of(inputs: Sequence[Tensor]) -> Key:
    """What inputs must have in common for one recording to serve them all."""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)


class Graph(Generic[_T]):
    """What a function did with some inputs, to be done again with others of the same sizes.

    Args:
        function: Of tensors on a GPU, with nothing on its way that makes the CPU wait. It must have been called before,
            so that libraries are loaded.
        inputs: To begin with.
        pool: Memory that several graphs share, none of which needs the results of another any more; None: its own.

    Raises:
        RuntimeError: If it cannot be recorded.
    """

    def __init__(self, function: Callable[..., _T], inputs: Sequence[Tensor], *, pool: Any = None) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        # Whoever works on a stream of his own has the function recorded there, as PyTorch wants it of gradients.
        stream = None if current == torch.cuda.default_stream() else current
        # Other threads may go on asking the GPU for work meanwhile.
        record = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with _uncached_autocast(), record:
            self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> _T:
        """Return what the function would, in memory that the next call writes to."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output


class Recorder:
    """A network's calls, recorded when inputs of the same sizes come for the second time; safe for threads.

    Recording takes as long as a few calls, which a single one would not be worth. What cannot be recorded is called as
    it is.

    Args:
        function: As of :class:`Graph`; gives one tensor.
        record: What records; for tests.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        record: Callable[[Callable[..., Tensor], Sequence[Tensor]], Callable[..., Tensor]] | None = None,
    ) -> None:
        self._function = function
        self._record = Graph if record is None else record
        # None: seen once. The function itself: cannot be recorded.
        self._calls: OrderedDict[Key, Callable[..., Tensor] | None] = OrderedDict()
        self._lock = threading.Lock()
        # Set when the memory of the graphs may be written to again, by whatever stream.
        self._free: torch.cuda.Event | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Call the function, or replay what it did."""
        key = key_of(inputs)
        with self._lock:
            if key not in self._calls:
                self._calls[key] = None
                while len(self._calls) > _MOST:
                    self._calls.popitem(last=False)
                return self._function(*inputs)
            self._calls.move_to_end(key)
            call = self._calls[key]
            if call is None:
                try:
                    call = self._record(self._function, inputs)
                except RuntimeError:
                    # Too little memory for what is kept, or a driver that does not let it: no reason to fail.
                    call = self._function
                self._calls[key] = call
            if call is self._function:
                return call(*inputs)
            if self._free is not None:
                self._free.wait()
            output = call(*inputs).clone()
            if output.device.type == "cuda":
                self._free = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._free.record()
            return output

    def forget(self) -> None:
        """Give back the memory that the graphs keep."""
        with self._lock:
            self._calls.clear()


@contextlib.contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Keep autocast from reusing weights that it cast before, whose memory it gives back at its end."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
