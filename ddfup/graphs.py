"""Work for a GPU, recorded as CUDA graphs once the same sizes come again.

The CPU takes longer to ask for the hundreds of kernels of a network than a GPU takes to run them, unless pictures are
large. A recorded graph asks for all of them at once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ddfup.devices import cudnn_search, is_out_of_memory

_T = TypeVar("_T")
_log = logging.getLogger("ddfup")

# Sizes of which a network's calls are kept, each with the memory of one call: a batch's pictures, upright and lying.
_MOST_SIZES = 2

# CUDA lets a process record one graph at a time.
_recording = threading.Lock()
# Set by a recording that failed for another reason than memory: PyTorch's allocator may not know that it has ended,
# and what cannot be recorded once cannot be recorded the next time.
_refused = threading.Event()

# Shapes, strides and types of all inputs.
Key = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]


def key_of(inputs: Sequence[Tensor]) -> Key:
    """What inputs must have in common for one recording to serve them all."""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)


class Graph(Generic[_T]):
    """What a function did with some inputs, to be done again with others of the same sizes.

    While it is recorded, other threads may ask the GPU for work, but not wait for all of it.

    Args:
        function: Of tensors on one GPU, with nothing on its way that makes the CPU wait.
        inputs: To begin with.
        pool: Memory that several graphs share, none of which needs the results of another any more; None: its own.
        stream: Where this thread has called the function before, not the default one: gradients can only be recorded
            where they were made. None: one of its own, where it is called first, so that libraries have what they need.

    Raises:
        RuntimeError: If it cannot be recorded.
    """

    def __init__(
        self,
        function: Callable[..., _T],
        inputs: Sequence[Tensor],
        *,
        pool: Any = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        # Streams, graphs and events are those of the current device, which need not be that of the inputs.
        self._device = inputs[0].device
        with _recording, torch.cuda.device(self._device):
            self._inputs = [tensor.clone() for tensor in inputs]
            self._graph = torch.cuda.CUDAGraph()
            pool = torch.cuda.graph_pool_handle() if pool is None else pool
            tried = stream is not None
            if stream is None:
                stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), _uncached_autocast():
                if not tried:
                    function(*self._inputs)
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                with _own_workspaces(), _captured(self._graph, pool, self._device):
                    self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> _T:
        """Return what the function would, in memory that the next call writes to."""
        with torch.cuda.device(self._device):
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
            self._graph.replay()
        return self._output


@contextlib.contextmanager
def _captured(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> Iterator[None]:
    """Record what the current stream is asked for."""
    # Not `torch.cuda.graph`, which leaves the stream and the pool as they are when the end fails.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        _release(pool, device)
        raise
    try:
        graph.capture_end()
    except RuntimeError:
        _release(pool, device)
        raise


def _release(pool: Any, device: torch.device) -> None:
    """Tell PyTorch's allocator that a recording has ended, which some versions forget where it failed."""
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """Have cuBLAS take its workspace of the recording's memory, and give it to nobody else afterwards."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextlib.contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Keep autocast from reusing weights that it cast before, whose memory it gives back at its end."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def try_to_record(make: Callable[[], _T]) -> _T | None:
    """Make a recording, or return None, and say why, where it cannot be.

    Args:
        make: Makes it.

    Raises:
        RuntimeError: What is not about the GPU.
    """
    if _refused.is_set():
        return None
    try:
        return make()
    except RuntimeError as error:
        short = is_out_of_memory(error)
        if not (short or isinstance(error, torch.AcceleratorError) or "CUDA" in str(error) or "captur" in str(error)):
            raise
        if not short:
            _refused.set()
        reason = "there is too little memory" if short else str(error).partition("\n")[0]
        _log.info("ddfup: calls of this size are not recorded, and slower for it: %s", reason)
    # Only now, when the error no longer holds what was made on the way.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


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
        self._record = _searched if record is None else record
        # None: called once. The function itself: cannot be recorded.
        self._calls: OrderedDict[Key, Callable[..., Tensor] | None] = OrderedDict()
        self._lock = threading.Lock()
        # Set when the memory of the graphs may be written to again, by whatever stream.
        self._free: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple[type[Recorder], tuple[Callable[..., Tensor]]]:
        """Copy and pickle the function alone: graphs belong to this process and its GPU."""
        return Recorder, (self._function,)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Call the function, or replay what it did."""
        key = key_of(inputs)
        with self._lock:
            known = key in self._calls
            call = self._calls.get(key)
            if known and call is None:
                call = try_to_record(lambda: self._record(self._function, inputs))
                self._calls[key] = call = self._function if call is None else call
            if call is not None:
                self._calls.move_to_end(key)
                if call is not self._function:
                    return self._replay(call, inputs)
        # Others need not wait for what is not recorded.
        with contextlib.nullcontext() if call is None else cudnn_search:
            output = self._function(*inputs)
        if call is None:
            with self._lock:
                self._calls.setdefault(key)
                while len(self._calls) > _MOST_SIZES:
                    self._drop_oldest()
        return output

    def _replay(self, call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        with torch.cuda.device(inputs[0].device) if inputs[0].is_cuda else contextlib.nullcontext():
            if self._free is not None:
                self._free.wait()
            output = call(*inputs).clone()
            if output.is_cuda:
                self._free = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._free.record()
        return output

    def _drop_oldest(self) -> None:
        # Its memory is given back where it was taken, which another stream may still be reading.
        if self._free is not None:
            self._free.synchronize()
        self._calls.popitem(last=False)

    def forget(self) -> bool:
        """Give back the memory that the graphs keep; return whether there were any."""
        with self._lock:
            kept = any(call not in (None, self._function) for call in self._calls.values())
            while self._calls:
                self._drop_oldest()
            self._free = None
        return kept


def _searched(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Graph[Tensor]:
    """Record a function whose convolutions are computed in the fastest way."""
    with cudnn_search:
        return Graph(function, inputs)
