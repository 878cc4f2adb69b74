"""Names of files, millions of them, in two tensors instead of as many objects.

A loader process that only looks at a Python string writes its count of references, and the page it lies on is copied:
lists of names grow in every process. Tensors are shared by processes that are forked and by those that are not.
"""

import logging
import os
import time
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np
import torch

logger = logging.getLogger(__name__)

BLOCK = 65_536  # names that are decoded together
CLOCK_EVERY = 10_000  # names between two looks at the clock
SAID_EVERY_S = 10.0


class FileNames(Sequence[str]):
    """File names by index, in the order of their code points. Can be pickled, for loader processes.

    Attributes:
        packed: `(bytes,)` uint8, the names one after the other.
        ends: `(names + 1,)` int64, where each begins and the last one ends.
        prefix: Before each of them.
    """

    def __init__(self, packed: torch.Tensor, ends: torch.Tensor, prefix: str = ""):
        """Take names as `FileNames.of` makes them."""
        self.packed, self.ends, self.prefix = packed, ends, prefix

    @classmethod
    def of(cls, paths: Iterable[str], folder: str, suffixes: Collection[str]) -> "FileNames":
        """Return the names, relative to a folder, of those files below it that have one of the suffixes.

        Args:
            paths: As `files_below` yields them.
            folder: As it was named there.
            suffixes: In lower case.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        start = len(os.path.join(folder, ""))
        packed, ends = bytearray(), array("q", [0])
        for path in _counted(paths):
            if os.path.splitext(path)[1].lower() in suffixes:
                # "surrogatepass": bytes are in the order of code points, whatever a name is made of
                packed += path[start:].encode(errors="surrogatepass")
                ends.append(len(packed))
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(packed)]
        names = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(ends) - 1, buffers)
        del buffers, packed, ends
        names = names.take(pc.array_sort_indices(names))
        _, places, contents = names.buffers()
        starts = np.frombuffer(places, np.int64, len(names) + 1).copy()
        text = np.frombuffer(contents or b"", np.uint8, int(starts[-1])).copy()
        del names, places, contents
        pa.default_memory_pool().release_unused()
        return cls(torch.from_numpy(text), torch.from_numpy(starts))

    def below(self, folder: str) -> "FileNames":
        """Return the same names behind that of a folder, in the same memory."""
        return FileNames(self.packed, self.ends, os.path.join(folder, ""))

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start, end = self.ends[place : place + 2].tolist()
        return self.prefix + self.packed[start:end].numpy().tobytes().decode(errors="surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (name for block in self.blocks() for name in block)

    def blocks(self) -> Iterator[list[str]]:
        """Yield all names, many at once."""
        for first in range(0, len(self), BLOCK):
            ends = self.ends[first : first + BLOCK + 1].tolist()
            text = self.packed[ends[0] : ends[-1]].numpy().tobytes()
            yield [
                self.prefix + text[start - ends[0] : end - ends[0]].decode(errors="surrogatepass")
                for start, end in pairwise(ends)
            ]

    def update(self, digest: Any) -> None:
        """Let a digest of `hashlib` take the names, a line each."""
        for place, block in enumerate(self.blocks()):
            digest.update(("\n" * bool(place) + "\n".join(block)).encode(errors="surrogateescape"))


def _counted(paths: Iterable[str]) -> Iterator[str]:
    """Yield paths; how many they are so far is logged every ten seconds."""
    said = time.monotonic()
    for count, path in enumerate(paths, 1):
        yield path
        if count % CLOCK_EVERY == 0 and time.monotonic() - said > SAID_EVERY_S:
            said = time.monotonic()
            logger.info("%s files so far, %s the last of them", f"{count:,}", os.path.dirname(path))
