"""Log-probabilities of tokens, as those who evaluate a model ask for them.

They are the plain log-softmax over the real ids, whatever temperature, top_k or top_p is.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from gptlib.inference.decode_step import project_to_logits
from gptlib.inference.sampling import k_likeliest

HEAD_ROWS = 128  # tokens whose logits exist at a time: those of 16 x 1024 take 3.3 GB


class TokenLogprob(NamedTuple):
    token: int
    logprob: float | None  # None for the first token of a text, which nothing predicts
    top: list  # [(token, logprob)] of the likeliest, the best one first


def logprobs_of(logits, tokens, k):
    """A TokenLogprob for each of the tokens (n,), with the k likeliest beside it.

    logits: (n, n_vocab), those that predict the tokens.
    """
    logprobs = F.log_softmax(logits.float(), dim=-1)  # (n, n_vocab)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    values, ids = logprobs[:, :0], logprobs[:, :0]
    if k > 0:
        values, ids = k_likeliest(logprobs, min(k, logprobs.size(1)))  # (n, k)
    entries = []
    rows = zip(tokens.tolist(), chosen, ids.tolist(), values.tolist(), strict=True)
    for token, logprob, top_ids, top_values in rows:
        entries.append(TokenLogprob(token, logprob, list(zip(top_ids, top_values, strict=True))))
    return entries


def logprobs_from_hidden(lm_head, x, tokens, n_vocab, k):
    """logprobs_of from final hidden states x (n, n_embd), HEAD_ROWS of them at a time."""
    tokens = torch.tensor(tokens, dtype=torch.int64, device=x.device)
    entries = []
    for rows, targets in zip(x.split(HEAD_ROWS), tokens.split(HEAD_ROWS), strict=True):
        logits = project_to_logits(lm_head, rows)[:, :n_vocab]
        entries += logprobs_of(logits, targets, k)
    return entries
