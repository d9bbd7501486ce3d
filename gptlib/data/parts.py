"""A part of a source, which one of several machines prepares: which rows, and its shards' names."""

import math
import re
from fractions import Fraction
from typing import NamedTuple

from gptlib.common import UserError

MAX_SHARDS = 10**6  # shards are numbered with six digits


class Part(NamedTuple):
    """Part `number` of `count` of a source; the parts follow each other without a gap."""
    number: int
    count: int

    def rows(self, file, num_files, num_rows):
        """(first, last): the rows of this part in one of num_files files, with num_rows rows.

        All files count alike, however large they are, so that only the files at the part's borders
        have to be opened to find its rows.
        """
        def rows_before(number):
            share = Fraction(number * num_files, self.count) - file
            return math.floor(min(max(share, 0), 1) * num_rows)
        return rows_before(self.number - 1), rows_before(self.number)

    def touches(self, file, num_files):
        """Whether any row of a file can be in this part."""
        return (self.number - 1) * num_files < (file + 1) * self.count \
            and file * self.count < self.number * num_files

    def folder(self):
        return f"part_{self.number:04d}_of_{self.count:04d}"

    def first_index(self):
        """The number of this part's first shard: the names of all parts sort into one dataset."""
        return (self.number - 1) * self.max_shards()

    def max_shards(self):
        return MAX_SHARDS // self.count


WHOLE = Part(1, 1)


def parse_part(text):
    """The Part of "3/8"; WHOLE for None. Raises UserError."""
    if text is None:
        return WHOLE
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count <= 9999:
        raise UserError(f"--part {text}: expected a number and how many there are, 1/8 to 8/8 for "
                        "eight, and at most 9999")
    return Part(number, count)
