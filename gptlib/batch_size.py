"""The largest micro-batch that fits into memory, for --batch_size 0."""

import os

import torch
import torch.distributed as dist

from gptlib.memory import activation_bytes, logit_bytes
from gptlib.runtime import preserved_rng


def find_batch_size(model, block_size, total_batch_size, device, autocast, world):
    """The most sequences, a power of two, whose forward and backward pass fit beside the state of
    AdamW.

    All ranks get the same answer, the smallest of theirs. It draws nothing from the random state
    of the run: with dropout a trial step would, and a resumed run would no longer equal the
    uninterrupted one.
    """
    enough = total_batch_size // (block_size * world.size)
    batch_size = 1 << max(0, enough.bit_length() - 1)  # more is never needed
    with preserved_rng(device):
        while batch_size > 1 and not fits(model, batch_size, block_size, device, autocast):
            batch_size //= 2
    if world.size > 1:
        smallest = torch.tensor(batch_size)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        batch_size = int(smallest)
    return batch_size


def fits(model, batch_size, block_size, device, autocast):
    """Whether a training step of batch_size sequences fits into the memory of the device."""
    if device.type == "cpu":
        # there is no error to catch, the system kills the process: so the bytes are estimated, for
        # float32, on the safe side
        tokens = batch_size * block_size
        needed = activation_bytes(model.config, tokens, bits=32) + logit_bytes(model.config, tokens)
        return needed < free_host_memory() / 2
    try:
        adamw_state = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]
        idx = torch.zeros(batch_size, block_size, dtype=torch.int64, device=device)
        with autocast:
            _, loss = model(idx, idx)
        loss.backward()
        del adamw_state
        return True
    except RuntimeError as e:
        if "out of memory" not in str(e):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)


def free_host_memory():
    """Bytes of memory that are free on this machine; 4 GiB where the system does not tell."""
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", ()):  # Linux has it
        return 4 << 30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
