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

    Raises UserError for a value out of range. Where no seed is given a random one is chosen, so
    that every sample can be repeated.
    """
    max_length: int = setting(100, "new tokens at most, a sample", 1)
    temperature: float = setting(1.0, "0 is greedy", 0.0, 2.0)
    top_k: int = setting(None, "sample from the k likeliest tokens", 1, optional=True)
    top_p: float = setting(None, "sample from the likeliest tokens that make up this mass",
                           above=0, high=1, optional=True)
    seed: int = setting(None, "random seed", 0, optional=True)

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
    number from [0, 1): from noise (B, 1), or from the generator where there is no noise.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    use_top_p = top_p is not None and top_p < 1
    ids = None  # the ids of the columns, where those are not all ids in order
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)  # likeliest first
    elif use_top_p:
        logits, ids = logits.sort(descending=True)
    probs = F.softmax(logits.float() / temperature, dim=-1)
    if use_top_p:
        mass_before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(mass_before >= top_p, 0.0)
    if noise is None:
        noise = torch.rand(probs.size(0), 1, device=probs.device, generator=generator)
    # the first column at which the cumulative mass reaches the row's share of the total:
    # a column of probability 0 is never the first
    mass = probs.cumsum(dim=-1)
    column = (mass < noise * mass[:, -1:]).sum(dim=-1, keepdim=True)
    return column if ids is None else ids.gather(-1, column)
