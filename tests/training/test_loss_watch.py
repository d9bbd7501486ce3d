"""A run that diverges stops and is not repeated; one that overfits says so.

    python -m pytest tests/training/test_loss_watch.py

loss_curves.json holds losses of real runs, each step's: `shakespeare`, bytes of tinyshakespeare;
`demo`, the first 120 steps of --preset demo; `spike`, a rate of 0.2 for six steps of the warm-up;
`diverged`, a rate of 0.3 from step 600 on.
"""

import functools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY

import train_gpt2
from gptlib.common import UserError
from gptlib.training import loss_watch
from gptlib.training.console import Console
from gptlib.training.loss_watch import Divergence, find_overfitting
from gptlib.training.run_log import RunLog
from train_gpt2 import TrainConfig, train

CURVES = json.loads((Path(__file__).parent / "loss_curves.json").read_text())


def diverges_at(vocab_size, losses):
    """The step at which the run is stopped, or None."""
    watch = Divergence(vocab_size)
    return next((step for step, loss in enumerate(losses) if watch.add(step, loss)), None)


@pytest.mark.parametrize("name", ["shakespeare", "demo", "spike"])
def test_a_healthy_run_is_never_stopped(name):
    """Guards against a night's run that is stopped for noise, or for a spike of the warm-up."""
    assert diverges_at(**CURVES[name]) is None


def test_a_run_that_diverged_is_stopped():
    """Guards against a run of days that trains on at the loss of its first hundred steps."""
    stopped = diverges_at(**CURVES["diverged"])
    assert 690 <= stopped <= 720, f"the loss rises at step 600, stopped at {stopped}"


@pytest.mark.parametrize("after", [8.0, 6.0, math.nan])
def test_gpt2_that_explodes_is_stopped(after):
    """Guards against the 124M run in bfloat16 whose loss jumps from 3 to 8 with finite norms."""
    losses = [max(3.0, 10.8 - 0.02 * step) for step in range(1000)] + [after] * 150
    assert diverges_at(50304, losses) == 1099


def test_the_mean_does_not_follow_high_losses():
    """Guards against a slow rise in the running mean, after which a lost run counts as healthy."""
    watch = Divergence(50304)
    for step, loss in enumerate([3.0] * 200 + [8.0] * 50):
        watch.add(step, loss)
    assert watch.mean == pytest.approx(3.0)
    assert (watch.high_steps, watch.since) == (50, 200)


# -----------------------------------------------------------------------------
# whole runs

EXPLODING = {**TINY, "max_steps": 80, "eval_interval": 1000, "checkpoint_interval": 10,
             "keep_checkpoints": 2, "num_samples": 0}


@pytest.fixture
def exploding(monkeypatch):
    """A schedule that ruins the model at step 25, and a watch that waits for 30 high steps."""
    monkeypatch.setattr(train_gpt2, "get_lr", lambda step, cfg: cfg.max_lr if step < 25 else 3.0)
    monkeypatch.setattr(loss_watch, "HIGH_STEPS", 30)


def train_into(folder, data_root, **settings):
    cfg = TrainConfig(**{**EXPLODING, **settings}, data_root=str(data_root), log_dir=str(folder))
    start = train_gpt2.load_start({"auto_resume": cfg.auto_resume, "log_dir": cfg.log_dir},
                                  train_gpt2.distributed.World(), list(vars(cfg)))
    return train(cfg, start)


@pytest.mark.parametrize("late", [False, True])
def test_a_diverging_run_keeps_its_last_good_checkpoint(tmp_path, data_root, exploding,
                                                        monkeypatch, late):
    """Guards against checkpoints of a ruined model that push the last good one out, and against a
    restart by torchrun that repeats it all."""
    monkeypatch.setattr(train_gpt2.console, "Console", functools.partial(Console, late=late))
    folder = tmp_path / "log"
    with pytest.raises(UserError, match="stopped at step") as first:
        train_into(folder, data_root, auto_resume=True)
    message = str(first.value)
    assert "model_00020.pt, is kept" in message
    assert "--no-stop_on_divergence" in message
    assert sorted(path.name for path in folder.glob("model_*.pt"))[-1] <= "model_00030.pt"
    assert (folder / "model_00020.pt").exists()

    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(UserError) as again:
        train_into(folder, data_root, auto_resume=True)
    assert str(again.value) == message
    assert (folder / "log.jsonl").read_bytes() == before

    monkeypatch.setattr(train_gpt2, "get_lr", lambda step, cfg: cfg.max_lr)
    train_into(folder, data_root, auto_resume=True, max_lr=1e-3)  # another setting: it goes on


