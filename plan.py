"""
What a run needs, before its machine is rented: the command to type, hours, dollars, memory, disk.

$ python plan.py --preset gpt2-xl --gpus 8 --gpu H100 --dollars_per_hour 24

It takes every flag of train_gpt2.py too, and needs neither data nor a GPU. With --gpu it computes
from published figures (gptlib/training/gpu_facts.py). Without, it measures a few micro-batches on
the machine at hand.
"""

import dataclasses
import math
import shlex
import statistics
import textwrap
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from gptlib.checkpoints.start import Start, load_start
from gptlib.common import ArgumentParser, UserError, duration, run_main
from gptlib.config import add_flags, check_settings, setting
from gptlib.data.shards import list_shards
from gptlib.data.tokenizer import load_tokenizer
from gptlib.distributed import World
from gptlib.runtime import (device_name, prepare_attention, prepare_device, resolve_device,
                            resolve_dtype)
from gptlib.training.gpu_facts import GPUS_PER_HOST, find_gpu, published_mfu
from gptlib.training.memory import (PARTS, checkpoint_bytes, estimate_memory, free_host_memory,
                                    model_sizes)
from gptlib.training.parallel import Layout, recompute_blocks
from gptlib.training.presets import DEMO_VOCAB_SIZE
from train_gpt2 import TrainConfig, create_model, parse_flags

GIB = 2**30
GPT2_TOKENS = 50257
BYTES_PER_TOKEN = 2  # of a shard
PROCESS_BYTES = 320 * 2**20  # Python and torch, resident before there is a model
MEASURE_SECONDS = 20  # no micro-batch is begun after them
MEASURE_TOKENS = 2048  # of a micro-batch that is measured, unless one sequence is longer
MEASURE_PARAMETERS = 3e8  # a larger model is measured with 2 and with 4 of its blocks
SCREEN_WIDTH = 79

# In the order of what they cost: sharding hides behind the computation, recomputing adds a third to
# it, and reducing after each micro-batch adds communication.
VARIANTS = ("plain", "--shard", "--recompute", "--shard --recompute",
            "--shard --recompute --reduce_each")
TITLES = ("plain", "--shard", "--recompute", "both", "+ reduce_each")  # of their columns


@dataclass
class PlanConfig:
    gpus: int = setting(1, "how many GPUs, 8 in a host", 1)
    gpu: str = setting("", "the GPU, such as H100 (default: measure this machine)")
    dollars_per_hour: float = setting(0.0, "price of all GPUs together; 0: not known", 0.0)

    def __post_init__(self):
        check_settings(self)


# -----------------------------------------------------------------------------
# what fits


@dataclass(frozen=True)
class Run:
    """The settings of a run that decide what it needs, on `ranks` devices of `budget` bytes each.

    batch_size: the micro-batch asked for, 0 for the largest; bits: 16 under autocast, else 32.
    """
    sizes: object  # memory.Sizes
    layout: Layout
    optimizer: str
    total_batch_size: int
    batch_size: int
    ranks: int = 1
    budget: float = math.inf
    bits: int = 16

    def memory(self, layout, batch_size):
        return estimate_memory(self.sizes, layout, self.optimizer, self.total_batch_size,
                               batch_size, self.ranks, bits=self.bits)

    def fits(self, layout, batch_size):
        return self.memory(layout, batch_size).peak <= self.budget


@dataclass(frozen=True)
class Choice:
    """A way to run that fits: its name in VARIANTS, its Layout, and the micro-batch."""
    flags: str
    layout: Layout
    batch_size: int


def layout_of(cfg):
    """The Layout of a TrainConfig."""
    return Layout(cfg.shard, cfg.shard_ranks, cfg.reduce_each,
                  cfg.recompute_every if cfg.recompute else 0, cfg.compile)


