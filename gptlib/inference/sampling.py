"""From logits to the next token."""

import random
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from gptlib.config import check_settings, setting

MAX_RANDOM_SEED = 2**32
GREEDY_BELOW = 1e-6  # a lower temperature is greedy: logits divided by it would overflow


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is continued, checked here for the command, Python, HTTP and the engine.

    Raises UserError for a value out of range. If no seed is given a random one is chosen, so
    that every sample can be repeated.
    """
    max_length: int = setting(100, "new tokens at most, a sample", 1)
    temperature: float = setting(1.0, "0 is greedy", 0.0, 2.0)
    top_k: int = setting(None, "sample from the k likeliest tokens", 1, optional=True)
    top_p: float = setting(None, "sample from the likeliest tokens that make up this mass",
                           above=0, high=1, optional=True)
    seed: int = setting(None, "random seed", 0, 2**63 - 1, optional=True)

    def __post_init__(self):
        check_settings(self, str)
        if self.seed is None:
            seed = random.SystemRandom().randrange(MAX_RANDOM_SEED)
            object.__setattr__(self, "seed", seed)
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, generator=None, noise=None):
    """One token id a row, (B, 1), sampled from logits (B, V).

    temperature 0 is greedy; top_k keeps the k likeliest tokens; top_p keeps the smallest set of
    likeliest tokens whose mass reaches it (nucleus sampling, arXiv:1904.09751). Each row takes one
    number from [0, 1): from noise (B, 1), or from the generator if noise is None. Among
    equal logits at the edge of what is kept it is not defined which ones are kept.
    """
    if temperature == 0:
        return likeliest(logits)
    use_top_p = top_p is not None and top_p < 1
    ids = None  # the ids of the columns; None: all ids in order
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = k_likeliest(logits, top_k)
        probs = F.softmax(logits.float() / temperature, dim=-1)
    elif use_top_p:
        probs, ids = sort_probabilities(logits, temperature, top_p)
    else:
        probs = F.softmax(logits.float() / temperature, dim=-1)
    if use_top_p:
        mass_before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(mass_before >= top_p, 0.0)
    if noise is None:
        noise = torch.rand(probs.size(0), 1, device=probs.device, generator=generator)
    # the first column at which the cumulative mass reaches the row's share of the total:
    # a column of probability 0 is never the first
    mass = probs.cumsum(dim=-1)
    column = first_column_to_reach(mass, noise * mass[:, -1:])
    return column if ids is None else ids.gather(-1, column)


def first_column_to_reach(mass, target):
    """The first column of each row of cumulative masses (B, n) that reaches its target (B, 1)."""
    if mass.device.type == "cpu":
        # a row of NaN, from a model that overflows, reaches nothing: it has to be some column still
        return torch.searchsorted(mass, target).clamp_(max=mass.size(-1) - 1)
    # elsewhere sums are rounded in parallel and may not ascend, as a search needs: count
    return (mass < target).sum(dim=-1, keepdim=True)


# -----------------------------------------------------------------------------
# Selecting from a large vocabulary. On a CPU, topk, argmax and sort look at the logits one by one,
# and sorting all of GPT-2's takes longer than its forward pass. Maxima of blocks and comparisons
# with a threshold are vectorized, and leave few logits to be looked at.

BLOCK = 64  # neighbouring ids that one maximum stands for
MIN_VOCABULARY = 4096  # with fewer ids there is little to gain


def is_large_on_cpu(logits):
    return logits.device.type == "cpu" and logits.size(-1) >= MIN_VOCABULARY


def block_maxima(logits):
    """The maximum of each whole block of columns, (B, V // BLOCK)."""
    n_whole = logits.size(-1) // BLOCK * BLOCK
    return logits[:, :n_whole].unflatten(-1, (-1, BLOCK)).amax(dim=-1)


def columns_of(blocks, n_columns):
    """The columns of these blocks (B, n), and those past the last whole block, (B, columns)."""
    columns = blocks[..., None] * BLOCK + torch.arange(BLOCK)  # (B, n, BLOCK)
    rest = torch.arange(n_columns // BLOCK * BLOCK, n_columns).expand(blocks.size(0), -1)
    return torch.cat((columns.flatten(1), rest), dim=1)


def likeliest(logits):
    """The likeliest id of each row, (B, 1); of equal ones the first."""
    if not is_large_on_cpu(logits):
        return logits.argmax(dim=-1, keepdim=True)
    block = block_maxima(logits).argmax(dim=-1, keepdim=True)
    ids = columns_of(block, logits.size(-1))
    column = logits.gather(-1, ids).argmax(dim=-1, keepdim=True)
    return ids.gather(-1, column)


def k_likeliest(logits, k):
    """The k largest logits of each row, the largest first, and their ids: both (B, k)."""
    if not is_large_on_cpu(logits) or k * BLOCK > logits.size(-1) // 4:
        return logits.topk(k)
    # the k largest are in the k blocks whose maxima are the largest
    blocks = block_maxima(logits).topk(k, sorted=False).indices
    ids = columns_of(blocks, logits.size(-1))
    values, columns = logits.gather(-1, ids).topk(k)
    return values, ids.gather(-1, columns)


def sort_probabilities(logits, temperature, top_p):
    """Probabilities and ids of each row, the likeliest first: both (B, n).

    n may be less than the vocabulary: all that belongs to the mass top_p is among them. Rows with
    fewer candidates end in probabilities of 0.
    """
    if not is_large_on_cpu(logits):
        logits, ids = logits.sort(descending=True)
        return F.softmax(logits.float() / temperature, dim=-1), ids
    probs = F.softmax(logits.float() / temperature, dim=-1)
    is_candidate = probs >= nucleus_threshold(probs, top_p)  # (B, V)
    counts = is_candidate.sum(dim=-1, keepdim=True)
    is_filled = torch.arange(counts.max().clamp(min=1)) < counts  # (B, n)
    candidates = logits.new_full(is_filled.shape, -torch.inf)
    candidates[is_filled] = logits[is_candidate]
    ids = torch.zeros(is_filled.shape, dtype=torch.int64)
    ids[is_filled] = is_candidate.nonzero()[:, 1]
    candidates, order = candidates.sort(descending=True)
    ids = ids.gather(-1, order)
    return probs.gather(-1, ids).masked_fill(candidates == -torch.inf, 0.0), ids


def nucleus_threshold(probs, top_p):
    """A lower bound for the probability of any row's nucleus tokens, as high as is easily found."""
    for threshold in (1e-3, 1e-4, 1e-5):
        mass = probs.where(probs >= threshold, 0.0).sum(dim=-1)
        # well above top_p, so that no rounding of sums matters
        if (mass > top_p + 1e-4).all():
            return threshold
    # tokens below this one have, all together, half of the mass that may be left out
    return (1 - top_p) / probs.size(-1) / 2
