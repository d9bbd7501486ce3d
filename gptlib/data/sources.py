"""Where documents come from: the Hugging Face Hub, files, the standard library of this Python."""

import ast
import codecs
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
from gptlib.data.hub import (FILES_AHEAD, FOOTERS_AHEAD, HubFiles, fetch_ahead, find_parquet_files,
                             hub_errors)
from gptlib.data.parquet import MAX_DOCUMENT, ParquetFile, text_of, unreadable
from gptlib.data.parts import WHOLE
from gptlib.data.tokenizing import group_documents

FINEWEB = "HuggingFaceFW/fineweb-edu"
# the samples of FineWeb-Edu, and about how many of GPT-2's tokens each has
FINEWEB_TOKENS = {"sample-10BT": 10**10, "sample-100BT": 10**11, "sample-350BT": 35 * 10**10}


def open_source(source, files, dataset, name, column, split_on=None, **hub_options):
    """Find the text that the command line describes, without reading it yet.

    hub_options: see HubSource. Returns a FileSource or a HubSource. Raises UserError if no file is
    found.
    """
    if source == "fineweb":
        return HubSource(dataset, name, column, **hub_options)
    if source == "files":
        paths = matching_files(files or "")
        names_and_sizes = [(path, os.path.getsize(path)) for path in paths]
        digest = hashlib.sha256(repr(names_and_sizes).encode()).hexdigest()[:12]
        description = f"{files}, column {column}: {len(paths)} files, names and sizes {digest}"
        if split_on is not None:
            description += f", split on {split_on!r}"
        found = FileSource(description, paths, column, split_on)
    elif source == "stdlib":
        found = StdlibSource()
    else:
        raise UserError(f"--source {source}: expected fineweb, files or stdlib")
    if not found.paths:
        hint = "check the pattern, and quote it"
        if os.path.isdir(files or ""):
            hint = f"for all files in that folder: --files '{files}/**'"
        raise UserError(f"--source {source} --files {files}: no files found; {hint}")
    return found


class FileSource:
    """Text in files of this machine.

    description: a line that differs for any two sources. paths: in the order of reading. split_on:
    see read_text.
    """

    def __init__(self, description, paths, column, split_on=None):
        self.description, self.paths, self.column = description, paths, column
        self.split_on = split_on

    def read(self, skip=0):
        """An iterator of all documents (str) without the first `skip`."""
        for batch in self.batches(skip):
            yield from batch if isinstance(batch, list) else batch.documents()

    def batches(self, skip=0, part=WHOLE):
        """The documents of a part without its first `skip`, as encode_batches takes them."""
        return batches_of_files(self.paths, self.column, skip, part, self.split_on)

    def resolve(self):
        """Find out what reading needs to know. Returns what meta.json has to keep of it."""
        return {}

    def keeps_downloads_in(self, root):
        """Whether files lie in this directory while they are read."""
        return False

    def close(self):
        """Remove the files that reading has left on the disk."""


class StdlibSource(FileSource):
    """The functions of the standard library of this Python, each a document."""

    def __init__(self):
        paths = stdlib_files()
        version = sys.version.split()[0]
        description = f"functions of Python {version}'s standard library: {len(paths)} files"
        super().__init__(description, paths, column=None)

    def batches(self, skip=0, part=WHOLE):
        if part != WHOLE:
            raise UserError("--part: the standard library is too small for parts")
        return group_documents(itertools.islice(read_functions(self.paths), skip, None))


