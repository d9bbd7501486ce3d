"""
python -m pytest tests/data/test_tokenizing.py

Documents to tokens, chunk by chunk, against tiktoken's plain method; processes against threads.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from corpus import ODD, openai_gpt2, small_bpe, some_documents

from gptlib.common import UserError
from gptlib.data import parquet, tokenizing
from gptlib.data.sources import FileSource
from gptlib.data.tokenizer import EOT, byte_lengths, load_tokenizer
from gptlib.data.tokenizing import encode_batches, encode_chunk, encode_stream


@pytest.fixture(scope="module")
def gpt2():
    return openai_gpt2()


@pytest.fixture(scope="module")
def ours(gpt2):
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def bpe():
    return small_bpe()


@example(text=" ".join(ODD).replace("\ud800", ""))
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(text=st.text(st.sampled_from(" \n\t\r\u00a0\u3000\x1cab'stdl19.,<|>中の")
                    | st.characters(), max_size=60))
def test_gpt2_pieces_are_those_of_openai(gpt2, ours, text):
    """Guards against a token changed by our split pattern, or by one call for many documents."""
    tokens, marks, num_bytes = encode_chunk(ours, [text, "second", text])
    one = [50256, *gpt2.encode_ordinary(text)]
    assert tokens.tolist() == one + [50256, *gpt2.encode_ordinary("second")] + one
    assert ours.eot_token == 50256
    assert ours.n_vocab == 50257
    assert len(marks) == 3
    text_tokens = [token for token in tokens.tolist() if token != 50256]
    assert num_bytes == len(gpt2.decode_bytes(text_tokens))


def test_a_million_spaces(bpe):
    """Guards against text that is lost because it overflows the stack of tiktoken's regex."""
    for text in (" " * 1_100_000 + "x", "x" + "\n" * 1_100_000):
        tokens, _, _ = encode_chunk(bpe, ["before", text, "after"])
        assert bpe.decode(tokens.tolist()) == EOT + "before" + EOT + text + EOT + "after"


def test_memory_is_bounded_by_chunks_in_flight(bpe):
    """Guards against a reader that runs far ahead, so that a long corpus fills the memory."""
    read = 0

    def documents():
        nonlocal read
        for _ in range(200):
            read += 1
            yield "x y " * 2**18  # a chunk each

    stream = encode_stream(bpe, documents(), 2)
    for consumed in range(1, 6):
        next(stream)
        time.sleep(0.01)
        assert read <= consumed + 2 + 17
    stream.close()


def test_byte_lengths(gpt2, bpe):
    """Guards against bits per byte from wrong sizes of tokens."""
    for enc in (gpt2, bpe):
        sizes = byte_lengths(enc)
        expected = [len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)]
        expected[enc.eot_token] = 0
        assert sizes.tolist() == expected


# -----------------------------------------------------------------------------
# processes that read and tokenize row groups


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


def test_a_process_imports_nothing_from_the_working_directory(source, tmp_path, monkeypatch):
    """Guards against running a stranger's code: a tiktoken.py that lies beside data.parquet."""
    for name in ("tiktoken", "numpy", "pyarrow", "pickle", "gptlib"):
        (tmp_path / f"{name}.py").write_text("open('it_ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizing, "MAX_THREADS", 0)
    assert len(encode(source)) > 10
    assert not (tmp_path / "it_ran").exists()


def test_processes_give_what_threads_give(source, monkeypatch):
    """Guards against a process that makes other tokens, or hands them back in another order."""
    expected = encode(source)
    monkeypatch.setattr(tokenizing, "MAX_THREADS", 1)
    found = encode(source)
    assert len(found) == len(expected) > 10
    for chunk, other in zip(found, expected, strict=True):
        assert chunk.tokens.tolist() == other.tokens.tolist()
        assert (chunk.marks, chunk.num_bytes) == (other.marks, other.num_bytes)


def test_errors_of_a_process_are_told(source, monkeypatch, tmp_path):
    """Guards against a hang or a traceback if a file is damaged or the system kills a process."""
    monkeypatch.setattr(tokenizing, "MAX_THREADS", 0)
    data = bytearray(Path(source.paths[1]).read_bytes())
    data[4:2000] = bytes(1996)  # the footer is as it was
    (tmp_path / "bad.parquet").write_bytes(data)
    with pytest.raises(UserError, match="bad.parquet: cannot read it"):
        encode(FileSource("", [str(tmp_path / "bad.parquet")], "text"), 1)

    started = []
    start = tokenizing.Worker.__init__

    def remember(self, tokenizer):
        start(self, tokenizer)
        started.append(self)

    monkeypatch.setattr(tokenizing.Worker, "__init__", remember)
    stream = encode_batches(small_bpe(), endless(source), 1)
    while not started:  # the first batch is read here: no row group, but a text file
        next(stream)
    os.kill(started[0].process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="exit code -9.*--num_proc"):
        for _ in range(100):
            next(stream)


def test_large_row_group_is_not_given_to_a_process(source, monkeypatch):
    """Guards against a process that sends back all tokens of one huge row group at once."""
    expected = [token for chunk in encode(source) for token in chunk.tokens.tolist()]
    monkeypatch.setattr(tokenizing, "MAX_THREADS", 0)
    monkeypatch.setattr(parquet, "LARGE_ROW_GROUP", 100)
    monkeypatch.setattr(tokenizing.Worker, "__init__", None)  # starting one fails
    found = [token for chunk in encode(source) for token in chunk.tokens.tolist()]
    assert found == expected


def endless(source):
    while True:
        yield from source.batches()


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from corpus import small_bpe
from gptlib.data import tokenizing
from gptlib.data.sources import FileSource
tokenizing.MAX_THREADS = 0
source = FileSource("", {paths!r}, "text")
def endless():
    while True:
        yield from source.batches()
stream = tokenizing.encode_batches(small_bpe(), endless(), 2)
for count, chunk in enumerate(stream):
    if count == 30:
        print("running", flush=True)
"""


def children_of(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.skipif(sys.platform == "win32", reason="needs pgrep and SIGKILL")
def test_no_process_is_left_behind(source):
    """Guards against processes that go on after kill -9 and hold the memory of the next run."""
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
