"""The loss of a validation batch on a GPU: compiled, and without float32 logits of the batch."""

import torch
from torch.nn import functional as F

from gptlib.runtime import compile_model

HEAD_ROWS = 8192  # rows of logits at a time: 1.6 GB in float32 for GPT-2's vocabulary


def chunked_loss(model, idx, targets, head_rows):
    """The mean loss in nats of tokens idx (B, T) that targets (B, T) follow; -1 doesn't count.

    The head computes the logits of head_rows positions at a time.
    """
    x = model.hidden(idx).flatten(0, 1)  # (B * T, n_embd)
    targets = targets.flatten()
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for h, t in zip(x.split(head_rows), targets.split(head_rows), strict=True):
        logits = model.lm_head(h)  # (head_rows, vocab_size)
        total = total + F.cross_entropy(logits, t, ignore_index=-1, reduction="sum")
    return total / (targets != -1).sum()


def validation_loss(model, device, batch_size, compile):
    """A function (idx, targets) -> mean loss for batches of up to batch_size rows.

    On CUDA chunked and, with compile, compiled; elsewhere the model's own loss, to the last bit.
    """
    if device.type != "cuda":
        return lambda idx, targets: model(idx, targets, return_logits=False)[1]
    loss = compile_model(chunked_loss, device, dynamic=False) if compile else chunked_loss

    def padded_loss(idx, targets):
        # one shape for all batches: another one would be compiled for the last batch alone
        missing = (0, 0, 0, batch_size - len(idx))
        targets = F.pad(targets, missing, value=-1)
        return loss(model, F.pad(idx, missing), targets, HEAD_ROWS)

    return padded_loss
