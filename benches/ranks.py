"""What `python bench.py several_gpus` runs inside of the processes of one torchrun.

    torchrun --standalone --nproc_per_node=2 benches/ranks.py PART FOLDER DEVICE SIZE

Rank 0 writes what it found to FOLDER/PART.json, with a line for the table under "summary".
"""

import dataclasses
import gc
import hashlib
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import train_gpt2
from gptlib import distributed
from gptlib.checkpoints.start import load_start
from gptlib.common import UserError, run_main
from gptlib.runtime import resolve_device
from gptlib.training import scoring
from gptlib.training.console import Console
from gptlib.training.evaluation import Evaluator
from gptlib.training.memory import estimate_memory, model_sizes
from gptlib.training.optim import all_gather

TOLERANCE = 0.02  # of a loss beside that of one GPU

# The small model compares layouts, the large one measures. total_batch_size divides by no number of
# GPUs, so that shares are unequal and last micro-batches short.
SMALL = dict(n_layer=4, n_head=4, n_embd=256, block_size=256, total_batch_size=32768 + 300,
             batch_size=12, max_steps=20, warmup_steps=5, max_lr=1e-3, eval_interval=20,
             val_tokens=65536, hellaswag_examples=0, num_samples=0, checkpoint_interval=10**6,
             compile=False)
LARGE = dict(max_steps=40, eval_interval=40, val_tokens=10**6, num_samples=4,
             checkpoint_interval=10**6)
XL = dict(preset="gpt2-xl", batch_size=2, total_batch_size=2 * 2 * 8 * 1024, max_steps=3,
          compile=False, hellaswag_examples=0, num_samples=0, val_tokens=1024,
          checkpoint_interval=10**6)
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, total_batch_size=300, batch_size=2,
            max_steps=4, val_tokens=500, sample_length=8)
SIZES = {  # settings of the small, the large and the largest model
    "full": (SMALL, LARGE, XL),
    "tiny": ({**SMALL, **TINY}, {**LARGE, **TINY, "compile": False}, {**SMALL, **TINY}),
}
MEGABYTES = {"full": (157, 498), "tiny": (1, 2)}  # GPT-2's gradients in 16 bits, weights in 32


