"""The first ten minutes on several GPUs: what one GPU cannot show, once, in one command.

    python bench.py several_gpus

A part that fails ends it: what follows would fail for the same reason, while the GPUs are paid for.
On a machine without GPUs two processes with gloo rehearse it, with a tiny model. The processes of
a part run this file too; runs.json in their folder says which runs:

    torchrun --standalone --nproc_per_node=2 benches/several_gpus.py DEVICE
"""

import base64
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import train_gpt2
from benches.floors import matrix_peak
from benches.parts import Runs, end_process, parts_table, run_parts
from benches.turns import run_alone
from gptlib.checkpoints.start import Start, load_start
from gptlib.common import UserError, log, run_main
from gptlib.distributed import any_rank, gather_from_all, join
from gptlib.runtime import resolve_device
from gptlib.training.memory import estimate_memory, model_sizes
from gptlib.training.optim import all_gather
from gptlib.training.presets import preset_settings

TOTAL_SECONDS = 600
STOP_SECONDS = 10  # within which a run of several GPUs has to end after SIGTERM
SLOWEST_SHARE = 0.9  # of the fastest GPU's rate: a card below it is named
TOLERANCE = 0.02  # of a loss beside that of one GPU
GOAL = 0.95  # of one GPU's rate times their number

# -----------------------------------------------------------------------------
# the table of runs

# total_batch_size divides by no number of GPUs: shares are unequal, last micro-batches short.
SMALL = dict(n_layer=4, n_head=4, n_embd=256, block_size=256, total_batch_size=32768 + 300,
             batch_size=12, max_steps=20, warmup_steps=5, max_lr=1e-3, eval_interval=20,
             val_tokens=65536, hellaswag_examples=0, num_samples=0, checkpoint_interval=10,
             compile=False)
LARGE = dict(max_steps=40, eval_interval=40, val_tokens=10**6, num_samples=4,
             checkpoint_interval=20)  # GPT-2 (124M)
XL = dict(preset="gpt2-xl", batch_size=2, total_batch_size=2 * 2 * 8 * 1024, max_steps=3,
          compile=False, hellaswag_examples=0, num_samples=0, val_tokens=1024)
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, total_batch_size=300, batch_size=2,
            max_steps=4, max_lr=1e-2, val_tokens=500, sample_length=32, checkpoint_interval=2,
            compile=False)
MODELS = {"cuda": dict(small=SMALL, large=LARGE, xl=XL),
          "cpu": dict(small={**SMALL, **TINY}, large={**LARGE, **TINY}, xl={**SMALL, **TINY})}
MEGABYTES = {"cuda": (157, 498), "cpu": (1, 2)}  # GPT-2's gradients in 16 bits, weights in 32
N_VOCAB = {"cuda": 50257, "cpu": 257}


def processes_of(n_gpus):
    """{part: its number of processes}, in their order."""
    four = 4 if n_gpus >= 4 else 2
    return dict(one_gpu=1, exchanges=n_gpus, two_gpus=2, four_gpus=four, resumed=four // 2,
                all_gpus=n_gpus)


def runs_of(device, n_gpus):
    """The training runs, as (part, name, flags, the run on one GPU that has the same losses)."""
    small, large, xl = MODELS[device].values()
    muon, shard, quick = dict(optimizer="muon"), dict(shard=True), dict(hellaswag_examples=0)
    middle = f"copies/model_{small['checkpoint_interval']:05d}.pt"
    copies = dict(shard_ranks=processes_of(n_gpus)["resumed"], largest_file=0)
    return (
        ("one_gpu", "one", small, None),
        ("one_gpu", "one_muon", {**small, **muon}, None),
        ("one_gpu", "one_shard", {**small, **shard}, "one"),
        ("one_gpu", "one_large", {**large, **quick, "max_steps": 12}, None),
        ("exchanges", "exchanges", {}, None),
        ("two_gpus", "ddp", small, "one"),
        ("two_gpus", "ddp_muon", {**small, **muon}, "one_muon"),
        ("two_gpus", "recompute", {**small, "recompute": True}, "one"),
        ("two_gpus", "other_micro_batch", {**small, "batch_size": 5}, "one"),
        ("two_gpus", "shard", {**small, **shard}, "one"),
        ("two_gpus", "shard_muon", {**small, **shard, **muon}, "one_muon"),
        ("two_gpus", "shard_recompute",
         {**small, **shard, "recompute": True, "reduce_each": True}, "one"),
        ("four_gpus", "copies", {**small, **shard, **copies}, "one"),
        ("resumed", "copies",
         {**shard, "shard_ranks": 0, "resume": True, "checkpoint_path": middle}, "one"),
        ("all_gpus", "all", large, None),
        ("all_gpus", "all_muon", {**large, **quick, **muon}, None),
        ("all_gpus", "xl", xl, None),
    )


