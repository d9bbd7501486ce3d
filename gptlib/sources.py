"""Where documents come from: the Hugging Face Hub, files, the standard library of this Python."""

import glob
import gzip
import hashlib
import itertools
import json
import os
import sys
import sysconfig
import zlib
from pathlib import Path

from gptlib.common import UserError

FINEWEB = "HuggingFaceFW/fineweb-edu"
# about how many of GPT-2's tokens its samples have
FINEWEB_TOKENS = {"sample-10BT": 10**10, "sample-100BT": 10**11, "sample-350BT": 35 * 10**10}

# Folders of the standard library with tests, tables of code pages, and what some systems leave out.
NOT_EVERYWHERE = {
    "test", "tests", "site-packages", "dist-packages", "lib-dynload", "__pycache__", "encodings",
    "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip", "msilib"}


def open_source(source, files, dataset, name, column):
    """Find the text that the command line describes, without reading it yet.

    Returns (description, read): a line that differs for any two sources, and a function read(skip)
    that returns an iterator of documents (str) without the first `skip`. Raises UserError where no
    file is found.
    """
    if source == "fineweb":
        description = f"{dataset}, {name or 'default'}, column {column}"
        return description, lambda skip: read_hub(dataset, name, column, skip)
    if source == "files":
        paths = matching_files(files or "")
        names_and_sizes = [(path, os.path.getsize(path)) for path in paths]
        digest = hashlib.sha256(repr(names_and_sizes).encode()).hexdigest()[:12]
        description = f"{files}, column {column}: {len(paths)} files, names and sizes {digest}"
    elif source == "stdlib":
        paths = stdlib_files()
        version = sys.version.split()[0]
        description = f"standard library of Python {version}: {len(paths)} files"
    else:
        raise UserError(f"--source {source}: expected fineweb, files or stdlib")
    if not paths:
        raise UserError(f"--source {source} --files {files}: no files found; check the pattern, "
                        "and quote it")
    return description, lambda skip: itertools.islice(read_files(paths, column), skip, None)


def matching_files(pattern):
    """The files that match a glob pattern, sorted; ** matches any folders, ~ is the home folder."""
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    return [path for path in sorted(found) if os.path.isfile(path)]


def stdlib_files():
    """The .py files of the standard library that every installation has, sorted."""
    found = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        # os.walk goes on into what is left in this list
        folders[:] = [name for name in folders
                      if name not in NOT_EVERYWHERE and not name.startswith("config-")]
        for name in names:
            of_this_machine = name.startswith(("_sysconfigdata", "sitecustomize"))
            if name.endswith(".py") and not of_this_machine:
                found.append(os.path.join(folder, name))
    return sorted(found)


def read_files(paths, column):
    for path in paths:
        yield from read_file(path, column)


def read_file(path, column):
    """Yield the documents of a file.

    column: the key or column that holds the text of .jsonl and .parquet. Raises UserError for what
    cannot be read, naming the line where there are lines.
    """
    where = path
    try:
        if path.endswith((".txt", ".md", ".py")):
            yield Path(path).read_bytes().decode()
        elif path.endswith((".jsonl", ".json.gz", ".jsonl.gz")):
            open_lines = gzip.open if path.endswith(".gz") else open
            with open_lines(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    where = f"{path}, line {number}"
                    if line.strip():
                        yield text_of_line(line, column, where)
        elif path.endswith(".parquet"):
            yield from read_parquet(path, column)
        else:
            raise UserError(f"{path}: expected .txt, .md, .jsonl, .json.gz or .parquet; "
                            "narrow --files")
    except UserError:
        raise
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error) as error:
        raise UserError(f"{where}: cannot read it ({error}). Repair it, or leave it out of "
                        "--files") from error


def text_of_line(line, column, where):
    row = json.loads(line)
    if not isinstance(row, dict) or column not in row:
        raise UserError(f"{where}: no {column!r} in {line[:60]!r}; name the text by --column")
    return text_of(row[column], column, where)


def text_of(value, column, where):
    """The document in a row's column; null is an empty document."""
    if not isinstance(value, str | None):
        raise UserError(f"{where}: {column!r} is {value!r:.60}, not text; name the text by "
                        "--column")
    return value or ""


def read_parquet(path, column):
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path) as f:
        names = f.schema_arrow.names
        if column not in names:
            raise UserError(f"{path}: no column {column!r} in {names}; name one by --column")
        for batch in f.iter_batches(1024, columns=[column]):
            for text in batch[0].to_pylist():
                yield text_of(text, column, path)


def read_hub(dataset, name, column, skip):
    """Stream the documents of a dataset on the Hub, or of a local directory of the same layout."""
    from datasets import load_dataset
    try:
        rows = load_dataset(dataset, name=name, split="train", streaming=True)
        # Some formats name their columns only in the rows. An empty dataset has every column.
        columns = rows.column_names or list(next(iter(rows), {column: ""}))
        if column not in columns:
            raise UserError(f"{dataset}: no column {column!r} in {columns}; name one by --column")
        rows = rows.select_columns([column]).skip(skip).with_format("arrow")
        for table in rows.iter(1024):
            for text in table[column].to_pylist():
                yield text_of(text, column, dataset)
    except UserError:
        raise
    except Exception as error:  # the Hub, the network, a damaged file: dozens of classes
        raise UserError(f"cannot read dataset {dataset} ({name or 'default'}): "
                        f"{type(error).__name__}: {error}. Finished shards are kept: repair it "
                        "and run the same command again") from error
