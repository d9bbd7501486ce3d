"""What the two long benches share: parts within a time, and runs of train_gpt2.py to watch.

A part is a function that returns a dict with "rows", {what: the figures in words}.
"""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benches.turns import ROOT
from gptlib.common import UserError, first_line, log

# -----------------------------------------------------------------------------
# parts


def run_parts(parts, seconds):
    """Run parts in their order, and yield the results of all so far after each of them.

    parts: (name, the seconds that it needs, function of the seconds left). The results are
    {"parts": {name: result}, "failed": {name: reason}, "left_out": {name: reason}}.
    """
    end = time.monotonic() + seconds
    results = dict(parts={}, failed={}, left_out={})
    for name, needed, part in parts:
        left = end - time.monotonic()
        if left < needed:
            results["left_out"][name] = f"{left:.0f} s left, it takes about {needed:.0f}"
        else:
            try:
                result = part(left)
                result["part_seconds"] = left - (end - time.monotonic())
                results["parts"][name] = result
                log(f"{name}: {result['part_seconds']:.0f} s")
            except UserError as e:
                results["failed"][name] = first_line(e)
                log(f"{name}: FAILED, {e}")
        yield results


def parts_table(heading, results):
    """The results of run_parts as a Markdown table."""
    lines = [heading, "", "| part | what | result |", "|---|---|---|"]
    for name, part in results["parts"].items():
        lines += [f"| {name} | {what} | {text} |" for what, text in part["rows"].items()]
    for name, reason in results["failed"].items():
        lines.append(f"| {name} | | **failed**: {reason.replace('|', '/')} |")
    lines += [f"| {name} | | left out: {why} |" for name, why in results["left_out"].items()]
    return "\n".join(lines) + "\n"


# -----------------------------------------------------------------------------
# runs under torchrun


class Runs:
    """Runs of train_gpt2.py in a folder, each with a log folder there, and the time they have."""

    def __init__(self, folder, device, seconds):
        self.folder, self.device = Path(folder), device
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def start(self, script, *argv, nproc, restarts=0, **variables):
        """Start a script under torchrun with nproc processes; its output goes to a file."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}",
                    f"--max-restarts={restarts}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **variables}
        if self.device == "cpu":
            env["OMP_NUM_THREADS"] = "1"
        with open(self.folder / "output.txt", "w") as output:
            return subprocess.Popen([sys.executable, *torchrun, str(script), *map(str, argv)],
                                    cwd=self.folder, env=env, stdout=output, stderr=output)

    def start_training(self, flags, nproc):
        flags = [f"--{name}={value}" for name, value in flags.items()]
        return self.start(ROOT / "train_gpt2.py", *flags, nproc=nproc, restarts=1)

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

    def kill_one(self, process, name):
        """kill -9 one process of a run; returns the seconds until the run has made a step again."""
        os.kill(children_of(process.pid)[-1], signal.SIGKILL)
        t0 = time.monotonic()

        def has_gone_on():
            kinds = [record["kind"] for record in self.records(name)]
            return "resume" in kinds and kinds[-1] == "train"

        self.wait_until(has_gone_on, process, "training went on after kill -9")
        return time.monotonic() - t0

    def output(self):
        return last_lines((self.folder / "output.txt").read_text(errors="replace"))

    def records(self, name, *kinds):
        """The whole lines of a run's log, of these kinds or all, as dicts."""
        path = self.folder / name / "log.jsonl"
        lines = path.read_text().splitlines(True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in records if not kinds or record["kind"] in kinds]

    def rate(self, name):
        """The median tokens per second of the steps from the third on."""
        steps = self.records(name, "train")
        return statistics.median(step["tokens_per_second"] for step in steps[2:])

    def evaluation(self, name):
        """The seconds of each part of a run's last evaluation, in words."""
        records = self.records(name, "train", "val", "hella", "samples")
        seconds = {after["kind"]: after["elapsed"] - before["elapsed"]
                   for before, after in itertools.pairwise(records) if after["kind"] != "train"}
        return ", ".join(f"{kind} {value:.2f} s" for kind, value in seconds.items())


def last_lines(text, count=10):
    """The last lines that a failed process wrote, without torchrun's own report after them."""
    lines = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if number > 0 and "failed (exitcode:" in line:
            lines = lines[:number]
            break
    return "\n".join(lines[-count:])


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
