"""The model as it is evaluated: its validation loss, and forward passes in which all ranks join."""

import math

import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from gptlib.distributed import World, any_rank, is_sharded
from gptlib.runtime import compile_model

HEAD_ROWS = 8192  # rows of logits at a time: 1.6 GB in float32 for GPT-2's vocabulary


class Evaluator:
    """The uncompiled model, which shares its weights with the one that trains: it is evaluated,
    scored and sampled from.

    It is a context for forward passes of `model` under autocast. Every forward pass of a sharded
    model gathers its weights from all ranks, so all have to run as many. A rank that leaves the
    context first runs empty passes until the others have left too: validation and HellaSwag give
    the ranks unequal shares, and rank 0 alone draws samples.
    """

    def __init__(self, model, device, autocast, world=World(), batch_size=16, compile=False):
        """batch_size: rows of a validation batch; compile: compile the validation loss on CUDA."""
        self.model, self.device, self.autocast, self.world = model, device, autocast, world
        self.batch_size = batch_size
        self.is_sharded = is_sharded(next(model.parameters()))
        self.batch_loss = make_batch_loss(model, device, batch_size, compile)

    @torch.no_grad()
    def validation_loss(self, loader, n_tokens):
        """Mean loss in nats per token over the first n_tokens predictions of a split.

        It is the same for any number of processes. Collective.
        """
        world, device = self.world, self.device
        self.model.eval()
        n_tokens = min(n_tokens, loader.n_tokens - 1)  # nothing follows the last token of the split
        # summed up on the GPU, so that the host does not wait for each batch
        sum_device = device if device.type == "cuda" else "cpu"
        total = torch.zeros(1, dtype=torch.float64, device=sum_device)
        n_batches = math.ceil(n_tokens / (loader.block_size * world.size * self.batch_size))
        batches = loader.batches(0, n_tokens, self.batch_size, world, self.model.config.vocab_size)
        batches = tqdm(batches, total=n_batches, desc="validation", leave=False,
                       disable=None if world.rank == 0 else True)
        with self:
            for x, y, n, _ in batches:
                if n == 0:
                    continue  # rows that pad: this rank has no share
                loss = self.batch_loss(x.to(device), y.to(device))
                total += loss.to(total.device).double() * n
        total = total.cpu()
        if world.size > 1:
            dist.all_reduce(total)
        return total.item() / n_tokens

    def __enter__(self):
        self.autocast.__enter__()
        if self.is_sharded:
            self.eager = torch.compiler.set_stance("force_eager")
            self.eager.__enter__()
            self.hidden = self.model.hidden
            self.model.hidden = self.hidden_on_all_ranks

    def hidden_on_all_ranks(self, *args, **kwargs):
        any_rank(True, self.world)  # tells the ranks that have left to take part
        return self.hidden(*args, **kwargs)

    def __exit__(self, *error):
        if self.is_sharded:
            self.model.hidden = self.hidden
            if error[0] is None:
                self.follow_the_others()
            self.eager.__exit__(*error)
        self.autocast.__exit__(*error)

    @torch.no_grad()
    def follow_the_others(self):
        idx = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        while any_rank(False, self.world):
            self.hidden(idx)
        self.model.reshard()


def make_batch_loss(model, device, batch_size, compile):
    """A function (idx, targets) -> mean loss for batches of up to batch_size rows.

    On CUDA the loss is computed in chunks, compiled if that is asked for; elsewhere it is the
    model's own loss, to the last bit.
    """
    if device.type != "cuda":
        # forward without the module's hooks: a sharded model's would gather weights before
        # Evaluator has told the ranks without a share to take part
        return lambda idx, targets: model.forward(idx, targets, return_logits=False)[1]
    loss = compile_model(chunked_loss, device, dynamic=False) if compile else chunked_loss

    def padded_loss(idx, targets):
        # one shape for all batches: another one would be compiled for the last batch alone
        missing = (0, 0, 0, batch_size - len(idx))
        targets = F.pad(targets, missing, value=-1)
        return loss(model, F.pad(idx, missing), targets, HEAD_ROWS)

    return padded_loss


def chunked_loss(model, idx, targets, head_rows):
    """The mean loss in nats of tokens idx (B, T) that targets (B, T) follow; -1 doesn't count.

    The head computes the logits of head_rows positions at a time: a batch's float32 logits would
    take gigabytes.
    """
    x = model.hidden(idx).flatten(0, 1)  # (B * T, n_embd)
    targets = targets.flatten()
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for h, t in zip(x.split(head_rows), targets.split(head_rows), strict=True):
        logits = model.lm_head(h)  # (head_rows, vocab_size)
        total = total + F.cross_entropy(logits, t, ignore_index=-1, reduction="sum")
    return total / (targets != -1).sum()
