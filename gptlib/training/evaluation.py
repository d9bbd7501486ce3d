"""The validation loss; on a GPU compiled, and without float32 logits of a whole batch."""

import math

import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from gptlib.runtime import World, compile_model

HEAD_ROWS = 8192  # rows of logits at a time: 1.6 GB in float32 for GPT-2's vocabulary


@torch.no_grad()
def evaluate(model, loader, n_tokens, batch_size, device, autocast, world=World(), loss_of=None):
    """Mean loss in nats per token over the first n_tokens predictions of a split.

    It is the same for any number of processes; all of them have to call it. loss_of: the model's
    mean loss of a batch (x, y), by default that of its forward pass.
    """
    model.eval()
    loss_of = loss_of or validation_loss(model, device, batch_size, compile=False)
    n_tokens = min(n_tokens, loader.n_tokens - 1)  # nothing follows the last token of the split
    # summed up on the GPU, so that the host does not wait for each batch
    total = torch.zeros(1, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    n_batches = math.ceil(n_tokens / (loader.block_size * world.size * batch_size))
    batches = loader.batches(0, n_tokens, batch_size, world, model.config.vocab_size)
    batches = tqdm(batches, total=n_batches, desc="validation", leave=False,
                   disable=None if world.rank == 0 else True)
    with autocast:
        for x, y, n, _ in batches:
            if n == 0:
                continue  # this rank has fewer rows than others
            loss = loss_of(x.to(device), y.to(device))
            total += loss.to(total.device).double() * n
    total = total.cpu()
    if world.size > 1:
        dist.all_reduce(total)
    return total.item() / n_tokens


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
        # forward without the module's hooks: a sharded model's would gather weights before
        # Evaluation has told the ranks without a share to take part
        return lambda idx, targets: model.forward(idx, targets, return_logits=False)[1]
    loss = compile_model(chunked_loss, device, dynamic=False) if compile else chunked_loss

    def padded_loss(idx, targets):
        # one shape for all batches: another one would be compiled for the last batch alone
        missing = (0, 0, 0, batch_size - len(idx))
        targets = F.pad(targets, missing, value=-1)
        return loss(model, F.pad(idx, missing), targets, HEAD_ROWS)

    return padded_loss
