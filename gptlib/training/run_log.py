"""What a run leaves to look at: log.jsonl, log.txt, log.png, report.md, and optionally wandb and
TensorBoard."""

import errno
import itertools
import json
import math
import os
from pathlib import Path

from gptlib.checkpoints.saver import checkpoint_path, list_checkpoints, update_latest
from gptlib.common import (UserError, atomic_write, first_line, import_optional, open_unless_link,
                           print0, warn)
from gptlib.training.loss_watch import find_overfitting
from gptlib.training.report_page import (GPT2_HELLASWAG, GPT2_VAL_LOSS, GPT3_HELLASWAG,
                                         format_report, run_seconds)

# the value that log.txt and log.png show of each kind of record, and its format in log.txt
TEXT_COLUMNS = {"train": ("loss", ".6f"), "val": ("loss", ".4f"), "hella": ("acc_norm", ".4f")}
RUN_FILES = ("log.*", "report.md", "model_*.pt", "latest_checkpoint.pt", "best_checkpoint.pt",
             "tensorboard")
STARTS = ("config", "resume")  # the kinds of the record that begins a session
STOPS = ("end", "diverged")  # and of those that end it


# -----------------------------------------------------------------------------
# the log


class RunLog:
    """The log of a run: log.jsonl (everything), log.txt (step, kind and value on a line), log.png
    and report.md.

    A context manager: leaving it closes wandb and TensorBoard. Nothing that can't be written, drawn
    or sent stops the run: it is one warning.
    """

    def __init__(self, log_dir, resumed_at, facts, wandb=False, tensorboard=False):
        """Continue the log at the step resumed_at. If that is None, start a new log, after moving
        an earlier run away.

        facts: the first record, as describe_run returns it. Raises UserError, before anything is
        moved, if log_dir can't be written to, if wandb or TensorBoard is asked for and not
        installed, or if the run has diverged and would be repeated with the same settings.
        """
        self.dir = Path(log_dir)
        self.published = facts.get("gpt2_tokens", False), facts.get("fineweb_edu", False)
        self.warned = set()
        settings = facts["config"]
        senders = [WandbSink] * wandb + [TensorBoardSink] * tensorboard
        senders = [(sink, import_optional(*sink.module)) for sink in senders]
        if resumed_at is not None or settings.get("auto_resume"):
            refuse_to_repeat(self.records(), settings)
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if resumed_at is None:
                self._move_away([path for name in RUN_FILES for path in self.dir.glob(name)])
            else:
                facts = {**facts, "seconds_before": run_seconds(self.records())}
                self._return_to(resumed_at)
        except OSError as error:
            reason = error.strerror
            raise UserError(f"--log_dir {log_dir} can't be written to: {reason}") from error
        kind = "config" if resumed_at is None else "resume"
        self._append("log.jsonl", json.dumps({"kind": kind, "step": resumed_at or 0, **facts}))
        sinks = [self._attempt(f"--{module.__name__}", sink, module, self.dir, settings)
                 for sink, module in senders]
        self.sinks = [sink for sink in sinks if sink]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Have wandb and TensorBoard write what they still hold. May be called twice."""
        while self.sinks:
            self._attempt("closing the log", self.sinks.pop().close)

    def write(self, step, kind, **values):
        """Record the values of a kind (train, val, hella) at a step."""
        record = {"kind": kind, "step": step}
        for name, value in values.items():
            is_finite = value is not None and math.isfinite(value)
            record[name] = value if is_finite else None  # JSON has no NaN
        self._append("log.jsonl", json.dumps(record))
        self._append("log.txt", format_line(record))
        known = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
        for sink in list(self.sinks):
            if not self._attempt(type(sink).__name__, sink.add, known, step):
                self.sinks.remove(sink)

    def note(self, step, kind, **values):
        """Record values that make no curve, such as samples, in log.jsonl alone."""
        self._append("log.jsonl", json.dumps({"kind": kind, "step": step, **values}))

    def records(self):
        """All records of log.jsonl; a line that is none is left out."""
        path = self.dir / "log.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [record for record in map(parse_record, lines) if record]

    def last_checkpoint(self, step):
        """The path of the newest checkpoint up to a step, or None."""
        paths = [path for path in list_checkpoints(self.dir) if int(path.stem[6:]) <= step]
        return paths[0] if paths else None

    def tell_overfitting(self, step):
        """Say once in a run that it overfits, as its records up to now show."""
        self._attempt("the search for overfitting", self._tell_overfitting, step)

    def _tell_overfitting(self, step):
        records = self.records()
        message = find_overfitting(records)
        if message and not any(record["kind"] == "overfitting" for record in records):
            print0(f"step {step:5d} | {message}")
            self.note(step, "overfitting", message=message)

    def write_report(self):
        """Write report.md anew from all records of log.jsonl."""
        self._attempt("report.md", self._write_report)

    def _write_report(self):
        records = self.records()
        if not any(record["kind"] in STARTS for record in records):
            return  # the disk was full when the run's facts were to be written
        text = format_report(records, self.dir.resolve().name)
        # a path or a prompt may hold bytes that are no UTF-8
        data = text.encode(errors="replace")
        atomic_write(self.dir / "report.md", lambda file: file.write(data))

    def draw(self):
        """Redraw log.png, with the published figures that this run can be compared with."""
        self._attempt("log.png", plot, self.records(), self.dir / "log.png", *self.published)

    def _attempt(self, what, function, *args):
        """Call a function whose failure must not end the run; the first failure is a warning.

        Returns its result, True in place of None; None if it failed.
        """
        try:
            result = function(*args)
            return True if result is None else result
        except Exception as error:  # of other people's code, too
            if what not in self.warned:
                warn(f"{what}: {first_line(error)}; training goes on without")
            self.warned.add(what)
            return None

    def _move_away(self, paths):
        """Move the files of an earlier run into the first unused numbered folder."""
        if not paths:
            return
        place = place_for_earlier_runs(self.dir)
        for path in paths:
            if path.lstat().st_dev != place.stat().st_dev:
                raise UserError(f"{path} of an earlier run is on another disk than {place}: move "
                                "it away, or choose another --log_dir")
        for i in itertools.count(1):
            folder = place / f"{self.dir.resolve().name}_{i:03d}"
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
        evaluation at `step` stays. Records of an end go, since the run continues.
        """
        later = [path for path in list_checkpoints(self.dir) if int(path.stem[6:]) > step]
        self._move_away(later)
        resumed = checkpoint_path(self.dir, step)
        if later and resumed.exists():  # latest_checkpoint.pt names one that is gone
            update_latest(resumed)

        records = []
        for record in self.records():
            at_step = record["step"] == step and record["kind"] != "train"
            if (record["step"] < step or at_step) and record["kind"] not in STOPS:
                records.append(record)
        lines = [format_line(record) for record in records if record["kind"] in TEXT_COLUMNS]
        self._rewrite("log.txt", lines)
        self._rewrite("log.jsonl", [json.dumps(record) for record in records])

    def _rewrite(self, name, lines):
        text = "".join(line + "\n" for line in lines)
        atomic_write(self.dir / name, lambda file: file.write(text.encode()))

    def _append(self, name, line):
        path = self.dir / name
        try:
            append_line(path, line)
        except OSError as error:
            if "append" not in self.warned:
                warn(f"{path} can't be written to ({error.strerror}); training goes on")
            self.warned.add("append")


