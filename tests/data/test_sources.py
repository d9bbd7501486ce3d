"""
python -m pytest tests/data/test_sources.py

Documents out of every kind of file, and the line that says which file or row cannot be read.
"""

import ast
import gzip
import json
import os
from pathlib import Path

import pytest

from corpus import (all_tokens, contents, make_dataset, openai_gpt2, reference_tokens,
                    some_documents)

from gptlib.common import UserError
from gptlib.data.parquet import ParquetFile
from gptlib.data.parts import Part
from gptlib.data.shards import list_shards
from gptlib.data.sources import open_source, read_file, read_functions, stdlib_files


@pytest.fixture(scope="module")
def gpt2():
    return openai_gpt2()


def open_files(pattern):
    return open_source("files", str(pattern), None, None, "text")


def test_kinds_of_files(tmp_path):
    """Guards against a kind of file that gives other documents; null is an empty document."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    documents = ["one", "zwei <|endoftext|>", "", "四"]
    rows = "".join(json.dumps({"body": text or None}) + "\n\n" for text in documents)
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(rows.encode()))
    table = pa.table({"body": ["one", "zwei <|endoftext|>", None, "四"], "n": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json.gz", "c.parquet"):
        assert list(read_file(str(tmp_path / name), "body")) == documents


def test_directory_tree_is_read_in_sorted_order(tmp_path):
    """Guards against an order that depends on the file system, and a skip that miscounts."""
    (tmp_path / "e").mkdir()
    for name, text in (("b.md", "one"), ("a.txt", "zwei <|endoftext|>"), ("e/c.txt", "")):
        (tmp_path / name).write_text(text)
    read = open_files(tmp_path / "**").read
    assert list(read(0)) == ["zwei <|endoftext|>", "one", ""]
    assert list(read(2)) == [""]


def test_one_huge_row_group(tmp_path):
    """Guards against a huge row group in memory all at once, or cut at the wrong rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    documents = [os.urandom(i % 9000).hex() for i in range(3000)]  # 27 MB, hardly compressed
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", row_group_size=10**6)
    group, = ParquetFile(str(tmp_path / "a.parquet"), "text").batches(5, 2900)
    before, largest, found = pa.total_allocated_bytes(), 0, []
    for document in group.documents():
        found.append(document)
        largest = max(largest, pa.total_allocated_bytes() - before)
    assert found == documents[5:2900]
    assert largest < 9e6


def write_bad_files(root):
    good = json.dumps({"text": "x"})
    (root / "bad.jsonl").write_text(f"{good}\n{good}\n{{truncated\n")
    (root / "list.jsonl").write_text(f"{good}\n[1]\n")
    (root / "column.jsonl").write_text(f"{good}\n{json.dumps({'body': 'x'})}\n")
    (root / "number.jsonl").write_text(f"{good}\n{json.dumps({'text': 3})}\n")
    (root / "truncated.json.gz").write_bytes(gzip.compress(good.encode() * 100)[:-12])
    (root / "not.json.gz").write_bytes(b"plain")
    (root / "bad.parquet").write_bytes(b"PAR1 no")
    (root / "latin1.txt").write_bytes("né".encode("latin-1"))
    (root / "a.docx").write_bytes(b"")


@pytest.mark.parametrize("name, words", [
    ("bad.jsonl", ["bad.jsonl, line 3"]),
    ("list.jsonl", ["list.jsonl, line 2", "'text'"]),
    ("column.jsonl", ["column.jsonl, line 2", "--column"]),
    ("number.jsonl", ["number.jsonl, line 2", "3"]),
    ("truncated.json.gz", ["truncated.json.gz"]),
    ("not.json.gz", ["not.json.gz"]),
    ("bad.parquet", ["bad.parquet"]),
    ("latin1.txt", ["latin1.txt", "utf-8"]),
    ("a.docx", ["a.docx", ".parquet"]),
    ("nothing*.txt", ["nothing*.txt"])])
