"""Signals set a flag and nothing else; whoever listened before listens again afterwards."""

import os
import signal

import pytest

from lib.ranks import STOP_SIGNALS, StopFlag


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_interrupts_nothing(number):
    with StopFlag() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.signal == number


def test_the_handlers_from_before_are_back_afterwards_even_after_an_error():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(RuntimeError), StopFlag():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_second_ctrl_c_does_not_wait_but_a_second_sigterm_does():
    with StopFlag() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first Ctrl-C, whatever came before
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
