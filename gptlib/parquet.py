"""Text in parquet files, a row group at a time."""

import contextlib
import threading
from typing import NamedTuple

from gptlib.common import UserError

# A row group with more bytes of text than this is read in pieces, so that memory stays bounded.
LARGE_ROW_GROUP = 2**26


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
        """Yield rows `start` to `stop` as RowGroups, and large row groups as lists of documents."""
        stop = self.num_rows if stop is None else stop
        begin = 0
        for index in range(self.metadata.num_row_groups):
            num_rows = self.metadata.row_group(index).num_rows
            first, last = max(start - begin, 0), min(stop - begin, num_rows)
            begin += num_rows
            if first >= last:
                continue
            if self.text_size(index) > LARGE_ROW_GROUP:
                yield from self.read_in_pieces(index, first, last)
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

    def open(self):
        import pyarrow.parquet
        return pyarrow.parquet.ParquetFile(self.path, metadata=self.metadata)

    def read_in_pieces(self, index, first, last):
        """Yield lists of 1024 documents of rows `first` to `last` of a row group."""
        begin = 0
        with readable(self.path), self.open() as f:
            for batch in f.iter_batches(1024, row_groups=[index], columns=[self.column]):
                rows = batch[0].slice(max(first - begin, 0), max(last - max(begin, first), 0))
                begin += len(batch)
                if len(rows):
                    yield self.texts(rows)

    def read_row_group(self, index, first, last):
        with readable(self.path), self.open() as f:
            # one thread: as many of these as there are cores run at a time
            table = f.read_row_group(index, columns=[self.column], use_threads=False)
        return self.texts(table[0].slice(first, last - first))

    def texts(self, column):
        return [text_of(value, self.column, self.path) for value in column.to_pylist()]

    def done_with_one(self):
        with self.lock:
            self.num_unread -= 1
            is_done = self.num_unread == 0
        if is_done and self.on_done:
            self.on_done()


class RowGroup(NamedTuple):
    """Rows `first` to `last` of a row group, which a thread reads and tokenizes."""
    file: ParquetFile
    index: int
    first: int
    last: int

    def read(self):
        """The documents (a list of str). Raises UserError where they can't be read."""
        texts = self.file.read_row_group(self.index, self.first, self.last)
        self.file.done_with_one()
        return texts
