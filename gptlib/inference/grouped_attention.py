"""Attention of one token a sequence, where each reads about as much of the cache as it has filled.

A decode step of several sequences attends to as many positions as the longest of them has. On a
CPU reading these takes most of the step as soon as one is long: seven sequences of 60 tokens
beside one of 1,000 took twice as long as eight of 60.
"""

import copy
import functools

import torch

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


def attend_in_groups(attend, q, k, v, mask):
    """CausalSelfAttention.attend, in groups of rows in a decode step with rows of unlike lengths.

    attend: the method that attends for one group. mask: (B, 1, T, S), or None.
    """
    rows, _, tokens, _ = q.size()
    if mask is None or rows == 1 or tokens > 1:
        return attend(q, k, v, mask)
    outputs = []
    for first, count, size in groups_of(mask):
        row = slice(first, first + count)
        outputs.append(attend(q[row], k[row, :, :size], v[row, :, :size], mask[row, ..., :size]))
    return torch.cat(outputs)


def groups_of(mask):
    """group_rows for the mask (B, 1, 1, S) of a decode step, found once for all layers."""
    if not hasattr(mask, "groups"):
        mask.groups = group_rows(mask.sum(dim=-1).flatten().tolist())
    return mask.groups


def group_attention(model):
    """A copy of the model, which shares all weights with it, whose layers attend in groups."""
    model = copy_modules(model)
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = functools.partial(attend_in_groups, module.attend)
    return model


def copy_modules(module):
    """A copy of a module and of those inside it, which share their weights and all else."""
    twin = copy.copy(module)
    twin._modules = {name: child if child is None else copy_modules(child)
                     for name, child in module._modules.items()}
    return twin
