"""One action at a time beside the training, in a thread of this process."""

import logging
import threading
from collections.abc import Callable
from types import TracebackType

logger = logging.getLogger(__name__)


class Background:
    """Runs what need not be waited for; an error of it is raised when it is waited for.

    As a context, it leaves nothing undone; on the way of another error, one of the action is only logged.
    """

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as own:
            if error is None:
                raise
            logger.warning("what was being done beside the training failed as well: %s", own)

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
