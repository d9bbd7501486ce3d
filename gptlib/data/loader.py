"""Which tokens a step reads: a split as an endless stream of windows, and the thread that
prefetches them.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from gptlib.common import UserError
from gptlib.data.shards import list_shards, open_shard, read_checksums, verify_shard
from gptlib.distributed import World


class TokenLoader:
    """One split of a dataset as an endless stream of tokens, a pure function of (seed, position).

    The shards, joined, have N tokens; an epoch reads each of them once. The stream is cut into
    windows of T = block_size tokens, and every token predicts the next one; the last token of the
    split predicts its first, which is <|endoftext|>.

    Epoch 0 is in file order, unless `shuffle` is set. Every later epoch begins at a seeded
    offset, so that the windows fall on other tokens each time, and visits its windows in a seeded
    permutation: shard by shard, so that one shard at a time is read. A window that reaches from
    one epoch into the next is not permuted, so that an epoch reads each token once whatever N and
    T are.
    """

    def __init__(self, data_root, split, block_size, seed=0, shuffle=False):
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

        self.verifier = ShardVerifier(read_checksums(data_root))

    def _open_and_verify(self, i):
        self.verifier.start(self.paths[i])
        return open_shard(self.paths[i])

    def _draw_permutation(self, n, *key):
        return np.random.default_rng((self.seed, *key)).permutation(n)

    def _plan_epoch(self, epoch):
        """Where an epoch begins, and in which order it visits the shards.

        Returns (offset of its first token in the split, order of the shards, windows up to the
        end of each shard in that order, first window of each shard). The shard in which the epoch
        begins counts as two.
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
        """Yield (offset in the split, number of tokens) of what the stream reads from `position`
        on.

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
        """n tokens from offset `start` on, as an int64 tensor; the split's first token follows
        its last.
        """
        out = np.empty(n, dtype=np.int64)
        done = 0
        while done < n:
            i, place = self._locate((start + done) % self.n_tokens)
            piece = self._open_shard(i)[place:place + n - done]
            out[done:done + len(piece)] = piece
            done += len(piece)
        return torch.from_numpy(out)

    def _check_vocab(self, tokens, start, vocab_size):
        """Raise UserError that names shard, place and id of a token that the model does not know.
        """
        unknown = (tokens >= vocab_size).nonzero()
        if len(unknown) == 0:
            return
        first = int(unknown[0])
        i, place = self._locate((start + first) % self.n_tokens)
        raise UserError(
            f"{self.paths[i]}: token {place} is {int(tokens[first])}, but the model's vocabulary "
            f"has {vocab_size} tokens. The shard is damaged or of another tokenizer: make it again "
            "with python fineweb.py")

    def batches(self, position, n_tokens, batch_size, world=World(), vocab_size=None, even=False):
        """Yield this rank's share of the n_tokens from `position` on, in micro-batches (x, y,
        tokens in it).

        x, y: (up to batch_size, block_size) int64. The tokens are cut into rows where windows
        end, and the rows dealt out to the ranks. A row that is cut short, or begins inside a
        window, is padded with targets of -1. A rank without a row gets one of 0 tokens, so that
        it can take part in what the others do; with `even`, any rank gets such ones until all
        have as many micro-batches. Raises UserError for a token id of vocab_size or more, where
        that is given.
        """
        self.verifier.raise_if_damaged()
        T = self.block_size
        rows = []  # (position of the first token, number of tokens)
        while n_tokens > 0:
            length = min(T - position % T, n_tokens)
            rows.append((position, length))
            position, n_tokens = position + length, n_tokens - length
        mine = rows[world.rank::world.size]
        n_rows = len(rows[::world.size]) if even else len(mine)  # rank 0 has the most
        for i in range(0, max(n_rows, 1), batch_size):
            micro_batch = mine[i:i + batch_size] or rows[:1]
            x = torch.zeros(len(micro_batch), T, dtype=torch.int64)
            y = torch.full((len(micro_batch), T), -1)
            for row, (first, length) in enumerate(micro_batch):
                self._fill_row(x[row], y[row], first, length, vocab_size)
            yield x, y, sum(length for _, length in mine[i:i + batch_size])

    def fewest_micro_batches(self, position, n_tokens, batch_size, world_size):
        """The smallest number of micro-batches that `batches` gives to any rank."""
        T = self.block_size
        n_rows = (position + n_tokens - 1) // T - position // T + 1
        fewest_rows = n_rows // world_size
        return max(1, -(-fewest_rows // batch_size))

    def _fill_row(self, x, y, position, length, vocab_size):
        """Write `length` tokens of the stream into x (T,) and those that follow each into y (T,).
        """
        done = 0
        for start, n in self._segments(position, length):
            tokens = self._read(start, n + 1)
            if vocab_size is not None:
                self._check_vocab(tokens, start, vocab_size)
            x[done:done + n], y[done:done + n] = tokens[:-1], tokens[1:]
            done += n


class ShardVerifier:
    """Compares each shard with its checksum once, when it is first opened, in a thread of its own.

    checksums: {file name: checksum} of read_checksums; a shard without one is not checked.
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


def prefetch(steps, device):
    """Yield the lists of micro-batches that `steps` yields, on the device; a second thread reads
    them one step ahead.

    On CUDA that thread copies them too. Elsewhere the caller does: two threads that use an Apple
    GPU at the same time crash the process (https://github.com/pytorch/pytorch/issues/197805).
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def set_device():
        # The current GPU belongs to the thread. Without this it is GPU 0 on every rank, where
        # pinned memory and streams would then make a context of half a gigabyte for each of the
        # other ranks.
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def load():
        micro_batches = list(next(steps))
        if stream is None:
            return micro_batches
        with torch.cuda.stream(stream):
            return [(copy_async(x, device), copy_async(y, device), n) for x, y, n in micro_batches]

    with ThreadPoolExecutor(1, initializer=set_device) as thread:
        ahead = thread.submit(load)
        while True:
            micro_batches = ahead.result()
            if stream is None:
                micro_batches = [(x.to(device), y.to(device), n) for x, y, n in micro_batches]
            else:
                hand_over(micro_batches, stream, torch.cuda.current_stream(device))
            ahead = thread.submit(load)
            yield micro_batches


def copy_async(tensor, device):
    """Start a copy to the GPU that does not wait; only from pinned memory can it overlap with
    computation.
    """
    return tensor.pin_memory().to(device, non_blocking=True)


def hand_over(micro_batches, copying, computing):
    """Make the computing stream wait for the copies, and keep their memory from the next copies
    while it reads them.
    """
    computing.wait_stream(copying)
    for x, y, _ in micro_batches:
        x.record_stream(computing)
        y.record_stream(computing)
