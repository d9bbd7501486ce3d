"""The cache of keys and values, and what attends to it: a prompt that fills it, tokens that follow.

Prefill and CachedAttention have the methods of Causal in train_gpt2.py, which the layers ask.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass
class KVCache:
    """Keys and values of several sequences, one slot each, stored at the position of their token.

    keys, values: for each layer a tensor (slots, n_head, size, head_size); `size` is the longest
    sequence that fits.
    """
    keys: list
    values: list

    @classmethod
    def of_model(cls, model, slots, size=None, dtype=None):
        """An empty cache for `slots` sequences of up to `size` tokens (default: the block size)."""
        c, w = model.config, model.lm_head.weight
        shape = (slots, c.n_head, size or c.block_size, c.n_embd // c.n_head)

        def zeros():
            return [torch.zeros(shape, device=w.device, dtype=dtype or w.dtype)
                    for _ in range(c.n_layer)]

        return cls(keys=zeros(), values=zeros())

    def narrow(self, first, slots, size):
        """A view of this cache: `slots` slots from `first` on, up to position `size`."""
        part = (slice(first, first + slots), slice(None), slice(size))
        return KVCache([k[part] for k in self.keys], [v[part] for v in self.values])

    def from_start(self):
        """The attention of a forward pass whose tokens fill the slots from position 0 on."""
        return Prefill(self)

    def at(self, pos):
        """The attention of new tokens at positions pos (B, T), one row for each slot."""
        return CachedAttention(self, pos)


class Prefill:
    """Causal attention of whole prompts, whose keys and values fill a cache from position 0 on."""

    def __init__(self, cache):
        self.cache = cache

    def positions(self, idx):
        return torch.arange(idx.size(1), device=idx.device)  # (T,)

    def attend(self, layer, q, k, v, dropout_p):
        T = k.size(2)
        self.cache.keys[layer][:, :, :T], self.cache.values[layer][:, :, :T] = k, v
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)


class CachedAttention:
    """Attention of new tokens to what their slot holds up to their position, themselves included.
    """

    def __init__(self, cache, pos):
        self.cache, self.pos = cache, pos
        self.rows = torch.arange(pos.size(0), device=pos.device)[:, None]  # (B, 1), pairs with pos
        stored = torch.arange(cache.keys[0].size(2), device=pos.device)  # (S,)
        self.mask = (stored <= pos[:, :, None])[:, None]  # (B, 1, T, S)

    def positions(self, idx):
        return self.pos

    def store(self, layer, k, v):
        """Store k, v (B, nh, T, hs); returns all that the slots hold, (B, nh, S, hs) each."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.pos] = k.transpose(1, 2).to(keys.dtype)
        values[self.rows, :, self.pos] = v.transpose(1, 2).to(values.dtype)
        return keys, values

    def attend(self, layer, q, k, v, dropout_p):
        keys, values = self.store(layer, k, v)
        y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=self.mask,
                                           dropout_p=dropout_p)
        return y.to(q.dtype)