class Runs:
    """Training runs in these processes, one after the other, and what each left in its log."""

    def __init__(self, world, folder, device, size):
        self.world, self.folder, self.device, self.size = world, folder, device, size
        self.small, self.large, self.xl = SIZES[size]

    def train(self, name, settings):
        """Train into the folder `name`; returns the model as this rank has it."""
        flags = {**settings, "data_root": str(self.folder / "data"), "device": self.device,
                 "log_dir": str(self.folder / name),
                 "hellaswag_data": str(self.folder / "examples.jsonl")}
        flags = {**train_gpt2.presets.preset_settings(flags), **flags}
        known = [field.name for field in dataclasses.fields(train_gpt2.TrainConfig)]
        start = load_start(flags, self.world, known)
        made = []
        create_on = train_gpt2.parallel.create_on

        def create_and_keep(*args):
            made.append(create_on(*args))
            return made[-1]

        train_gpt2.parallel.create_on = create_and_keep
        try:
            cfg = train_gpt2.TrainConfig(**{**start.settings, **flags})
            train_gpt2.train(cfg, start, self.world)
        finally:
            train_gpt2.parallel.create_on = create_on
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        dist.barrier()  # rank 0 has written its log
        return made[0]

    def records(self, name, kind="train"):
        lines = (self.folder / name / "log.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def losses(self, name):
        """The loss of each step, and the validation losses."""
        records = self.records(name) + self.records(name, "val")
        return [math.nan if record["loss"] is None else record["loss"] for record in records]

    def rate(self, name):
        """The median tokens per second of the steps from the third on."""
        return statistics.median(r["tokens_per_second"] for r in self.records(name)[2:])

    def compare(self, name, expected):
        """The largest difference of a loss to those of another run. UserError above TOLERANCE."""
        ours, theirs = self.losses(name), self.losses(expected)
        differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        if not all(difference < TOLERANCE for difference in differences):  # a NaN is below nothing
            raise UserError(f"the losses of {name} differ from those of {expected}: {ours}, "
                            f"expected {theirs}")
        return max(differences)

    def compare_weights(self, name, model):
        """UserError if the ranks of an unsharded run do not have the same weights, bit for bit."""
        digest = hashlib.sha256()
        for p in model.state_dict().values():
            digest.update(p.cpu().numpy().tobytes())
        if len(set(distributed.gather_from_all(digest.hexdigest(), self.world))) > 1:
            raise UserError(f"after {name} the ranks have different weights")

    def compare_all(self, expected, variants):
        """Train each variant of the small model; returns a line about the losses."""
        worst = {}
        for name, settings in variants.items():
            model = self.train(name, {**self.small, **settings})
            if not settings.get("shard"):
                self.compare_weights(name, model)
            worst[name] = self.compare(name, expected[settings.get("optimizer", "adamw")])
        return ", ".join(f"{name} {difference:.4f}" for name, difference in worst.items())


# -----------------------------------------------------------------------------
# the parts


def exchanges(runs):
    """Times of the collectives that training uses, each checked."""
    world, device = runs.world, resolve_device(runs.device, runs.world.local_rank)
    total = world.size * (world.size + 1) / 2
    lines = []

    def timed(name, exchange):
        exchange()
        dist.barrier()
        t0 = time.perf_counter()
        for _ in range(5):
            exchange()
        if device.type == "cuda":
            torch.cuda.synchronize()
        lines.append(f"{name} {(time.perf_counter() - t0) / 5 * 1000:.2f} ms")

    for n_bytes in (4, *(m * 10**6 for m in MEGABYTES[runs.size])):
        def reduce(n_bytes=n_bytes):
            tensor = torch.full((n_bytes // 4,), world.rank + 1.0, device=device)
            dist.all_reduce(tensor)
            check(bool((tensor == total).all()), "an all-reduce")
        timed(f"all-reduce of {n_bytes / 1e6:g} MB", reduce)

    n = MEGABYTES[runs.size][0] * 10**6 // world.size

    def gather():
        received = torch.empty(n * world.size, dtype=torch.uint8, device=device)
        all_gather(received, torch.full((n,), world.rank, dtype=torch.uint8, device=device))
        firsts = received[::n].tolist()
        check(firsts == list(range(world.size)), "an all-gather")

    def swap():  # rank r sends (r + 1) * n // 8 bytes to each
        sizes = [(rank + 1) * n // 8 for rank in range(world.size)]
        own = sizes[world.rank]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        sent = torch.full((own * world.size,), world.rank, dtype=torch.uint8, device=device)
        dist.all_to_all_single(received, sent, sizes, [own] * world.size)
        lasts = [int(part[-1]) for part in received.split(sizes)]
        check(lasts == list(range(world.size)), "an uneven all-to-all")

    timed(f"all-gather of {n * world.size / 1e6:g} MB", gather)
    timed("uneven all-to-all", swap)
    timed("200 agreements", lambda: [distributed.any_rank(False, world) for _ in range(200)])
    return dict(summary=", ".join(lines))


def check(is_right, what):
    if not is_right:
        raise UserError(f"{what} brought wrong numbers")


def one_gpu(runs):
    """The runs of one process that the others are compared with; sharded on one it is the same."""
    runs.train("one", runs.small)
    runs.train("one_muon", {**runs.small, "optimizer": "muon"})
    line = runs.compare_all(ONE, {"one_shard": dict(shard=True)})
    runs.train("one_large", {**runs.large, "hellaswag_examples": 0, "max_steps": 12})
    return dict(summary=f"{line}; 124M: {runs.rate('one_large'):,.0f} tok/s")


ONE = dict(adamw="one", muon="one_muon")


def two_gpus(runs):
    """Every layout of a small model beside one GPU."""
    line = runs.compare_all(ONE, {
        "ddp": {}, "ddp_muon": dict(optimizer="muon"), "recompute": dict(recompute=True),
        "shard": dict(shard=True), "shard_muon": dict(shard=True, optimizer="muon"),
        "shard_recompute": dict(shard=True, recompute=True, reduce_each=True),
        "other_micro_batch": dict(batch_size=5)})
    return dict(summary=f"losses beside one GPU differ by {line}; equal weights on all ranks")


def four_gpus(runs):
    """Several copies of a sharded model, saved as a directory in the middle of the run."""
    half = runs.small["max_steps"] // 2
    copies = dict(shard=True, shard_ranks=max(1, runs.world.size // 2), largest_file=0,
                  checkpoint_interval=half)
    line = runs.compare_all(ONE, {"copies": copies})
    if runs.world.rank == 0:
        is_directory = (runs.folder / f"copies/model_{half:05d}.pt").is_dir()
        check(is_directory, "the checkpoint of a sharded model is no directory: it")
    return dict(summary=f"{line}, saved as a directory")


def resumed(runs):
    """The second half of that run on half as many GPUs."""
    half = runs.small["max_steps"] // 2
    path = runs.folder / f"copies/model_{half:05d}.pt"
    runs.train("copies", dict(resume=True, checkpoint_path=str(path), shard=True, shard_ranks=0))
    worst = runs.compare("copies", "one")
    return dict(summary=f"a directory goes on at step {half}: losses differ by {worst:.4f}")


def all_gpus(runs):
    """GPT-2 (124M) on all GPUs, beside one GPU's rate times their number."""
    seconds = {}
    for owner, name in ((Evaluator, "validation_loss"), (scoring, "evaluate"),
                        (train_gpt2, "sample"), (Console, "draw")):
        time_calls(owner, name, seconds)
    runs.train("all", runs.large)
    evaluation = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    runs.train("all_muon", {**runs.large, "optimizer": "muon", "hellaswag_examples": 0})
    rate, muon = runs.rate("all"), runs.rate("all_muon")
    share = rate / (runs.rate("one_large") * runs.world.size)
    goal = "" if share >= 0.95 else ", BELOW THE GOAL OF 95 %"
    summary = (f"{rate:,.0f} tok/s, {share:.1%} of one GPU's times {runs.world.size}{goal}; Muon "
               f"{muon:,.0f} tok/s; one evaluation: {evaluation}")
    return dict(summary=summary, share=share, tokens_per_second=rate, muon=muon, seconds=seconds)


def time_calls(owner, name, seconds):
    """Have the last call of a function note how long it took."""
    function = getattr(owner, name)

    def timed(*args, **kwargs):
        t0 = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[name] = time.perf_counter() - t0
        return result

    setattr(owner, name, timed)


def largest_model(runs):
    """GPT-2 XL's peak beside the plan. Nothing is saved: a checkpoint would have 19 GB."""
    train_gpt2.Saver.save = lambda *args, **options: None
    model = runs.train("xl", runs.xl)
    cfg = train_gpt2.TrainConfig(**{**train_gpt2.presets.preset_settings(runs.xl), **runs.xl})
    planned = estimate_memory(model_sizes(model), cfg.layout(), cfg.optimizer, cfg.total_batch_size,
                              cfg.batch_size, runs.world.size).peak
    measured = runs.records("xl")[-1]["memory_mib"]
    found = "not measured on a CPU" if measured is None else f"{measured / 1024:.1f} GiB"
    return dict(summary=f"peak {found}, planned {planned / 2**30:.1f} GiB", planned=planned,
                measured_mib=measured)


PARTS = {part.__name__: part for part in (exchanges, one_gpu, two_gpus, four_gpus, resumed,
                                          all_gpus, largest_model)}


def main():
    part, folder, device, size = sys.argv[1:]
    with distributed.join(device) as world:
        result = PARTS[part](Runs(world, Path(folder), device, size))
        if world.rank == 0:
            Path(folder, f"{part}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
