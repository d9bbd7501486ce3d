"""Documents -> tokens -> shards: tokenizing on all cores, and the writer of a dataset directory."""

import re
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from gptlib.common import UserError
from gptlib.data.shards import save_shard, shard_checksum, write_meta
from gptlib.data.parts import WHOLE
from gptlib.data.tokenizer import EOT, dump_ranks
from gptlib.data.workers import Worker

# -----------------------------------------------------------------------------
# documents -> tokens

CHUNK = 2**20  # characters that a thread tokenizes at a time
MAX_THREADS = 4  # that tokenize without processes of their own
EMPTY, REPAIRED = 1, 2  # what a document is marked with; 0 for an ordinary one


class Chunk(NamedTuple):
    """Some tokens of the corpus, and what is known of the documents in them."""
    tokens: np.ndarray  # uint16
    marks: bytes  # one for each document that begins in these tokens
    num_bytes: int  # of text


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
        # The string keeps its UTF-8 from that call, so this only copies it.
        num_bytes = len(joined.encode()) - len(EOT) * len(texts)
        marks = bytes(EMPTY * (not text) for text in texts)
        return Chunk(tokens.astype(np.uint16), marks, num_bytes)
    except ValueError:
        # Besides the separator, tiktoken refuses lone surrogates and a million spaces in a row,
        # which overflow the stack of its regex. Find the document by trying each alone.
        if len(texts) == 1:
            return encode_difficult_document(enc, texts[0])
    return join_chunks([encode_chunk(enc, [text]) for text in texts])


def encode_difficult_document(enc, text):
    """encode_chunk of one document that tiktoken refuses as it is."""
    repaired = replace_surrogates(text)
    # Tokenize long runs of whitespace by themselves, so that the regex stays within its stack.
    parts = re.split(r"(\s{100000})", repaired)
    tokens = [enc.encode_to_numpy(part, disallowed_special=()) for part in parts]
    tokens = np.concatenate([[enc.eot_token], *tokens])
    marks = bytes([REPAIRED * (repaired != text)])
    return Chunk(tokens.astype(np.uint16), marks, len(repaired.encode()))


def join_chunks(chunks):
    tokens = [chunk.tokens for chunk in chunks]
    marks = b"".join(chunk.marks for chunk in chunks)
    num_bytes = sum(chunk.num_bytes for chunk in chunks)
    return Chunk(np.concatenate([np.empty(0, np.uint16), *tokens]), marks, num_bytes)


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
    """encode_chunk of all documents of a RowGroup, in parts of about CHUNK."""
    parts = group_documents(row_group.documents())
    return join_chunks([encode_chunk(enc, part) for part in parts])


def encode_stream(enc, documents, num_proc):
    """encode_batches of single documents (str)."""
    return encode_batches(enc, group_documents(documents), num_proc)


