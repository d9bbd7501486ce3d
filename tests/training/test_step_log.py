"""A step's update is skipped on the device, and its line may come a step late: both change nothing else.

    python -m pytest tests/training/test_step_log.py
"""

import contextlib
import copy
import functools
import json
import math

import fake_cuda
import pytest
import torch
import train_gpt2
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from gptlib.training import step_log
from gptlib.common import UserError
from gptlib.training.step_log import StepLog, update_if_finite
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizers, take_step, train

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
NAN = torch.tensor(math.nan)


class NoHostWait(TorchDispatchMode):
    """Raises where the host asks for a tensor's value, for which it would wait on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
        assert function._schema.name not in waits, f"{function} makes the host wait"
        return function(*args, **(kwargs or {}))


class Setup:
    """A tiny model, its optimizers and two micro-batches."""

    def __init__(self, optimizer, dtype=torch.float32):
        torch.manual_seed(1)
        self.cfg = TrainConfig(**{**TINY, "total_batch_size": 64, "optimizer": optimizer})
        self.model = GPT(GPTConfig(16, 64, 2, 2, 32))
        self.optimizers = configure_optimizers(self.model, self.cfg, CPU)
        self.autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        x, y = torch.randint(64, (2, 2, 16))
        self.micro_batches = [(x, y, 32), (y, x, 32)]

    def step(self, lr=1e-3):
        return take_step(self.model, self.micro_batches, self.optimizers, self.scaler,
                         self.autocast, lr, self.cfg)

    def state(self):
        states = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        return copy.deepcopy((self.model.state_dict(), states))


def assert_same(state, expected):
    torch.testing.assert_close(state, expected, rtol=0, atol=0, equal_nan=True)


# -----------------------------------------------------------------------------
# the update


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_leaves_weights_and_moments(optimizer, bad):
    """Guards against weights of NaN, decayed weights, and moments or a bias correction that count
    a step which never was."""
    run = Setup(optimizer)
    run.step()
    before = run.state()
    run.micro_batches[0][0].zero_()
    handle = run.model.lm_head.weight.register_hook(lambda grad: grad + bad)
    loss, norm = run.step()
    handle.remove()
    assert not norm.isfinite()
    assert_same(run.state(), before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_first_step_changes_nothing_later(optimizer):
    """Guards against moments that a skipped first step leaves: the next one equals a first."""
    plain, late = Setup(optimizer), Setup(optimizer)
    handle = late.model.lm_head.weight.register_hook(lambda grad: grad * math.nan)
    late.step()
    handle.remove()
    plain.step()
    late.step()
    assert_same(late.state(), plain.state())


@pytest.mark.parametrize("is_finite", [True, False])
@pytest.mark.parametrize("n_before", [0, 1])
def test_muon_skips_a_bad_step_on_the_device(is_finite, n_before):
    """Guards against what torch's Muon, which knows no found_inf, would do to the weights."""
    run, plain = Setup("muon"), Setup("muon")

    def set_gradients(setup, bad=False):
        torch.manual_seed(2)
        for p in setup.optimizers[1].param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
            if bad:
                p.grad[0, 0] = math.nan

    for setup in [run, plain] * n_before:
        set_gradients(setup)
        setup.optimizers[1].step()
    set_gradients(run, bad=not is_finite)
    with NoHostWait():
        update_if_finite(run.optimizers[1:], torch.tensor(1.0) if is_finite else NAN)
    if is_finite:
        set_gradients(plain)
        plain.optimizers[1].step()
    assert_same(run.model.state_dict(), plain.model.state_dict())
    ours, theirs = (setup.optimizers[1].state_dict()["state"] for setup in (run, plain))
    if theirs:
        assert_same(ours, theirs)
    else:  # the state is made, of zeros, as the first step would find it
        assert all(not value["momentum_buffer"].any() for value in ours.values())


@pytest.mark.parametrize("optimizer, dtype", [
    ("adamw", torch.float32), ("adamw", torch.float16), ("muon", torch.float32)])
def test_a_step_never_makes_the_host_wait(optimizer, dtype):
    """Guards against a read of the norm or of the scaler's found_inf before the update: on CUDA
    the device would idle until the host has queued the next step."""
    run = Setup(optimizer, dtype)
    with NoHostWait():
        loss, norm = run.step()
    assert math.isfinite(loss.item() + norm.item())


def test_the_guard_sees_a_read():
    """Guards the guard: .item() and a condition on a tensor are what it has to find."""
    for read in (lambda: torch.ones(1).item(), lambda: bool(torch.ones(1) > 0)):
        with pytest.raises(AssertionError, match="host wait"), NoHostWait():
            read()


