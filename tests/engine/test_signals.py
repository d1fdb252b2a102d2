"""A request to stop: the first signal is noted, the second stops at once, and the handlers of before come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from sdclr.engine.signals import StopRequest
from sdclr.errors import Terminated


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_only_sets_requested_and_its_error_exits_with_128_plus_it(number, code):
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested == number
        problem = stop.interrupted("stopped", "go on")
    assert (problem.exit_code, problem.message, problem.hint) == (code, "stopped", "go on")


def test_the_second_signal_stops_at_once():
    for second in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(Terminated) as stopped, StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), second)
        assert stopped.value.signal_number == second
        assert isinstance(stopped.value, KeyboardInterrupt)  # and no Exception, which a decoder's handler would take


def test_the_handlers_of_before_come_back_even_after_an_error():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        raise RuntimeError
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_it_leaves_the_handlers_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]