def variants(layout, ranks, recompute_every=1):
    """{flags: Layout} of the ways to run; one device alone has nothing to shard over."""
    found = {}
    for flags in VARIANTS:
        shard, recompute = "--shard" in flags, "--recompute" in flags
        reduce_each = shard and (layout.reduce_each or "--reduce_each" in flags)
        if ranks > 1 or not shard:
            found[flags] = Layout(shard, layout.shard_ranks if shard else 0, reduce_each,
                                  recompute_every if recompute else 0, layout.compile)
    return found


def largest_batch_size(run, layout):
    """The largest power of two of sequences per micro-batch whose step fits; 0 if none does."""
    enough = math.ceil(run.total_batch_size / (run.sizes.block_size * run.ranks))
    batch_size = 1 << (enough.bit_length() - 1)
    while batch_size and not run.fits(layout, batch_size):
        batch_size //= 2
    return batch_size


def best_batch_size(run, layout):
    """The micro-batch to run with; 0 if none fits.

    A sharded model gathers its weights for each micro-batch, so it takes the largest. Otherwise a
    larger one than was asked for gains next to nothing.
    """
    largest = largest_batch_size(run, layout)
    if layout.shard or not run.batch_size:
        return largest
    return min(run.batch_size, largest)


def choose(run, recompute_every=1):
    """The Choice of the first variant that fits, in the order of VARIANTS; None if none does.

    What run.layout asks for stays: with --shard only sharded variants count.
    """
    wants_shard = run.layout.shard and run.ranks > 1
    every = run.layout.recompute_every or recompute_every
    for flags, layout in variants(run.layout, run.ranks, every).items():
        drops_shard = wants_shard and not layout.shard
        drops_recompute = run.layout.recompute_every and not layout.recompute_every
        if drops_shard or drops_recompute:
            continue
        batch_size = best_batch_size(run, layout)
        if batch_size:
            return Choice(flags, layout, batch_size)
    return None


# -----------------------------------------------------------------------------
# time


def group_size(layout, ranks):
    """How many ranks gather and reduce together: those of one copy of a sharded model, or all."""
    return (layout.shard_ranks or ranks) if layout.shard else ranks


def traffic(run, layout, batch_size):
    """(bytes that a GPU sends inside its group in a step, bytes between copies of the model).

    A ring sends (n - 1) / n of a tensor to gather or to reduce it, and twice that to do both.
    Everything is float32. DDP reduces the gradients once a step. A sharded model gathers each
    block's weights for the forward and for the backward pass of every micro-batch, those outside
    of the blocks once, and reduces the gradients once a step, with --reduce_each once a
    micro-batch. Muon's updates travel in 16 bits. Sharded, each rank sends the gradients of its
    rows to their owners, and an owner sends the updates back.
    """
    sizes, ranks = run.sizes, run.ranks
    group = group_size(layout, ranks)
    around = (group - 1) / group
    updates = 2 * sizes.hidden if run.optimizer == "muon" else 0
    micro_steps = math.ceil(run.total_batch_size / (batch_size * sizes.block_size * ranks))
    reduced = 4 * sizes.total * (micro_steps if layout.reduce_each else 1)
    if not layout.shard:
        return around * (2 * reduced + updates), 0
    gathered = 2 * 4 * (sizes.total - sizes.root) + 4 * sizes.root
    inside = around * (micro_steps * gathered + reduced + 2 * updates / group)
    copies = ranks // group
    between = 2 * (copies - 1) / copies * reduced / group
    return inside, between


def communication_seconds(run, layout, batch_size, gpu):
    """Seconds that a step spends on communication if nothing else runs.

    Between hosts all adapters of a host work for one collective, so a ring over all GPUs is as
    fast as the slower of a GPU's link and its host's adapters together.
    """
    inside, between = traffic(run, layout, batch_size)
    bandwidth = gpu.link
    if group_size(layout, run.ranks) > GPUS_PER_HOST:
        bandwidth = min(gpu.link, GPUS_PER_HOST * gpu.network)
    of_copies = gpu.link if run.ranks <= GPUS_PER_HOST else gpu.network
    return inside / bandwidth + between / of_copies


