"""One bounded store for everything that is derived from patterns: tables, masks, patterns themselves.

Keys are contents, never identities, so that eight threads and a copied model share one table. What was used longest
ago is forgotten first, and made again when asked for.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

MAX_BYTES = 2**30


class TableStore:
    """Values by key, up to `max_bytes` in all and at least the latest; each is made once, whichever threads ask."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the value of a key, made by `make` if there is none."""
        found = self._find(key)
        if found is not None:
            return found
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:  # other keys are made meanwhile, and a value may need them
            found = self._find(key)
            if found is None:
                found = make()
                self.put(key, found)
        with self._lock:
            self._making.pop(key, None)
        return found

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value and forget the oldest ones beyond the bound."""
        size = size_of(value)
        with self._lock:
            _, before = self._values.pop(key, (None, 0))
            self._values[key] = value, size
            self.bytes += size - before
            while self.bytes > self.max_bytes and len(self._values) > 1:
                _, (_, forgotten) = self._values.popitem(last=False)
                self.bytes -= forgotten

    def _find(self, key: Hashable) -> Any:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]


def size_of(value: Any) -> int:
    """Return the bytes of a tensor, of several, or of what says its own `nbytes`."""
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    if callable(as_tuple := getattr(value, "as_tuple", None)):  # FlexAttention's mask
        return size_of(as_tuple())
    size = getattr(value, "nbytes", 0)
    return size if isinstance(size, int) else 0


STORE = TableStore(MAX_BYTES)


def outside_modes(function: Callable) -> Callable:
    """Return a function that makes tables of tensors and runs in a thread of its own.

    Modes of torch's (inference, fake tensors of a trace, a default device) belong to a thread: whatever is on when a
    table is first asked for, it becomes an ordinary tensor that serves training, inference and tracing alike.
    """

    @wraps(function)
    def run(*arguments):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(function, *arguments).result()

    return run


def cached_tables(function: Callable) -> Callable:
    """Return a function of patterns (by their names) and hashable arguments: `outside_modes`, kept in the store."""
    alone = outside_modes(function)
    label = f"{function.__module__}.{function.__qualname__}"

    @wraps(function)
    def cached(*arguments):
        key = (label, *(getattr(one, "name", one) for one in arguments))
        return STORE.get(key, lambda: alone(*arguments))

    return cached


__all__ = ["STORE", "TableStore", "cached_tables", "outside_modes", "size_of"]
