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


def open_source(source, files, dataset, name, column):
    """Return a description, which tells any two sources apart, and read(skip), an iterator of documents (str)."""
    if source == "fineweb":
        return f"{dataset}, {name or 'default'}, column {column}", lambda skip: read_hub(dataset, name, column, skip)
    if source == "files":
        paths = [path for path in sorted(glob.glob(os.path.expanduser(files or ""), recursive=True))
                 if os.path.isfile(path)]
        digest = hashlib.sha256(repr([(path, os.path.getsize(path)) for path in paths]).encode()).hexdigest()[:12]
        description = f"{files}, column {column}: {len(paths)} files, names and sizes {digest}"
    elif source == "stdlib":
        paths = stdlib_files()
        description = f"standard library of Python {sys.version.split()[0]}: {len(paths)} files"
    else:
        raise UserError(f"--source {source}: expected fineweb, files or stdlib")
    if not paths:
        raise UserError(f"--source {source} --files {files}: no files found; check the pattern, and quote it")
    return description, lambda skip: itertools.islice((text for path in paths for text in read_file(path, column)),
                                                      skip, None)


def stdlib_files():
    """The .py files of the standard library that are on every installation, sorted: no tests, no tables of code pages."""
    skip = {"test", "tests", "site-packages", "dist-packages", "lib-dynload", "__pycache__", "encodings", "idlelib",
            "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip", "msilib"}
    found = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in skip and not name.startswith("config-")]
        found += [os.path.join(folder, name) for name in names
                  if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize"))]
    return sorted(found)


def text_of(value, column, where):
    """A document from a row: null is an empty one."""
    if not isinstance(value, str | None):
        raise UserError(f"{where}: {column!r} is {value!r:.60}, not text; name the text by --column")
    return value or ""


def read_file(path, column):
    """Yield the documents of a file. Raises UserError, with the line where there is one."""
    where = path
    try:
        if path.endswith((".txt", ".md", ".py")):
            yield Path(path).read_bytes().decode()
        elif path.endswith((".jsonl", ".json.gz", ".jsonl.gz")):
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    where = f"{path}, line {number}"
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict) or column not in row:
                            raise UserError(f"{where}: no {column!r} in {line[:60]!r}; name the text by --column")
                        yield text_of(row[column], column, where)
        elif path.endswith(".parquet"):
            import pyarrow.parquet
            with pyarrow.parquet.ParquetFile(path) as f:
                if column not in f.schema_arrow.names:
                    raise UserError(f"{path}: no column {column!r} in {f.schema_arrow.names}; name one by --column")
                for batch in f.iter_batches(1024, columns=[column]):
                    for text in batch[0].to_pylist():
                        yield text_of(text, column, where)
        else:
            raise UserError(f"{path}: expected .txt, .md, .jsonl, .json.gz or .parquet; narrow --files")
    except UserError:
        raise
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error) as error:
        raise UserError(f"{where}: cannot read it ({error}). Mend it, or leave it out of --files") from error


def read_hub(dataset, name, column, skip):
    """Stream the documents of a dataset on the Hub, or of a local directory of the same layout."""
    from datasets import load_dataset
    try:
        rows = load_dataset(dataset, name=name, split="train", streaming=True)
        columns = rows.column_names or list(next(iter(rows), {column: ""}))
        if column not in columns:
            raise UserError(f"{dataset}: no column {column!r} in {columns}; name one by --column")
        for table in rows.select_columns([column]).skip(skip).with_format("arrow").iter(1024):
            for text in table[column].to_pylist():
                yield text_of(text, column, dataset)
    except UserError:
        raise
    except Exception as error:  # the Hub, the network, a broken file: dozens of kinds
        raise UserError(f"cannot read dataset {dataset} ({name or 'default'}): {type(error).__name__}: {error}. Whole "
                        "shards are kept: mend it and run the same command again") from error
