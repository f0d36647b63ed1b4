"""A setting of the whole process: the first thread that needs it changes it, the last restores it."""

import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddfup._shared import SharedContext
from ddfup.formats.base import decoding


def test_it_is_entered_by_the_first_and_left_by_the_last():
    seen = []

    @contextmanager
    def setting():
        seen.append("on")
        try:
            yield
        finally:
            seen.append("off")

    shared = SharedContext(setting)
    with shared:
        with shared:
            assert seen == ["on"]
        assert seen == ["on"]
    assert seen == ["on", "off"]
    with pytest.raises(KeyError), shared:
        raise KeyError("within")
    assert seen == ["on", "off", "on", "off"]


def test_decoders_in_two_threads_leave_the_warnings_as_they_were():
    before, inside, go = list(warnings.filters), threading.Event(), threading.Event()

    def decode():
        with decoding(Path("second"), "PNG"):
            inside.set()
            assert go.wait(10)
            warnings.warn("of a decoder", stacklevel=1)

    thread = threading.Thread(target=decode)
    with decoding(Path("first"), "PNG"):
        thread.start()
        assert inside.wait(10)
    go.set()
    thread.join()
    assert list(warnings.filters) == before
