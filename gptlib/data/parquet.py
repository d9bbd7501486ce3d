"""Text in parquet files, a row group at a time, and their row counts without reading them."""

import contextlib
import threading
from typing import NamedTuple

from gptlib.common import UserError

# A row group with more bytes of text than this is not given to a process, which would send back all
# of its tokens at once.
LARGE_ROW_GROUP = 2**26
PIECE = 2**20  # bytes of text that are read at a time, about


def text_of(value, column, where):
    """The document in a row's column; null is an empty document."""
    if not isinstance(value, str | None):
        raise UserError(f"{where}: {column!r} is {value!r:.60}, not text; name the text by "
                        "--column")
    return value or ""


@contextlib.contextmanager
def readable(where):
    """Turn what pyarrow raises for a damaged file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(where, error) from error


def unreadable(where, error):
    """The UserError of a file, or of a line of one, that can't be read."""
    return UserError(f"{where}: cannot read it ({error}). Repair it, or leave it out of --files")


class ParquetFile:
    """The text in one column of a parquet file.

    path: the file. column: its column of text. on_done: called when every RowGroup that was handed
    out is read and no other follows. Raises UserError where the file is damaged or has no such
    column.
    """

    def __init__(self, path, column, on_done=None):
        import pyarrow.parquet
        self.path, self.column, self.on_done = path, column, on_done
        # The footer of a file with many row groups takes milliseconds to parse: that is done once.
        with readable(path):
            self.metadata = pyarrow.parquet.read_metadata(path)
            names = self.metadata.schema.to_arrow_schema().names
        self.num_rows = self.metadata.num_rows
        if column not in names:
            raise UserError(f"{path}: no column {column!r} in {names}; name one by --column")
        self.lock, self.num_unread = threading.Lock(), 1  # 1 for the iterator over row groups

    def batches(self, start=0, stop=None):
        """Yield rows `start` to `stop` as RowGroups."""
        stop = self.num_rows if stop is None else stop
        begin = 0
        for index in range(self.metadata.num_row_groups):
            num_rows = self.metadata.row_group(index).num_rows
            first, last = max(start - begin, 0), min(stop - begin, num_rows)
            begin += num_rows
            if first >= last:
                continue
            with self.lock:
                self.num_unread += 1
            yield RowGroup(self, index, first, last)
        self.done_with_one()

    def text_size(self, index):
        """The uncompressed bytes of a row group's text."""
        group = self.metadata.row_group(index)
        columns = [group.column(i) for i in range(group.num_columns)]
        return sum(column.total_uncompressed_size for column in columns
                   if column.path_in_schema.split(".")[0] == self.column)

    def rows(self, index, first, last):
        """Yield rows `first` to `last` of a row group as lists of documents, of PIECE each.

        Only such a piece is in memory, not the row group: pieces also stay in the processor's
        cache, and their memory is used again for the next.
        """
        import pyarrow.parquet
        size = self.text_size(index) / self.metadata.row_group(index).num_rows
        # at most 1024, because text that repeats itself is larger than its encoded size
        rows_at_a_time = min(max(1, int(PIECE / max(size, 1))), 1024)
        begin = 0
        with (readable(self.path),
              pyarrow.parquet.ParquetFile(self.path, metadata=self.metadata, pre_buffer=False,
                                          buffer_size=PIECE) as f):
            # one thread: as many of these as there are cores may run at a time
            for batch in f.iter_batches(rows_at_a_time, row_groups=[index],
                                        columns=[self.column], use_threads=False):
                rows = batch[0].slice(max(first - begin, 0), max(last - max(begin, first), 0))
                begin += len(batch)
                if len(rows):
                    yield [text_of(value, self.column, self.path) for value in rows.to_pylist()]
                if begin >= last:
                    return

    def done_with_one(self):
        with self.lock:
            self.num_unread -= 1
            is_done = self.num_unread == 0
        if is_done and self.on_done:
            self.on_done()


class RowGroup(NamedTuple):
    """Rows `first` to `last` of a row group, which are read when they are asked for."""
    file: ParquetFile
    index: int
    first: int
    last: int

    def is_large(self):
        return self.file.text_size(self.index) > LARGE_ROW_GROUP

    def documents(self):
        """Yield the documents (str). Raises UserError where they can't be read."""
        for documents in self.file.rows(self.index, self.first, self.last):
            yield from documents
        self.file.done_with_one()
