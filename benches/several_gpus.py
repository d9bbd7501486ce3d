"""The first ten minutes on several GPUs: what one GPU cannot show, once, in one command.

A part that fails ends it: what follows would fail for the same reason, while the GPUs are paid for.
On a machine without GPUs two processes with gloo rehearse it, with a tiny model.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benches.ranks import PARTS, SIZES
from benches.turns import last_lines
from gptlib.common import UserError, first_line, log

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 600
STOP_SECONDS = 10  # within which a run of several GPUs has to end after SIGTERM
SLOWEST_SHARE = 0.9  # of the fastest GPU's rate: a card below it is named

# -----------------------------------------------------------------------------
# what the parts read


def write_data(folder, n_vocab):
    """A dataset with something to learn in it, and multiple-choice questions, without a download.

    Its tokenizer has the 256 bytes, then pairs of bytes, up to n_vocab tokens with <|endoftext|>.
    """
    data = folder / "data"
    data.mkdir()
    pairs = (bytes(divmod(i, 256)) for i in range(n_vocab - 257))
    ranks = [*(bytes([i]) for i in range(256)), *pairs]
    lines = [base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(ranks)]
    (data / "tokenizer.tiktoken").write_bytes(b"".join(lines))
    sizes = {"val": 1 << 21, "train": 1 << 24} if n_vocab > 257 else {"val": 2000, "train": 20000}
    shards = []
    for i, (split, n) in enumerate(sizes.items()):
        places = np.arange(n)
        tokens = (places * places // 7 % 251 + places % 3).astype(np.uint16)
        name = f"made_{split}_{i:06d}.npy"
        np.save(data / name, tokens)
        shards.append(dict(name=name, tokens=n, documents=1))
    (data / "meta.json").write_text(json.dumps(dict(
        tokenizer="bpe", vocab_size=n_vocab, eot=n_vocab - 1, source="made by bench.py",
        shards=shards, tokens=sizes, bytes=sizes, complete=True)))
    endings = ["the first", "a second", "third", "and the fourth"]
    with open(folder / "examples.jsonl", "w") as f:
        for i in range(400 if n_vocab > 257 else 8):
            f.write(json.dumps(dict(ctx=f"question {i}", endings=endings, label=i % 4)) + "\n")


# -----------------------------------------------------------------------------
# processes


class Bench:
    """A folder, a number of GPUs, and the time that is left."""

    def __init__(self, folder, device, n_gpus, size, seconds=TOTAL_SECONDS):
        self.folder, self.device, self.n_gpus, self.size = folder, device, n_gpus, size
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def seconds_left(self):
        return max(1.0, self.end - time.monotonic())

    def start(self, argv, **variables):
        """Start a Python script; its output goes to a file."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **variables}
        if self.device == "cpu":
            env["OMP_NUM_THREADS"] = "1"
        with open(self.folder / "output.txt", "w") as output:
            return subprocess.Popen([sys.executable, *map(str, argv)], cwd=self.folder, env=env,
                                    stdout=output, stderr=output)

    def torchrun(self, n, *argv, **variables):
        options = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        return self.start([*options, *argv], **variables)

    def wait(self, process):
        """Wait for a process; UserError if it fails or if the time is over."""
        try:
            process.wait(self.seconds_left())
        except subprocess.TimeoutExpired:
            raise UserError(f"the {self.seconds:.0f} s are over") from None
        finally:
            end_process(process)
        if process.returncode:
            raise UserError(f"exit code {process.returncode}\n{self.output()}")

    def wait_until(self, condition, process, what):
        while not condition():
            if process.poll() is not None:
                raise UserError(f"the run ended before {what}\n{self.output()}")
            if time.monotonic() > self.end:
                raise UserError(f"the {self.seconds:.0f} s were over before {what}")
            time.sleep(0.02)

    def output(self):
        return last_lines((self.folder / "output.txt").read_text(errors="replace"))

    def run_part(self, part, n, **variables):
        """The result of a part of benches/ranks.py in n processes."""
        argv = (ROOT / "benches" / "ranks.py", part, self.folder, self.device, self.size)
        self.wait(self.torchrun(n, *argv, **variables))
        return json.loads((self.folder / f"{part}.json").read_text())


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
# the parts that benches/ranks.py has not


