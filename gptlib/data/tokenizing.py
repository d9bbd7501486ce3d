"""Documents -> tokens, on all cores, and the text that a tokenizer is trained on.

Threads tokenize: tiktoken works outside the interpreter lock. Reading makes Python strings, which
holds the lock for about a tenth of the time, enough to hold back more than a few threads. So with
more than MAX_THREADS threads each has a process of its own, which reads and tokenizes row groups
and sends back arrays of tokens; text never passes between processes.
"""

import contextlib
import os
import pickle
import re
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptlib.common import UserError
from gptlib.data.parquet import ParquetFile, RowGroup
from gptlib.data.tokenizer import EOT, dump_ranks, load_tokenizer

# -----------------------------------------------------------------------------
# chunks of tokens

CHUNK = 2**20  # characters that a thread tokenizes at a time
EMPTY, REPAIRED, HOLDS_EOT = 1, 2, 4  # how a document is marked, added up; 0: an ordinary one


class Chunk(NamedTuple):
    """Some tokens of the corpus, and what is known about the documents in them."""
    tokens: np.ndarray  # uint16
    marks: bytes  # one for each document that begins in these tokens
    num_bytes: int  # of text


def count_marked(marks, mark):
    """How many documents have this mark."""
    return int(np.count_nonzero(np.frombuffer(marks, np.uint8) & mark))


def join_chunks(chunks):
    tokens = [chunk.tokens for chunk in chunks]
    marks = b"".join(chunk.marks for chunk in chunks)
    num_bytes = sum(chunk.num_bytes for chunk in chunks)
    return Chunk(np.concatenate([np.empty(0, np.uint16), *tokens]), marks, num_bytes)


def split_chunk(chunk, num_tokens, eot, token_sizes):
    """Cut a Chunk after num_tokens tokens. Returns both parts."""
    first, rest = chunk.tokens[:num_tokens], chunk.tokens[num_tokens:]
    num_documents = np.count_nonzero(first == eot)
    num_bytes = measure(token_sizes, first)[1]
    # A copy, because a slice would keep the first part in memory.
    return (Chunk(first, chunk.marks[:num_documents], num_bytes),
            Chunk(rest.copy(), chunk.marks[num_documents:], chunk.num_bytes - num_bytes))


def whole_documents(chunk, max_tokens, eot, token_sizes):
    """The leading whole documents of a Chunk that together have at most max_tokens tokens."""
    if len(chunk.tokens) <= max_tokens:
        return chunk
    starts = np.flatnonzero(chunk.tokens == eot)
    ends = starts[starts <= max_tokens]  # a document ends where the next one begins
    end = int(ends[-1]) if len(ends) else 0
    return split_chunk(chunk, end, eot, token_sizes)[0]


def measure(token_sizes, tokens, limit=2**63 - 1):
    """Count the leading tokens that fit into `limit` bytes of text.

    token_sizes: as byte_lengths returns them. Returns (number of tokens, their bytes of text).
    """
    fit = size = 0
    step = 2**20  # in pieces, because numpy turns every index into an int64
    for i in range(0, len(tokens), step):
        ends = size + np.cumsum(token_sizes[tokens[i:i + step]], dtype=np.int64)
        n = int(np.searchsorted(ends, limit, side="right"))
        fit += n
        if n:
            size = int(ends[n - 1])
        if n < len(ends):
            break
    return fit, size


# -----------------------------------------------------------------------------
# documents -> a chunk