class HubSource(FileSource):
    """Text of a dataset on the Hub, or in a local directory of the same layout.

    revision: a commit, branch or tag (default: the newest commit). recorded: what resolve returned
    when this dataset was begun, so that a run that continues it reads the same commit. folder:
    files are downloaded into it and removed when they are read; None keeps them in Hugging Face's
    cache.
    """

    def __init__(self, dataset, name, column, revision=None, recorded=None, folder=None):
        self.description = f"{dataset}, {name or 'default'}, column {column}"
        self.dataset, self.name, self.column = dataset, name, column
        self.revision, self.recorded, self.folder = revision, recorded, folder
        self.paths = self.hub = None

    def resolve(self):
        if self.recorded:
            self.revision, self.paths = self.recorded["revision"], self.recorded["files"]
        else:
            with self.errors():
                found = find_parquet_files(self.dataset, self.name, self.revision)
            commit, self.paths = found or (None, None)
            self.revision = commit or self.revision
        is_on_hub = self.recorded or (self.paths and commit)
        if not is_on_hub:
            return {}
        self.hub = HubFiles(self.dataset, self.revision, self.folder)
        return {"hub": {"revision": self.revision, "files": self.paths}}

    def batches(self, skip=0, part=WHOLE):
        with self.errors():
            if self.hub:
                yield from self.batches_of_hub(skip, part)
            elif self.paths:
                yield from batches_of_files(self.paths, self.column, skip, part)
            elif part != WHOLE:
                raise UserError(f"--part: {self.dataset} is not made of parquet files, so it "
                                "can't be read in parts")
            else:
                documents = read_stream(self.dataset, self.name, self.column, skip, self.revision)
                yield from group_documents(documents)

    def batches_of_hub(self, skip, part):
        files = list(enumerate(self.paths))
        files = [(i, path) for i, path in files if part.touches(i, len(self.paths))]
        if skip:
            files, skip = self.unfinished_files(files, skip, part)
        fetched = fetch_ahead(self.hub.fetch, [path for _, path in files], FILES_AHEAD)
        for (i, _), path in zip(files, fetched, strict=True):
            file = ParquetFile(path, self.column, lambda path=path: self.hub.drop(path))
            first, last = part.rows(i, len(self.paths), file.num_rows)
            yield from file.batches(first + skip, last)
            skip = 0

    def unfinished_files(self, files, skip, part):
        """Leave out the files whose rows are all within the first `skip`.

        Returns (the others, how many rows of the first of them to skip).
        """
        counts = fetch_ahead(self.hub.count_rows, [path for _, path in files], FOOTERS_AHEAD)
        for done, ((i, _), num_rows) in enumerate(zip(files, counts, strict=True)):
            first, last = part.rows(i, len(self.paths), num_rows)
            if skip < last - first:
                return files[done:], skip
            skip -= last - first
        return [], 0

    def errors(self):
        return hub_errors(f"{self.dataset} ({self.name or 'default'})")

    def keeps_downloads_in(self, root):
        return bool(self.hub and self.folder and self.folder.is_relative_to(root))

    def close(self):
        if self.hub:
            self.hub.drop_all()


def matching_files(pattern):
    """The files that match a glob pattern, sorted; ** matches any folders, ~ is the home folder.

    What exists is taken literally, whatever it is called: a whole path, or the folders it begins
    with, such as "notes [2024]/*.txt".
    """
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):
        return [pattern]
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    found = glob.glob(glob.escape(folder) + pattern[len(folder):], recursive=True)
    return [path for path in sorted(found) if os.path.isfile(path)]


def batches_of_files(paths, column, skip, part=WHOLE, split_on=None):
    """Yield the documents of files as encode_batches takes them, without the first `skip`.

    Parquet files are given out as row groups, in which the part may begin and end. Of other files
    only whole ones are in a part.
    """
    numbered = [(i, path) for i, path in enumerate(paths) if part.touches(i, len(paths))]
    for is_parquet, group in itertools.groupby(numbered, lambda item: item[1].endswith(".parquet")):
        if not is_parquet:
            whole = [path for i, path in group if part.rows(i, len(paths), 1) == (0, 1)]
            documents = read_files(whole, column, split_on)
            while skip and next(documents, None) is not None:
                skip -= 1
            yield from group_documents(documents)
            continue
        for i, path in group:
            file = ParquetFile(path, column)
            first, last = part.rows(i, len(paths), file.num_rows)
            skipped = min(skip, last - first)
            skip -= skipped
            yield from file.batches(first + skipped, last)


def read_files(paths, column, split_on=None):
    for path in paths:
        yield from read_file(path, column, split_on)


