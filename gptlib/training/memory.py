"""How much memory a training step needs, and the largest micro-batch that fits into it.

The need is estimated from shapes: `plan.py` prints the estimate, and `--batch_size 0` relies on it
for sharded models and on a CPU. tests/training/test_memory.py compares it with the peak of real
processes, and `bench.py gpu` with the peak of a GPU.
"""

import contextlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gptlib.common import UserError
from gptlib.distributed import World
from gptlib.runtime import preserved_rng

# Bytes that a block keeps for each token and channel until its backward pass, under autocast to 16
# bits: the residual stream before each layer norm (4 + 4), the outputs of the layer norms (2 + 2),
# queries, keys and values (6), attention's output (2), and the wide layer before and after GELU
# (8 + 8). Compiled or not, it is the same. In float32 only the stream does not double.
BLOCK_BYTES = {16: 36, 32: 64}
STREAM_BYTES = 4  # what a recomputed block keeps: its input, in float32
FINAL_BYTES = 10  # the last layer norm, its output and the embedding, for each channel

# Peak bytes per logit. Eager: the float32 log-probabilities, their gradient and that of the logits.
# Compiled: the logits alone, since their gradient takes their place.
LOGIT_BYTES_EAGER = 12
LOGIT_BYTES_COMPILED = {16: 2, 32: 4}

# Muon updates sharded matrices in parts of about this many elements a rank, since it needs ten
# bytes for each of them. A model that has to be sharded has no memory for all of them at once.
MUON_ELEMENTS_AT_ONCE = 2**25

# The share of memory that an estimate may fill. The estimate counts tensors; libraries and what an
# allocator can't use again take the rest.
PLANNED_SHARE = 0.85

PARTS = ("weights", "gradients", "optimizer", "16-bit weights", "activations", "logits", "buckets")

