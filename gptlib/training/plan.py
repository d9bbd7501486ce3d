"""`train_gpt2.py --plan`: what a run needs before its machine is rented.

Parameters, memory of each GPU by part, the largest micro-batch and the flags to type, time, cost
and disk. With --gpu it computes from published figures (gpu_facts.py); without, it measures a few
micro-batches on this machine. It needs no data.
"""

import dataclasses
import math
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from gptlib.training.batch_size import free_host_memory
from gptlib.common import UserError, duration
from gptlib.data.shards import list_shards
from gptlib.training.gpu_facts import GPUS_PER_HOST, find_gpu, published_mfu
from gptlib.training.memory import PARTS, checkpoint_bytes, estimate_memory, model_sizes
from gptlib.training.parallel import recompute_blocks
from gptlib.training.presets import DEMO_VOCAB_SIZE
from gptlib.runtime import (device_name, prepare_attention, prepare_device, resolve_device,
                            resolve_dtype)
from gptlib.data.tokenizer import load_tokenizer

GIB = 2**30
GPT2_TOKENS = 50257
BYTES_PER_TOKEN = 2  # of a shard
PROCESS_BYTES = 320 * 2**20  # Python and torch, resident before there is a model
MEASURE_SECONDS = 20  # no micro-batch is begun after them
MEASURE_TOKENS = 2048  # of a micro-batch that is measured, unless one sequence is longer
MEASURE_PARAMETERS = 3e8  # a larger model is measured with 2 and 4 of its blocks

# In the order in which they cost time: sharding hides behind the computation, recomputing adds a
# third to it, and reducing after each micro-batch adds communication.
VARIANTS = ("plain", "--shard", "--recompute", "--shard --recompute",
            "--shard --recompute --reduce_each")


# -----------------------------------------------------------------------------
# memory


def variants(cfg, ranks):
    """{flags: cfg with them}; one device alone has nothing to shard over."""
    found = {}
    for flags in VARIANTS:
        shard, recompute = "--shard" in flags, "--recompute" in flags
        if ranks > 1 or not shard:
            found[flags] = dataclasses.replace(
                cfg, shard=shard, recompute=recompute,
                shard_ranks=cfg.shard_ranks if shard else 0,
                reduce_each=shard and (cfg.reduce_each or "--reduce_each" in flags))
    return found


def largest_batch_size(sizes, cfg, ranks, budget, bits=16):
    """The most sequences per micro-batch whose step fits into budget bytes; 0 where not even one
    does.

    It is not the first that does not fit: a step of a single micro-batch keeps no gradients
    during the forward pass.
    """
    enough = math.ceil(cfg.total_batch_size / (sizes.block_size * ranks))
    for batch_size in range(enough, 0, -1):
        if estimate_memory(sizes, cfg, batch_size, ranks, bits=bits).peak <= budget:
            return batch_size
    return 0


@dataclass(frozen=True)
class Choice:
    """flags: those of the first variant that fits, with its cfg and its largest micro-batch."""
    flags: str
    cfg: object
    batch_size: int


def choose(sizes, cfg, ranks, budget, bits=16):
    """The Choice of the first variant that fits, in the order of VARIANTS; None where none does.

    What cfg asks for already stays: with --shard only sharded ones count.
    """
    wants_shard = cfg.shard and ranks > 1
    for flags, variant in variants(cfg, ranks).items():
        if wants_shard > variant.shard or cfg.recompute > variant.recompute:
            continue
        batch_size = largest_batch_size(sizes, variant, ranks, budget, bits)
        if batch_size:
            return Choice(flags, variant, batch_size)
    return None


# -----------------------------------------------------------------------------
# time


def group_size(cfg, ranks):
    """How many ranks gather and reduce together: those that hold one copy of a sharded model, or
    all."""
    return (cfg.shard_ranks or ranks) if cfg.shard else ranks