MATRIX_RATE = """
import json, sys, time, torch
device, n = torch.device(sys.argv[1]), int(sys.argv[2])
a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else None)
def seconds():
    t0 = time.perf_counter()
    for _ in range(20):
        b = a @ a
    total = b.float().sum().item()
    assert total == total, "the products of this GPU are no numbers"
    return time.perf_counter() - t0
print(json.dumps(20 * 2 * n**3 / min(seconds() for _ in range(5)) / 1e12))
"""


def each_alone(bench):
    """Matrix products on each GPU by itself: a slow or broken card shows."""
    rates = []
    for i in range(bench.n_gpus):
        variables = {"CUDA_VISIBLE_DEVICES": str(i)} if bench.device == "cuda" else {}
        n = 8192 if bench.device == "cuda" else 64
        bench.wait(bench.start(["-c", MATRIX_RATE, bench.device, n], **variables))
        rates.append(float((bench.folder / "output.txt").read_text().splitlines()[-1]))
    summary = "TFLOP/s of each: " + ", ".join(f"{rate:.3g}" for rate in rates)
    slow = [i for i, rate in enumerate(rates) if rate < SLOWEST_SHARE * max(rates)]
    if slow and bench.device == "cuda":
        raise UserError(f"{summary}: GPU {', '.join(map(str, slow))} is slower than the others")
    return dict(summary=summary, tflops=rates)


def killed_and_stopped(bench):
    """kill -9 of a rank, the seconds until training goes on, and those that SIGTERM takes."""
    settings = {**SIZES[bench.size][0], "data_root": "data", "log_dir": "killed",
                "device": bench.device, "auto_resume": True, "max_steps": 10**6,
                "eval_interval": 10**6, "checkpoint_interval": 20}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    run = bench.torchrun(bench.n_gpus, "--max-restarts=1", ROOT / "train_gpt2.py", *flags)
    lines = bench.folder / "killed" / "log.jsonl"

    def kinds():
        text = lines.read_text() if lines.exists() else ""
        return [json.loads(line)["kind"] for line in text.splitlines(True) if line.endswith("\n")]

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
        run.wait(min(60, bench.seconds_left()))
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


def parts_of(bench):
    """{name: function() -> result}, in their order."""
    n, four = bench.n_gpus, min(4, bench.n_gpus)
    first = {"CUDA_VISIBLE_DEVICES": "0"} if bench.device == "cuda" else {}
    processes = dict(exchanges=n, one_gpu=1, two_gpus=2, four_gpus=four, resumed=max(1, four // 2),
                     all_gpus=n, largest_model=n)
    assert processes.keys() == PARTS.keys()
    parts = {"each_alone": lambda: each_alone(bench)}
    for part, count in processes.items():
        variables = first if count == 1 else {}
        parts[part] = lambda p=part, n=count, v=variables: bench.run_part(p, n, **v)
    parts["killed_and_stopped"] = lambda: killed_and_stopped(bench)
    return parts


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
    device, n_gpus, size = ("cpu", 2, "tiny") if on_cpu else (
        "cuda", torch.cuda.device_count(), "full")
    if n_gpus < 2:
        raise UserError("this machine has one GPU: bench.py gpu measures it")
    name = "a rehearsal on 2 CPU processes" if on_cpu else (
        f"{n_gpus} x {torch.cuda.get_device_name(0)}")
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), 257 if size == "tiny" else 50257)
        results = run_parts(parts_of(Bench(Path(folder), device, n_gpus, size)))
    log("\n" + table(results, f"{name}, torch {torch.__version__}, "
                              f"`python bench.py several_gpus`:"))
    return results