def test_a_stop_while_the_loss_is_high_removes_nothing(tmp_path, data_root, exploding, monkeypatch):
    """Guards against SIGTERM in the midst of an explosion, whose checkpoint pushes out the only
    good one."""
    def ruin_and_stop(step, cfg):
        if step == 28:
            os.kill(os.getpid(), signal.SIGTERM)
        return cfg.max_lr if step < 25 else 3.0

    monkeypatch.setattr(train_gpt2, "get_lr", ruin_and_stop)
    train_into(tmp_path, data_root, keep_checkpoints=1)
    kept = sorted(path.name for path in tmp_path.glob("model_*.pt"))
    assert kept == ["model_00020.pt", "model_00028.pt"]


def test_a_run_may_go_on_in_spite_of_it(tmp_path, data_root, exploding):
    """Guards against a switch that does nothing."""
    train_into(tmp_path / "log", data_root, stop_on_divergence=False)


# -----------------------------------------------------------------------------
# overfitting


def course(*evaluations):
    """Records of a run: (training loss of the steps before, validation loss) of each evaluation."""
    records = []
    for i, (train_loss, val_loss) in enumerate(evaluations):
        step = 10 * i
        if i:
            records += [dict(kind="train", step=step - 1, loss=train_loss)]
        records.append(dict(kind="val", step=step, loss=val_loss))
    return records


@pytest.mark.parametrize("evaluations, says_so", [
    ([(0, 5.0), (3.0, 3.0), (2.0, 2.5), (1.5, 2.6), (1.2, 2.8)], True),
    ([(0, 5.0), (3.0, 3.0), (2.0, 2.5), (1.5, 2.6)], False),  # risen once
    ([(0, 5.0), (3.0, 3.0), (2.0, 2.5), (1.5, 2.503), (1.2, 2.507)], False),  # next to nothing
    ([(0, 5.0), (3.0, 3.0), (2.0, 2.5), (2.2, 2.6), (2.4, 2.8)], False),  # both rise
    ([(0, 5.0), (3.0, 3.0), (2.0, None), (1.5, 2.6), (1.2, 2.5)], False),
    ([], False),
])
def test_overfitting_by_hand(evaluations, says_so):
    """Guards against a warning for noise, and against none where the model learns by heart."""
    message = find_overfitting(course(*evaluations))
    assert (message is not None) == says_so
    if says_so:
        assert "since step 20 the validation loss has risen from 2.5000 to 2.8000" in message


def test_overfitting_is_told_once(tmp_path, capsys):
    """Guards against a warning at each evaluation, and again after a resume."""
    facts = {"config": {}}
    losses = [(3.0, 3.0), (2.0, 2.5), (1.5, 2.6), (1.2, 2.8), (1.0, 3.0)]
    log = RunLog(tmp_path, None, facts)
    for step, (train_loss, val_loss) in enumerate(losses):
        if step == 4:
            log.close()
            log = RunLog(tmp_path, step, facts)
        log.write(step, "train", loss=train_loss)
        log.write(step + 1, "val", loss=val_loss)
        log.tell_overfitting(step + 1)
    printed = capsys.readouterr()
    assert printed.out.count("the model overfits") == 1
    assert "step     4 | the model overfits" in printed.out
    assert printed.err == ""


def test_the_best_model_is_kept(tmp_path, data_root):
    """Guards against a best checkpoint of a later, worse evaluation, and one that a later save
    removes."""
    settings = {**TINY, "max_lr": 3e-2, "eval_interval": 5, "max_steps": 30, "num_samples": 0,
                "checkpoint_interval": 10, "keep_checkpoints": 1, "keep_best": True}
    folder = tmp_path / "log"
    train(TrainConfig(**settings, data_root=str(data_root), log_dir=str(folder)))
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "val" and r["step"] > 0}
    best = torch.load(folder / "best_checkpoint.pt", weights_only=True)
    assert best["val_loss"] == min(losses.values())
    assert losses[best["step"]] == best["val_loss"]
    assert [path.name for path in folder.glob("model_*.pt")] == ["model_00030.pt"]
