"""Ctrl-C and SIGTERM in the process that drives a rehearsal."""

import os
import signal

import pytest

from slime_plugins.lora.rehearsal import cluster


class InterruptedWhileItGoes:
    """Python prints and forgets what a destructor raises: Ctrl-C at that moment was lost, and the run went on."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        sum(range(1000))  # the handler runs between two instructions


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, cluster.Terminated)])
def test_an_interrupt_that_a_destructor_swallowed_ends_the_next_call(number, raised):
    with cluster.terminate_as_interrupt():
        assert cluster._wait({}) == []
        thing = InterruptedWhileItGoes(number)
        del thing
        with pytest.raises(raised):
            cluster._wait({})
    with cluster.terminate_as_interrupt():
        assert cluster._wait({}) == [], "the next run knows nothing of it"