def write_data(folder, n_vocab):
    """A dataset with something to learn in it, and multiple-choice questions, without a download.

    Its tokenizer has the 256 bytes, then pairs of bytes, up to n_vocab tokens with <|endoftext|>.
    """
    data = folder / "data"
    data.mkdir()
    ranks = [bytes([i]) for i in range(256)] + [bytes(divmod(i, 256)) for i in range(n_vocab - 257)]
    lines = [base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(ranks)]
    (data / "tokenizer.tiktoken").write_bytes(b"".join(lines))
    sizes = {"val": 1 << 21, "train": 1 << 24} if n_vocab > 257 else {"val": 2000, "train": 20000}
    shards = []
    for i, (split, n) in enumerate(sizes.items()):
        places = np.arange(n)
        shards.append(dict(name=f"made_{split}_{i:06d}.npy", tokens=n, documents=1))
        np.save(data / shards[-1]["name"],
                (places * places // 7 % 251 + places % 3).astype(np.uint16))
    (data / "meta.json").write_text(json.dumps(dict(
        tokenizer="bpe", vocab_size=n_vocab, eot=n_vocab - 1, source="made by bench.py",
        shards=shards, tokens=sizes, bytes=sizes, complete=True)))
    endings = ["the first", "a second", "third", "and the fourth"]
    questions = [dict(ctx=f"question {i}", endings=endings, label=i % 4)
                 for i in range(400 if n_vocab > 257 else 8)]
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, questions)))


# -----------------------------------------------------------------------------
# inside of the processes of a part


class ComparingSaver(train_gpt2.Saver):
    """Raises UserError if the ranks of an unsharded run have different weights, bit for bit."""
    writes = True

    def save(self, state, **options):
        weights = list(state["model"].values())
        if not any(isinstance(p, DTensor) for p in weights):
            digest = hashlib.sha256()
            for p in weights:
                digest.update(p.detach().cpu().numpy())
            if len(set(gather_from_all(digest.hexdigest(), self.world))) > 1:
                raise UserError(f"the ranks have different weights at step {state['step']}")
        if self.writes:
            super().save(state, **options)


def train(name, flags, world):
    """One training run into the folder `name`."""
    ComparingSaver.writes = name != "xl"  # its checkpoint has 19 GB
    train_gpt2.Saver = ComparingSaver
    flags = {**preset_settings(flags), **flags, "log_dir": name, "data_root": "data",
             "hellaswag_data": "examples.jsonl"}
    known = [field.name for field in dataclasses.fields(train_gpt2.TrainConfig)]
    start = load_start(flags, world, known)
    train_gpt2.train(train_gpt2.TrainConfig(**{**start.settings, **flags}), start, world)
    torch.compiler.reset()
    if torch.cuda.is_available():  # the next run finds the memory free
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def check(is_right, what):
    if not is_right:
        raise UserError(f"{what} brought wrong numbers")


