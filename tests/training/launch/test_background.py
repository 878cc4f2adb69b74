"""What is done beside the training: one thing at a time, and no error is lost."""

import logging
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


def test_a_context_waits_and_another_error_is_the_one_that_is_raised(caplog):
    gate, done = threading.Event(), []

    def fail():
        gate.wait(60)
        done.append("tried")
        raise OSError("no room")

    def work(own):
        gate.clear()
        threading.Timer(0.05, gate.set).start()
        with Background() as background:
            background.start(fail)
            if own is not None:
                raise own

    for own in (KeyError, None):
        with pytest.raises(own or OSError):
            work(own)
        assert done.pop() == "tried"
    assert [one.message for one in caplog.records if one.levelno == logging.WARNING] == [
        "what was being done beside the training failed as well: no room"
    ]