def read_file(path, column, split_on=None):
    """Yield the documents of a file.

    column: the key or column that holds the text of .jsonl and .parquet. Raises UserError, which
    names the file, and the line if it has lines, if it cannot be read.
    """
    where = path
    try:
        if path.endswith((".txt", ".md", ".py")):
            yield from read_text(path, split_on)
        elif path.endswith((".jsonl", ".json.gz", ".jsonl.gz")):
            open_lines = gzip.open if path.endswith(".gz") else open
            with open_lines(path, "rb") as f:
                for number in itertools.count(1):
                    where = f"{path}, line {number}"
                    # with a limit, because a file of some kilobytes may unpack to an endless line
                    line = f.readline(MAX_DOCUMENT + 1)
                    check_length(len(line), where)
                    if not line:
                        break
                    if line.strip():
                        yield text_of_line(line, column, where)
        elif path.endswith(".parquet"):
            for row_group in ParquetFile(path, column).batches():
                yield from row_group.documents()
        else:
            raise UserError(f"{path}: expected .txt, .md, .jsonl, .json.gz or .parquet; "
                            "narrow --files")
    except UserError:
        raise
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error) as error:
        raise unreadable(where, error) from error


def read_text(path, split_on=None):
    """Yield the documents of a text file: one, or with split_on several.

    Lines that hold split_on alone stand between two documents, and may begin and end the file.
    """
    if split_on is None:
        check_length(os.path.getsize(path), path, "; --split_on cuts a file into documents")
        yield decode_text(Path(path).read_bytes())
        return
    separator, lines, length, is_first = split_on.encode(), [], 0, True
    with open(path, "rb") as f:
        while line := f.readline(MAX_DOCUMENT + 1):
            bare = line.removeprefix(codecs.BOM_UTF8) if is_first and not lines else line
            if bare.rstrip(b"\r\n") != separator:
                lines.append(line)
                length += len(line)
                check_length(length, path)
                continue
            if lines or not is_first:
                yield decode_text(b"".join(lines))
            lines, length, is_first = [], 0, False
    if lines:
        yield decode_text(b"".join(lines))


def decode_text(data):
    """Bytes of UTF-8 as a str, without the mark that some editors begin a file with (BOM).

    Raises ValueError.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise ValueError("it seems to be UTF-16 or binary: save it as UTF-8")
    return data.decode("utf-8-sig")


def check_length(length, where, hint=""):
    """Raise UserError for a document of so many bytes, if that is too long."""
    if length > MAX_DOCUMENT:
        raise UserError(f"{where}: a document of more than {MAX_DOCUMENT} bytes{hint}. Cut it into "
                        "several, or leave it out of --files")


def text_of_line(line, column, where):
    row = json.loads(line)
    if not isinstance(row, dict) or column not in row:
        raise UserError(f"{where}: no {column!r} in {line[:60]!r}; name the text by --column")
    return text_of(row[column], column, where)


def read_stream(dataset, name, column, skip, revision=None):
    """The documents of a dataset in any format that `datasets` knows."""
    from datasets import load_dataset
    rows = load_dataset(dataset, name=name, split="train", streaming=True, revision=revision)
    # Some formats name their columns only in the rows. An empty dataset has every column.
    columns = rows.column_names or list(next(iter(rows), {column: ""}))
    if column not in columns:
        raise UserError(f"{dataset}: no column {column!r} in {columns}; name one by --column")
    rows = rows.select_columns([column]).skip(skip).with_format("arrow")
    for table in rows.iter(1024):
        for text in table[column].to_pylist():
            yield text_of(text, column, dataset)


# -----------------------------------------------------------------------------
# the demo's text: the functions in the standard library of this Python
#
# Each function and method is a document, written as `ast.unparse` writes it. So a document is
# complete, usually shorter than the demo's context, and in one style: a small model learns Python
# and not where files of a thousand lines are cut. Comments and docstrings are left out: in half a
# sentence of English a quotation mark that is never closed is one wrong word away.

# folders with tests, with tables of code pages, and those that some systems leave out
NOT_EVERYWHERE = {
    "test", "tests", "site-packages", "dist-packages", "lib-dynload", "__pycache__", "encodings",
    "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip", "msilib"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


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


def read_functions(paths):
    """Yield the functions of Python files, each once: the source of one function a document."""
    seen = set()
    for path in paths:
        for function in find_functions(ast.parse(Path(path).read_bytes())):
            text = ast.unparse(without_docstrings(function)) + "\n"
            if text not in seen:
                seen.add(text)
                yield text


def find_functions(node):
    """The functions of a module and the methods of its classes; not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            yield child
        else:
            yield from find_functions(child)


def without_docstrings(tree):
    """The tree, changed in place; a body that was a docstring alone becomes `pass`."""
    for node in ast.walk(tree):
        has_body = isinstance(node, (*FUNCTIONS, ast.ClassDef))
        if has_body and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
