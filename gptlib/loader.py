"""Which tokens a step reads: the train split as an endless stream, and the thread that prefetches it."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from gptlib.common import UserError
from gptlib.dataset import list_shards, open_shard
from gptlib.runtime import World


class TokenLoader:
    """One split of a dataset as an endless stream of tokens, a pure function of (seed, position).

    The shards joined are a ring of N tokens, and an epoch is a lap round it. The stream is cut into windows of
    T = block_size tokens, each predicting the token after it; that of the ring's last token is its first, <|endoftext|>.
    The first lap is in file order, unless `shuffle`. The later ones begin at a seeded place, so that windows fall on other
    tokens each time, and visit the windows that lie whole inside the lap in a seeded permutation, shard by shard, so that
    one shard at a time is read. A window across two laps stays where it is: a lap reads each token once, whatever N and T.
    """

    def __init__(self, data_root, split, block_size, seed=0, shuffle=False):
        self.paths = list_shards(data_root, split)
        if not self.paths:
            raise UserError(f"no {split} shards in {str(data_root)!r}")
        self.block_size, self.seed, self.shuffle = block_size, seed, shuffle
        self.starts = np.cumsum([0] + [len(open_shard(path)) for path in self.paths])  # ring offset of each shard, and N
        self.n_tokens = int(self.starts[-1])
        if self.n_tokens < 2:
            raise UserError(f"the {split} split of {str(data_root)!r} has {self.n_tokens} tokens: too few to predict one")
        # few shards are mapped at a time, else resident memory would grow with the dataset
        self._shard = functools.lru_cache(2)(lambda i: open_shard(self.paths[i]))
        self._permutation = functools.lru_cache(2)(lambda n, *key: np.random.default_rng((seed, *key)).permutation(n))
        self._lap = functools.lru_cache(2)(self._lap)

    def _lap(self, lap):
        """Where a lap begins in the ring, and how it visits the shards.

        Returns (ring offset, order of the shards, windows up to the end of each in that order, first window of each); the
        shard that the lap begins in counts as two.
        """
        N, T = self.n_tokens, self.block_size
        rng = np.random.default_rng((self.seed, lap))
        begin = int(rng.integers(N)) if lap else 0
        borders = np.unique(np.concatenate(([0], (self.starts[:-1] - begin) % N, [N])))  # of the shards, from `begin` on
        first, last = -(-lap * N // T), (lap + 1) * N // T  # windows first..last-1 lie whole inside the lap
        edges = np.clip(-(-(lap * N + borders) // T), first, last)  # a window belongs to the shard it starts in
        order = rng.permutation(len(edges) - 1)
        return begin, order, np.cumsum(np.diff(edges)[order]), edges

    def _pieces(self, position, length):
        """Yield (ring offset, tokens) of what the stream reads from `position` on, cut at windows' and laps' borders."""
        N, T = self.n_tokens, self.block_size
        while length > 0:
            k, lap = position // T, position // N
            begin, order, ends, edges = self._lap(lap)
            offset = position - lap * N
            if (lap or self.shuffle) and lap * N <= k * T and (k + 1) * T <= (lap + 1) * N:
                i = int(np.searchsorted(ends, k - edges[0], side="right"))
                count = int(edges[order[i] + 1] - edges[order[i]])
                inner = self._permutation(count, lap, i)[k - edges[0] - (ends[i] - count)]
                offset += int(edges[order[i]] + inner - k) * T
            n = min((k + 1) * T - position, (lap + 1) * N - position, length)
            yield (begin + offset) % N, n
            position, length = position + n, length - n

    def _read(self, start, n):
        """n tokens from ring offset `start` on, as an int64 tensor."""
        out = np.empty(n, dtype=np.int64)
        done = 0
        while done < n:
            at = (start + done) % self.n_tokens
            i = int(np.searchsorted(self.starts, at, side="right")) - 1
            piece = self._shard(i)[at - self.starts[i]:][:n - done]
            out[done:done + len(piece)] = piece
            done += len(piece)
        return torch.from_numpy(out)

    def batches(self, position, n_tokens, batch_size, world=World()):
        """Yield this process's share of the n_tokens from `position` on, in micro-batches (x, y, tokens in it).

        x, y: (up to batch_size, block_size) int64. The tokens are cut into rows at the windows' borders, the rows dealt
        out to the processes. A row that is cut short, or begins inside a window, is padded with targets of -1. A process
        left without a row gets one of 0 tokens, so that it can take part in what follows.
        """
        T = self.block_size
        rows = []  # (position of the first token, length)
        while n_tokens > 0:
            length = min(T - position % T, n_tokens)
            rows.append((position, length))
            position, n_tokens = position + length, n_tokens - length
        mine = rows[world.rank::world.size]
        for i in range(0, max(len(mine), 1), batch_size):
            micro = mine[i:i + batch_size] or rows[:1]
            x = torch.zeros(len(micro), T, dtype=torch.int64)
            y = torch.full((len(micro), T), -1)
            for row, (p, length) in enumerate(micro):
                done = 0
                for start, n in self._pieces(p, length):
                    tokens = self._read(start, n + 1)
                    x[row, done:done + n], y[row, done:done + n] = tokens[:-1], tokens[1:]
                    done += n
            yield x, y, sum(length for _, length in micro) if mine else 0


def prefetch(steps, device):
    """Yield the lists of micro-batches that `steps` yields, moved to the device by a second thread, one step ahead."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load():
        micro_batches = list(next(steps))
        if stream is None:
            return [(x.to(device), y.to(device), n) for x, y, n in micro_batches]
        with torch.cuda.stream(stream):
            return [(x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True), n)
                    for x, y, n in micro_batches]

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(load)
        while True:
            micro_batches = ahead.result()
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)  # the copies are done before the model reads them, and
                for x, y, _ in micro_batches:  # their memory is not given to the next copies while it still does
                    x.record_stream(torch.cuda.current_stream())
                    y.record_stream(torch.cuda.current_stream())
            ahead = thread.submit(load)
            yield micro_batches
