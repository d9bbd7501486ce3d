"""What a run tells on the way: lines on the console and records in its log, on rank 0 alone."""

import math
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from gptlib.common import duration, first_line, print0
from gptlib.training.run_log import RunLog
from gptlib.runtime import device_name, git_commit, peak_flops


class Reporter:
    """Prints and logs the course of a run. Every rank has one; only that of rank 0 prints and
    writes.

    facts: what the log's first record says beside the settings. resumed_at: the step that the run
    goes on from, None for a fresh start. tokens_per_byte: of the val split, None where it is not
    known.
    """

    def __init__(self, cfg, model, facts, device, world, resumed_at,
                 tokens_per_byte=None, gpt2_tokens=True):
        self.cfg, self.device, self.world = cfg, device, world
        self.flops_per_token, self.peak = model.flops_per_token(), peak_flops(device)
        self.tokens_per_byte, self.gpt2_tokens = tokens_per_byte, gpt2_tokens
        self.began, self.first_step = time.perf_counter(), None
        self.steps_done = resumed_at or 0
        is_master = world.rank == 0
        facts = {**facts, "gpt2_tokens": gpt2_tokens}
        self.log = RunLog(cfg, resumed_at, facts) if is_master else None
        self.bar = tqdm(total=cfg.max_steps, initial=resumed_at or 0, desc="training", unit="step",
                        dynamic_ncols=True, disable=None if is_master else True)

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        self.bar.close()
        if not self.log:
            return
        if error_type:
            self._end(self.steps_done, error=first_line(error))
        self.log.close()

    def _write(self, step, kind, **values):
        if self.log:
            elapsed = time.perf_counter() - self.began
            self.log.write(step, kind, **values, elapsed=round(elapsed, 2))

    def validation(self, step, loss):
        """Report a validation loss in nats per token; also in bits per byte, where the bytes are
        known.
        """
        bits, shown = {}, ""
        if self.tokens_per_byte:
            bits = {"bpb": loss * self.tokens_per_byte / math.log(2)}
            shown = f" | {bits['bpb']:.4f} bits per byte"
        print0(f"step {step:5d} | validation loss: {loss:.4f}{shown}")
        self._write(step, "val", loss=loss, **bits)

    def hellaswag(self, step, scores):
        """Report the accuracies that scoring.evaluate returns."""
        n = scores["examples"]
        print0(f"step {step:5d} | HellaSwag accuracy: {scores['acc_norm']:.4f} on {n} examples")
        self._write(step, "hella", acc_norm=scores["acc_norm"], acc=scores["acc"])

    def samples(self, step, texts):
        for text in texts:
            print0(f"sample: {text}")
        if self.log and texts:
            self.log.note(step, "samples", texts=texts)

    def draw(self):
        """Redraw log.png and report.md."""
        if self.log:
            self.log.draw(gpt2_tokens=self.gpt2_tokens)
            self.log.write_report()

    def step(self, step, loss, lr, norm, seconds):
        """Report a step of the optimization that took so many seconds."""
        tokens_per_second = self.cfg.total_batch_size / seconds
        mfu = None
        if self.peak:
            mfu = tokens_per_second * self.flops_per_token / (self.peak * self.world.size)
        if not math.isfinite(norm):
            print0(f"step {step:5d} | warning: the gradient norm is {norm}, the update is skipped")
        if step % self.cfg.log_interval == 0:
            line = (f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
                    f"dt: {seconds * 1000:.2f}ms | tok/sec: {tokens_per_second:.2f}")
            line += f" | mfu: {mfu:.2%}" if mfu else ""
            print0(line + self._time_left(step))
        self._write(step, "train", loss=loss, lr=lr, norm=norm, ms=seconds * 1000,
                    tokens_per_second=tokens_per_second, mfu=mfu,
                    memory_mib=peak_gpu_memory(self.device))
        self.steps_done = step + 1
        self.bar.update()

    def _time_left(self, step):
        """What a console line says of the time to the end, from what steps took so far.

        Evaluations between the steps count. The first step does not: it compiles.
        """
        now = time.perf_counter()
        if self.first_step is None:
            self.first_step = step, now
        first, began = self.first_step
        left = self.cfg.max_steps - step - 1
        if step == first or left == 0:
            return ""
        return f" | {duration((now - began) / (step - first) * left)} left"

    def _end(self, step, **values):
        elapsed = time.perf_counter() - self.began
        self.log.note(step, "end", elapsed=round(elapsed, 2), **values)
        self.log.write_report()

    def end(self, step, position, val_loss):
        """Report where a run has ended: `position` is in tokens."""
        if self.log:
            self._end(step)
        if step < self.cfg.max_steps:
            print0(f"stopped after {step} of {self.cfg.max_steps} steps; --auto_resume goes on")
            return
        shown = "" if val_loss is None else f", val loss {val_loss:.4f}"
        print0(f"done: {step} steps, {position:,} tokens{shown}")


def describe_run(cfg, model, device, dtype, world, batch_size, data):
    """The facts of the log's first record: what a reader needs to run the same again."""
    return dict(
        config=asdict(cfg), parameters=sum(p.numel() for p in model.parameters()),
        git_commit=git_commit(), torch=torch.__version__, device=device_name(device),
        dtype=str(dtype), world_size=world.size, batch_size=batch_size,
        vocab_size=model.config.vocab_size, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=describe_command(), machine=describe_machine(), data=data)


def describe_command():
    """The command line of this run, as one would type it again, torchrun included."""
    environment = os.environ
    command = "python"
    if "RANK" in environment:
        hosts = environment.get("GROUP_WORLD_SIZE", "1")
        command = "torchrun --standalone" if hosts == "1" else f"torchrun --nnodes={hosts}"
        command += f" --nproc_per_node={environment.get('LOCAL_WORLD_SIZE', '1')}"
    return f"{command} {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"


def describe_machine():
    """Processor and system, such as "AMD EPYC, 2 cores, Linux x86_64"."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = found[0].split(":", 1)[1].strip() if found else name
    system = f"{platform.system()} {platform.machine()}"
    return ", ".join(filter(None, [name, f"{os.cpu_count()} cores", system]))


def print_run(facts, n_tokens):
    """Print in one line what is about to run."""
    cfg = facts["config"]
    tokens_per_micro_step = facts["batch_size"] * cfg["block_size"] * facts["world_size"]
    micro_batches = math.ceil(cfg["total_batch_size"] / tokens_per_micro_step)
    dtype = facts["dtype"].removeprefix("torch.")
    millions = facts["parameters"] / 1e6
    print0(f"{millions:.1f}M parameters on {facts['world_size']} x {facts['device']}, {dtype}, "
           f"{n_tokens:,} training tokens, "
           f"micro-batches of {facts['batch_size']} x {cfg['block_size']}, "
           f"{micro_batches} a step and process")


def peak_gpu_memory(device):
    """MiB that tensors took on the GPU at most, or None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
