"""What a run reports on the way: on CUDA a step late, in order, and to the last line.

    python -m pytest tests/training/test_console.py
"""

import contextlib
import functools
import json
import math
import threading

import pytest
import torch
from conftest import TINY

import train_gpt2
from gptlib.common import UserError
from gptlib.distributed import World
from gptlib.training import console as module
from gptlib.training.console import Console
from train_gpt2 import TrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class Records:
    """Stands in for the RunLog, and notes what it is told."""

    def __init__(self):
        self.written, self.notes, self.is_closed = [], [], False

    def write(self, step, kind, **values):
        self.written.append((kind, step, values.get("loss", values.get("acc_norm"))))

    def note(self, step, kind, **values):
        self.notes.append((kind, step, values))

    def write_report(self):
        self.notes.append("report")

    def tell_overfitting(self, step):
        pass

    def last_checkpoint(self, step):
        return f"model_{step // 10 * 10:05d}.pt"

    def close(self):
        self.is_closed = True


def console_of(records, device=CPU, late=None, **values):
    return Console(records, device, World(), max_steps=30, tokens_per_step=100, flops_per_token=1,
                   late=late, **values)


def feed(console, steps, norm=1.0):
    for step in steps:
        console.step_begins()
        console.step_ended(step, torch.tensor(step + 0.5), 0.1, torch.tensor(norm))


def steps_in(records):
    return [step for kind, step, _ in records.written if kind == "train"]


def test_a_step_is_reported_when_the_next_is_queued():
    """Guards against a read that makes the host wait, lines out of order, and a lost last line."""
    late, prompt = Records(), Records()
    with console_of(prompt) as console:
        feed(console, [0])
        assert prompt.written == [("train", 0, 0.5)]
    with console_of(late, late=True) as console:
        feed(console, [0])
        assert late.written == []
        feed(console, [1])
        assert late.written == [("train", 0, 0.5)]
        console.flush()
        assert steps_in(late) == [0, 1]
        feed(console, [2, 3])
    assert steps_in(late) == [0, 1, 2, 3]


def test_an_error_loses_no_line_and_stays_itself():
    """Guards against a crash that hides the step before it, or that is hidden by a second one."""
    late = Records()
    with pytest.raises(ValueError, match="broken"), console_of(late, late=True) as console:
        feed(console, [0, 1])
        raise ValueError("broken")
    assert steps_in(late) == [0, 1]
    assert ("end", 2, "broken") == (*late.notes[0][:2], late.notes[0][2]["error"])
    assert late.is_closed

    def fail(*args, **values):
        raise RuntimeError("CUDA error")

    late.write = fail
    with pytest.raises(ValueError, match="broken"), console_of(late, late=True) as console:
        feed(console, [0])
        raise ValueError("broken")


@pytest.mark.parametrize("late", [False, True])
def test_ten_bad_steps_in_a_row_stop_the_run(late):
    """Guards against a count that the delay breaks: nine with a good one between them go on, ten
    stop, and the step begun meanwhile is not reported."""
    records = Records()
    with pytest.raises(UserError, match="stopped at step 20"), \
            console_of(records, late=late) as console:
        feed(console, range(1, 10), math.inf)
        feed(console, [10])
        feed(console, range(11, 30), math.nan)
    assert steps_in(records)[-1] == 20


def test_the_console_tells_the_time_left(monkeypatch, capsys):
    """Guards against an estimate with the compiling first step in it, which promises hours too
    many."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    with console_of(Records(), start_step=25) as console:
        for step, seconds in enumerate([100.0, 110.0, 130.0, 145.0, 150.0], 25):
            console.step_begins()
            now[0] = seconds
            console.step_ended(step, torch.tensor(1.0), 0.1, torch.tensor(1.0))
    lines = [line for line in capsys.readouterr().out.splitlines() if "tok/sec" in line]
    left = [line.split(" | ")[-1] for line in lines]
    assert left[1:4] == ["30 s left", "30 s left", "15 s left"]
    assert "left" not in left[0]
    assert "left" not in left[4]


def test_ranks_but_the_first_report_nothing(capsys, monkeypatch):
    """Guards against eight lines for each step on eight GPUs."""
    monkeypatch.setenv("RANK", "1")
    with console_of(None) as console:
        feed(console, [0])
        console.validation(1, 2.0)
        console.hellaswag(1, dict(examples=1, acc=0.0, acc_norm=0.0))
        console.samples(1, [])
        console.draw()
    console.end(1, 100, 2.0)
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


# -----------------------------------------------------------------------------
# whole runs


def run_of(tmp_path, data_root, name, capsys, **settings):
    """Train; returns the records of log.jsonl without times, and the console's lines likewise."""
    cfg = TrainConfig(**{**TINY, **settings}, data_root=str(data_root),
                      log_dir=str(tmp_path / name))
    capsys.readouterr()
    with contextlib.suppress(UserError, ZeroDivisionError):
        train(cfg)
    timed = ("ms", "tokens_per_second", "mfu", "memory_mib", "time", "elapsed")
    records = []
    for line in (tmp_path / name / "log.jsonl").read_text().splitlines()[1:]:
        record = json.loads(line)
        records.append({key: value for key, value in record.items() if key not in timed})
    console = [line.split(" | dt")[0] for line in capsys.readouterr().out.splitlines()
               if line.startswith(("step", "sample", "warning")) and "saved" not in line]
    return records, console


@pytest.mark.parametrize("settings", [
    {}, {"max_lr": 1e30, "min_lr": 0.0, "max_steps": 40, "eval_interval": 7}])
def test_a_late_log_equals_a_prompt_one(tmp_path, data_root, monkeypatch, capsys, settings):
    """Guards against a step's line after the validation that follows it, and lines that are lost
    at a checkpoint, at the end, or where ten bad steps stop the run."""
    prompt = run_of(tmp_path, data_root, "prompt", capsys, **settings)
    monkeypatch.setattr(train_gpt2.console, "Console", functools.partial(Console, late=True))
    late = run_of(tmp_path, data_root, "late", capsys, **settings)
    assert len(prompt[0]) > 10
    assert late[0] == prompt[0]
    assert late[1] == prompt[1]


def test_a_crash_of_a_late_run_loses_no_line(tmp_path, data_root, monkeypatch, capsys):
    """Guards against a step that was done, and is in no log."""
    calls = []

    def crash_at_step_7(*args):
        calls.append(1)
        if len(calls) == 8:
            raise ZeroDivisionError
        return 1e-3

    monkeypatch.setattr(train_gpt2, "get_lr", crash_at_step_7)
    monkeypatch.setattr(train_gpt2.console, "Console", functools.partial(Console, late=True))
    records, _ = run_of(tmp_path, data_root, "crashed", capsys)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(7))


def test_training_goes_on_while_a_picture_is_drawn(tmp_path, data_root, monkeypatch, capsys):
    """Guards against eight GPUs that wait at each evaluation until rank 0 has drawn log.png."""
    step_3_is_over = threading.Event()
    report, drawn = Console._report, []

    def report_and_tell(console, step, *args):
        report(console, step, *args)
        if step == 3:
            step_3_is_over.set()

    def draw(console):
        in_thread = threading.current_thread() is not threading.main_thread()
        drawn.append(in_thread and step_3_is_over.wait(100))

    monkeypatch.setattr(Console, "_report", report_and_tell)
    monkeypatch.setattr(Console, "draw", draw)
    run_of(tmp_path, data_root, "drawn", capsys)
    assert drawn  # the first one begins before the first step
    assert all(drawn)