def test_unreadable_files(tmp_path, name, words):
    """Guards against a traceback, or a message without the place, for what can't be read."""
    write_bad_files(tmp_path)
    with pytest.raises(UserError) as error:
        list(open_files(tmp_path / name).read(0))
    message = str(error.value)
    for word in words:
        assert word in message
    assert "\n" not in message


def test_hub_layout_in_a_local_directory(gpt2, tmp_path):
    """Guards against rows of FineWeb-Edu's layout that are lost, or a wrong row to go on at."""
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq
    documents = [text for text in some_documents(120) if "\ud800" not in text]
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    files = [documents[i::3] for i in range(3)]
    for i, texts in enumerate(files):
        table = pa.table({"id": list(range(len(texts))), "text": texts})
        pq.write_table(table, hub / "data" / f"train-{i:05d}-of-00003.parquet")
    data = tmp_path / "data"
    make_dataset(data, dataset=hub, shard_size=700)
    assert all_tokens(data) == sum(reference_tokens(gpt2, sum(files, [])), [])

    whole = contents(data)
    for path in list_shards(data, "train")[2:]:
        path.unlink()
    make_dataset(data, dataset=hub, shard_size=700)
    assert contents(data) == whole
    with pytest.raises(UserError, match="no column 'body' in .*'id', 'text'"):
        make_dataset(tmp_path / "other", dataset=hub, column="body")
    with pytest.raises(UserError, match="cannot read dataset"):
        make_dataset(tmp_path / "other", dataset=tmp_path / "nowhere")


# -----------------------------------------------------------------------------
# the demo's text: each function of the standard library, once, complete and without English

SOURCE = '''"""A module."""
import os

def first( a,b = 2 ):
    """Says "what" it does."""
    # a comment
    def inner():
        """Inside."""
        return a
    return inner() + \
        b

class Thing:
    """A thing."""

    @property
    def size(self):
        "No more than this."

    class Part:
        async def wait(self):
            return None

if os.name == "nt":
    def first(a, b=2):
        def inner():
            return a
        return inner() + b
else:
    def other(): return "x"
'''

FUNCTIONS = [
    "def first(a, b=2):\n\n    def inner():\n        return a\n    return inner() + b\n",
    "@property\ndef size(self):\n    pass\n",
    "async def wait(self):\n    return None\n",
    "def other():\n    return 'x'\n"]


def test_functions_of_a_file(tmp_path):
    """Guards against a function behind an `if` that is missed, one that is there twice, and a
    comment that is left.
    """
    path = tmp_path / "a.py"
    path.write_text(SOURCE)
    assert list(read_functions([path, path])) == FUNCTIONS


def test_files():
    """Guards against a demo's text without common files, or with files that few have."""
    paths = stdlib_files()
    assert paths == sorted(paths)
    assert 7e6 < sum(map(os.path.getsize, paths)) < 14e6
    names = {os.path.relpath(path, os.path.dirname(os.__file__)) for path in paths}
    assert {"json/decoder.py", "argparse.py"} <= names
    folders = {part for name in names for part in Path(name).parts}
    assert not folders & {"test", "tests", "site-packages", "idlelib"}


@pytest.fixture(scope="module")
def documents():
    return list(open_source("stdlib", None, None, None, "text").read())


def test_each_document_is_one_function_that_compiles(documents):
    """Guards against a document that is cut off, or is not Python."""
    for text in documents[::7]:
        (node,) = ast.parse(text).body
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def test_there_is_enough_to_learn_from(documents):
    """Guards against a rule for files or functions that loses most of the library."""
    assert 3e6 < sum(map(len, documents)) < 6e6
    assert len(documents) == len(set(documents))


def test_reading_goes_on_after_documents_that_were_read(documents):
    """Guards against a killed preparation that goes on at another document."""
    source = open_source("stdlib", None, None, None, "text")
    source.paths = source.paths[:20]
    first_files = list(source.read())
    assert first_files == documents[:len(first_files)]
    assert list(source.read(skip=100)) == first_files[100:]


def test_parts_are_refused():
    """Guards against several machines that each prepare the whole library."""
    source = open_source("stdlib", None, None, None, "text")
    with pytest.raises(UserError, match="--part"):
        list(source.batches(part=Part(1, 2)))
