"""The cache of keys and values, and attention to it: of prompts, and of tokens that follow them.

The classes of attention have the methods of train_gpt2.py's Causal, which the model's layers call.
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


# -----------------------------------------------------------------------------
# sequences of unlike lengths, on a CPU

# one more call takes as long as reading this many more positions of one sequence
CALL_COST = 256


def group_rows(lengths, call_cost=CALL_COST):
    """Group neighbouring rows that attend faster together: [(first row, rows, positions)].

    lengths: how many positions each row attends to.
    """
    groups = []
    for row, length in enumerate(lengths):
        if groups:
            first, count, size = groups[-1]
            joint = max(size, length)
            if (count + 1) * joint <= count * size + length + call_cost:
                groups[-1] = first, count + 1, joint
                continue
        groups.append((row, 1, length))
    return groups


class GroupedAttention(CachedAttention):
    """CachedAttention of one token per row, in which short rows do not read as far as long ones.

    Rows attend together to as many positions as the longest of them has. On a CPU that takes most
    of a step as soon as one row is long, so rows of similar length form groups.
    """

    def __init__(self, cache, pos):
        super().__init__(cache, pos)
        lengths = (pos[:, 0] + 1).tolist()
        self.groups = group_rows(lengths)

    def attend(self, layer, q, k, v, dropout_p):
        if len(self.groups) == 1:
            return super().attend(layer, q, k, v, dropout_p)
        keys, values = self.store(layer, k, v)
        outputs = []
        for first, count, size in self.groups:
            row = slice(first, first + count)
            outputs.append(F.scaled_dot_product_attention(
                q[row].to(keys.dtype), keys[row, :, :size], values[row, :, :size],
                attn_mask=self.mask[row, ..., :size], dropout_p=dropout_p))
        return torch.cat(outputs).to(q.dtype)
