"""Attention of one token a sequence, where each reads about as much of the cache as it has filled.

A decode step of several sequences attends to as many positions as the longest of them has. On a
CPU reading these takes most of the step as soon as one is long: seven sequences of 60 tokens
beside one of 1,000 took twice as long as eight of 60.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

# another call takes as long as reading this many positions more of one sequence
CALL_COST = 256


def group_rows(lengths, call_cost=CALL_COST):
    """Neighbouring rows that had better attend together, as [(first row, rows, positions)].

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


class GroupedAttention(nn.Module):
    """The attention of a block, in groups of rows where a decode step has rows of unlike lengths.

    attention: a CausalSelfAttention, or anything with its attributes; it does all other passes.
    """

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, cache=None, pos=None, mask=None):
        B, T, C = x.size()
        groups = []
        if cache is not None and pos is not None and T == 1 and B > 1:
            groups = groups_of(cache, pos)
        if len(groups) < 2:
            return self.attention(x, cache, pos, mask)
        attention = self.attention
        q, k, v = attention.c_attn(x).split(C, dim=2)
        heads = (B, attention.n_head, 1, C // attention.n_head)
        q, k, v = q.view(heads), k.view(heads), v.view(heads)  # (B, nh, 1, hs)
        keys, values = cache.append(attention.layer, pos, k, v)  # (B, nh, S, hs)
        q = q.to(keys.dtype)
        outputs = []
        for first, count, size in groups:
            rows = slice(first, first + count)
            outputs.append(F.scaled_dot_product_attention(
                q[rows], keys[rows, :, :size], values[rows, :, :size],
                attn_mask=mask[rows, ..., :size]))
        y = torch.cat(outputs).to(k.dtype).reshape(B, 1, C)
        return attention.resid_dropout(attention.c_proj(y))


def groups_of(cache, pos):
    """group_rows for a step at positions pos (B, 1), found once for all layers."""
    if not hasattr(cache, "groups"):
        cache.groups = group_rows([p + 1 for p in pos[:, 0].tolist()])
    return cache.groups


def group_attention(model):
    """A copy of the model, which shares all weights with it, whose blocks have GroupedAttention."""
    model = copy_modules(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "c_attn") and hasattr(child, "n_head"):
                setattr(module, name, GroupedAttention(child))
    return model


def copy_modules(module):
    """A copy of a module and of those inside it, which share their weights and all else."""
    twin = copy.copy(module)
    twin._modules = {name: child if child is None else copy_modules(child)
                     for name, child in module._modules.items()}
    return twin