# -----------------------------------------------------------------------------
# the estimate


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of a model, and its shape.

    hidden: in the matrices of the blocks, which Muon trains; block: in one block; tied: in the
    matrix that is both embedding and head; root: outside of the blocks, `tied` included.
    """
    total: int
    hidden: int
    block: int
    tied: int
    root: int
    n_layer: int
    n_embd: int
    vocab_size: int
    block_size: int


def model_sizes(model):
    """The Sizes of a GPT, which may be on the meta device."""
    config = model.config
    in_blocks, hidden, total = 0, 0, 0
    for name, p in model.named_parameters():  # the tied matrix comes once
        total += p.numel()
        if name.startswith("transformer.h."):
            in_blocks += p.numel()
            hidden += p.numel() if p.dim() == 2 else 0
    return Sizes(total, hidden, in_blocks // config.n_layer, model.lm_head.weight.numel(),
                 total - in_blocks, config.n_layer, config.n_embd, config.vocab_size,
                 config.block_size)


def activation_bytes(config, tokens, bits=16, recomputed=0):
    """Bytes that the blocks keep for the backward pass of this many tokens.

    config: a GPTConfig or Sizes; recomputed: how many blocks keep only their input.
    """
    kept = config.n_layer - recomputed
    per_channel = kept * BLOCK_BYTES[bits] + recomputed * STREAM_BYTES + FINAL_BYTES
    return tokens * config.n_embd * per_channel


def working_bytes(config, tokens, bits=16):
    """Bytes that the backward pass of a block needs besides, as many as a block keeps."""
    return tokens * config.n_embd * BLOCK_BYTES[bits]


def logit_bytes(config, tokens, bits=16, compiled=False):
    """Peak bytes of the logits of this many tokens, of their loss and of their gradients."""
    per_logit = LOGIT_BYTES_COMPILED[bits] if compiled else LOGIT_BYTES_EAGER
    return tokens * config.vocab_size * per_logit


@dataclass(frozen=True)
class Memory:
    """Bytes by part, and the peak; not every part exists all the time."""
    parts: dict
    peak: int


def estimate_memory(sizes, layout, optimizer, total_batch_size, batch_size, ranks=1,
                    accumulate=None, bits=16):
    """The Memory that a step needs on each of `ranks` devices at micro-batches of batch_size.

    layout: a parallel.Layout; optimizer: "adamw" or "muon". accumulate: whether a step has several
    micro-batches, so that gradients exist during a forward pass (default: if total_batch_size asks
    for it). bits: 16 under autocast, else 32.
    """
    tokens = batch_size * sizes.block_size
    if accumulate is None:
        accumulate = tokens * ranks < total_batch_size
    share = (layout.shard_ranks or ranks) if layout.shard else 1
    every = layout.recompute_every
    recomputed = -(-sizes.n_layer // every) if every else 0
    sharded = layout.shard and share > 1
    weights = 4 * sizes.total // share
    gradients = 4 * sizes.total // share
    optimizer_state, optimizer_work = optimizer_bytes(sizes, optimizer, share, bits)
    copies = 0
    if bits == 16:
        copies = 2 * (sizes.hidden + sizes.tied)
        if layout.shard:  # only the graph keeps copies, those of the blocks it keeps
            kept = sizes.n_layer - recomputed + 1
            copies = 2 * (sizes.tied + kept * sizes.hidden // sizes.n_layer)
    activations = activation_bytes(sizes, tokens, bits, recomputed)
    working = working_bytes(sizes, tokens, bits)
    # a sharded model compiles its blocks, not the head and the loss
    is_compiled = layout.compile and not layout.shard
    logits = logit_bytes(sizes, tokens, bits, is_compiled)
    if is_compiled:  # the logits are gone before the first block works: the larger one counts
        logits_and_working = max(logits, working)
    else:
        logits_and_working = logits + working
    tie = 4 * sizes.tied  # the head's gradient waits for the embedding's
    tied_sum = tie if bits == 32 else 0  # in float32 the sum of the two is a third tensor
    root, blocks = gathered_bytes(sizes) if sharded else (0, 0)
    if accumulate and share > 1 and not layout.reduce_each:
        gradients = 4 * sizes.total  # whole until the last micro-batch, then they are reduced
    # DDP's buckets are never freed, and until the last micro-batch gradients add up beside them
    is_ddp = ranks > 1 and not layout.shard
    before = (gradients if accumulate else 0) + (gradients if is_ddp else 0)
    forward = before + copies + activations + root + max(logits_and_working, tie + blocks)
    # the embedding's gradient comes after those of the blocks; nothing is gathered then
    both = tie if accumulate or sharded else 0
    backward = max(before, gradients) + root + tie + tied_sum + max(both, blocks)
    update = gradients + optimizer_work
    peak = weights + optimizer_state + max(forward, backward, update)
    gradients = max(before, gradients)
    parts = (weights, gradients, optimizer_state, copies, activations + working, logits,
             root + blocks)
    return Memory(dict(zip(PARTS, parts, strict=True)), peak)


def optimizer_bytes(sizes, name, share, bits=16):
    """(bytes of the optimizer's state on a rank, bytes that its step needs besides).

    share: the number of ranks that divide the model among them.
    """
    if name == "adamw":  # two moments; the step is fused
        return 8 * sizes.total // share, 0
    # one momentum for each hidden matrix; in 16 bits the directions and updates of all, and three
    # tensors for the batch of one shape, a third of the elements. These have 32 bits on a CPU
    # without bfloat16, and the products copy them once more.
    state = (8 * (sizes.total - sizes.hidden) + 4 * sizes.hidden) // share
    if share == 1:
        return state, (6 if bits == 16 else 10) * sizes.hidden
    # a matrix for each rank
    at_once = max(MUON_ELEMENTS_AT_ONCE, sizes.hidden // (4 * sizes.n_layer))
    return state, 10 * min(sizes.hidden // share, at_once)


def gathered_bytes(sizes):
    """(bytes of whole weights outside of the blocks, bytes of whole blocks) in a sharded step.

    The weights outside of the blocks stay whole from the beginning of the forward to the end of
    the backward pass. At most five blocks are whole at once, in the backward pass: the one that
    computes, its gradients, those of the block before, which are being reduced, and the next one,
    which arrives in a buffer and is copied to its place. gloo has one more buffer until then.
    """
    return 4 * sizes.root, 5 * 4 * sizes.block


def checkpoint_bytes(sizes, optimizer):
    """Bytes of a checkpoint: float32 weights and the optimizer's state."""
    return 4 * sizes.total + optimizer_bytes(sizes, optimizer, 1)[0]


# -----------------------------------------------------------------------------
# the largest micro-batch, for --batch_size 0


def choose_batch_size(model, layout, optimizer, total_batch_size, device, autocast, dtype, world):
    """The sequences per micro-batch of --batch_size 0: a power of two, the same on all ranks.

    Trial steps find it. For a sharded model it is estimated: a process that ran out of memory in a
    trial step would leave the others waiting. Collective: every process calls it.
    """
    if layout.shard:
        budget = PLANNED_SHARE * usable_memory(device)
        bits = 32 if dtype == torch.float32 else 16
        return planned_batch_size(model_sizes(model), layout, optimizer, total_batch_size, budget,
                                  bits, world)
    return find_batch_size(model, total_batch_size, device, autocast, world)


def planned_batch_size(sizes, layout, optimizer, total_batch_size, budget, bits, world):
    """The largest power of two of sequences whose step is estimated to fit on every rank.

    budget: the bytes that this rank may use. Collective.
    """
    batch_size = most_needed(sizes.block_size, total_batch_size, world)

    def peak():
        return estimate_memory(sizes, layout, optimizer, total_batch_size, batch_size, world.size,
                               bits=bits).peak

    while batch_size > 1 and peak() > budget:
        batch_size //= 2
    return smallest_of_all(batch_size, world)


def find_batch_size(model, total_batch_size, device, autocast, world):
    """The largest power of two of sequences whose forward and backward pass fit beside AdamW's
    state. Collective.

    The search draws nothing from the random state of the run. With dropout a trial step would, and
    a resumed run would no longer equal the uninterrupted one.
    """
    batch_size = most_needed(model.config.block_size, total_batch_size, world)
    with preserved_rng(device):
        while batch_size > 1 and not fits(model, batch_size, device, autocast, world):
            batch_size //= 2
    if device.type == "cuda":
        torch.cuda.empty_cache()  # NCCL takes its memory beside torch's
    return smallest_of_all(batch_size, world)


def most_needed(block_size, total_batch_size, world):
    """The largest power of two of sequences that a process can have in a step."""
    enough = total_batch_size // (block_size * world.size)
    return 1 << max(0, enough.bit_length() - 1)


def smallest_of_all(batch_size, world):
    """The smallest of the batch sizes of all ranks. Collective."""
    if world.size > 1:
        smallest = torch.tensor(batch_size)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        batch_size = int(smallest)
    return batch_size


def fits(model, batch_size, device, autocast, world=World()):
    """Whether a training step of batch_size sequences fits into the memory of the device, beside
    AdamW's two moments and, if there are several processes, DDP's buckets."""
    block_size = model.config.block_size
    if device.type == "cpu":
        # A CPU raises no error that could be caught, the system kills the process. So the bytes are
        # estimated, for float32, on the safe side.
        tokens = batch_size * block_size
        needed = (activation_bytes(model.config, tokens, bits=32)
                  + logit_bytes(model.config, tokens)
                  + working_bytes(model.config, tokens, bits=32))
        return needed < free_host_memory() / 2
    try:
        copies = 2 if world.size == 1 else 3
        held = [torch.empty_like(p) for p in model.parameters() for _ in range(copies)]
        idx = torch.zeros(batch_size, block_size, dtype=torch.int64, device=device)
        with autocast:
            _, loss = model(idx, idx)
        loss.backward()
        del held
        return True
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)


def is_out_of_memory(error):
    """Whether a RuntimeError says that memory has run out.

    Only CUDA has an exception class for it; an Apple GPU and a CPU have none.
    """
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


# -----------------------------------------------------------------------------
# memory of this machine


def usable_memory(device):
    """Bytes that this process may use: those that are free, and those that it holds already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return free_host_memory() / processes + resident_bytes()


def resident_bytes():
    """Bytes of this process that are in memory; 0 if the system does not tell."""
    try:
        with open("/proc/self/statm") as file:  # Linux has it
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def free_host_memory():
    """Bytes of memory that are free on this machine; 4 GiB if the system does not tell."""
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", ()):  # Linux has it
        return 4 << 30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
