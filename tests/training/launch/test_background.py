"""What is done beside the training: one thing at a time, and no error is lost."""

import threading

import pytest

from hf_vicreg.training.launch.background import Background


def test_the_caller_goes_on_and_the_next_action_waits():
    background, gate, done = Background(), threading.Event(), []
    background.start(lambda: (gate.wait(60), done.append("first")))
    assert not done
    threading.Timer(0.05, gate.set).start()
    background.start(lambda: done.append("second"))
    assert done[0] == "first"
    background.wait()
    assert done == ["first", "second"]
    background.wait()  # with nothing left to do


def test_an_error_is_raised_once_where_it_is_waited_for():
    background = Background()

    def fail():
        raise OSError("no room")

    background.start(fail)
    with pytest.raises(OSError, match="no room"):
        background.start(lambda: pytest.fail("begun after a failure"))
    background.wait()
