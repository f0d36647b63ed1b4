"""Recorded calls, with something in the place of a GPU that records; what a GPU does is in test_gpu.py."""

import pytest
import torch

from ddfup.graphs import Recorder


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


def images(*sizes):
    return [torch.rand(1, 1, *size) for size in sizes]


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
    recorder = Recorder(lambda a: 2 * a, record=recording)
    for image in (*images((2, 3), (3, 2)), torch.ones(1, 1, 2, 3, dtype=torch.float64)):
        torch.testing.assert_close(recorder(image), 2 * image)
    assert recording.made == 0


def test_the_sizes_seen_last_are_kept(recording):
    recorder = Recorder(lambda a: 2 * a, record=recording)
    small, middle, large = images((1, 1), (2, 2), (3, 3))
    for image in (small, small, middle, small, large, small, middle):
        torch.testing.assert_close(recorder(image), 2 * image)
    # The small one was never forgotten, the middle one was when the large one came.
    assert recording.made == 1
    recorder(middle)
    assert recording.made == 2


def test_what_cannot_be_recorded_is_called():
    def refuse(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    calls = []

    def double(image):
        calls.append(image)
        return 2 * image

    recorder = Recorder(double, record=refuse)
    (image,) = images((2, 3))
    for _ in range(4):
        torch.testing.assert_close(recorder(image), 2 * image)
    assert len(calls) == 4


def test_forgotten_recordings_are_made_anew(recording):
    recorder = Recorder(lambda a: 2 * a, record=recording)
    (image,) = images((2, 3))
    for _ in range(2):
        recorder(image)
    recorder.forget()
    for _ in range(3):
        torch.testing.assert_close(recorder(image), 2 * image)
    assert recording.made == 2
