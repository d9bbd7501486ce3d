"""How much memory a training step needs, estimated from shapes.

`--plan` prints the estimate, `--batch_size 0` uses it on a CPU, and `bench.py gpu` shows it beside
what it measures. tests/training/test_plan.py compares it with the peak of real processes.
"""

from dataclasses import dataclass

from gptlib.training.optim import ELEMENTS_AT_ONCE

# Bytes that a block keeps for each token and channel until its backward pass, under autocast to 16
# bits: the residual stream before each layer norm (4 + 4), the outputs of the layer norms (2 + 2),
# queries, keys and values (6), attention's output (2), and the wide layer before and after GELU
# (8 + 8). Compiled or not, it is the same. In float32 only the stream does not double.
BLOCK_BYTES = {16: 36, 32: 64}
STREAM_BYTES = 4  # what a recomputed block keeps: its input, in float32
FINAL_BYTES = 10  # of the last layer norm, its output and the embedding, for each channel

# Bytes for each logit at the moment when most exist. Eager: the float32 log-probabilities, their
# gradient and that of the logits. Compiled: the logits and their gradient, the rest is fused.
LOGIT_BYTES_EAGER = 12
LOGIT_BYTES_COMPILED = {16: 4, 32: 8}

PARTS = ("weights", "gradients", "optimizer", "16-bit weights", "activations", "logits", "buckets")


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
    """The Sizes of a GPT; one on the meta device will do."""
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
    """Bytes of what the blocks keep for the backward pass of `tokens` tokens.

    config: a GPTConfig or Sizes; recomputed: how many of the blocks keep only their input. One
    block more is counted, for what the backward pass of a block holds besides.
    """
    kept = config.n_layer - recomputed + 1
    per_channel = kept * BLOCK_BYTES[bits] + recomputed * STREAM_BYTES + FINAL_BYTES
    return tokens * config.n_embd * per_channel


def logit_bytes(config, tokens, bits=16, compiled=False):
    """Bytes of the logits of `tokens` tokens, of the loss and of their gradients, at the peak."""
    per_logit = LOGIT_BYTES_COMPILED[bits] if compiled else LOGIT_BYTES_EAGER
    return tokens * config.vocab_size * per_logit


@dataclass(frozen=True)
class Memory:
    """Bytes by part, and the most that exists at once (not every part exists all the time)."""
    parts: dict
    peak: int


def estimate_memory(sizes, cfg, batch_size, ranks=1, accumulate=None, bits=16):
    """The Memory that a step of cfg needs on each of `ranks` devices at micro-batches of
    batch_size.

    accumulate: whether a step has several micro-batches, so that gradients exist during a forward
    pass; by default as cfg.total_batch_size asks for it. bits: 16 under autocast, else 32.
    """
    tokens = batch_size * sizes.block_size
    if accumulate is None:
        accumulate = tokens * ranks < cfg.total_batch_size
    share = (cfg.shard_ranks or ranks) if cfg.shard else 1
    recomputed = -(-sizes.n_layer // cfg.recompute_every) if cfg.recompute else 0
    sharded = cfg.shard and share > 1
    weights = 4 * sizes.total // share
    gradients = 4 * sizes.total // share
    optimizer, optimizer_work = optimizer_bytes(sizes, cfg.optimizer, share)
    copies = 0
    if bits == 16:
        copies = 2 * (sizes.hidden + sizes.tied)
        if cfg.shard:  # autocast keeps no copies: only the graph does, of the blocks that it keeps
            kept = sizes.n_layer - recomputed + 1
            copies = 2 * (sizes.tied + kept * sizes.hidden // sizes.n_layer)
    activations = activation_bytes(sizes, tokens, bits, recomputed)
    # a sharded model compiles its blocks, not the head and the loss
    logits = logit_bytes(sizes, tokens, bits, cfg.compile and not cfg.shard)
    tie = 4 * sizes.tied  # the head's gradient waits for the embedding's
    root, blocks = gathered_bytes(sizes) if sharded else (0, 0)
    if accumulate and share > 1 and not cfg.reduce_each:
        gradients = 4 * sizes.total  # whole until the last micro-batch, then they are reduced
    # DDP's buckets, which hold the gradients, are never given back
    before = gradients if accumulate or (ranks > 1 and not cfg.shard) else 0
    forward = before + copies + activations + root + max(logits, tie + blocks)
    # the embedding's gradient comes when the blocks have theirs; nothing is gathered then
    both = tie if accumulate or sharded else 0
    backward = gradients + root + tie + max(both, blocks)
    update = gradients + optimizer_work
    peak = weights + optimizer + max(forward, backward, update)
    parts = (weights, gradients, optimizer, copies, activations, logits, root + blocks)
    return Memory(dict(zip(PARTS, parts, strict=True)), peak)


def optimizer_bytes(sizes, name, share):
    """Bytes of the optimizer's state on a rank, and of what its step needs besides."""
    if name == "adamw":  # two moments; the step is fused
        return 8 * sizes.total // share, 0
    # one momentum for each hidden matrix; in 16 bits the directions and updates of all, and three
    # tensors for the batch of one shape, a third of the elements
    state = (8 * (sizes.total - sizes.hidden) + 4 * sizes.hidden) // share
    if share == 1:
        return state, 6 * sizes.hidden
    at_once = max(ELEMENTS_AT_ONCE, sizes.hidden // (4 * sizes.n_layer))  # a matrix for each rank
    return state, 10 * min(sizes.hidden // share, at_once)


def gathered_bytes(sizes):
    """(bytes of what is whole outside of the blocks, and of the blocks, in a sharded model's step).

    The weights outside of the blocks stay whole from the beginning of the forward to the end of
    the backward pass. Of the blocks there are at most five at once, in the backward pass: one that
    computes, its gradients, those of the block before, which are being reduced, and the next one,
    which arrives in a buffer and is copied to where it belongs. gloo has a buffer of its own until
    then.
    """
    return 4 * sizes.root, 5 * 4 * sizes.block


def checkpoint_bytes(sizes, optimizer):
    """Bytes of a checkpoint: float32 weights and the optimizer's state."""
    return 4 * sizes.total + optimizer_bytes(sizes, optimizer, 1)[0]
