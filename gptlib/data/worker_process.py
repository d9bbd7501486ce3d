"""What runs in a process of gptlib/data/workers.py, which starts it."""

import os
import pickle
import sys

from gptlib.common import UserError
from gptlib.data.parquet import ParquetFile, RowGroup
from gptlib.data.preparation import encode_row_group
from gptlib.data.tokenizer import load_tokenizer


def serve(requests, answers):
    """Tokenize each row group that is asked for, until the requests end."""
    enc = load_tokenizer(pickle.load(requests))
    file = None
    while True:
        try:
            path, column, index, first, last = pickle.load(requests)
        except EOFError:
            return
        try:
            if file is None or file.path != path:
                file = ParquetFile(path, column)
            chunk = encode_row_group(enc, RowGroup(file, index, first, last))
        except UserError as error:
            pickle.dump((0, b"", 0, str(error)), answers)
        else:
            pickle.dump((len(chunk.tokens), chunk.marks, chunk.num_bytes, None), answers)
            answers.write(chunk.tokens.data)
        answers.flush()


def main():
    # Whatever else is printed here must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.stdin.buffer, answers)
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)  # the process that asked is gone, or is ending


if __name__ == "__main__":
    main()
