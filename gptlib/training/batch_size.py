"""The largest micro-batch that fits into memory, for --batch_size 0."""

import contextlib
import os

import torch
import torch.distributed as dist

from gptlib.common import UserError
from gptlib.training.memory import activation_bytes, estimate_memory, logit_bytes, model_sizes
from gptlib.runtime import preserved_rng

PLANNED_SHARE = 0.85  # of the memory: tests/training/test_sharded.py requires the plan to be right to 15 %


def choose_batch_size(model, cfg, device, autocast, dtype, world):
    """The micro-batch of --batch_size 0: found by trial steps, of a sharded model by the plan.

    There a process that ran out of memory in a trial step would leave the others waiting.
    """
    if cfg.shard:
        memory = PLANNED_SHARE * usable_memory(device)
        bits = 32 if dtype == torch.float32 else 16
        return planned_batch_size(model_sizes(model), cfg, memory, bits, world)
    return find_batch_size(model, cfg.block_size, cfg.total_batch_size, device, autocast, world)


def planned_batch_size(sizes, cfg, memory, bits, world):
    """The most sequences, a power of two, whose step is planned to fit into the memory of every
    rank; `memory`, in bytes, is this rank's."""
    batch_size = most_needed(sizes.block_size, cfg.total_batch_size, world)

    def needed():
        return estimate_memory(sizes, cfg, batch_size, world.size, bits=bits).peak

    while batch_size > 1 and needed() > memory:
        batch_size //= 2
    return smallest_of_all(batch_size, world)


def usable_memory(device):
    """Bytes that are free for this process, and those that it holds already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return free_host_memory() / processes + resident_bytes()


def resident_bytes():
    """Bytes of this process that are in memory; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:  # Linux has it
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def find_batch_size(model, block_size, total_batch_size, device, autocast, world):
    """The most sequences, a power of two, whose forward and backward pass fit beside the state of
    AdamW.

    All ranks get the same answer, the smallest of theirs. It draws nothing from the random state
    of the run: with dropout a trial step would, and a resumed run would no longer equal the
    uninterrupted one.
    """
    batch_size = most_needed(block_size, total_batch_size, world)
    with preserved_rng(device):
        while batch_size > 1 and not fits(model, batch_size, block_size, device, autocast):
            batch_size //= 2
    return smallest_of_all(batch_size, world)


def most_needed(block_size, total_batch_size, world):
    """The largest power of two of sequences that a process can have in a step."""
    enough = total_batch_size // (block_size * world.size)
    return 1 << max(0, enough.bit_length() - 1)


def smallest_of_all(batch_size, world):
    """The smallest of the batch sizes of all ranks; every rank has to call it."""
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
        if not is_out_of_memory(e):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)


def is_out_of_memory(error):
    """Whether a RuntimeError says that memory has run out: only CUDA has a class for that, an Apple
    GPU and a CPU have none."""
    texts = ("out of memory", "DefaultCPUAllocator")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


@contextlib.contextmanager
def memory_errors_told(batch_size):
    """A context in which running out of memory raises a UserError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory at --batch_size {batch_size}: try half of it, or 0 to find "
                        "what fits") from error


def free_host_memory():
    """Bytes of memory that are free on this machine; 4 GiB where the system does not tell."""
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", ()):  # Linux has it
        return 4 << 30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