def computing_seconds(run, flops_per_token, peak, mfu):
    """Seconds that a step spends on computation, at a published utilization of a peak in FLOP/s."""
    return run.total_batch_size * flops_per_token / (run.ranks * peak * mfu)


def run_seconds(cfg, tokens_per_second):
    """Seconds of all steps and of the validations, which need a third of a step's computation."""
    evaluations = math.ceil(cfg.max_steps / cfg.eval_interval) + 1
    tokens = cfg.max_steps * cfg.total_batch_size + evaluations * cfg.val_tokens / 3
    return tokens / tokens_per_second


def time_micro_batch(model, batch_size, device, dtype, seconds):
    """The median seconds of the forward and backward pass of batch_size sequences.

    One pass warms up. Then as many are timed as begin within `seconds`, up to five.
    """
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
    """(tokens a second of this device, how that was measured in words).

    Blocks are recomputed if cfg says so. Nothing is compiled, since compiling takes longer than
    measuring. A large model is measured with 2 and with 4 blocks, and the others are assumed to
    take as long as the third and the fourth.
    """
    prepare_device(device)
    prepare_attention(device, dtype, sizes.block_size)
    batch_size = max(1, min(cfg.batch_size, MEASURE_TOKENS // sizes.block_size))

    def measure(n_layer, seconds):
        model = create(dataclasses.replace(cfg, n_layer=n_layer)).to(device)
        recompute_blocks(model, cfg.layout().recompute_every)
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


def plan(cfg, own, create, argv):
    """The lines to print.

    cfg: the run's TrainConfig; own: a PlanConfig; create: a function that makes the model of a
    cfg, its random weights on torch's current device; argv: the training flags as the user typed
    them. Raises UserError if so many GPUs can't be shared out.
    """
    check_gpus(own.gpus, cfg.shard_ranks)
    with torch.device("meta"):
        model = create(cfg)
    sizes, flops = model_sizes(model), model.flops_per_token()
    if own.gpu:
        gpu, device = find_gpu(own.gpu), None
        name, budget, bits = gpu.name, gpu.usable_bytes, 32 if cfg.dtype == "float32" else 16
        usable = f"{budget / GIB:,.1f} of {gpu.memory} GiB usable"
    else:
        device = resolve_device(cfg.device)
        dtype = resolve_dtype(cfg.dtype, device)
        name, bits = device_name(device), 32 if dtype == torch.float32 else 16
        budget = free_memory(device, own.gpus)
        usable = f"{budget / GIB:,.1f} GiB free"
    run = Run(sizes, layout_of(cfg), cfg.optimizer, cfg.total_batch_size, cfg.batch_size,
              own.gpus, budget, bits)
    choice = choose(run, cfg.recompute_every)
    lines = [f"{sizes.total:,} parameters on {own.gpus} x {name} ({usable}), {bits} bits, "
             f"{cfg.optimizer}", ""]
    notes = []
    if choice is None:
        lines.append("it does not fit: take more GPUs, larger ones, or a smaller model")
    else:
        if own.gpu:
            rate, notes = published_rate(run, choice, flops, gpu)
        else:
            chosen = dataclasses.replace(cfg, batch_size=choice.batch_size,
                                         recompute=choice.layout.recompute_every > 0)
            rate, how = measure_tokens_per_second(create, chosen, sizes, device, dtype)
            rate *= own.gpus if device.type == "cuda" else 1  # processes on a CPU share it
            notes = [how]
        lines += [f"type: {command(argv, choice, own.gpus)}", *time_lines(cfg, rate, own)]
    lines += [disk_line(sizes, cfg), "", *memory_lines(run, cfg.recompute_every)]
    for note in notes:
        lines += textwrap.wrap(note, SCREEN_WIDTH, subsequent_indent="  ")
    return lines


def check_gpus(gpus, shard_ranks):
    """Raise UserError if hosts of one size, or copies of the model, don't add up to the GPUs."""
    hosts = math.ceil(gpus / GPUS_PER_HOST)
    if gpus % hosts:
        raise UserError(f"--gpus is {gpus}, which {hosts} hosts of at most {GPUS_PER_HOST} do "
                        f"not share evenly: give a multiple of {GPUS_PER_HOST}")
    if shard_ranks and gpus % shard_ranks and gpus > 1:
        raise UserError(f"--shard_ranks is {shard_ranks}, which does not divide --gpus "
                        f"{gpus}: give the number of GPUs of a host, or 0")


def free_memory(device, processes):
    """Bytes that each process may use: of a GPU, or of the host's memory, which they share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory() / processes - PROCESS_BYTES


def command(argv, choice, ranks):
    """The command line to type: the given training flags, with those of the choice."""
    replaced = ("batch_size", "shard", "recompute")
    switches = ("shard", "recompute")
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


def time_lines(cfg, tokens_per_second, own):
    """Hours and dollars of the whole run."""
    seconds = run_seconds(cfg, tokens_per_second)
    lines = [f"time: {duration(seconds)} for {cfg.max_steps:,} steps with validations, "
             f"{tokens_per_second:,.0f} tokens a second",
             "      (starts, HellaSwag, samples and checkpoints come on top)"]
    if own.dollars_per_hour:
        dollars = seconds / 3600 * own.dollars_per_hour
        return [*lines, f"cost: {dollars:,.2f} dollars at {own.dollars_per_hour:,.2f} an hour for "
                        f"{own.gpus} together"]
    return [*lines, "cost: give --dollars_per_hour, the price of all GPUs together"]


def disk_line(sizes, cfg):
    """What a run reads and writes: shards and checkpoints."""
    tokens = cfg.max_steps * cfg.total_batch_size
    each = checkpoint_bytes(sizes, cfg.optimizer)
    count = math.ceil(cfg.max_steps / cfg.checkpoint_interval)
    if cfg.keep_checkpoints:
        count = min(count, cfg.keep_checkpoints + 1)  # the oldest goes when the newest is written
    return (f"disk: {tokens * BYTES_PER_TOKEN / 1e9:,.1f} GB of shards if no token is read twice, "
            f"{count} checkpoints of {each / 1e9:,.2f} GB")


def memory_lines(run, recompute_every):
    """The table of the memory of each device by part, a column for each variant.

    A column is shown at the micro-batch that one would run with; if none fits, at one sequence.
    """
    shown_variants = variants(run.layout, run.ranks, run.layout.recompute_every or recompute_every)
    columns = []
    for layout in shown_variants.values():
        batch_size = best_batch_size(run, layout) or 1
        memory = run.memory(layout, batch_size)
        fits = "yes" if memory.peak <= run.budget else "NO"
        columns.append([str(batch_size), *(shown(memory.parts[part]) for part in PARTS),
                        shown(memory.peak), fits])
    names = ["micro-batch", *PARTS, "most at once", "fits"]
    titles = [TITLES[VARIANTS.index(flags)] for flags in shown_variants]
    widths = [max(10, len(title) + 2) for title in titles]
    rows = [["GiB on each device", *titles]]
    rows += [[name, *cells] for name, *cells in zip(names, *columns, strict=True)]
    lines = []
    for name, *cells in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        lines.append(f"{name:18}" + "".join(cells))
    return lines


def shown(n_bytes):
    return f"{n_bytes / GIB:,.2f}" if n_bytes < 10 * GIB else f"{n_bytes / GIB:,.1f}"


def published_rate(run, choice, flops_per_token, gpu):
    """(tokens a second of all GPUs, notes on where the figures come from)."""
    recompute = choice.layout.recompute_every > 0
    mfu, source = published_mfu(gpu, run.sizes.total, recompute)
    peak = gpu.peak if run.bits == 16 else gpu.float32_peak
    compute = computing_seconds(run, flops_per_token, peak, mfu)
    communication = communication_seconds(run, choice.layout, choice.batch_size, gpu)
    notes = [f"MFU {mfu:.1%} of {peak / 1e12:,.0f} TFLOP/s: {source}"]
    if run.bits == 32:
        notes.append("that MFU is of 16 bits, and assumed for float32")
    if run.ranks > 1:
        sent = sum(traffic(run, choice.layout, choice.batch_size))
        notes.append(f"a step computes for {compute:,.2f} s and sends {sent / 1e9:,.1f} GB a GPU "
                     f"in {communication:,.3f} s beside that; the longer counts ({gpu.source})")
    return run.total_batch_size / max(compute, communication), notes


# -----------------------------------------------------------------------------
# the table in docs/large.md


def preset_table(configs, create, gpu="H100", counts=(1, 8, 64)):
    """Markdown lines that say for each {preset: cfg} and number of GPUs whether it fits.

    If it does: with which flags, how much memory it needs, how long a step computes and
    communicates.
    """
    gpu = find_gpu(gpu)
    lines = ["| preset | GPUs | flags | GiB a GPU | computing | communicating | GB sent |",
             "|---|---|---|---|---|---|---|"]
    for name, cfg in configs.items():
        with torch.device("meta"):
            model = create(cfg)
        sizes, flops = model_sizes(model), model.flops_per_token()
        for n in counts:
            run = Run(sizes, layout_of(cfg), cfg.optimizer, cfg.total_batch_size, cfg.batch_size,
                      n, gpu.usable_bytes)
            cells = " | ".join(preset_row(run, flops, gpu))
            lines.append(f"| {name}, {sizes.total / 1e6:,.0f}M | {n} | {cells} |")
    return lines


def preset_row(run, flops_per_token, gpu):
    """The cells of preset_table after the first two."""
    choice = choose(run)
    if choice is None:
        layouts = variants(run.layout, run.ranks).values()
        smallest = min(run.memory(layout, 1).peak for layout in layouts)
        return ["does not fit", f"{smallest / GIB:,.0f} at least", "", "", ""]
    layout, batch_size = choice.layout, choice.batch_size
    mfu, _ = published_mfu(gpu, run.sizes.total, layout.recompute_every > 0)
    compute = computing_seconds(run, flops_per_token, gpu.peak, mfu)
    flags = f"`--batch_size {batch_size}`"
    if choice.flags != "plain":
        flags = f"`{choice.flags} --batch_size {batch_size}`"
    row = [flags, f"{run.memory(layout, batch_size).peak / GIB:,.0f}", f"{compute:,.2f} s"]
    if run.ranks == 1:
        return [*row, "", ""]
    seconds = communication_seconds(run, layout, batch_size, gpu)
    sent = sum(traffic(run, layout, batch_size))
    return [*row, f"{seconds:,.3f} s", f"{sent / 1e9:,.1f}"]


# -----------------------------------------------------------------------------


def find_vocabulary(cfg, checkpoint):
    """Something with the n_vocab of the run: the checkpoint's, that of the data, or the default.

    The default is GPT-2's, or for the demo that of the tokenizer which it will train.
    """
    if checkpoint:
        return SimpleNamespace(n_vocab=checkpoint["config"]["vocab_size"])
    if list_shards(cfg.data_root, "train"):
        return load_tokenizer(cfg.data_root)
    return SimpleNamespace(n_vocab=DEMO_VOCAB_SIZE if cfg.preset == "demo" else GPT2_TOKENS)


def main():
    parser = ArgumentParser(__doc__)
    add_flags(parser, PlanConfig)
    own, argv = parser.parse_known_args()
    own, flags = PlanConfig(**vars(own)), parse_flags(argv)
    start = load_start(flags, World(), [f.name for f in dataclasses.fields(TrainConfig)])
    cfg = TrainConfig(**{**start.settings, **flags})
    vocabulary = find_vocabulary(cfg, start.checkpoint)
    print(*plan(cfg, own, lambda cfg: create_model(cfg, Start(), vocabulary), argv), sep="\n")


if __name__ == "__main__":
    run_main(main)
