"""Recorded calls, with something in the place of a GPU that records; what a GPU does is in test_gpu.py."""

import contextlib
import copy
import logging
import pickle

import pytest
import torch

from ddfup import graphs
from ddfup.graphs import Graph, Recorder, try_to_record
from ddfup.inference import Upsampler


class Recording:
    """Repeats a function in memory of its own, as a graph does."""

    made = 0

    def __init__(self, function, inputs):
        type(self).made += 1
        self.function, self.inputs = function, [tensor.clone() for tensor in inputs]
        self.output = function(*self.inputs)

    def __call__(self, *inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.output.copy_(self.function(*self.inputs))
        return self.output


@pytest.fixture
def recording():
    Recording.made = 0
    return Recording


@pytest.fixture(autouse=True)
def may_record():
    graphs._refused.clear()
    yield
    graphs._refused.clear()


def images(*sizes):
    return [torch.rand(1, 1, *size) for size in sizes]


def double(image):
    return 2 * image


def test_sizes_that_come_again_are_recorded_once(recording):
    recorder = Recorder(lambda a, b: a.mean() + b, record=recording)
    first, *others = images((2, 3), (2, 3), (2, 3), (2, 3))
    results, made = [recorder(first, first)], [recording.made]
    for image in others:
        results.append(recorder(image, first))
        made.append(recording.made)
    assert made == [0, 1, 1, 1]
    # Also the earlier ones still hold what they held.
    for image, result in zip([first, *others], results, strict=True):
        torch.testing.assert_close(result, image.mean() + first)


def test_a_recording_serves_its_own_sizes_and_types_only(recording):
    recorder = Recorder(double, record=recording)
    for image in (*images((2, 3), (3, 2)), torch.ones(1, 1, 2, 3, dtype=torch.float64)):
        torch.testing.assert_close(recorder(image), 2 * image)
    assert recording.made == 0


def test_the_sizes_seen_last_are_kept(recording):
    recorder = Recorder(double, record=recording)
    small, middle, large = images((1, 1), (2, 2), (3, 3))
    for image in (small, small, middle, small, large, small, middle):
        torch.testing.assert_close(recorder(image), 2 * image)
    # The small one was never forgotten, the middle one was when the large one came.
    assert recording.made == 1
    recorder(middle)
    assert recording.made == 2


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
    ],
)
def test_what_cannot_be_recorded_is_called_and_told(error, again, caplog):
    asked, calls = [], []

    def refuse(function, inputs):
        asked.append(inputs)
        raise error

    def watched(image):
        calls.append(image)
        return 2 * image

    recorder = Recorder(watched, record=refuse)
    (image,) = images((2, 3))
    with caplog.at_level(logging.INFO, "ddfup"):
        for _ in range(4):
            torch.testing.assert_close(recorder(image), 2 * image)
    assert len(calls) == 4 and len(asked) == 1
    assert [record.message.startswith("ddfup: calls of this size are not recorded") for record in caplog.records] == [1]
    # Memory may be had later; what CUDA does not allow it will not allow for another size.
    (other,) = images((3, 3))
    for _ in range(2):
        recorder(other)
    assert len(asked) == (2 if again else 1)


def test_an_error_of_something_else_is_not_swallowed():
    def killed():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        try_to_record(killed)


def test_a_call_that_fails_is_no_first_call(recording):
    def fail_once(image, failed=[]):  # noqa: B006
        if not failed:
            failed.append(True)
            raise RuntimeError("CUDA out of memory")
        return 2 * image

    recorder = Recorder(fail_once, record=recording)
    (image,) = images((2, 3))
    with pytest.raises(RuntimeError):
        recorder(image)
    recorder(image)
    assert recording.made == 0


def test_forgotten_recordings_are_made_anew(recording):
    recorder = Recorder(double, record=recording)
    (image,) = images((2, 3))
    assert not recorder.forget()
    recorder(image)
    assert not recorder.forget()
    for _ in range(2):
        recorder(image)
    assert recorder.forget() and not recorder.forget()
    for _ in range(3):
        torch.testing.assert_close(recorder(image), 2 * image)
    assert recording.made == 2


def test_convolutions_are_chosen_by_trying_when_sizes_come_again():
    chosen, cudnn = [], torch.backends.cudnn

    def watched(image):
        chosen.append(cudnn.benchmark)
        return 2 * image

    def refuse(function, inputs):
        raise RuntimeError("CUDA error: not supported")

    recorder = Recorder(watched, record=refuse)
    (image,) = images((2, 3))
    for _ in range(3):
        recorder(image)
    assert chosen == [False, True, True] and not cudnn.benchmark


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_begin_anew(copied, recording):
    recorder = Recorder(double, record=recording)
    (image,) = images((2, 3))
    for _ in range(2):
        recorder(image)
    other = copied(recorder)
    assert not other.forget() and recorder.forget()
    torch.testing.assert_close(other(image), 2 * image)


