"""
python -m pytest tests/data/test_sources.py

Documents out of every kind of file, and the line that says which file or row cannot be read.
"""

import gzip
import json
import os

import pytest

from gptlib.common import UserError
from gptlib.data.parquet import ParquetFile
from gptlib.data.sources import open_source, read_file


def open_files(pattern):
    return open_source("files", str(pattern), None, None, "text")


def test_kinds_of_files(tmp_path):
    """A kind of file gives other documents than the rest; null is an empty document."""
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
    """The order of documents depends on the file system, or skipping miscounts them."""
    (tmp_path / "e").mkdir()
    for name, text in (("b.md", "one"), ("a.txt", "zwei <|endoftext|>"), ("e/c.txt", "")):
        (tmp_path / name).write_text(text)
    read = open_files(tmp_path / "**").read
    assert list(read(0)) == ["zwei <|endoftext|>", "one", ""]
    assert list(read(2)) == [""]


def test_one_huge_row_group(tmp_path):
    """A file that is a single row group is in memory all at once, or is cut at the wrong rows."""
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
    """What cannot be read ends in a traceback, or in a message that does not say where it is."""
    write_bad_files(tmp_path)
    with pytest.raises(UserError) as error:
        list(open_files(tmp_path / name).read(0))
    message = str(error.value)
    for word in words:
        assert word in message
    assert "\n" not in message