def test_an_optimizer_may_decide_by_found_inf():
    """Guards against an optimizer of one's own that isn't asked, or keeps the flag afterwards."""
    seen = []

    class Own(torch.optim.SGD):
        def step(self):
            seen.append(self.found_inf.item())

    own = Own([torch.ones(1, requires_grad=True)])
    own._step_supports_amp_scaling = True
    update_if_finite([own], NAN)
    update_if_finite([own], torch.tensor(2.0))
    assert seen == [1.0, 0.0]
    assert not hasattr(own, "found_inf")


# -----------------------------------------------------------------------------
# the report


class Recorder:
    """Stands in for the Reporter."""

    def __init__(self):
        self.lines = []

    def step(self, step, loss, lr, norm, seconds):
        assert seconds >= 0
        self.lines.append((step, loss, lr, norm))


def feed(log, steps, norm=1.0):
    for step in steps:
        log.start()
        log.end(step, torch.tensor(step + 0.5), 0.1, torch.tensor(norm))


def test_a_step_is_reported_when_the_next_is_queued():
    """Guards against a read that makes the host wait, lines out of order, and a lost last line."""
    late, prompt = Recorder(), Recorder()
    with StepLog(prompt, CPU) as log:
        feed(log, [0])
        assert prompt.lines == [(0, 0.5, 0.1, 1.0)]
    with StepLog(late, CPU, late=True) as log:
        feed(log, [0])
        assert late.lines == []
        feed(log, [1])
        assert late.lines == [(0, 0.5, 0.1, 1.0)]
        log.flush()
        assert [line[0] for line in late.lines] == [0, 1]
        feed(log, [2, 3])
    assert [line[0] for line in late.lines] == [0, 1, 2, 3]


def test_an_error_loses_no_line_and_stays_itself():
    """Guards against a crash that hides the step before it, or that is hidden by a second one."""
    late = Recorder()
    with pytest.raises(ValueError, match="broken"), StepLog(late, CPU, late=True) as log:
        feed(log, [0, 1])
        raise ValueError("broken")
    assert [line[0] for line in late.lines] == [0, 1]

    class Broken:
        def step(self, *args):
            raise RuntimeError("CUDA error")

    with pytest.raises(ValueError, match="broken"), StepLog(Broken(), CPU, late=True) as log:
        feed(log, [0])
        raise ValueError("broken")


@pytest.mark.parametrize("late", [False, True])
def test_ten_bad_steps_in_a_row_stop_the_run(late):
    """Guards against a count that the delay breaks: nine with a good one between go on, ten stop,
    and the step begun meanwhile is not reported."""
    reporter = Recorder()
    with pytest.raises(UserError, match="stopped at step 20"), \
            StepLog(reporter, CPU, late=late) as log:
        feed(log, range(1, 10), math.inf)
        feed(log, [10])
        feed(log, range(11, 30), math.nan)
    assert reporter.lines[-1][0] == 20


def test_events_are_of_the_device_that_trains(monkeypatch):
    """Guards against events in the queue of GPU 0 where another one trains, and against a time
    that is taken before the device has come to the end of the step."""
    cuda = fake_cuda.FakeCuda(monkeypatch)
    device = torch.device("cuda", 1)
    reporter = Recorder()
    with cuda.device(device), StepLog(reporter, device) as log:
        assert log.late
        feed(log, [0])
        assert [call.name for call in cuda.calls] == ["record", "record"]
        feed(log, [1])
    names = [call.name for call in cuda.calls]
    assert names == ["record"] * 4 + ["synchronize", "elapsed"] * 2
    assert {call.device for call in cuda.calls} == {1}


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
    monkeypatch.setattr(train_gpt2, "StepLog", functools.partial(StepLog, late=True))
    late = run_of(tmp_path, data_root, "late", capsys, **settings)
    assert len(prompt[0]) > 10
    assert late[0] == prompt[0]
    assert late[1] == prompt[1]


def test_a_crash_of_a_late_run_loses_no_line(tmp_path, data_root, monkeypatch, capsys):
    """Guards against a step that was done, and is in no log."""
    take = train_gpt2.take_step
    calls = []

    def crash_at_step_7(*args):
        calls.append(1)
        if len(calls) == 8:
            raise ZeroDivisionError
        return take(*args)

    monkeypatch.setattr(train_gpt2, "take_step", crash_at_step_7)
    monkeypatch.setattr(train_gpt2, "StepLog", functools.partial(StepLog, late=True))
    records, _ = run_of(tmp_path, data_root, "crashed", capsys)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(7))
    assert step_log.MAX_BAD_STEPS == 10
