"""Which tokens a step reads: the splits of a dataset as streams of windows, and the thread that
prefetches micro-batches.

B: rows of a micro-batch, T: tokens of a window (block_size), N: tokens of a split.
"""

import functools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from gptlib.common import UserError
from gptlib.data.shards import (checksums_of, is_fineweb_edu, list_shards, open_shard, read_meta,
                                tokens_per_byte, verify_shard)
from gptlib.data.tokenizer import byte_lengths, find_tokenizer, load_tokenizer
from gptlib.distributed import World

# -----------------------------------------------------------------------------
# a dataset, opened

# The largest dev split, as many tokens as the recipe's val_tokens; usually it is a tenth of a
# small training text.
MAX_DEV_TOKENS = 10485760


@dataclass
class Dataset:
    """What a run reads: its tokenizer, the tokens to train on and the tokens to evaluate on."""
    tokenizer: tiktoken.Encoding
    train: "TokenLoader"
    val: "TokenLoader"
    val_tokens_per_byte: float | None  # None if the bytes of text are not known
    description: str  # where it is, its source, size and tokenizer, in one line
    is_fineweb_edu: bool  # whether val is FineWeb-Edu's val split, with which others compare


def open_dataset(data_root, block_size, seed=0, shuffle=False, dev=False):
    """Open a dataset directory; meta.json is read once. Returns a Dataset.

    seed, shuffle: the order of the training windows, see TokenLoader. dev: evaluate on the end of
    the training text and train on the rest. A setting chosen by the val loss makes that loss look
    better than it is; with dev the val split is never opened. Raises UserError if the directory is
    no dataset, or if a tenth of the training text is too little for a dev split.
    """
    meta = read_meta(data_root)
    tokenizer = load_tokenizer(find_tokenizer(data_root, meta))
    train = TokenLoader(data_root, "train", block_size, seed, shuffle, meta)
    description = describe_dataset(data_root, meta)
    if not dev:
        val = TokenLoader(data_root, "val", block_size, meta=meta)
        return Dataset(tokenizer, train, val, tokens_per_byte(meta, "val"), description,
                       is_fineweb_edu(data_root, meta))

    end = train.n_tokens
    begin = end - min(end // 10, MAX_DEV_TOKENS)
    if end - begin < 2:
        raise UserError(f"--dev holds out a tenth of the training text, but {data_root!r} has "
                        f"{end} training tokens: too few")
    val = PartLoader(data_root, "train", block_size, begin, end, meta=meta)
    train = PartLoader(data_root, "train", block_size, 0, begin, seed, shuffle, meta)
    n_bytes = count_bytes(val, tokenizer)
    return Dataset(tokenizer, train, val, val.n_tokens / n_bytes if n_bytes else None, description,
                   is_fineweb_edu=False)


def describe_dataset(data_root, meta):
    """The dataset in one line: where it is, its source, its size and its tokenizer."""
    parts = [str(data_root)]
    if "source" in meta:
        parts.append(meta["source"])
    if "tokens" in meta:
        parts.append(f"{meta['tokens']['train']:,} training tokens")
    if "tokenizer" in meta:
        parts.append(f"tokenizer {meta['tokenizer']}")
    return ", ".join(parts)


def count_bytes(loader, tokenizer):
    """The bytes of text that a stream's tokens stand for; <|endoftext|> stands for none."""
    sizes = np.zeros(2**16, dtype=np.int64)  # of every id that a shard can hold
    sizes[:tokenizer.n_vocab] = byte_lengths(tokenizer)
    total = 0
    for i in range(len(loader.paths)):
        total += int(sizes[loader._open_shard(i)].sum())
    return total


# -----------------------------------------------------------------------------
# a split as an endless stream of tokens


class MicroBatch(NamedTuple):
    """One rank's rows of a step.

    x, y: (up to B, T) int64, the inputs and their targets; targets of -1 do not count. n_tokens:
    how many targets count; 0 if the micro-batch only pads, and its rows repeat others. is_last:
    whether it is the last of its step.
    """
    x: torch.Tensor
    y: torch.Tensor
    n_tokens: int
    is_last: bool


class TokenLoader:
    """One split of a dataset as an endless stream of tokens, a pure function of (seed, position).

    The shards, joined, have N tokens; an epoch reads each of them once. The stream is cut into
    windows of T = block_size tokens, and every token predicts the next one. The last token of the
    split predicts its first, which is <|endoftext|>.

    Epoch 0 is in file order, unless `shuffle` is set. Every later epoch begins at a seeded
    offset, so that the windows fall on other tokens each time, and visits its windows in a seeded
    permutation: shard by shard, so that one shard at a time is read. A window that reaches from
    one epoch into the next is not permuted, so that an epoch reads each token once whatever N and
    T are.

    meta: what read_meta returns, if it has been read already.
    """

    def __init__(self, data_root, split, block_size, seed=0, shuffle=False, meta=None):
        self.split = split
        self.paths = list_shards(data_root, split)
        if not self.paths:
            raise UserError(f"no {split} shards in {str(data_root)!r}")
        self.block_size, self.seed, self.shuffle = block_size, seed, shuffle
        sizes = [len(open_shard(path)) for path in self.paths]
        self.starts = np.cumsum([0] + sizes)  # offset of each shard in the split, then N
        self.n_tokens = int(self.starts[-1])
        if self.n_tokens < 2:
            raise UserError(f"the {split} split of {str(data_root)!r} has {self.n_tokens} tokens: "
                            "too few to predict one")
        # Few shards are mapped at a time, or else resident memory would grow with the dataset.
        # The caches belong to the instance: a decorated method would keep every loader alive.
        self._open_shard = functools.lru_cache(2)(self._open_and_verify)
        self._permutation = functools.lru_cache(2)(self._draw_permutation)
        self._epoch_plan = functools.lru_cache(2)(self._plan_epoch)

        meta = read_meta(data_root) if meta is None else meta
        self.verifier = ShardVerifier(checksums_of(meta))

    def _open_and_verify(self, i):
        self.verifier.start(self.paths[i])
        return open_shard(self.paths[i])

    def _draw_permutation(self, n, *key):
        return np.random.default_rng((self.seed, *key)).permutation(n)

    def _plan_epoch(self, epoch):
        """Where an epoch begins, and in which order it visits the shards.

        Returns (offset of its first token in the split, order of the shards, number of windows up
        to the end of each shard in that order, first window of each shard). The shard in which the
        epoch begins counts as two.
        """
        N, T = self.n_tokens, self.block_size
        rng = np.random.default_rng((self.seed, epoch))
        begin = int(rng.integers(N)) if epoch else 0
        # tokens from the beginning of the epoch to each border between shards
        borders = np.unique(np.concatenate(([0], (self.starts[:-1] - begin) % N, [N])))
        # windows first..last-1 lie entirely inside the epoch
        first = -(-epoch * N // T)
        last = (epoch + 1) * N // T
        # a window belongs to the shard in which it starts
        edges = np.clip(-(-(epoch * N + borders) // T), first, last)
        order = rng.permutation(len(edges) - 1)
        ends = np.cumsum(np.diff(edges)[order])
        return begin, order, ends, edges

    def _segments(self, position, length):
        """Yield (offset in the split, number of tokens) of each segment from `position` on.

        Segments end where a window or an epoch ends.
        """
        N, T = self.n_tokens, self.block_size
        while length > 0:
            window, epoch = position // T, position // N
            begin, order, ends, edges = self._epoch_plan(epoch)
            offset = position - epoch * N
            permuted = epoch > 0 or self.shuffle
            inside = epoch * N <= window * T and (window + 1) * T <= (epoch + 1) * N
            if permuted and inside:
                index = window - edges[0]  # number of the permuted window within the epoch
                # position of its shard in the order
                i = int(np.searchsorted(ends, index, side="right"))
                first = int(edges[order[i]])
                count = int(edges[order[i] + 1]) - first
                chosen = self._permutation(count, epoch, i)[index - (ends[i] - count)]
                offset += int(first + chosen - window) * T
            n = min((window + 1) * T - position, (epoch + 1) * N - position, length)
            yield (begin + offset) % N, n
            position, length = position + n, length - n

    def _locate(self, offset):
        """(index of the shard, place in it) of a token at an offset in the split."""
        i = int(np.searchsorted(self.starts, offset, side="right")) - 1
        return i, offset - int(self.starts[i])

    def _read(self, start, n):
        """n tokens from offset `start` on, int64 (n,); the split's first token follows its last."""
        out = np.empty(n, dtype=np.int64)
        done = 0
        while done < n:
            i, place = self._locate((start + done) % self.n_tokens)
            piece = self._open_shard(i)[place:place + n - done]
            out[done:done + len(piece)] = piece
            done += len(piece)
        return torch.from_numpy(out)

    def _check_vocab(self, tokens, start, vocab_size):
        """Raise UserError, with shard, place and id, if the model does not know a token."""
        unknown = (tokens >= vocab_size).nonzero()
        if len(unknown) == 0:
            return
        first = int(unknown[0])
        i, place = self._locate((start + first) % self.n_tokens)
        raise UserError(
            f"{self.paths[i]}: token {place} is {int(tokens[first])}, but the model's vocabulary "
            f"has {vocab_size} tokens. The shard is damaged or of another tokenizer: make it again "
            "with python fineweb.py")

    def micro_batches(self, position, tokens_per_step, batch_size, world=World(), vocab_size=None):
        """Yield this rank's micro-batches of the steps from `position` on, without end.

        Each step reads the next tokens_per_step tokens. See `batches` for the rest.
        """
        while True:
            yield from self.batches(position, tokens_per_step, batch_size, world, vocab_size)
            position += tokens_per_step

    def batches(self, position, n_tokens, batch_size, world=World(), vocab_size=None):
        """Yield this rank's share of the n_tokens from `position` on, as one step's MicroBatches.

        The tokens are cut into rows where windows end, and the rows are dealt out to the ranks. A
        row that is cut short, or begins inside a window, is padded with targets of -1. Every rank
        gets as many micro-batches, so that all take part in the same exchanges: a rank that has
        fewer rows gets some with n_tokens 0. Raises UserError for a token id of vocab_size or more,
        if that is given, and for a damaged shard.
        """
        self.verifier.raise_if_damaged()
        T = self.block_size
        rows = []  # (position of the first token, number of tokens)
        while n_tokens > 0:
            length = min(T - position % T, n_tokens)
            rows.append((position, length))
            position, n_tokens = position + length, n_tokens - length
        mine = rows[world.rank::world.size]
        n_rows = len(rows[::world.size])  # of rank 0, which has the most
        for i in range(0, n_rows, batch_size):
            mine_now = mine[i:i + batch_size]
            n = sum(length for _, length in mine_now)
            # The mean loss of no targets is NaN, so a micro-batch that only pads reads a real row.
            x, y = self._read_rows(mine_now or rows[:1], vocab_size)
            yield MicroBatch(x, y, n, is_last=i + batch_size >= n_rows)

    def _read_rows(self, rows, vocab_size):
        """The inputs and targets of rows (position, length): x, y, both (len(rows), T)."""
        x = torch.zeros(len(rows), self.block_size, dtype=torch.int64)
        y = torch.full((len(rows), self.block_size), -1)
        for row, (first, length) in enumerate(rows):
            self._fill_row(x[row], y[row], first, length, vocab_size)
        return x, y

    def _fill_row(self, x, y, position, length, vocab_size):
        """Write `length` tokens of the stream into x (T,) and the token after each into y (T,)."""
        done = 0
        for start, n in self._segments(position, length):
            tokens = self._read(start, n + 1)
            if vocab_size is not None:
                self._check_vocab(tokens, start, vocab_size)
            x[done:done + n], y[done:done + n] = tokens[:-1], tokens[1:]
            done += n


class PartLoader(TokenLoader):
    """The tokens first..last-1 of a split, as a stream of their own.

    All that TokenLoader promises of a split holds for the part: its last token predicts its first.
    """

    def __init__(self, data_root, split, block_size, first, last, seed=0, shuffle=False, meta=None):
        super().__init__(data_root, split, block_size, seed, shuffle, meta)
        starts = np.clip(self.starts, first, last)  # of the shards, as far as they lie in the part
        cuts = [slice(begin - start, end - start)
                for begin, end, start in zip(starts, starts[1:], self.starts, strict=False)]
        inside = [i for i, cut in enumerate(cuts) if cut.stop > cut.start]
        self.paths = [self.paths[i] for i in inside]
        self.cuts = [cuts[i] for i in inside]
        self.starts = np.cumsum([0] + [cut.stop - cut.start for cut in self.cuts])
        self.n_tokens = last - first

    def _open_and_verify(self, i):
        return super()._open_and_verify(i)[self.cuts[i]]


class ShardVerifier:
    """Compares each shard with its checksum once, when it is first opened, in a thread of its own.

    checksums: {file name: checksum}, as checksums_of returns it; other shards are not checked.
    """

    def __init__(self, checksums):
        self.checksums = dict(checksums)
        self.thread, self.running = ThreadPoolExecutor(1), []

    def start(self, path):
        checksum = self.checksums.pop(path.name, None)  # pop: once is enough
        if checksum is not None:
            self.running.append(self.thread.submit(verify_shard, path, checksum))

    def raise_if_damaged(self):
        """Raise the UserError of a shard whose check has ended and failed."""
        done = [check for check in self.running if check.done()]
        self.running = [check for check in self.running if not check.done()]
        for check in done:
            check.result()


# -----------------------------------------------------------------------------
# reading ahead

AHEAD = 4  # micro-batches that are read before they are asked for


def prefetch(micro_batches, device):
    """Yield MicroBatches with their tensors on the device; a second thread reads a few ahead.

    On CUDA that thread copies them, too. Elsewhere the caller does: two threads that use an Apple
    GPU at the same time crash the process (https://github.com/pytorch/pytorch/issues/197805).
    Close the generator to end the thread.
    """
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def set_device():
        # The current GPU belongs to the thread. Without this it is GPU 0 on every rank, and pinned
        # memory and streams would make a context of half a gigabyte there for each other rank.
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def load():
        """The next micro-batch and, on CUDA, the event of its copy; None at the end."""
        batch = next(micro_batches, None)
        if batch is None or copying is None:
            return batch, None
        with torch.cuda.stream(copying):
            batch = batch._replace(x=copy_async(batch.x, device), y=copy_async(batch.y, device))
            copied = torch.cuda.Event()
            copied.record()
        return batch, copied

    thread = ThreadPoolExecutor(1, initializer=set_device)
    loading = deque(thread.submit(load) for _ in range(AHEAD))
    try:
        while True:
            batch, copied = loading.popleft().result()
            if batch is None:
                return
            if copied is None:
                batch = batch._replace(x=batch.x.to(device), y=batch.y.to(device))
            else:
                hand_over(batch, copied, torch.cuda.current_stream(device))
            loading.append(thread.submit(load))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)


def copy_async(tensor, device):
    """Start a copy to the GPU without waiting for it; only pinned memory can be copied so."""
    return tensor.pin_memory().to(device, non_blocking=True)


def hand_over(batch, copied, computing):
    """Make the computing stream wait for a micro-batch's copy, and hold its memory until it has
    computed with it.
    """
    computing.wait_event(copied)
    batch.x.record_stream(computing)
    batch.y.record_stream(computing)