def replace_surrogates(text):
    """Replace lone surrogates, which UTF-8 cannot hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode_chunk(enc, texts):
    """Tokenize a list of documents. Returns a Chunk, with EOT before each document."""
    try:
        if any(EOT in text for text in texts):
            raise ValueError("the separator is in the text")
        # One call for all documents: it makes no Python object per token, and it releases the
        # interpreter lock while it works.
        joined = EOT.join(["", *texts])
        tokens = enc.encode_to_numpy(joined, allowed_special={EOT})
        # The string keeps its UTF-8 from that call, so encoding it again only copies it.
        num_bytes = len(joined) if joined.isascii() else len(joined.encode())
        num_bytes -= len(EOT) * len(texts)
        marks = bytes(EMPTY * (not text) for text in texts)
        return Chunk(tokens.astype(np.uint16), marks, num_bytes)
    except ValueError:
        # tiktoken also refuses lone surrogates, and a million spaces in a row, which overflow the
        # stack of its regex. Find the document by trying each alone.
        if len(texts) == 1:
            return encode_difficult_document(enc, texts[0])
    return join_chunks([encode_chunk(enc, [text]) for text in texts])


def encode_difficult_document(enc, text):
    """Like encode_chunk, for one document that tiktoken refuses as it is."""
    repaired = replace_surrogates(text)
    # Tokenize long runs of whitespace by themselves, so that the regex stays within its stack.
    parts = re.split(r"(\s{100000})", repaired)
    tokens = [enc.encode_to_numpy(part, disallowed_special=()) for part in parts]
    tokens = np.concatenate([[enc.eot_token], *tokens])
    marks = bytes([REPAIRED * (repaired != text) + HOLDS_EOT * (EOT in text)])
    return Chunk(tokens.astype(np.uint16), marks, len(repaired.encode()))


def group_documents(documents):
    """Yield lists of documents of about CHUNK characters each."""
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text) + 1
        if size >= CHUNK:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def encode_row_group(enc, row_group):
    """Tokenize all documents of a RowGroup, about CHUNK characters at a time. Returns a Chunk."""
    chunks, num_bytes = [], 0
    for part in group_documents(row_group.documents()):
        chunks.append(encode_chunk(enc, part))
        num_bytes += chunks[-1].num_bytes
        if num_bytes > MAX_ROW_GROUP:
            raise UserError(f"{row_group.file.path}: row group {row_group.index} repeats its texts "
                            f"to more than {MAX_ROW_GROUP} bytes. Leave it out of --files, or use "
                            f"--num_proc {MAX_THREADS}")
    return join_chunks(chunks)


# -----------------------------------------------------------------------------
# a corpus -> a stream of chunks

MAX_THREADS = 4  # the most threads that tokenize without processes of their own
MAX_ROW_GROUP = 2**32  # bytes of text whose tokens a process may send back at once


def encode_stream(enc, documents, num_proc):
    """Like encode_batches, for single documents (str)."""
    return encode_batches(enc, group_documents(documents), num_proc)


def encode_batches(enc, batches, num_proc):
    """Yield the tokens of all batches as Chunks, in order; num_proc threads tokenize.

    batches: lists of documents, or RowGroups. The calling thread reads, which takes a twentieth of
    the time. More than MAX_THREADS threads would wait for it: then each has a process that reads
    and tokenizes RowGroups.
    """
    # Enough work to keep the threads busy, little enough to bound memory.
    max_queued = num_proc + 16
    pool, queue = ThreadPoolExecutor(num_proc), deque()
    workers = Workers(enc) if num_proc > MAX_THREADS else None
    try:
        for encode, work in divide_work(batches, workers):
            queue.append(pool.submit(encode, enc, work))
            if len(queue) > max_queued:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if workers:
            workers.kill()  # so that no thread waits for a row group that nobody needs
        pool.shutdown()
        if workers:
            workers.close()


def divide_work(batches, workers=None):
    """Yield (function, what it encodes) for each Chunk that encode_batches makes."""
    for batch in batches:
        if isinstance(batch, list):
            yield encode_chunk, batch
        elif workers and not batch.is_large():
            yield workers.encode, batch
        else:
            for documents in group_documents(batch.documents()):
                yield encode_chunk, documents


# -----------------------------------------------------------------------------
# processes that read and tokenize row groups

# What a new process runs: this module. It must not import from the working directory, where a file
# of a stranger may be called tiktoken.py, so the entry that stands for it leaves the search path.
START = ("import sys; sys.path[:] = [{root!r}, *filter(None, sys.path)]; "
         "from {module} import work; work()")
ROOT = str(Path(__file__).resolve().parents[2])


class Workers:
    """A Worker for each thread that asks for one."""

    def __init__(self, enc):
        self.tokenizer = {"name": enc.name, "ranks": dump_ranks(enc._mergeable_ranks)}
        self.local, self.all = threading.local(), []

    def encode(self, enc, row_group):
        """Like encode_row_group, in the process of this thread."""
        if not hasattr(self.local, "worker"):
            self.local.worker = Worker(self.tokenizer)
            self.all.append(self.local.worker)
        chunk = self.local.worker.encode(row_group)
        row_group.file.done_with_one()
        return chunk

    def kill(self):
        for worker in self.all:
            worker.process.kill()

    def close(self):
        for worker in self.all:
            worker.close()


class Worker:
    """A child process that tokenizes one row group at a time.

    It is a plain process on pipes, so it starts the same way on every platform and whatever script
    is running, and it ends when its standard input does: when this process ends or is killed.
    tokenizer: {"name", "ranks"}, as load_tokenizer takes it.
    """

    def __init__(self, tokenizer):
        command = [sys.executable, "-c", START.format(root=ROOT, module=__name__)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.send(tokenizer)

    def encode(self, row_group):
        """Returns a Chunk. Raises UserError if the row group can't be read."""
        file = row_group.file
        self.send((file.path, file.column, row_group.index, row_group.first, row_group.last))
        num_tokens, marks, num_bytes, error = self.receive()
        if error:
            raise UserError(error)
        tokens = np.empty(num_tokens, np.uint16)
        missing = memoryview(tokens).cast("B")
        while missing:
            count = self.process.stdout.readinto(missing)
            if not count:
                self.raise_died()
            missing = missing[count:]
        return Chunk(tokens, marks, num_bytes)

    def send(self, message):
        try:
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()
        except BrokenPipeError:
            self.raise_died()

    def receive(self):
        try:
            return pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):
            self.raise_died()

    def raise_died(self):
        code = self.process.wait()
        raise UserError(f"a tokenizing process ended with exit code {code}, perhaps for lack of "
                        "memory: run the same command again with a smaller --num_proc")

    def close(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def work():
    """What a Worker's process does: answer requests on its standard input until they end."""
    # Whatever else is printed in this process must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        answer_requests(sys.stdin.buffer, answers)
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)  # the process that asked is gone, or is ending


