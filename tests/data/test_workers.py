"""
python -m pytest tests/data/test_workers.py

Processes that tokenize row groups, against threads that do.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from corpus import small_bpe, some_documents

from gptlib.data import parquet
from gptlib.data import preparation
from gptlib.common import UserError
from gptlib.data.preparation import encode_batches
from gptlib.data.sources import FileSource


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    import pyarrow as pa
    import pyarrow.parquet as pq
    root = tmp_path_factory.mktemp("text")
    documents = [text for text in some_documents(200) if "\ud800" not in text]
    (root / "a.txt").write_text("a document that no process reads")
    for name in "bc":
        table = pa.table({"text": documents, "n": range(len(documents))})
        pq.write_table(table, root / f"{name}.parquet", row_group_size=20)
    return FileSource("", [str(path) for path in sorted(root.iterdir())], "text")


def encode(source, num_proc=2):
    return list(encode_batches(small_bpe(), source.batches(5), num_proc))


def test_processes_give_what_threads_give(source, monkeypatch):
    """A process tokenizes otherwise, or its tokens come in another order."""
    expected = encode(source)
    monkeypatch.setattr(preparation, "MAX_THREADS", 1)
    found = encode(source)
    assert len(found) == len(expected) > 10
    for chunk, other in zip(found, expected, strict=True):
        assert chunk.tokens.tolist() == other.tokens.tolist()
        assert (chunk.marks, chunk.num_bytes) == (other.marks, other.num_bytes)


def test_errors_of_a_process_are_told(source, monkeypatch, tmp_path):
    """A damaged file, or a process that the system has killed, hangs or ends in a traceback."""
    monkeypatch.setattr(preparation, "MAX_THREADS", 0)
    data = bytearray(open(source.paths[1], "rb").read())
    data[4:2000] = bytes(1996)  # the footer is as it was
    (tmp_path / "bad.parquet").write_bytes(data)
    with pytest.raises(UserError, match="bad.parquet: cannot read it"):
        encode(FileSource("", [str(tmp_path / "bad.parquet")], "text"), 1)

    started = []
    start = preparation.Worker.__init__

    def remember(self, tokenizer):
        start(self, tokenizer)
        started.append(self)

    monkeypatch.setattr(preparation.Worker, "__init__", remember)
    stream = encode_batches(small_bpe(), endless(source), 1)
    while not started:  # the first batch is read here: no row group, but a text file
        next(stream)
    os.kill(started[0].process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="exit code -9.*--num_proc"):
        for _ in range(100):
            next(stream)


def test_large_row_group_is_not_given_to_a_process(source, monkeypatch):
    """A process sends back the tokens of a file that is one huge row group, all at once."""
    expected = [token for chunk in encode(source) for token in chunk.tokens.tolist()]
    monkeypatch.setattr(preparation, "MAX_THREADS", 0)
    monkeypatch.setattr(parquet, "LARGE_ROW_GROUP", 100)
    monkeypatch.setattr(preparation.Worker, "__init__", None)  # starting one fails
    found = [token for chunk in encode(source) for token in chunk.tokens.tolist()]
    assert found == expected


def endless(source):
    while True:
        yield from source.batches()


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from corpus import small_bpe
from gptlib.data import preparation
from gptlib.data.sources import FileSource
preparation.MAX_THREADS = 0
source = FileSource("", {paths!r}, "text")
def endless():
    while True:
        yield from source.batches()
stream = preparation.encode_batches(small_bpe(), endless(), 2)
for count, chunk in enumerate(stream):
    if count == 30:
        print("running", flush=True)
"""


def children_of(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.skipif(sys.platform == "win32", reason="needs pgrep and SIGKILL")
def test_no_process_is_left_behind(source):
    """After kill -9 the processes go on and hold the memory of the next run."""
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), paths=source.paths)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "running\n"
    workers = children_of(child.pid)
    assert len(workers) == 2
    child.kill()
    child.wait()
    child.stdout.close()
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.1)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
