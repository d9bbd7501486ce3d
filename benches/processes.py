"""Two processes that share this machine, beside one."""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from benches.training import write_random_shard
from benches.turns import ROOT, run_command
from gptlib.common import log


def train_under_torchrun(n_processes, folder, steps):
    """Train a small model in `folder`; the median tokens per second of its steps from the third."""
    settings = dict(n_layer=4, n_head=6, n_embd=384, block_size=256, data_root="data",
                    total_batch_size=4096, batch_size=4, max_steps=steps, val_tokens=256,
                    hellaswag_examples=0, num_samples=0, compile=False, device="cpu")
    flags = [f"--{name}={value}" for name, value in settings.items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    run_command([sys.executable, *torchrun, str(ROOT / "train_gpt2.py"), *flags], cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"})
    rates = []
    for line in Path(folder, "log", "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "train" and record["step"] > 1:
            rates.append(record["tokens_per_second"])
    return statistics.median(rates)


def bench_processes(args):
    """Tokens per second of one and of two processes training together on this machine.

    Over gloo on the CPU, with one thread each.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_random_shard(data / "random_val_000000.npy", 10**6)
        write_random_shard(data / "random_train_000001.npy", 10**6)
        results = {n: train_under_torchrun(n, folder, 3 + args.rounds) for n in (1, 2)}
    log(f"\none process {results[1]:,.0f} tok/s, two {results[2]:,.0f} tok/s: "
           f"x {results[2] / results[1]:.2f}")
    return results