def answer_requests(requests, answers):
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


# -----------------------------------------------------------------------------
# the text that a tokenizer is trained on


def bytes_within(sizes, limit):
    """How many bytes of each document lie within the first `limit` bytes of all documents."""
    begins = np.cumsum(sizes) - sizes
    return np.clip(limit - begins, 0, sizes)


def cut_documents(documents, begins, ends):
    """Yield bytes begins[i] to ends[i] of each document i, as strings of at most 1 MiB.

    Short strings, because the trainer takes many bytes of memory for each one that it reads.
    """
    for text, begin, end in zip(documents, begins, ends, strict=False):
        if begin >= end:
            continue
        data = replace_surrogates(text).encode()
        for i in range(begin, end, 2**20):
            yield data[i:min(i + 2**20, end)].decode("utf-8", "ignore")


def training_text(read, shard_size, val_fraction, seed, max_bytes=10**8):
    """Choose up to max_bytes of text of the train split to train a tokenizer on.

    The train split is defined by counts of tokens, which do not exist before the tokenizer does.
    So text is taken only from where it is in the train split for any tokenizer. If the corpus may
    fill two shards, its first half may be validation; if it may not, the end of its seeded order
    may be. The split that is made later keeps its side of the agreement: validation lies within
    the first `head` bytes as read, or beyond the first `tail` bytes of the seeded order.

    Returns (strings, head, tail): an iterator of str, and None for a case that is ruled out.
    """
    large_for_sure = 12 * shard_size  # bytes: two shards, at six bytes a token
    sizes, total = [], 0
    for text in read(0):
        size = len(text) if text.isascii() else len(replace_surrogates(text).encode())
        sizes.append(size)
        total += size
        if total > large_for_sure:
            break
    sizes = np.array(sizes, dtype=np.int64)
    begins, ends = np.zeros_like(sizes), sizes.copy()
    head = tail = None
    # Every token but EOT has at least one byte, so fewer bytes than this cannot fill two shards.
    if total + len(sizes) >= 2 * shard_size:
        head = total // 2
        begins = bytes_within(sizes, head)
    if total <= large_for_sure:
        # A margin of 5 %, so that the cut at --val_fraction of the tokens seldom has to move.
        tail = int(0.95 * (1 - val_fraction) * total)
        order = np.random.default_rng(seed).permutation(len(sizes))
        ends[order] = bytes_within(sizes[order], tail)
    wanted = np.maximum(ends - begins, 0)
    ends = begins + bytes_within(wanted, max_bytes)
    return cut_documents(read(0), begins, ends), head, tail