def traffic(sizes, cfg, batch_size, ranks):
    """(bytes that a GPU sends inside its group in a step, bytes between copies of the model).

    A ring sends (n - 1) / n of a tensor to gather or to reduce it, and twice that to do both.
    Everything is float32. DDP reduces the gradients once a step. A sharded model gathers each
    block's weights for the forward and for the backward pass of every micro-batch, those outside
    of the blocks once, and reduces the gradients once a step, with --reduce_each once a
    micro-batch. Muon's updates travel in 16 bits; sharded, each rank sends the gradients of its
    rows to their owners, and an owner sends the updates back.
    """
    group = group_size(cfg, ranks)
    around = (group - 1) / group
    updates = 2 * sizes.hidden if cfg.optimizer == "muon" else 0
    micro_steps = math.ceil(cfg.total_batch_size / (batch_size * sizes.block_size * ranks))
    reduced = 4 * sizes.total * (micro_steps if cfg.reduce_each else 1)
    if not cfg.shard:
        return around * (2 * reduced + updates), 0
    gathered = 2 * 4 * (sizes.total - sizes.root) + 4 * sizes.root
    inside = around * (micro_steps * gathered + reduced + 2 * updates / group)
    copies = ranks // group
    between = 2 * (copies - 1) / copies * reduced / group
    return inside, between


def communication_seconds(sizes, cfg, batch_size, ranks, gpu):
    """Seconds a step spends on communication if nothing else runs, from bytes and bandwidths.

    Between hosts all adapters of a host work for one collective, so a ring over all GPUs is as
    fast as the slower of a GPU's link and its host's adapters together.
    """
    inside, between = traffic(sizes, cfg, batch_size, ranks)
    bandwidth = gpu.link
    if group_size(cfg, ranks) > GPUS_PER_HOST:
        bandwidth = min(gpu.link, GPUS_PER_HOST * gpu.network)
    return inside / bandwidth + between / (gpu.link if ranks <= GPUS_PER_HOST else gpu.network)


def computing_seconds(cfg, flops_per_token, ranks, peak, mfu):
    """Seconds a step spends on computation, at a published utilization of a peak in FLOP/s."""
    return cfg.total_batch_size * flops_per_token / (ranks * peak * mfu)


def validation_tokens(cfg):
    """Tokens that the evaluations of a run read, as many as its data have."""
    evaluations = math.ceil(cfg.max_steps / cfg.eval_interval) + 1
    return evaluations * cfg.val_tokens


def run_seconds(cfg, step_seconds, tokens_per_second):
    """Seconds of all steps and of the validations, which need a third of a step's computation."""
    return cfg.max_steps * step_seconds + validation_tokens(cfg) / (3 * tokens_per_second)


