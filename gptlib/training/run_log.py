"""What a run leaves to look at: log.jsonl, log.txt, log.png, report.md, and optionally wandb and
TensorBoard."""

import contextlib
import errno
import itertools
import json
import math
import os
from pathlib import Path

from gptlib.checkpoints.saver import list_checkpoints
from gptlib.common import UserError, atomic_write, import_optional, warn
from gptlib.training.plot import plot
from gptlib.training.report_page import format_report, run_seconds

# what log.txt shows of each kind of record: the name of the value, and its format
TEXT_COLUMNS = {"train": ("loss", ".6f"), "val": ("loss", ".4f"), "hella": ("acc_norm", ".4f")}
RUN_FILES = ("log.*", "report.md", "model_*.pt", "latest_checkpoint.pt", "tensorboard")


class RunLog:
    """The log of a run: log.jsonl (everything), log.txt (step, kind and value on a line), log.png
    and report.md.

    A context manager: leaving it closes wandb and TensorBoard. A full disk warns once and never
    stops the run.
    """

    def __init__(self, cfg, step, facts):
        """Start a new log where step is None, after moving an earlier run away; otherwise continue
        at `step`.

        cfg: has log_dir, wandb and tensorboard; facts: the first record, with the config among
        them. Raises UserError where log_dir can't be written to, or wandb or TensorBoard is asked
        for and not installed.
        """
        self.dir = Path(cfg.log_dir)
        self.has_warned = False
        self.sinks = []
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if step is None:
                self._move_away([path for name in RUN_FILES for path in self.dir.glob(name)])
            else:
                facts = {**facts, "seconds_before": run_seconds(self._records())}
                self._return_to(step)
        except OSError as error:
            reason = error.strerror
            raise UserError(f"--log_dir {cfg.log_dir} can't be written to: {reason}") from error
        kind = "config" if step is None else "resume"
        self._append("log.jsonl", json.dumps({"kind": kind, "step": step or 0, **facts}))
        if cfg.wandb:
            self.sinks.append(WandbSink(cfg.log_dir, facts["config"]))
        if cfg.tensorboard:
            self.sinks.append(TensorBoardSink(self.dir / "tensorboard"))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Let wandb and TensorBoard write what they still hold. May be called twice."""
        while self.sinks:
            self.sinks.pop().close()

    def write(self, step, kind, **values):
        """Record the values of a kind (train, val, hella) at a step."""
        record = {"kind": kind, "step": step}
        for name, value in values.items():
            is_finite = value is not None and math.isfinite(value)
            record[name] = value if is_finite else None  # JSON has no NaN
        self._append("log.jsonl", json.dumps(record))
        self._append("log.txt", format_line(record))
        for sink in self.sinks:
            for name, value in values.items():
                if value is not None:
                    sink.add(f"{kind}/{name}", value, step)

    def note(self, step, kind, **values):
        """Record in log.jsonl alone what is no curve, such as the texts of samples."""
        self._append("log.jsonl", json.dumps({"kind": kind, "step": step, **values}))

    def write_report(self):
        """Write report.md anew, from all that log.jsonl has."""
        records = self._records()
        if not any(record["kind"] in ("config", "resume") for record in records):
            return  # a full disk kept the run's facts from being written
        text = format_report(records, self.dir.name)
        with contextlib.suppress(UserError):  # a full disk: the next evaluation tries again
            atomic_write(self.dir / "report.md", lambda file: file.write(text.encode()))

    def draw(self, gpt2_tokens):
        """Redraw log.png, with the published GPT-2 and GPT-3 figures where the tokens are
        GPT-2's."""
        plot(self._records(), self.dir / "log.png", gpt2_tokens)

    def _move_away(self, paths):
        """Move what an earlier run left into the first unused numbered folder beside this one."""
        if not paths:
            return
        for i in itertools.count(1):
            folder = self.dir.with_name(f"{self.dir.name}_{i:03d}")
            if not folder.exists():
                break
        folder.mkdir()
        for path in paths:
            os.replace(path, folder / path.name)
        print(f"moved {len(paths)} files of an earlier run from {self.dir} to {folder}")

    def _return_to(self, step):
        """Remove what was written after the checkpoint at `step`.

        Later checkpoints are truncated, or belong to a course of training that this run does not
        follow. A "train" record at `step` is of the step that begins there, so it goes too; the
        evaluation at `step` stays. That the run ended there is no longer true.
        """
        later = [path for path in list_checkpoints(self.dir) if int(path.stem[6:]) > step]
        self._move_away(later)

        records = []
        for record in self._records():
            at_step = record["step"] == step and record["kind"] not in ("train", "end")
            earlier = record["step"] < step and record["kind"] != "end"
            if earlier or at_step:
                records.append(record)
        lines = [format_line(record) for record in records if record["kind"] in TEXT_COLUMNS]
        self._rewrite("log.txt", lines)
        self._rewrite("log.jsonl", [json.dumps(record) for record in records])

    def _records(self):
        path = self.dir / "log.jsonl"
        records = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                records.append(json.loads(line))
            except ValueError:  # a crash cut it short
                continue
        return records

    def _rewrite(self, name, lines):
        text = "".join(line + "\n" for line in lines)
        atomic_write(self.dir / name, lambda file: file.write(text.encode()))

    def _append(self, name, line):
        path = self.dir / name
        try:
            append_line(path, line)
        except OSError as error:
            if not self.has_warned:
                warn(f"{path} can't be written to ({error.strerror}); training goes on")
            self.has_warned = True


def append_line(path, line):
    """Append a line to a file, whole or not at all: the next one must not continue half a line."""
    data = (line + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        if file.write(data) < len(data):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def format_line(record):
    """A record as log.txt has it: `{step} {kind} {value}`, as in the original recipe."""
    name, digits = TEXT_COLUMNS[record["kind"]]
    value = math.nan if record[name] is None else record[name]
    return f"{record['step']} {record['kind']} {value:{digits}}"


class WandbSink:
    """Sends values to Weights & Biases."""

    def __init__(self, log_dir, config):
        self.run = import_optional("wandb").init(project="gpt2", dir=log_dir, config=config)

    def add(self, name, value, step):
        self.run.log({name: value}, step=step)

    def close(self):
        self.run.finish()


class TensorBoardSink:
    """Writes values for TensorBoard."""

    def __init__(self, folder):
        tensorboard = import_optional("torch.utils.tensorboard", "tensorboard")
        self.writer = tensorboard.SummaryWriter(folder)

    def add(self, name, value, step):
        self.writer.add_scalar(name, value, step)

    def close(self):
        self.writer.close()
