"""
python -m pytest tests/data/test_sources.py

Documents out of every kind of file, and the line that says which file or row cannot be read.
"""

import ast
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from corpus import (all_tokens, assert_fails, contents, fineweb_here, make_dataset, openai_gpt2,
                    reference_tokens, some_documents)

from gptlib.common import UserError
from gptlib.data import parquet, sources
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


def read_here(folder, name, **options):
    return list(open_source("files", str(folder / name), None, None, "text", **options).read())


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.json.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    """Guards against U+FEFF as the first character that a model learns to write."""
    text = "text" if name.endswith(("txt", "md")) else '{"text": "text"}'
    data = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_here(tmp_path, name) == ["text"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused(tmp_path, encoding):
    """Guards against a text with a NUL after each letter, which is valid UTF-8."""
    (tmp_path / "a.txt").write_bytes("text".encode(encoding))
    with pytest.raises(UserError, match="a.txt: .*UTF-16.*save it as UTF-8"):
        read_here(tmp_path, "a.txt")


@pytest.mark.parametrize("text, expected", [
    ("one\n<|endoftext|>\ntwo\n", ["one\n", "two\n"]),
    ("<|endoftext|>\none\n<|endoftext|>\n\n<|endoftext|>\n", ["one\n", "\n"]),
    ("one\r\n<|endoftext|>\r\ntwo", ["one\r\n", "two"]),
    ("one\n<|endoftext|>\n<|endoftext|>\ntwo", ["one\n", "", "two"]),
    ("a <|endoftext|> inside\n<|endoftext|> and more", ["a <|endoftext|> inside\n"
                                                       "<|endoftext|> and more"]),
    ("\ufeff<|endoftext|>\none", ["one"]), ("\ufeffone\n<|endoftext|>\ntwo", ["one\n", "two"]),
    ("", []),
])
def test_split_on(tmp_path, text, expected):
    """Guards against documents that are lost or run together where a file is cut."""
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_here(tmp_path, "a.txt", split_on="<|endoftext|>") == expected


def test_text_that_holds_the_separator_is_told(tmp_path):
    """Guards against a file of many documents that silently becomes one."""
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n" * 50)
    flags = ["--files", tmp_path / "a.txt", "--tokenizer", "bpe", "--vocab_size", 300]
    whole = fineweb_here(*flags, "--data_root", tmp_path / "whole")
    assert "1 documents hold the text <|endoftext|>" in whole.stderr
    cut = fineweb_here(*flags, "--split_on", "<|endoftext|>", "--data_root", tmp_path / "cut")
    assert "hold the text" not in cut.stderr
    assert "51 documents" in cut.stdout
    again = fineweb_here(*flags, "--data_root", tmp_path / "cut")
    assert_fails(again, "source was")


def test_a_path_that_exists_is_no_pattern(tmp_path):
    """Guards against files that are not found because their names hold glob's characters."""
    folder = tmp_path / "notes [2024]"
    folder.mkdir()
    for name in ("a[1].txt", "a1.txt"):
        (folder / name).write_text(name)
    assert read_here(folder, "a[1].txt") == ["a[1].txt"]
    assert read_here(folder, "*.txt") == ["a1.txt", "a[1].txt"]


def test_binary_columns_of_parquet(tmp_path):
    """Guards against refusing text only because its column is of type binary."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    texts = ["one", "四", None]
    column = pa.array([text and text.encode() for text in texts], pa.binary())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read_here(tmp_path, "a.parquet") == ["one", "四", ""]
    pq.write_table(pa.table({"text": pa.array([b"\xff"], pa.binary())}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet: .*utf-8"):
        read_here(tmp_path, "b.parquet")


# -----------------------------------------------------------------------------
# small files that stand for much text


@pytest.fixture
def small_limit(monkeypatch):
    for module in (sources, parquet):
        monkeypatch.setattr(module, "MAX_DOCUMENT", 100_000)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.json.gz"])
def test_a_document_beyond_the_limit(tmp_path, small_limit, name):
    """Guards against one endless line that fills the memory: 306 kB of gzip stand for 749 MB."""
    text = '{"text": "' + "x" * 200_000 + '"}'
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(UserError, match=f"{name}.*more than 100000 bytes"):
        read_here(tmp_path, name)
    if name == "a.txt":
        with pytest.raises(UserError, match="a.txt.*more than 100000 bytes"):
            read_here(tmp_path, name, split_on="<|endoftext|>")


def test_a_document_within_the_limit(tmp_path, small_limit):
    """Guards against a limit on a whole file, which holds for a document."""
    line = json.dumps({"text": "x" * 90_000}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 3)
    assert [len(text) for text in read_here(tmp_path, "a.jsonl")] == [90_000] * 3


def write_dictionary(path, length, rows):
    """A small parquet file in which each row refers to the same long text."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    column = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["a" * length])
    pq.write_table(pa.table({"text": column}), path, compression="zstd", store_schema=False,
                   dictionary_pagesize_limit=2**31 - 1, write_statistics=False)


def test_a_parquet_file_that_repeats_a_long_text(tmp_path, monkeypatch):
    """Guards against 1,024 rows of a long text in memory at once, from a file of kilobytes."""
    import pyarrow as pa
    monkeypatch.setattr(parquet, "MOST_REPEATED", 2**26)
    path = tmp_path / "a.parquet"
    write_dictionary(path, 10_000_000, 5000)
    assert path.stat().st_size < 100_000
    group, = ParquetFile(str(path), "text").batches()
    before, largest = pa.total_allocated_bytes(), 0
    for count, document in enumerate(group.documents()):
        assert len(document) == 10_000_000
        largest = max(largest, pa.total_allocated_bytes() - before)
        if count == 3:
            break
    assert largest < 3 * parquet.MOST_REPEATED


def test_a_parquet_file_with_a_text_beyond_the_limit(tmp_path, small_limit):
    """Guards against a text of gigabytes in a file of kilobytes."""
    write_dictionary(tmp_path / "a.parquet", 200_000, 10)
    with pytest.raises(UserError, match="a.parquet: row group 0 has documents of 200004 bytes"):
        read_here(tmp_path, "a.parquet")


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
