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
from gptlib.training.report_page import (GPT2_HELLASWAG, GPT2_VAL_LOSS, GPT3_HELLASWAG,
                                         format_report, run_seconds)

# the value that log.txt and log.png show of each kind of record, and its format in log.txt
TEXT_COLUMNS = {"train": ("loss", ".6f"), "val": ("loss", ".4f"), "hella": ("acc_norm", ".4f")}
RUN_FILES = ("log.*", "report.md", "model_*.pt", "latest_checkpoint.pt", "tensorboard")


# -----------------------------------------------------------------------------
# the log


class RunLog:
    """The log of a run: log.jsonl (everything), log.txt (step, kind and value on a line), log.png
    and report.md.

    A context manager: leaving it closes wandb and TensorBoard. A full disk is one warning and never
    stops the run.
    """

    def __init__(self, log_dir, resumed_at, facts, wandb=False, tensorboard=False):
        """Continue the log at the step resumed_at. If that is None, start a new log, after moving
        an earlier run away.

        facts: the first record, as describe_run returns it. Raises UserError if log_dir can't be
        written to, or if wandb or TensorBoard is asked for and not installed.
        """
        self.dir = Path(log_dir)
        self.gpt2_tokens = facts.get("gpt2_tokens", False)
        self.has_warned = False
        self.sinks = []
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if resumed_at is None:
                self._move_away([path for name in RUN_FILES for path in self.dir.glob(name)])
            else:
                facts = {**facts, "seconds_before": run_seconds(self._records())}
                self._return_to(resumed_at)
        except OSError as error:
            reason = error.strerror
            raise UserError(f"--log_dir {log_dir} can't be written to: {reason}") from error
        kind = "config" if resumed_at is None else "resume"
        self._append("log.jsonl", json.dumps({"kind": kind, "step": resumed_at or 0, **facts}))
        if wandb:
            self.sinks.append(WandbSink(log_dir, facts["config"]))
        if tensorboard:
            self.sinks.append(TensorBoardSink(self.dir / "tensorboard"))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Have wandb and TensorBoard write what they still hold. May be called twice."""
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
        """Record values that make no curve, such as samples, in log.jsonl alone."""
        self._append("log.jsonl", json.dumps({"kind": kind, "step": step, **values}))

    def write_report(self):
        """Write report.md anew from all records of log.jsonl."""
        records = self._records()
        if not any(record["kind"] in ("config", "resume") for record in records):
            return  # the disk was full when the run's facts were to be written
        text = format_report(records, self.dir.name)
        with contextlib.suppress(UserError):  # the disk is full; the next evaluation tries again
            atomic_write(self.dir / "report.md", lambda file: file.write(text.encode()))

    def draw(self):
        """Redraw log.png; if the tokens are GPT-2's, with the published GPT-2 and GPT-3 figures."""
        plot(self._records(), self.dir / "log.png", self.gpt2_tokens)

    def _move_away(self, paths):
        """Move the files of an earlier run into the first unused numbered folder beside this one.
        """
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
        follow. A "train" record at `step` is of the step that begins there, so it goes too, but the
        evaluation at `step` stays. An "end" record goes, since the run continues.
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
    """Append a line to a file, whole or not at all: the next line must not continue half a line."""
    data = (line + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        if file.write(data) < len(data):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def format_line(record):
    """A record as a line of log.txt: `{step} {kind} {value}`, as in the original recipe."""
    name, digits = TEXT_COLUMNS[record["kind"]]
    value = math.nan if record[name] is None else record[name]
    return f"{record['step']} {record['kind']} {value:{digits}}"


# -----------------------------------------------------------------------------
# other programs


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


# -----------------------------------------------------------------------------
# log.png


def plot(records, path, gpt2_tokens):
    """Draw the records of log.jsonl as an image at `path`; if the disk is full, the earlier image
    stays.

    gpt2_tokens: whether losses are per token of GPT-2, so that published ones can be compared.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train, val, hella = (select_curve(records, kind) for kind in TEXT_COLUMNS)
    has_hella = len(hella[0]) > 0
    columns = 2 if has_hella else 1
    figure, axes = plt.subplots(1, columns, figsize=(13 if has_hella else 7, 4.5), squeeze=False)
    plot_loss(axes[0][0], train, val, gpt2_tokens)
    if has_hella:
        plot_hellaswag(axes[0][1], hella, gpt2_tokens)
    for ax in axes[0]:
        ax.grid(alpha=0.3)
        ax.legend()
    figure.tight_layout()
    with contextlib.suppress(UserError):  # the next evaluation tries again
        atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def select_curve(records, kind):
    """(steps, values) of the records of a kind; a value that was not finite is left out."""
    name, _ = TEXT_COLUMNS[kind]
    points = [(r["step"], r[name]) for r in records if r["kind"] == kind and r[name] is not None]
    return [step for step, _ in points], [value for _, value in points]


def plot_loss(ax, train, val, gpt2_tokens):
    label = f"val {val[1][-1]:.4f}" if val[1] else "val"
    ax.plot(*train, lw=0.8, alpha=0.6, label="train")
    ax.plot(*val, marker=".", label=label)
    ax.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    if gpt2_tokens:
        label = "OpenAI GPT-2 (124M) on FineWeb-Edu val"
        ax.axhline(GPT2_VAL_LOSS, color="r", ls="--", lw=1, label=label)


def plot_hellaswag(ax, hella, gpt2_tokens):
    ax.plot(*hella, marker=".", label=f"this run {hella[1][-1]:.4f}")
    ax.set(xlabel="step", ylabel="acc_norm", title="HellaSwag")
    if gpt2_tokens:
        ax.axhline(GPT2_HELLASWAG, color="r", ls="--", lw=1, label="OpenAI GPT-2 (124M)")
        ax.axhline(GPT3_HELLASWAG, color="g", ls="--", lw=1, label="OpenAI GPT-3 (124M)")
