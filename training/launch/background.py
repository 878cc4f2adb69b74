"""One action at a time beside the training, in a thread of this process."""

import threading
from collections.abc import Callable


class Background:
    """Runs what need not be waited for; an error of it is raised when it is waited for."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, action: Callable[[], object]) -> None:
        """Wait for the action before, and begin this one. The interpreter does not end before it has.

        Raises:
            Exception: That of the action before; this one is not begun.
        """
        self.wait()

        def run() -> None:
            try:
                action()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="background")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is left to do.

        Raises:
            Exception: That of the action.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