def exchanges(device, world):
    """{exchange: its time in words} of those that training uses, each checked."""
    everyone = list(range(world.size))
    small, large = MEGABYTES[device.type]
    n = small * 10**6 // world.size

    def reduce(n_bytes):
        tensor = torch.full((n_bytes // 4,), world.rank + 1.0, device=device)
        dist.all_reduce(tensor)
        check(bool((tensor == sum(everyone) + world.size).all()), "an all-reduce")

    def gather():
        received = torch.empty(n * world.size, dtype=torch.uint8, device=device)
        all_gather(received, torch.full((n,), world.rank, dtype=torch.uint8, device=device))
        check(received[::n].tolist() == everyone, "an all-gather")

    def swap():  # rank r sends (r + 1) * n // 8 bytes to each
        sizes = [(rank + 1) * n // 8 for rank in everyone]
        own = sizes[world.rank]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        sent = torch.full((own * world.size,), world.rank, dtype=torch.uint8, device=device)
        dist.all_to_all_single(received, sent, sizes, [own] * world.size)
        lasts = [int(part[-1]) for part in received.split(sizes)]
        check(lasts == everyone, "an uneven all-to-all")

    rows = {}
    for name, exchange in {
            "all-reduce of 4 B": lambda: reduce(4),
            f"all-reduce of {small} MB": lambda: reduce(small * 10**6),
            f"all-reduce of {large} MB": lambda: reduce(large * 10**6),
            f"all-gather of {small} MB": gather, "uneven all-to-all": swap,
            "200 agreements": lambda: [any_rank(False, world) for _ in range(200)]}.items():
        exchange()
        dist.barrier()
        t0 = time.perf_counter()
        for _ in range(5):
            exchange()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rows[name] = f"{(time.perf_counter() - t0) / 5 * 1000:.2f} ms"
    return rows


def main():
    device = sys.argv[1]
    with join(device) as world:
        for name, flags in json.loads(Path("runs.json").read_text()):
            if name != "exchanges":
                train(name, {**flags, "device": device}, world)
                continue
            rows = exchanges(resolve_device(device, world.local_rank), world)
            if world.rank == 0:
                Path("exchanges.json").write_text(json.dumps(rows))


# -----------------------------------------------------------------------------
# the parts, in the process that starts them


def matrix_rates(device, n_gpus):
    """TFLOP/s of matrix products on each GPU in turn, in bfloat16; once on a CPU, in float32."""
    if device == "cpu":
        return [matrix_peak(torch.device("cpu"), torch.float32, [(64, 64, 64)]) / 1e12]
    return [matrix_peak(torch.device(device, i), torch.bfloat16) / 1e12 for i in range(n_gpus)]


def each_alone(runs, n_gpus):
    """Matrix products on each GPU by itself: a slow or broken card shows."""
    rates = run_alone(runs.seconds, matrix_rates, runs.device, n_gpus)
    shown = ", ".join(f"{rate:.3g}" for rate in rates)
    slow = [i for i, rate in enumerate(rates) if rate < SLOWEST_SHARE * max(rates)]
    if slow:
        raise UserError(f"{shown} TFLOP/s: GPU {', '.join(map(str, slow))} is slower than others")
    return dict(rows={"TFLOP/s of each": shown}, tflops=rates)


def run_in_processes(runs, n_gpus, parts, nproc):
    """Run parts in nproc processes; their rows are the losses beside those of one GPU, and more."""
    planned = [run for run in runs_of(runs.device, n_gpus) if run[0] in parts]
    named = [(name, flags) for _, name, flags, _ in planned]
    (runs.folder / "runs.json").write_text(json.dumps(named))
    first = {"CUDA_VISIBLE_DEVICES": "0"} if nproc == 1 and runs.device == "cuda" else {}
    runs.wait(runs.start(Path(__file__), runs.device, nproc=nproc, **first))
    rows = {}
    if "exchanges" in parts:
        rows = json.loads((runs.folder / "exchanges.json").read_text())
    for _, name, _, expected in planned:
        if expected:
            rows[f"{name} beside {expected}"] = f"{compare(runs, name, expected):.4f} nats apart"
    if "four_gpus" in parts and len(list(runs.folder.glob("copies/model_*.pt/"))) < 2:
        raise UserError("the checkpoints of a sharded model are no directories")
    return speed_of_all(runs, n_gpus) if "all_gpus" in parts else dict(rows=rows)


def compare(runs, name, expected):
    """The largest difference of a loss to those of another run. UserError above TOLERANCE."""
    ours, theirs = ([math.nan if record["loss"] is None else record["loss"]
                     for record in runs.records(run, "train", "val")] for run in (name, expected))
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    if not all(difference < TOLERANCE for difference in differences):  # a NaN is below nothing
        raise UserError(f"the losses of {name} differ from those of {expected}: {ours}, "
                        f"expected {theirs}")
    return max(differences)


def speed_of_all(runs, n_gpus):
    """GPT-2 (124M) on all GPUs beside one, its evaluation by part, and GPT-2 XL's peak."""
    rate = runs.rate("all")
    share = rate / (runs.rate("one_large") * n_gpus)
    goal = "" if share >= GOAL else f", BELOW THE GOAL OF {GOAL:.0%}"
    flags = MODELS[runs.device]["xl"]
    cfg = train_gpt2.TrainConfig(**{**preset_settings(flags), **flags})
    tokenizer = SimpleNamespace(n_vocab=N_VOCAB[runs.device])
    with torch.device("meta"):
        model = train_gpt2.create_model(cfg, Start(), tokenizer)
    planned = estimate_memory(model_sizes(model), cfg.layout(), cfg.optimizer, cfg.total_batch_size,
                              cfg.batch_size, n_gpus).peak
    measured = runs.records("xl", "train")[-1]["memory_mib"]
    peak = "not measured on a CPU" if measured is None else f"{measured / 1024:.1f} GiB"
    return dict(share=share, rows={
        "GPT-2 (124M)": f"{rate:,.0f} tok/s, {share:.1%} of one GPU's times {n_gpus}{goal}",
        "with Muon": f"{runs.rate('all_muon'):,.0f} tok/s",
        "one evaluation": runs.evaluation("all"),
        "GPT-2 XL's peak": f"{peak}, planned {planned / 2**30:.1f} GiB"})


def killed_and_stopped(runs, n_gpus):
    """kill -9 of a rank, the seconds until training goes on, and those that SIGTERM takes."""
    flags = {**MODELS[runs.device]["large"], "data_root": "data", "log_dir": "killed",
             "device": runs.device, "auto_resume": True, "max_steps": 10**6,
             "eval_interval": 10**6, "hellaswag_examples": 0}
    run = runs.start_training(flags, n_gpus)
    try:
        runs.wait_until(lambda: len(runs.records("killed", "train")) > 25, run, "step 25")
        saved = runs.folder / "killed" / "latest_checkpoint.pt"
        runs.wait_until(saved.exists, run, "the first checkpoint was written")
        lost = runs.kill_one(run, "killed")
        t0 = time.monotonic()
        run.terminate()
        run.wait(60)
        stopped = time.monotonic() - t0
    except subprocess.TimeoutExpired:
        raise UserError("60 s after SIGTERM the run had not ended") from None
    finally:
        end_process(run)
    if "stopped after" not in (runs.folder / "output.txt").read_text(errors="replace"):
        raise UserError(f"SIGTERM did not save the run\n{runs.output()}")
    if stopped > STOP_SECONDS and runs.device == "cuda":
        raise UserError(f"after SIGTERM the run took {stopped:.0f} s to end")
    return dict(rows={"kill -9 of a rank": f"{lost:.1f} s to the next step",
                      "SIGTERM": f"saved and ended in {stopped:.1f} s"})


def parts_of(runs, n_gpus):
    """The parts in their order, as run_parts takes them. Neighbours of as many processes share a
    start, of which a rehearsal consists for the most part.
    """
    parts = {"each_alone": each_alone}
    processes = processes_of(n_gpus)
    for nproc, group in itertools.groupby(processes, processes.get):
        group = list(group)
        run = functools.partial(run_in_processes, parts=group, nproc=nproc)
        parts[", ".join(group)] = run
    parts["killed_and_stopped"] = killed_and_stopped
    return [(name, 0, lambda left, part=part: part(runs, n_gpus)) for name, part in parts.items()]


def bench_several_gpus(args):
    """Exchanges, layouts, restarts and rates of all GPUs of this machine, in ten minutes."""
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    device, n_gpus = ("cpu", 2) if on_cpu else ("cuda", torch.cuda.device_count())
    if n_gpus < 2:
        raise UserError("this machine has one GPU: bench.py gpu measures it")
    name = "a rehearsal on 2 CPU processes" if on_cpu else (
        f"{n_gpus} x {torch.cuda.get_device_name(0)}")
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), N_VOCAB[device])
        runs = Runs(folder, device, TOTAL_SECONDS)
        for results in run_parts(parts_of(runs, n_gpus), TOTAL_SECONDS):
            if results["failed"]:
                break
    heading = f"{name}, torch {torch.__version__}, `python bench.py several_gpus`:"
    log("\n" + parts_table(heading, results))
    return results


if __name__ == "__main__":
    run_main(main)