def test_upsamplers_can_be_copied():
    upsampler = copy.deepcopy(Upsampler("small", device="cpu"))
    upsampler._recorder = Recorder(upsampler._network)
    other = pickle.loads(pickle.dumps(upsampler))
    depth, guide = torch.rand(3, 4) + 1, torch.rand(3, 12, 16)
    torch.testing.assert_close(other(depth, guide), upsampler(depth, guide))


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on the second GPU."""

    device = torch.device("cuda", 1)
    is_cuda = True


class Machine:
    """What graphs.py asks of torch.cuda, of which device and stream, in order."""

    def __init__(self):
        self.device_now, self.streams, self.log, self.fail_end = 0, {0: "default", 1: "default"}, [], False

    def note(self, *what):
        self.log.append((*what, self.device_now, self.streams[self.device_now]))

    @contextlib.contextmanager
    def device(self, device):
        before, self.device_now = self.device_now, torch.device(device).index
        try:
            yield
        finally:
            self.device_now = before

    @contextlib.contextmanager
    def stream(self, stream):
        before = self.streams[self.device_now]
        self.streams[self.device_now] = stream
        try:
            yield
        finally:
            self.streams[self.device_now] = before

    def install(self, monkeypatch):
        machine = self

        class Stream:
            def wait_stream(self, other):
                machine.note("wait")

        class CUDAGraph:
            def capture_begin(self, pool=None, capture_error_mode="global"):
                machine.note("begin", pool, capture_error_mode)

            def capture_end(self):
                machine.note("end")
                if machine.fail_end:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

            def replay(self):
                machine.note("replay")

        for name, value in {
            "device": self.device,
            "stream": self.stream,
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "current_stream": lambda: self.streams[self.device_now],
            "graph_pool_handle": lambda: "pool",
            "synchronize": lambda: self.note("synchronize"),
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: self.note("clear"), raising=False)
        ended = lambda device, pool: self.note("released", device, pool)  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
        return self


@pytest.fixture
def machine(monkeypatch):
    return Machine().install(monkeypatch)


def test_a_graph_belongs_to_the_device_of_its_inputs(machine):
    def watched(image):
        machine.note("call")
        return 2 * image

    image = torch.rand(2, 3).as_subclass(Elsewhere)
    graph = Graph(watched, [image])
    where = [entry[-2:] for entry in machine.log if entry[0] in ("call", "begin", "end", "synchronize")]
    # First as it is, then recorded, on one stream of the second GPU that is not the default one.
    assert [entry[0] for entry in machine.log] == [
        *("wait", "call", "synchronize", "clear", "begin", "call", "end", "clear")
    ]
    assert len(set(where)) == 1 and where[0][0] == 1 and where[0][1] != "default"
    graph(torch.rand(2, 3).as_subclass(Elsewhere))
    assert machine.log[-1] == ("replay", 1, "default")
    assert machine.device_now == 0 and machine.streams == {0: "default", 1: "default"}


def test_a_graph_is_recorded_on_the_stream_that_is_named(machine):
    calls = []
    with machine.stream("training"):
        stream = torch.cuda.Stream()
        Graph(lambda image: calls.append(image), [torch.rand(2, 3).as_subclass(Elsewhere)], pool="own", stream=stream)
    # It was called there before.
    assert len(calls) == 1
    assert ("begin", "own", "thread_local", 1, stream) in machine.log


@pytest.mark.parametrize("where", ["function", "end", "interrupt"])
def test_a_recording_that_fails_leaves_nothing_behind(machine, where):
    machine.fail_end = where == "end"

    def function(image):
        machine.note("call")
        if machine.log.count(machine.log[-1]) == 2 and where != "end":
            raise KeyboardInterrupt if where == "interrupt" else RuntimeError("CUDA error: capturing")
        return image

    with pytest.raises(KeyboardInterrupt if where == "interrupt" else RuntimeError):
        Graph(function, [torch.rand(2, 3).as_subclass(Elsewhere)])
    assert machine.device_now == 0 and machine.streams == {0: "default", 1: "default"}
    names = [entry[0] for entry in machine.log]
    assert names[-3:] == ["end", "released", "clear"] and machine.log[-2][1:3] == (1, "pool")
    # Another is recorded after it: the lock was given back.
    machine.fail_end = False
    Graph(double, [torch.rand(2, 3).as_subclass(Elsewhere)])
