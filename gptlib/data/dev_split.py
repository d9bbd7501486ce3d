"""The dev split: the end of the training text, held out so that choices are made on it.

A setting chosen by the val loss makes that loss look better than it is. With --dev a run trains on
what comes before the dev split, is evaluated on it, and never opens the val split.
"""

import numpy as np

from gptlib.common import UserError
from gptlib.data.loader import TokenLoader
from gptlib.data.preparation import byte_lengths
from gptlib.training.console import tokens_per_byte
from gptlib.data.tokenizer import load_tokenizer

MAX_DEV_TOKENS = 10485760  # as many as the recipe's val_tokens; a tenth of a small training text


class PartLoader(TokenLoader):
    """The tokens first..last-1 of a split, as a stream of their own.

    Whatever TokenLoader promises of a split holds for the part: the last token predicts the first.
    """

    def __init__(self, data_root, split, block_size, first, last, seed=0, shuffle=False):
        super().__init__(data_root, split, block_size, seed, shuffle)
        starts = np.clip(self.starts, first, last)  # of the shards, where they lie in the part
        cuts = [slice(begin - start, end - start)
                for begin, end, start in zip(starts, starts[1:], self.starts, strict=False)]
        inside = [i for i, cut in enumerate(cuts) if cut.stop > cut.start]
        self.paths = [self.paths[i] for i in inside]
        self.cuts = [cuts[i] for i in inside]
        self.starts = np.cumsum([0] + [cut.stop - cut.start for cut in self.cuts])
        self.n_tokens = last - first

    def _open_and_verify(self, i):
        return super()._open_and_verify(i)[self.cuts[i]]


def open_splits(cfg):
    """Open the tokens that a run trains on, and those that it is evaluated on.

    Returns (loader of the first, loader of the second, tokens for each byte of text in the second,
    or None where that is not known). cfg: a TrainConfig. Raises UserError where a tenth of the
    training text is too little.
    """
    train = TokenLoader(cfg.data_root, "train", cfg.block_size, cfg.seed, cfg.shuffle)
    if not cfg.dev:
        val = TokenLoader(cfg.data_root, "val", cfg.block_size)
        return train, val, tokens_per_byte(cfg.data_root, "val")
    end = train.n_tokens
    begin = end - min(end // 10, MAX_DEV_TOKENS)
    if end - begin < 2:
        raise UserError(f"--dev holds out a tenth of the training text, but {cfg.data_root!r} has "
                        f"{end} training tokens: too few")
    train = PartLoader(cfg.data_root, "train", cfg.block_size, 0, begin, cfg.seed, cfg.shuffle)
    dev = PartLoader(cfg.data_root, "train", cfg.block_size, begin, end)
    n_bytes = count_bytes(dev, load_tokenizer(cfg.data_root))
    return train, dev, dev.n_tokens / n_bytes if n_bytes else None


def count_bytes(loader, tokenizer):
    """The bytes of text that a stream's tokens stand for; <|endoftext|> stands for none."""
    sizes = np.zeros(2**16, dtype=np.int64)  # of every id that a shard can hold
    sizes[:tokenizer.n_vocab] = byte_lengths(tokenizer)
    total = 0
    for i in range(len(loader.paths)):
        total += int(sizes[loader._open_shard(i)].sum())
    return total
