"""The first ten minutes on several GPUs: what one GPU cannot show, once, in one command.

    python bench.py several_gpus

A part that fails ends it: what follows would fail for the same reason, while the GPUs are paid for.
On a machine without GPUs two processes with gloo rehearse it, with a tiny model. The processes of
a part run this file too; PART is "exchanges", or a part of runs_of():

    torchrun --standalone --nproc_per_node=2 benches/several_gpus.py PART DEVICE
"""

import base64
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import signal
import statistics
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
from benches.turns import ROOT, last_lines
from gptlib.checkpoints.start import Start, load_start
from gptlib.common import UserError, first_line, log, run_main
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
    return dict(exchanges=n_gpus, one_gpu=1, two_gpus=2, four_gpus=four, resumed=four // 2,
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
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def check(is_right, what):
    if not is_right:
        raise UserError(f"{what} brought wrong numbers")


def exchanges(device, world):
    """Times of the exchanges that training uses, each checked."""
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

    lines = []
    for name, exchange in {
            "all-reduce of 4 B": lambda: reduce(4),
            f"of {small} MB": lambda: reduce(small * 10**6),
            f"of {large} MB": lambda: reduce(large * 10**6),
            f"all-gather of {small} MB": gather, "uneven all-to-all": swap,
            "200 agreements": lambda: [any_rank(False, world) for _ in range(200)]}.items():
        exchange()
        dist.barrier()
        t0 = time.perf_counter()
        for _ in range(5):
            exchange()
        if device.type == "cuda":
            torch.cuda.synchronize()
        lines.append(f"{name} {(time.perf_counter() - t0) / 5 * 1000:.2f} ms")
    return dict(summary=", ".join(lines))


def main():
    part, device = sys.argv[1:]
    with join(device) as world:
        if part == "exchanges":
            result = exchanges(resolve_device(device, world.local_rank), world)
            if world.rank == 0:
                Path("exchanges.json").write_text(json.dumps(result))
        for name, flags in json.loads(Path("runs.json").read_text()):
            train(name, {**flags, "device": device}, world)


# -----------------------------------------------------------------------------
# the process that starts them


class Bench:
    """A folder, a number of GPUs, and the time that is left."""

    def __init__(self, folder, device, n_gpus, seconds=TOTAL_SECONDS):
        self.folder, self.device, self.n_gpus = folder, device, n_gpus
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def start(self, *argv, nproc=0, **variables):
        """Start a Python script, with nproc in that many processes; its output goes to a file."""
        options = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **variables}
        if self.device == "cpu":
            env["OMP_NUM_THREADS"] = "1"
        with open(self.folder / "output.txt", "w") as output:
            return subprocess.Popen(
                [sys.executable, *(options if nproc else ()), *map(str, argv)], cwd=self.folder,
                env=env, stdout=output, stderr=output)

    def wait(self, process):
        """Wait for a process; UserError if it fails or if the time is over."""
        try:
            process.wait(max(1.0, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise UserError(f"the {self.seconds:.0f} s are over") from None
        finally:
            end_process(process)
        if process.returncode:
            raise UserError(f"exit code {process.returncode}\n{self.output()}")

    def wait_until(self, condition, process, what):
        while not condition():
            if process.poll() is not None or time.monotonic() > self.end:
                raise UserError(f"the run or its {self.seconds:.0f} s ended before {what}\n"
                                f"{self.output()}")
            time.sleep(0.02)

    def output(self):
        return last_lines((self.folder / "output.txt").read_text(errors="replace"))

    def run_part(self, part, nproc):
        """Run a part in its processes. Returns {"summary": losses beside those of one GPU}."""
        rows = [row[1:] for row in runs_of(self.device, self.n_gpus) if row[0] == part]
        (self.folder / "runs.json").write_text(json.dumps([row[:2] for row in rows]))
        first = {"CUDA_VISIBLE_DEVICES": "0"} if nproc == 1 and self.device == "cuda" else {}
        self.wait(self.start(Path(__file__), part, self.device, nproc=nproc, **first))
        if part == "exchanges":
            return json.loads((self.folder / "exchanges.json").read_text())
        if part == "all_gpus":
            return speed_of_all(self)
        differences = {name: self.compare(name, expected) for name, _, expected in rows if expected}
        if part == "four_gpus" and len(list(self.folder.glob("copies/model_*.pt/"))) < 2:
            raise UserError("the checkpoints of a sharded model are no directories")
        shown = (f"{name} {difference:.4f}" for name, difference in differences.items())
        return dict(summary="losses beside one GPU's: " + ", ".join(shown), **differences)

    def records(self, name, *kinds):
        """The whole lines of a run's log, of these kinds or all, as dicts."""
        path = self.folder / name / "log.jsonl"
        lines = path.read_text().splitlines(True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in records if not kinds or record["kind"] in kinds]

    def losses(self, name):
        losses = [record["loss"] for record in self.records(name, "train", "val")]
        return [math.nan if loss is None else loss for loss in losses]

    def compare(self, name, expected):
        """The largest difference of a loss to those of another run. UserError above TOLERANCE."""
        ours, theirs = (self.losses(run) for run in (name, expected))
        differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        if not all(difference < TOLERANCE for difference in differences):  # a NaN is below nothing
            raise UserError(f"the losses of {name} differ from those of {expected}: {ours}, "
                            f"expected {theirs}")
        return max(differences)

    def rate(self, name):
        """The median tokens per second of the steps from the third on."""
        steps = self.records(name, "train")
        return statistics.median(step["tokens_per_second"] for step in steps[2:])


def end_process(process):
    """Have torchrun end, with its processes, if it still runs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(40)  # it gives its processes 30 s
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def children_of(pid):
    """The process ids of a process' children, on Linux."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


# -----------------------------------------------------------------------------
# the parts


MATRIX_RATE = """
import sys, time, torch
device, n = torch.device(sys.argv[1]), int(sys.argv[2])
a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else None)
def seconds():
    t0 = time.perf_counter()
    for _ in range(20):
        b = a @ a
    total = b.float().sum().item()
    assert total == total, "the products of this GPU are no numbers"
    return time.perf_counter() - t0
print(20 * 2 * n**3 / min(seconds() for _ in range(5)) / 1e12)
"""


def each_alone(bench):
    """Matrix products on each GPU by itself: a slow or broken card shows."""
    rates = []
    n = 8192 if bench.device == "cuda" else 64
    for i in range(bench.n_gpus):
        variables = {"CUDA_VISIBLE_DEVICES": str(i)} if bench.device == "cuda" else {}
        bench.wait(bench.start("-c", MATRIX_RATE, bench.device, n, **variables))
        rates.append(float((bench.folder / "output.txt").read_text().splitlines()[-1]))
    summary = "TFLOP/s of each: " + ", ".join(f"{rate:.3g}" for rate in rates)
    slow = [i for i, rate in enumerate(rates) if rate < SLOWEST_SHARE * max(rates)]
    if slow and bench.device == "cuda":
        raise UserError(f"{summary}: GPU {', '.join(map(str, slow))} is slower than the others")
    return dict(summary=summary, tflops=rates)


def speed_of_all(bench):
    """GPT-2 (124M) on all GPUs beside one, an evaluation by part, and GPT-2 XL's peak."""
    rate, muon = bench.rate("all"), bench.rate("all_muon")
    share = rate / (bench.rate("one_large") * bench.n_gpus)
    goal = "" if share >= GOAL else f", BELOW THE GOAL OF {GOAL:.0%}"
    last = bench.records("all", "train", "val", "hella", "samples")[-4:]
    seconds = {record["kind"]: record["elapsed"] - before["elapsed"]
               for before, record in itertools.pairwise(last)}
    evaluation = ", ".join(f"{kind} {value:.2f} s" for kind, value in seconds.items())
    flags = MODELS[bench.device]["xl"]
    cfg = train_gpt2.TrainConfig(**{**preset_settings(flags), **flags})
    tokenizer = SimpleNamespace(n_vocab=N_VOCAB[bench.device])
    with torch.device("meta"):
        model = train_gpt2.create_model(cfg, Start(), tokenizer)
    planned = estimate_memory(model_sizes(model), cfg.layout(), cfg.optimizer, cfg.total_batch_size,
                              cfg.batch_size, bench.n_gpus).peak
    measured = bench.records("xl", "train")[-1]["memory_mib"]
    peak = "not measured on a CPU" if measured is None else f"{measured / 1024:.1f} GiB"
    summary = (f"{rate:,.0f} tok/s, {share:.1%} of one GPU's times {bench.n_gpus}{goal}; Muon "
               f"{muon:,.0f} tok/s; one evaluation: {evaluation}; XL's peak {peak}, planned "
               f"{planned / 2**30:.1f} GiB")
    return dict(summary=summary, share=share, tokens_per_second=rate, muon=muon, seconds=seconds,
                planned=planned, measured_mib=measured)


def killed_and_stopped(bench):
    """kill -9 of a rank, the seconds until training goes on, and those that SIGTERM takes."""
    flags = {**MODELS[bench.device]["large"], "data_root": "data", "log_dir": "killed",
             "device": bench.device, "auto_resume": True, "max_steps": 10**6,
             "eval_interval": 10**6, "hellaswag_examples": 0}
    argv = [f"--{name}={value}" for name, value in flags.items()]
    run = bench.start("--max-restarts=1", ROOT / "train_gpt2.py", *argv, nproc=bench.n_gpus)

    def kinds():
        return [record["kind"] for record in bench.records("killed")]

    try:
        bench.wait_until(lambda: kinds().count("train") > 25, run, "step 25")
        saved = bench.folder / "killed" / "latest_checkpoint.pt"
        bench.wait_until(saved.exists, run, "the first checkpoint was written")
        os.kill(children_of(run.pid)[-1], signal.SIGKILL)
        t0 = time.monotonic()
        bench.wait_until(lambda: "resume" in kinds() and kinds()[-1] == "train", run,
                         "training went on after kill -9 of a rank")
        lost = time.monotonic() - t0
        t0 = time.monotonic()
        run.terminate()
        run.wait(60)
        stopped = time.monotonic() - t0
    except subprocess.TimeoutExpired:
        raise UserError("60 s after SIGTERM the run had not ended") from None
    finally:
        end_process(run)
    if "stopped after" not in (bench.folder / "output.txt").read_text(errors="replace"):
        raise UserError(f"SIGTERM did not save the run\n{bench.output()}")
    if stopped > STOP_SECONDS and bench.device == "cuda":
        raise UserError(f"after SIGTERM the run took {stopped:.0f} s to end")
    return dict(summary=f"kill -9 of a rank: {lost:.1f} s to the next step; "
                        f"SIGTERM: saved and ended in {stopped:.1f} s",
                seconds_lost=lost, seconds_to_stop=stopped)


# -----------------------------------------------------------------------------
# all of it


def parts_of(bench):
    """{name: function() -> result}, in their order."""
    parts = {part: functools.partial(bench.run_part, part, nproc)
             for part, nproc in processes_of(bench.n_gpus).items()}
    return {"each_alone": functools.partial(each_alone, bench), **parts,
            "killed_and_stopped": functools.partial(killed_and_stopped, bench)}


def run_parts(parts):
    """Run each part until one fails; returns {"parts": {name: result}, "failed": {name: reason}}.
    """
    results = dict(parts={}, failed={})
    for name, part in parts.items():
        t0 = time.monotonic()
        try:
            result = part()
        except UserError as error:
            results["failed"][name] = first_line(error)
            log(f"{name}: FAILED, {error}")
            break
        result["part_seconds"] = time.monotonic() - t0
        results["parts"][name] = result
        log(f"{name}, {result['part_seconds']:.0f} s: {result['summary']}")
    return results


def table(results, heading):
    lines = [heading, "", "| part | seconds | result |", "|---|---|---|"]
    for name, part in results["parts"].items():
        lines.append(f"| {name} | {part['part_seconds']:.0f} | {part['summary']} |")
    for name, reason in results["failed"].items():
        lines.append(f"| {name} | | **failed**: {reason.replace('|', '/')} |")
    return "\n".join(lines)


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
        results = run_parts(parts_of(Bench(Path(folder), device, n_gpus, TOTAL_SECONDS)))
    log("\n" + table(results, f"{name}, torch {torch.__version__}, "
                              f"`python bench.py several_gpus`:"))
    return results


if __name__ == "__main__":
    run_main(main)
