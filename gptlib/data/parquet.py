"""Text in parquet files, a row group at a time, and their row counts without reading them."""

import contextlib
import threading
from typing import NamedTuple

from gptlib.common import UserError

# A row group with more bytes of text than this is not given to a process, which would send back all
# of its tokens at once.
LARGE_ROW_GROUP = 2**26
PIECE = 2**20  # bytes of text that are read at a time, about
MOST_REPEATED = 2**30  # bytes of text in one piece, if each row repeats the longest text
MAX_DOCUMENT = 2**30  # bytes; a longer document is refused before it is in memory


def text_of(value, column, where):
    """The document in a row's column: text, or bytes that are UTF-8; null is an empty document."""
    if isinstance(value, bytes):
        value = value.decode()
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
    out is read and no other follows. Raises UserError if the file is damaged or has no such
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

    def dictionary_size(self, index):
        """The bytes of the longest text that a row group can repeat; 0 if it repeats none.

        A column's chunk may begin with a page of texts, its dictionary, to which rows refer by
        number. So a small file can stand for any amount of text.
        """
        group = self.metadata.row_group(index)
        columns = [group.column(i) for i in range(group.num_columns)]
        sizes = [size_of_dictionary_page(self.path, column) for column in columns
                 if column.path_in_schema.split(".")[0] == self.column]
        return max(sizes, default=0)

    def rows(self, index, first, last):
        """Yield rows `first` to `last` of a row group as lists of documents, of PIECE each.

        Only such a piece is in memory, not the row group: pieces also stay in the processor's
        cache, and their memory is used again for the next.
        """
        import pyarrow.parquet
        size = self.text_size(index) / self.metadata.row_group(index).num_rows
        longest = max(size, self.dictionary_size(index))
        if longest > MAX_DOCUMENT:
            raise UserError(f"{self.path}: row group {index} has documents of {longest:.0f} bytes; "
                            f"expected at most {MAX_DOCUMENT}. Leave it out of --files")
        # at most 1024: size is that of the encoded text, which may repeat itself when decoded
        rows_at_a_time = min(max(1, int(PIECE / max(size, 1))), 1024)
        rows_at_a_time = min(rows_at_a_time, max(1, int(MOST_REPEATED / max(longest, 1))))
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


def size_of_dictionary_page(path, column):
    """The bytes of texts in the dictionary page of a column's chunk; 0 if it begins with data.

    column: its ColumnChunkMetaData. Its header is in Thrift's compact protocol: field 1 is the type
    of the page (2: a dictionary), field 2 its size when decompressed, both zigzag integers.
    """
    offsets = [column.data_page_offset]
    if column.has_dictionary_page:
        offsets.append(column.dictionary_page_offset)
    with open(path, "rb") as f:
        f.seek(max(min(offsets), 0))
        header = f.read(16)
    page_type, rest = read_field(header)
    return read_field(rest)[0] if page_type == 2 else 0


def read_field(data):
    """An integer field of Thrift's compact protocol. Returns (its value, the bytes after it)."""
    value = 0
    for i, byte in enumerate(data[1:]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value >> 1 ^ -(value & 1), data[2 + i:]
    return 0, b""


class RowGroup(NamedTuple):
    """Rows `first` to `last` of a row group, which are read when they are asked for."""
    file: ParquetFile
    index: int
    first: int
    last: int

    def is_large(self):
        return self.file.text_size(self.index) > LARGE_ROW_GROUP

    def documents(self):
        """Yield the documents (str). Raises UserError if they can't be read."""
        for documents in self.file.rows(self.index, self.first, self.last):
            yield from documents
        self.file.done_with_one()
