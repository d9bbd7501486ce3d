"""Tokens -> shards: the writer of a dataset directory."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gptlib.common import UserError
from gptlib.data.parts import WHOLE
from gptlib.data.shards import save_shard, shard_checksum, write_meta
from gptlib.data.tokenizer import byte_lengths
from gptlib.data.tokenizing import (EMPTY, REPAIRED, Chunk, count_marked, join_chunks, measure,
                                    split_chunk)

COUNTS = ("tokens", "bytes", "documents", "empty", "repaired")  # of a shard, in meta.json


class ShardWriter:
    """Cuts a stream of tokens into shards and keeps meta.json in step with them.

    A corpus of two shards or more is large: it is written in the order of reading, and shard 0 is
    validation. A smaller one is kept in memory to its end and put in a seeded order, and the last
    --val_fraction of its tokens is validation.

    A thread writes, so that tokenizing goes on meanwhile. The writer is a context manager, which
    waits for that thread in the end.

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
        """Take the next Chunk of the corpus. Raises UserError if a shard can't be written."""
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

        training_text chose text by the seeded order of the whole corpus, which now differs. But it
        also left out what may be validation in the order of reading, so a corpus with a tokenizer
        of its own is written in that order.
        """
        if self.head is not None:
            self.is_large = True

    def finish(self):
        """Write what is pending, and note in meta.json that the dataset is complete."""
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
        """Take up to num_tokens tokens from what is pending. Returns Chunks."""
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
            # Move the cut past the last token of the text that trained the tokenizer.
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

        val_size: tokens of shard 0, if it has another size than the other shards.
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
        """How many of `size` tokens shard 0 gets.

        Of a large corpus it gets at most the first `head` bytes: the tokenizer was trained on text
        after them.
        """
        if not self.is_large or self.head is None:
            return size
        tokens = join_chunks(self.pending).tokens
        within_head, _ = measure(self.token_sizes, tokens, self.head)
        return max(1, min(size, within_head))

    def wait_for_writes(self, max_writes):
        """Wait until at most max_writes shards are being written. Raises what failed in one."""
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
            "empty": count_marked(chunk.marks, EMPTY),
            "repaired": count_marked(chunk.marks, REPAIRED),
            # Tokens of the last document up to here: a continued run skips that many of it.
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