def place_for_earlier_runs(log_dir):
    """The directory that gets the numbered folders of earlier runs: the one that holds log_dir.

    Files are renamed, so the place has to be on the same file system. If log_dir is a mount point,
    the working directory, or in a directory without permission, the place is log_dir itself.
    """
    real = log_dir.resolve()  # log_dir may be a link to another disk
    parent = real.parent
    same_disk = real.stat().st_dev == parent.stat().st_dev
    if same_disk and os.access(parent, os.W_OK) and real != Path.cwd():
        return parent
    return log_dir


def refuse_to_repeat(records, settings):
    """Raise UserError if the last session diverged with exactly these settings."""
    begun = [i for i, record in enumerate(records) if record["kind"] in STARTS]
    session = records[begun[-1]:] if begun else []
    diverged = [record for record in session if record["kind"] == "diverged"]
    if diverged and session[0].get("config") == json.loads(json.dumps(settings)):
        raise UserError(diverged[0].get("message") or "this run has diverged before")


def parse_record(line):
    """The record in a line of log.jsonl, or None if the line holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # a crash cut it short, or it is not ours
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    if type(record.get("step")) is not int:
        return None
    column, _ = TEXT_COLUMNS.get(record["kind"], (None, None))
    numbers = [record.get(name) for name in (column, "elapsed", "seconds_before")]
    are_numbers = all(n is None or (type(n) in (int, float) and abs(n) < 2**63) for n in numbers)
    is_complete = column is None or column in record
    return record if are_numbers and is_complete else None


def append_line(path, line):
    """Append a line to a file, whole or not at all: the next line must not continue half a line."""
    data = (line + "\n").encode()
    with open(path, "ab", buffering=0, opener=open_unless_link) as file:
        size = file.seek(0, os.SEEK_END)
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

    module = ("wandb",)

    def __init__(self, wandb, log_dir, config):
        self.run = wandb.init(project="gpt2", dir=str(log_dir), config=config)

    def add(self, values, step):
        for name, value in values.items():
            self.run.log({name: value}, step=step)

    def close(self):
        self.run.finish()


class TensorBoardSink:
    """Writes values for TensorBoard."""

    module = ("torch.utils.tensorboard", "tensorboard")

    def __init__(self, tensorboard, log_dir, config):
        self.writer = tensorboard.SummaryWriter(log_dir / "tensorboard")

    def add(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self):
        self.writer.close()


# -----------------------------------------------------------------------------
# log.png


def new_figure(**options):
    """A matplotlib Figure that is drawn to a file, whatever shows figures on this machine."""
    # A notebook sets MPLBACKEND for its own kernel, and matplotlib can't be imported with one that
    # it does not find.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(**options)


def plot(records, path, gpt2_tokens, fineweb_edu):
    """Draw the records of log.jsonl as an image at `path`. Raises UserError if that can't be
    written; the earlier image stays then.

    gpt2_tokens: whether published accuracies can be compared with; fineweb_edu: whether the losses
    are per token of GPT-2 on FineWeb-Edu's val split, so that published ones can.
    """
    train, val, hella = (select_curve(records, kind) for kind in TEXT_COLUMNS)
    has_hella = len(hella[0]) > 0
    figure = new_figure(figsize=(13 if has_hella else 7, 4.5))
    axes = figure.subplots(1, 2 if has_hella else 1, squeeze=False)
    plot_loss(axes[0][0], train, val, fineweb_edu)
    if has_hella:
        plot_hellaswag(axes[0][1], hella, gpt2_tokens)
    for ax in axes[0]:
        ax.grid(alpha=0.3)
        ax.legend()
    figure.tight_layout()
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def select_curve(records, kind):
    """(steps, values) of the records of a kind; a value that was not finite is left out."""
    name, _ = TEXT_COLUMNS[kind]
    points = [(r["step"], r[name]) for r in records if r["kind"] == kind and r[name] is not None]
    return [step for step, _ in points], [value for _, value in points]


def plot_loss(ax, train, val, fineweb_edu):
    label = f"val {val[1][-1]:.4f}" if val[1] else "val"
    ax.plot(*train, lw=0.8, alpha=0.6, label="train")
    ax.plot(*val, marker=".", label=label)
    ax.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    if fineweb_edu:
        label = "OpenAI GPT-2 (124M) on FineWeb-Edu val"
        ax.axhline(GPT2_VAL_LOSS, color="r", ls="--", lw=1, label=label)


def plot_hellaswag(ax, hella, gpt2_tokens):
    ax.plot(*hella, marker=".", label=f"this run {hella[1][-1]:.4f}")
    ax.set(xlabel="step", ylabel="acc_norm", title="HellaSwag")
    if gpt2_tokens:
        ax.axhline(GPT2_HELLASWAG, color="r", ls="--", lw=1, label="OpenAI GPT-2 (124M)")
        ax.axhline(GPT3_HELLASWAG, color="g", ls="--", lw=1, label="OpenAI GPT-3 (124M)")
