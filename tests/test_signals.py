"""Requests to end, sent to this very process."""

import signal

import pytest

from ddfup.signals import REQUESTS, handled


@pytest.fixture
def before():
    """Handlers of this test in the place of pytest's; those of before are put back."""
    kept = {number: signal.getsignal(number) for number in REQUESTS}
    seen = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield seen
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_handler_serves_while_its_block_runs(before, error):
    caught = []
    try:
        with handled(lambda number, frame: caught.append(number)):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
            if error is not None:
                raise error
    except ValueError:
        assert error is not None
    assert caught == [signal.SIGINT, signal.SIGTERM, signal.SIGINT] and before == []
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert before == [signal.SIGINT] and len(caught) == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_after_the_first_request_those_of_before_serve(before):
    caught = []
    with handled(lambda number, frame: caught.append(number), once=True):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
    assert caught == [signal.SIGTERM] and before == [signal.SIGINT]


def test_a_handler_that_raises_at_once_leaves_those_of_before(before, monkeypatch):
    """A request that comes while handlers are being put in place."""
    put = signal.signal

    def signal_comes_at_once(number, handler):
        old = put(number, handler)
        if number == signal.SIGINT and not done:
            done.append(number)
            signal.raise_signal(number)
        return old

    def end(number, frame):
        raise SystemExit(128 + number)

    done = []
    monkeypatch.setattr(signal, "signal", signal_comes_at_once)
    with pytest.raises(SystemExit), handled(end):
        pytest.fail("the block has run")
    monkeypatch.undo()
    signal.raise_signal(signal.SIGINT)
    assert before == [signal.SIGINT]
