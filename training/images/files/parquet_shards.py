"""Parquet shards of images, on a disk or in a store: tables with a column of image files' bytes, row after row."""

import io
import os
from collections.abc import Iterator
from typing import Any

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.files.shards import Member, ShardFile, ShardLost

ROWS_AT_ONCE = 64
USUAL_NAMES = ("image", "img")  # of several columns of bytes


class SeekableShard(ShardFile):
    """A shard for a reader that jumps; a jump costs nothing before the next read."""

    closed = False

    def __init__(self, name: str):
        """Open it to learn its size.

        Raises:
            ShardLost: It cannot be read.
            InputError: Credentials are missing, or a library.
        """
        super().__init__(name)
        self.read(0)
        size = getattr(self.file, "size", None)
        self.size = os.fstat(self.file.fileno()).st_size if size is None else int(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte and return which it is."""
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        if position != self.position and self.file is not None:
            try:
                self.file.seek(position)
            except Exception:  # each library has its own way to say that it cannot
                self.close()
        self.position = position
        return position

    def tell(self) -> int:
        """Return the byte that is read next."""
        return self.position

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, as many as asked for unless the file ends; as `ShardFile.read`."""
        wanted = self.size - self.position if size < 0 else size
        found = super().read(wanted)
        while 0 < len(found) < wanted:  # some stores give less
            more = super().read(wanted - len(found))
            if not more:
                break
            found += more
        return found


def parquet_members(name: str, start: int = 0, column: str = "") -> Iterator[Member]:
    """Yield the images of a shard from a row on; a member's offset is its row. A row without bytes is an empty image.

    Args:
        name: Path or address.
        start: Row to begin with.
        column: Of the images; "" takes the only one with bytes, or of several the one called `image`.

    Raises:
        ShardLost: The rest cannot be read.
        InputError: No such column, credentials are missing, or a library.
    """
    import pyarrow
    import pyarrow.parquet

    file = SeekableShard(name)
    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(file, mode="r"))
        path = _path_of(table.schema_arrow, name, column)
        first = 0
        for group in range(table.num_row_groups):
            row, first = first, first + table.metadata.row_group(group).num_rows
            if first <= start:
                continue
            for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[path]):
                values: Any = batch.column(0)
                if pyarrow.types.is_struct(values.type):
                    values = values.field("bytes")
                for value in values:
                    if row >= start:
                        yield Member(row, value.as_py() or b"")
                    row += 1
    except pyarrow.ArrowException as error:
        raise ShardLost("damaged", " ".join(str(error).split())[:100]) from error
    finally:
        file.close()


def _path_of(schema: Any, name: str, column: str) -> str:
    """Return the path of the column of bytes within a table.

    Raises:
        InputError: None, none of that name, or several.
    """
    import pyarrow

    def is_bytes(kind: Any) -> bool:
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    found = {}
    for field in schema:
        if is_bytes(field.type):
            found[field.name] = field.name
        elif pyarrow.types.is_struct(field.type) and any(
            one.name == "bytes" and is_bytes(one.type) for one in field.type
        ):
            found[field.name] = f"{field.name}.bytes"
    usual = [one for one in USUAL_NAMES if one in found]
    chosen = column or (usual[0] if usual else next(iter(found)) if len(found) == 1 else "")
    if chosen in found:
        return found[chosen]
    shard, wanted = name.rsplit("/", 1)[-1], f" called {column!r}" if column else ""
    raise InputError(
        f"`image_column_name`: expected a column of image files' bytes{wanted} in {shard}, found {sorted(found)} "
        f"among {schema.names}; name it with --image_column_name."
    )