def time_micro_batch(model, batch_size, device, dtype, seconds):
    """The median seconds of the forward and backward pass of batch_size sequences: of as many as
    begin within `seconds`, up to five, after one to warm up."""
    config = model.config
    idx = torch.randint(config.vocab_size, (batch_size, config.block_size), device=device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    measured = []
    begin = time.perf_counter()
    while len(measured) < 2 or len(measured) < 6 and time.perf_counter() - begin < seconds:
        t0 = time.perf_counter()
        with autocast:
            _, loss = model(idx, idx, return_logits=False)
        loss.backward()
        model.zero_grad(set_to_none=True)
        loss.item()  # waits for a GPU
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        measured.append(time.perf_counter() - t0)
    return statistics.median(measured[1:])


def measure_tokens_per_second(create, cfg, sizes, device, dtype):
    """(tokens a second of this device, how it was measured in words), with --recompute if cfg has
    it.

    Not compiled, since compiling takes longer than measuring. A large model is measured with 2 and
    with 4 blocks, and the others are assumed to take as long as the third and the fourth.
    """
    prepare_device(device)
    prepare_attention(device, dtype, sizes.block_size)
    batch_size = max(1, min(cfg.batch_size, MEASURE_TOKENS // sizes.block_size))

    def measure(n_layer, seconds):
        model = create(dataclasses.replace(cfg, n_layer=n_layer)).to(device)
        recompute_blocks(model, cfg)
        return time_micro_batch(model, batch_size, device, dtype, seconds)

    if sizes.total <= MEASURE_PARAMETERS or sizes.n_layer <= 4:
        seconds = measure(sizes.n_layer, MEASURE_SECONDS)
        how = "measured uncompiled"
    else:
        few, more = measure(2, MEASURE_SECONDS / 2), measure(4, MEASURE_SECONDS / 2)
        seconds = few + (sizes.n_layer - 2) * max(more - few, 0) / 2
        how = "measured uncompiled with 2 and with 4 blocks and extrapolated"
    rate = batch_size * sizes.block_size / seconds
    return rate, f"{how}, {batch_size} x {sizes.block_size} tokens"


# -----------------------------------------------------------------------------
# what is printed


def shown(n_bytes):
    return f"{n_bytes / GIB:,.2f}" if n_bytes < 10 * GIB else f"{n_bytes / GIB:,.1f}"


def memory_lines(sizes, cfg, ranks, budget, bits):
    """The table of the memory of each device by part, at the micro-batch of cfg.

    With --batch_size 0 each variant is shown at its largest.
    """
    columns = {}
    for flags, variant in variants(cfg, ranks).items():
        largest = largest_batch_size(sizes, variant, ranks, budget, bits)
        batch_size = cfg.batch_size or max(largest, 1)
        memory = estimate_memory(sizes, variant, batch_size, ranks, bits=bits)
        rows = [str(batch_size), *(shown(memory.parts[part]) for part in PARTS),
                shown(memory.peak), str(largest) if largest else "none"]
        columns[flags] = rows
    names = ["micro-batch, sequences", *PARTS, "most at once", "largest --batch_size"]
    titles = [flags.replace("--shard --recompute", "both") for flags in columns]
    lines = ["GiB on each device      " + "".join(f"{title:>{max(14, len(title) + 2)}}"
                                                  for title in titles)]
    for i, name in enumerate(names):
        cells = [f"{rows[i]:>{max(14, len(title) + 2)}}"
                 for rows, title in zip(columns.values(), titles, strict=True)]
        lines.append(f"{name:24}" + "".join(cells))
    return lines


def command(argv, choice, ranks):
    """The command line to type: the given flags, without those of the plan, with the choice's."""
    replaced = ("plan", "gpus", "gpu", "dollars_per_hour", "batch_size", "shard", "recompute")
    switches = ("plan", "shard", "recompute")
    given, words = [], iter(argv)
    for word in words:
        name = word.split("=")[0].removeprefix("--").removeprefix("no-")
        if word.startswith("--") and name in replaced:
            if "=" not in word and name not in switches:
                next(words, None)
        else:
            given.append(word)
    flags = choice.flags.split() if choice.flags != "plain" else []
    flags = [flag for flag in flags if flag not in given]
    launch = ["python", "train_gpt2.py"]
    if ranks > 1:
        hosts = math.ceil(ranks / GPUS_PER_HOST)
        nodes = ["--standalone"] if hosts == 1 else [
            f"--nnodes={hosts}", "--rdzv_backend=c10d", "--rdzv_endpoint=FIRST_HOST:29500"]
        launch = ["torchrun", *nodes, f"--nproc_per_node={ranks // hosts}", "train_gpt2.py"]
    return shlex.join([*launch, *given, *flags, "--batch_size", str(choice.batch_size)])


def disk_lines(sizes, cfg):
    """What a run writes and reads: shards and checkpoints."""
    tokens = cfg.max_steps * cfg.total_batch_size
    each = checkpoint_bytes(sizes, cfg.optimizer)
    count = math.ceil(cfg.max_steps / cfg.checkpoint_interval)
    if cfg.keep_checkpoints:
        count = min(count, cfg.keep_checkpoints + 1)  # the oldest goes when the newest is written
    return [f"disk: {tokens * BYTES_PER_TOKEN / 1e9:,.1f} GB of shards for {tokens:,} tokens read "
            "once (2 bytes a token; a smaller dataset is read again)",
            f"disk: {count * each / 1e9:,.1f} GB of checkpoints, {count} of {each / 1e9:,.2f} GB; "
            f"as much as one in the host's memory while it is written"]


def time_lines(cfg, step_seconds, tokens_per_second, n_gpus):
    """Speed, hours and dollars of the whole run."""
    seconds = run_seconds(cfg, step_seconds, tokens_per_second)
    lines = [f"speed: {tokens_per_second:,.0f} tokens a second, a step of "
             f"{cfg.total_batch_size:,} tokens in {step_seconds:,.2f} s",
             f"time: {duration(seconds)} for {cfg.max_steps:,} steps and their validations, "
             "without HellaSwag, samples and checkpoints"]
    if cfg.dollars_per_hour:
        dollars = seconds / 3600 * cfg.dollars_per_hour
        lines.append(f"cost: {dollars:,.2f} dollars at {cfg.dollars_per_hour:,.2f} an hour for "
                     f"{n_gpus} together")
    else:
        lines.append("cost: give --dollars_per_hour, the price of all of them together")
    return lines


def published_lines(sizes, flops_per_token, choice, ranks, gpu, bits):
    """Speed and time from published figures, with their sources."""
    cfg = choice.cfg
    mfu, source = published_mfu(gpu, sizes.total, cfg.recompute)
    peak = gpu.peak if bits == 16 else gpu.float32_peak
    compute = computing_seconds(cfg, flops_per_token, ranks, peak, mfu)
    sent = sum(traffic(sizes, cfg, choice.batch_size, ranks))
    communication = communication_seconds(sizes, cfg, choice.batch_size, ranks, gpu)
    step_seconds = max(compute, communication)
    lines = [f"MFU {mfu:.1%} of {peak / 1e12:,.0f} TFLOP/s: {source}"]
    if bits == 32:
        lines.append("that MFU is of 16 bits, and assumed for float32")
    if ranks > 1:
        lines.append(f"a step computes for {compute:,.2f} s, beside it a GPU sends "
                     f"{sent / 1e9:,.1f} GB in {communication:,.2f} s at "
                     f"{gpu.link / 1e9:,.0f} GB/s in a host, {gpu.network / 1e9:,.0f} between "
                     f"hosts ({gpu.source})")
        lines.append("the longer of the two counts: they overlap")
    return lines + time_lines(cfg, step_seconds, cfg.total_batch_size / step_seconds, ranks)


def plan(cfg, create, argv):
    """The lines that --plan prints.

    create: a function that makes the model of a cfg, its random weights on torch's current
    device; argv: the flags as the user typed them. Raises UserError where so many GPUs can't be
    shared out.
    """
    check_gpus(cfg)
    with torch.device("meta"):
        model = create(cfg)
    sizes = model_sizes(model)
    if cfg.gpu:
        gpu = find_gpu(cfg.gpu)
        name, budget, bits = gpu.name, gpu.usable_bytes, 32 if cfg.dtype == "float32" else 16
        what = f"{budget / GIB:,.0f} of its {gpu.memory} GiB usable, assumed"
    else:
        device = resolve_device(cfg.device)
        dtype = resolve_dtype(cfg.dtype, device)
        name, bits = device_name(device), 32 if dtype == torch.float32 else 16
        budget = free_memory(device, cfg.gpus)
        what = f"{budget / GIB:,.1f} GiB free for each now"
    choice = choose(sizes, cfg, cfg.gpus, budget, bits)
    lines = [f"{sizes.total:,} parameters on {cfg.gpus} x {name} ({what}), {bits} bits, "
             f"{cfg.optimizer}", "", *memory_lines(sizes, cfg, cfg.gpus, budget, bits), ""]
    if choice is None:
        return [*lines, "it does not fit: take more GPUs, larger ones, or a smaller model"]
    lines += ["type:", f"  {command(argv, choice, cfg.gpus)}", ""]
    if cfg.gpu:
        lines += published_lines(sizes, model.flops_per_token(), choice, cfg.gpus, gpu, bits)
    else:
        rate, how = measure_tokens_per_second(create, choice.cfg, sizes, device, dtype)
        n = cfg.gpus if device.type == "cuda" else 1  # processes on a CPU share it
        lines += [f"{how}: {rate:,.0f} tokens a second on {name}",
                  *time_lines(choice.cfg, cfg.total_batch_size / (n * rate), n * rate, cfg.gpus)]
    return lines + disk_lines(sizes, cfg)


def check_gpus(cfg):
    """Raise UserError where hosts of one size, or copies of the model, don't make up cfg.gpus."""
    hosts = math.ceil(cfg.gpus / GPUS_PER_HOST)
    if cfg.gpus % hosts:
        raise UserError(f"--gpus is {cfg.gpus}, which {hosts} hosts of at most {GPUS_PER_HOST} do "
                        f"not share evenly: give a multiple of {GPUS_PER_HOST}")
    if cfg.shard_ranks and cfg.gpus % cfg.shard_ranks and cfg.gpus > 1:
        raise UserError(f"--shard_ranks is {cfg.shard_ranks}, which does not divide --gpus "
                        f"{cfg.gpus}: give the number of GPUs of a host, or 0")


def free_memory(device, processes):
    """Bytes that each process may use: of a GPU, or of the host's memory, which they share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory() / processes - PROCESS_BYTES


# -----------------------------------------------------------------------------
# the table in docs/large.md


def preset_table(configs, create, gpu="H100", counts=(1, 8, 64)):
    """Markdown lines: for each {preset: cfg}, whether it fits on so many GPUs, with which flags,
    what it needs, and how long a step computes and communicates.
    """
    gpu = find_gpu(gpu)
    lines = ["| preset | GPUs | flags | GiB a GPU | computing | communicating | GB sent |",
             "|---|---|---|---|---|---|---|"]
    for name, cfg in configs.items():
        with torch.device("meta"):
            model = create(cfg)
        sizes = model_sizes(model)
        for n in counts:
            row = preset_row(sizes, model.flops_per_token(), cfg, n, gpu)
            lines.append(f"| {name}, {sizes.total / 1e6:,.0f}M | {n} | {' | '.join(row)} |")
    return lines


def preset_row(sizes, flops_per_token, cfg, ranks, gpu):
    """The cells of preset_table after the first two."""
    choice = choose(sizes, cfg, ranks, gpu.usable_bytes)
    if choice is None:
        smallest = min(estimate_memory(sizes, variant, 1, ranks).peak
                       for variant in variants(cfg, ranks).values())
        return ["does not fit", f"{smallest / GIB:,.0f} at least", "", "", ""]
    cfg, batch_size = choice.cfg, choice.batch_size
    mfu, _ = published_mfu(gpu, sizes.total, cfg.recompute)
    compute = computing_seconds(cfg, flops_per_token, ranks, gpu.peak, mfu)
    flags = f"`--batch_size {batch_size}`"
    if choice.flags != "plain":
        flags = f"`{choice.flags} --batch_size {batch_size}`"
    peak = estimate_memory(sizes, cfg, batch_size, ranks).peak
    row = [flags, f"{peak / GIB:,.0f}", f"{compute:,.2f} s"]
    if ranks == 1:
        return [*row, "", ""]
    seconds = communication_seconds(sizes, cfg, batch_size, ranks, gpu)
    sent = sum(traffic(sizes, cfg, batch_size, ranks))
    return [*row, f"{seconds:,.3f} s", f"{sent / 1e9:,.1f}"]


def print_plan(cfg, create_model, vocab_size=None):
    """Print what a run of cfg needs.

    create_model(cfg, tokenizer): the model of a run. vocab_size: of the checkpoint that it starts
    from. Without that and without data the vocabulary is GPT-2's, and of the demo the one that it
    will make.
    """
    if vocab_size:
        tokenizer = SimpleNamespace(n_vocab=vocab_size)
    elif list_shards(cfg.data_root, "train"):
        tokenizer = load_tokenizer(cfg.data_root)
    else:
        n_vocab = DEMO_VOCAB_SIZE if cfg.preset == "demo" else GPT2_TOKENS
        tokenizer = SimpleNamespace(n_vocab=n_vocab)
    for line in plan(cfg, lambda cfg: create_model(cfg, tokenizer), sys.argv[1:]):
        print(line)