def encode_batches(enc, batches, num_proc):
    """Yield the tokens of all batches as Chunks, in order.

    batches: lists of documents, or RowGroups. num_proc threads tokenize: tiktoken works outside the
    interpreter lock. The calling thread reads, which takes a twentieth of the time; more than
    MAX_THREADS would wait for it, so then each has a process that reads and tokenizes RowGroups.
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


class Workers:
    """A Worker for each thread that asks for one."""

    def __init__(self, enc):
        self.tokenizer = {"name": enc.name, "ranks": dump_ranks(enc._mergeable_ranks)}
        self.local, self.all = threading.local(), []

    def encode(self, enc, row_group):
        """encode_row_group in the process of this thread."""
        if not hasattr(self.local, "worker"):
            self.local.worker = Worker(self.tokenizer)
            self.all.append(self.local.worker)
        chunk = Chunk(*self.local.worker.encode(row_group))
        row_group.file.done_with_one()
        return chunk

    def kill(self):
        for worker in self.all:
            worker.process.kill()

    def close(self):
        for worker in self.all:
            worker.close()


def whole_documents(chunk, max_tokens, eot, token_sizes):
    """The leading whole documents of a Chunk that together have at most max_tokens tokens."""
    if len(chunk.tokens) <= max_tokens:
        return chunk
    starts = np.flatnonzero(chunk.tokens == eot)
    ends = starts[starts <= max_tokens]  # a document ends where the next one begins
    end = int(ends[-1]) if len(ends) else 0
    return split_chunk(chunk, end, eot, token_sizes)[0]


def split_chunk(chunk, num_tokens, eot, token_sizes):
    """Cut a Chunk after num_tokens tokens. Returns both parts."""
    first, rest = chunk.tokens[:num_tokens], chunk.tokens[num_tokens:]
    num_documents = np.count_nonzero(first == eot)
    num_bytes = measure(token_sizes, first)[1]
    # A copy, because a slice would keep the first part in memory.
    return (Chunk(first, chunk.marks[:num_documents], num_bytes),
            Chunk(rest.copy(), chunk.marks[num_documents:], chunk.num_bytes - num_bytes))


# -----------------------------------------------------------------------------
# sizes of tokens in bytes of text


def byte_lengths(enc):
    """The bytes of text of each token id, as uint16 (vocab_size,); EOT has none."""
    lengths = np.zeros(enc.n_vocab, dtype=np.uint16)
    for token, rank in enc._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


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


# -----------------------------------------------------------------------------
# tokens -> shards

COUNTS = ("tokens", "bytes", "documents", "empty", "repaired")  # of a shard, in meta.json


class ShardWriter:
    """Cuts a stream of tokens into shards and keeps meta.json in step with them.

    A corpus of two shards or more is large: it is written in the order of reading, and shard 0 is
    validation. A smaller one is kept in memory to its end, put in a seeded order, and the last
    --val_fraction of its tokens is validation.

    A thread writes, so that tokenizing goes on meanwhile. It is a context manager, which waits for
    that thread in the end.

    root: the dataset directory. meta: the contents of meta.json, which save_meta writes.
    finished_shards: the records in meta of the shards that an interrupted run has completed.
    part: which part of the corpus this is. A part is written in the order of reading, and only the
    first has a shard for validation.
    """
    MAX_WRITES = 2  # shards that wait in memory while another is collected

    def __init__(self, root, meta, enc, finished_shards, part=WHOLE):
        self.root, self.meta = root, meta
        self.settings = meta["settings"]
        self.shard_size = self.settings["shard_size"]
        self.eot = enc.eot_token
        self.token_sizes = byte_lengths(enc)
        self.head, self.tail = (meta["trained_within"][key] for key in ("head", "tail"))
        # A large corpus continues after its last finished shard. A small one is tokenized again.
        self.shards = finished_shards if meta["order"] == "as read" else []
        self.part = part
        is_large = self.head is not None and self.tail is None
        self.is_large = bool(self.shards) or is_large or part != WHOLE
        self.has_val = bool(self.shards) or part.number > 1
        self.pending, self.num_pending = deque(), 0  # Chunks that are in no shard yet
        self.writer, self.writes = ThreadPoolExecutor(1), deque()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.writer.shutdown()

    def position(self):
        """Where a continued run goes on: (documents to skip, tokens of the next one to skip)."""
        if not self.shards:
            return 0, 0
        documents = sum(shard["documents"] for shard in self.shards)
        return documents - 1, self.shards[-1]["begun"]

    def add(self, chunk):
        """Take the next Chunk of the corpus. Raises UserError where a shard can't be written."""
        while self.writes and self.writes[0].done():
            self.writes.popleft().result()
        self.pending.append(chunk)
        self.num_pending += len(chunk.tokens)
        known_large = self.is_large and self.has_val
        if self.num_pending < self.shard_size * (1 if known_large else 2):
            return
        self.is_large, self.meta["order"] = True, "as read"
        self.write_shards(min_tokens=self.shard_size)

    def end_early(self):
        """Note that the corpus goes on, but nothing more of it is added (--max_tokens).

        The seeded order then is not the one that training_text has chosen text by. Its other
        promise holds, and so a corpus with a tokenizer of its own is written as it was read.
        """
        if self.head is not None:
            self.is_large = True

    def finish(self):
        """Write what is pending; meta.json then says that the dataset is complete."""
        if self.is_large:
            self.meta["order"] = "as read"
            self.write_shards(min_tokens=1)
        else:
            self.meta["order"] = "seeded"
            self.write_small_corpus(join_chunks(self.take_pending(self.num_pending)))
        self.wait_for_writes(0)
        if len(self.shards) < (2 if self.part.number == 1 else 1):
            self.raise_too_few(self.totals()["tokens"])
        self.save_meta(complete=True)

    def take_pending(self, num_tokens):
        """Take so many tokens, or all there are, from what is pending. Returns Chunks."""
        taken, missing = [], num_tokens
        while missing and self.pending:
            chunk = self.pending.popleft()
            if len(chunk.tokens) > missing:
                chunk, rest = split_chunk(chunk, missing, self.eot, self.token_sizes)
                self.pending.appendleft(rest)
            taken.append(chunk)
            missing -= len(chunk.tokens)
        self.num_pending -= num_tokens - missing
        return taken

    def write_small_corpus(self, corpus):
        """Shuffle the documents of a whole corpus; write its end as val and the rest as train."""
        tokens = corpus.tokens
        if len(tokens) < 2:
            self.raise_too_few(len(tokens))
        documents = np.split(tokens, np.flatnonzero(tokens == self.eot)[1:])
        order = np.random.default_rng(self.settings["seed"]).permutation(len(documents))
        tokens = np.concatenate([documents[i] for i in order])
        cut = len(tokens) - round(self.settings["val_fraction"] * len(tokens))
        if self.tail is not None:
            # Move the cut past the token in which the text ends that the tokenizer has seen.
            cut = max(cut, measure(self.token_sizes, tokens, self.tail - 1)[0] + 1)
        cut = min(max(cut, 1), len(tokens) - 1)  # at least one token in each split
        num_train = np.count_nonzero(tokens[:cut] == self.eot)  # documents that begin in train
        val_first = [*order[num_train:], *order[:num_train]]
        marks = bytes(corpus.marks[i] for i in val_first)
        tokens = np.concatenate([tokens[cut:], tokens[:cut]])
        self.pending.append(Chunk(tokens, marks, corpus.num_bytes))
        self.num_pending = len(tokens)
        self.write_shards(min_tokens=1, val_size=len(tokens) - cut)

    def raise_too_few(self, num_tokens):
        limit = self.settings.get("max_tokens")
        within = f" in whole documents within --max_tokens {limit}" if limit else " in all"
        expected = "two splits"
        if self.part != WHOLE:
            within = f" in part {self.part.number}"
            expected = f"{self.part.count} parts; choose fewer"
        raise UserError(f"{self.settings['source']}: {num_tokens} tokens{within}, too few for "
                        f"{expected}")

    def write_shards(self, min_tokens, val_size=None):
        """Cut shards from what is pending while that has at least min_tokens; a thread writes them.

        val_size: tokens of shard 0, where that differs from the other shards.
        """
        while self.num_pending >= min_tokens:
            size = self.shard_size
            if not self.has_val:
                size = self.size_of_val(val_size or size)
                self.has_val = True
            chunks = self.take_pending(size)
            self.wait_for_writes(self.MAX_WRITES - 1)
            self.writes.append(self.writer.submit(self.write_shard, chunks))

    def size_of_val(self, size):
        """How many of `size` tokens shard 0 has: it ends before what the tokenizer may have seen.

        The tokenizer may have seen what follows the first `head` bytes of a large corpus.
        """
        if not self.is_large or self.head is None:
            return size
        tokens = join_chunks(self.pending).tokens
        within_head, _ = measure(self.token_sizes, tokens, self.head)
        return max(1, min(size, within_head))

    def wait_for_writes(self, max_writes):
        """Wait until at most max_writes shards are being written. Raises what stopped a write."""
        while len(self.writes) > max_writes:
            self.writes.popleft().result()

    def write_shard(self, chunks):
        """Add a shard to meta.json, then write the shard."""
        chunk, index = join_chunks(chunks), len(self.shards)
        chunks.clear()  # the joined copy is enough
        tokens = chunk.tokens
        if index == self.part.max_shards():
            raise UserError(f"part {self.part.number} has more than {index} shards: choose a "
                            "larger --shard_size, or fewer parts")
        index += self.part.first_index()
        split = "train" if index else "val"
        path = self.root / f"{self.settings['prefix']}_{split}_{index:06d}.npy"
        starts = np.flatnonzero(tokens == self.eot)
        if len(starts):
            last_doc_tokens = len(tokens) - int(starts[-1])
        else:  # the middle of a long document
            last_doc_tokens = len(tokens) + (self.shards[-1]["begun"] if self.shards else 0)
        self.shards.append({
            "name": path.name,
            "tokens": len(tokens),
            "bytes": chunk.num_bytes,
            "documents": len(starts),
            "empty": chunk.marks.count(EMPTY),
            "repaired": chunk.marks.count(REPAIRED),
            # Tokens of the last document so far: a continued run skips that many of it.
            "begun": last_doc_tokens,
            "crc32": shard_checksum(tokens),
        })
        self.save_meta()  # before the shard, so that every shard on disk has its record
        if not path.exists():
            save_shard(path, tokens)

    def save_meta(self, complete=False):
        train, val = self.totals("train"), self.totals("val")
        for unit in ("tokens", "bytes"):
            self.meta[unit] = {"train": train[unit], "val": val[unit]}
        self.meta |= {"shards": self.shards, "complete": complete}
        write_meta(self.root, self.meta)

    def totals(self, split=None):
        """The counts of all shards added up, or of the shards of a split."""
        shards = self.shards
        if split:
            shards = [shard for shard in shards if f"_{split}_" in shard["name"]]
        return {key: sum(shard[key] for shard in shards) for key in COUNTS}
