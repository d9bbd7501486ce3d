"""From logits to the next token."""

import random
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from gptlib.config import check_settings, setting


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is continued. Every way in (command, Python, HTTP, engine) is checked here and nowhere else.

    Raises UserError for a value that is out of range. Without a seed one is drawn, so that every sample can be repeated.
    """
    max_length: int = setting(100, "new tokens at most, a sample", 1)
    temperature: float = setting(1.0, "0 is greedy", 0.0, 2.0)
    top_k: int = setting(None, "draw from the k likeliest tokens", 1, optional=True)
    top_p: float = setting(None, "draw from the likeliest tokens that make up this mass", above=0, high=1, optional=True)
    seed: int = setting(None, "seed of the draws", 0, optional=True)

    def __post_init__(self):
        check_settings(self, str)
        if self.seed is None:
            object.__setattr__(self, "seed", random.SystemRandom().randrange(2**32))
        if self.temperature < 1e-6:  # logits / 1e-39 are no numbers any more
            object.__setattr__(self, "temperature", 0.0)


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, generator=None, noise=None):
    """One token id a row, (B, 1), drawn from logits (B, V) after temperature, top-k and nucleus (arXiv:1904.09751) cuts.

    temperature 0 is greedy; top_k keeps the k likeliest; top_p the smallest set of likeliest tokens whose mass reaches it.
    A row's draw is made with one number from [0, 1): that in noise (B, 1), or of the generator where there is none.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)  # likeliest first
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(descending=True)
    probs = F.softmax(logits.float() / temperature, dim=-1)
    if top_p is not None and top_p < 1:
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)  # mass before it has reached top_p
    if noise is None:
        noise = torch.rand(probs.size(0), 1, device=probs.device, generator=generator)
    mass = probs.cumsum(dim=-1)
    drawn = (mass < noise * mass[:, -1:]).sum(dim=-1, keepdim=True)  # the first whose mass reaches the share: never one of 0
    return drawn if ids is None else ids.gather(-1, drawn)
