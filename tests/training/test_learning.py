"""bench.py learning and bench.py samples: what is compared, chosen and counted.

    python -m pytest tests/training/test_learning.py
"""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY, english, flags, run, write_dataset

from benches import learning
from benches.learning import (Experiment, best_rate, draw_learning, run_name, run_settings,
                              run_training, tokens_to_loss)
from benches.samples import judge_python
from gptlib.common import UserError
from train_gpt2 import TrainConfig


def finished_run(folder, settings, loss):
    """The log that a run of train_gpt2.py would leave."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = settings["max_steps"]
    config = dict(data_root=settings.get("data_root"))
    records = [dict(kind="config", step=0, config=config), dict(kind="val", step=0, loss=7.0)]
    records += [dict(kind="train", step=step, loss=7.0, ms=100.0) for step in range(steps)]
    records.append(dict(kind="val", step=steps // 2, loss=6.0))
    records.append(dict(kind="val", step=steps, loss=loss))
    text = "\n".join(json.dumps(record) for record in records)
    (folder / "log.jsonl").write_text(text + '\n{"kind": "tr')  # a line cut short


@pytest.fixture
def fake_training(tmp_path, monkeypatch):
    """Stands for train_gpt2.py: notes its command lines, leaves the loss of `loss_of`."""
    fake = SimpleNamespace(commands=[], loss_of=lambda settings: 5.0)

    def start(command, **options):
        given = dict(flag.removeprefix("--").split("=", 1) for flag in command[2:] if "=" in flag)
        settings = dict(optimizer=given["optimizer"], max_lr=float(given["max_lr"]),
                        max_steps=int(given["max_steps"]), seed=int(given["seed"]),
                        dev=given.get("dev") == "True", data_root=given.get("data_root"))
        fake.commands.append(command)
        finished_run(tmp_path / given["log_dir"].split("/")[-1], settings, fake.loss_of(settings))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(learning.subprocess, "run", start)
    return fake


def test_tokens_to_a_loss_by_hand():
    """Guards against a wrong headline figure: half way between two losses is the geometric mean of
    their tokens."""
    assert tokens_to_loss([(100, 5.0), (400, 3.0)], 4.0) == pytest.approx(200)
    assert tokens_to_loss([(400, 3.0), (100, 5.0)], 5.0) == pytest.approx(100)
    assert tokens_to_loss([(400, 3.0), (100, 5.0)], 3.0) == pytest.approx(400)
    assert tokens_to_loss([(100, 5.0), (400, 3.0)], 2.9) is None
    assert tokens_to_loss([(100, 5.0), (400, 3.0)], 5.1) is None


def test_a_diverged_run_is_not_the_best():
    """Guards against a diverged run that counts as the best: NaN is neither smaller nor larger than
    a loss."""
    runs = [dict(settings=dict(max_lr=lr), loss=loss)
            for lr, loss in ((1, None), (2, 4.0), (3, 5.0))]
    assert best_rate(runs) == 2


def test_runs_that_differ_have_folders_of_their_own():
    """Guards against two runs in one folder: the second would count as finished, or resume the
    first."""
    settings = [run_settings("1.8M", "muon", 1e-3, 100, 1),
                run_settings("1.8M", "adamw", 1e-3, 100, 1),
                run_settings("1.8M", "muon", 2e-3, 100, 1),
                run_settings("1.8M", "muon", 1e-3, 65, 1),
                run_settings("1.8M", "muon", 1e-3, 100, 2),
                run_settings("1.8M", "muon", 1e-3, 100, 1, dev=True),
                run_settings("1.8M", "muon", 1e-3, 100, 1, lr_schedule="cosine")]
    assert len({run_name("1.8M", s) for s in settings}) == len(settings)


@pytest.mark.parametrize("size", learning.SIZES)
def test_settings_are_those_of_train_gpt2(size):
    """Guards against a flag that train_gpt2.py does not know, which ends the sweep at its first
    run."""
    cfg = TrainConfig(**run_settings(size, "muon", 1e-3, 100, 1, dev=True))
    assert cfg.n_embd % 64 == 0
    assert cfg.warmup_steps == 5
    assert all(len(rates) == 5 for rates in learning.SIZES[size]["rates"].values())


def test_a_sweep_chooses_on_the_dev_split(fake_training, tmp_path):
    """Guards against a rate that is chosen on the val split, which makes the reported loss too
    good."""
    fake_training.loss_of = lambda s: abs(s["max_lr"] - 4e-3) + (0 if s["dev"] else 100)
    experiment = Experiment("data", tmp_path, "1.8M", 20, 1)
    assert experiment.sweep() == dict(adamw=4e-3, muon=4e-3)
    assert len(fake_training.commands) == 10
    assert all("--dev=True" in command for command in fake_training.commands)


@pytest.mark.parametrize("best, found, tried", [
    (2e-4, 2.5e-4, 8), (1e-2, 8e-3, 5), (1.7e-2, 1.6e-2, 6), (9.0, 1.28e-1, 8)])
def test_a_sweep_goes_on_beyond_its_ends(fake_training, tmp_path, best, found, tried):
    """Guards against a best rate at the end of the grid, beyond which a better one may lie."""
    best_of = dict(adamw=best, muon=8e-3)  # Muon's best is inside of its grid
    fake_training.loss_of = lambda s: abs(s["max_lr"] - best_of[s["optimizer"]])
    experiment = Experiment("data", tmp_path, "1.8M", 20, 1)
    assert experiment.sweep() == pytest.approx(dict(adamw=found, muon=8e-3))
    assert len(fake_training.commands) == tried + 5


def test_the_comparison_is_of_other_seeds_and_the_val_split(fake_training, tmp_path):
    """Guards against a comparison with the very runs that chose the rate."""
    def loss_of(settings):
        return 5.0 if settings["optimizer"] == "adamw" else 6.0 - settings["max_steps"] / 100
    fake_training.loss_of = loss_of
    result = Experiment("data", tmp_path, "1.8M", 200, 2).compare(dict(adamw=1e-3, muon=2e-3))
    assert len(fake_training.commands) == 6
    assert not any("--dev=True" in command for command in fake_training.commands)
    assert result["adamw_loss"] == 5.0
    # 100 steps give a loss of 5.0, the 200 of AdamW: half of its tokens
    assert result["ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize("at_zero, lengths, ratio", [
    (5.5, [100, 50], 0.25),  # the loss is AdamW's at 50 steps, and below it at 100
    (6.2, [100, 130], 0.5 * 1.3 ** (2 / 3)),  # 5.2 and 4.9: two thirds of the way in the logarithm
    (7.5, [100, 130, 200], None)])  # still above it with all of AdamW's tokens
def test_lengths_follow_until_the_loss_is_between(fake_training, tmp_path, at_zero, lengths, ratio):
    """Guards against Muon below AdamW's loss in every run, or above it: then nobody learns with how
    many tokens it gets there."""
    def loss_of(settings):
        return 5.0 if settings["optimizer"] == "adamw" else at_zero - settings["max_steps"] / 100
    fake_training.loss_of = loss_of
    result = Experiment("data", tmp_path, "1.8M", 200, 2).compare(dict(adamw=1e-3, muon=2e-3))
    assert [tokens // 2048 for tokens, _ in result["muon"]] == lengths
    assert result["ratio"] == pytest.approx(ratio)


def test_a_rate_of_the_embeddings_is_adamws_alone(fake_training, tmp_path):
    """Guards against a ratio on top of Muon's rate, at which AdamW trains the embeddings
    already."""
    Experiment("data", tmp_path, "1.8M", 20, 1, adamw_embedding=16.0).compare(
        dict(adamw=1e-3, muon=2e-3))
    for command in fake_training.commands:
        is_adamw = "--optimizer=adamw" in command
        assert ("--embedding_lr_ratio=16.0" in command) == is_adamw
    names = {Path(flag).name for command in fake_training.commands for flag in command
             if flag.startswith("--log_dir") and "adamw" in flag}
    assert names == {f"1.8M-adamw-lr0.001-20steps-seed{seed}-embedding_lr_ratio=16.0"
                     for seed in learning.SEEDS}


def test_finished_runs_are_not_run_again(fake_training, tmp_path):
    """Guards against a sweep of hours that was stopped, and begins again."""
    settings = run_settings("1.8M", "muon", 1e-3, 20, 1)
    first = run_training(tmp_path, "1.8M", settings)
    again = run_training(tmp_path, "1.8M", settings)
    assert first == again
    assert len(fake_training.commands) == 1
    assert "--auto_resume" in fake_training.commands[0]
    assert first["curve"][-1] == (20 * 2048, 5.0)


def test_a_failed_run_ends_the_experiment(tmp_path, monkeypatch):
    """Guards against a failure without its reason, and runs that begin after it."""
    started = []

    def fail(command, **options):
        started.append(command)
        time.sleep(len(started) - 1)  # a run that began meanwhile takes its time
        return SimpleNamespace(returncode=1, stderr="error: this disk is full\n")

    monkeypatch.setattr(learning.subprocess, "run", fail)
    with pytest.raises(UserError, match="this disk is full"):
        Experiment("data", tmp_path, "1.8M", 20, 1).sweep()
    assert len(started) <= 2  # the second may have begun before the first was known to have failed


def test_a_rate_that_diverges_ends_its_run_alone(tmp_path, monkeypatch, fake_training):
    """Guards against a sweep that ends at its largest rate, which is there to be too large."""
    fake_training.loss_of = lambda s: abs(s["max_lr"] - 4e-3)
    start = learning.subprocess.run

    def diverge(command, **options):
        if "--max_lr=0.016" in command and "--optimizer=adamw" in command:
            error = "error: stopped at step 9: the gradient norm was not finite ten steps in a row."
            return SimpleNamespace(returncode=1, stderr=error)
        return start(command, **options)

    monkeypatch.setattr(learning.subprocess, "run", diverge)
    experiment = Experiment("data", tmp_path, "1.8M", 20, 1)
    assert experiment.sweep() == dict(adamw=4e-3, muon=4e-3)
    assert [run["loss"] for run in experiment.runs].count(None) == 1
    result = dict(size="1.8M", steps=20, runs=experiment.runs)
    draw_learning(result, tmp_path / "picture.png")
    assert "| 0.016 |  | 0.0120 |" in learning.format_tables(result)
    with pytest.raises(UserError, match="has diverged: at this seed the best rate is too high"):
        experiment.compare(dict(adamw=1.6e-2, muon=4e-3))


def test_runs_on_another_dataset_are_not_taken_for_these(tmp_path, fake_training):
    """Guards against two datasets in one --out that are compared with each other in silence."""
    run_training(tmp_path, "1.8M", run_settings("1.8M", "muon", 1e-3, 20, 1, data_root="a"))
    with pytest.raises(UserError, match="is a run on a, not on b: choose another --out"):
        run_training(tmp_path, "1.8M", run_settings("1.8M", "muon", 1e-3, 20, 1, data_root="b"))


def test_a_run_that_was_stopped_is_told(tmp_path, monkeypatch):
    """Guards against half a run that counts as a whole one: train_gpt2.py exits with 0 after
    SIGTERM."""
    settings = run_settings("1.8M", "muon", 1e-3, 20, 1)

    def stop(command, **options):
        finished_run(tmp_path / run_name("1.8M", settings), {**settings, "max_steps": 10}, 5.0)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(learning.subprocess, "run", stop)
    with pytest.raises(UserError, match="was stopped; the same command goes on"):
        run_training(tmp_path, "1.8M", settings)


def test_a_real_run_of_a_tiny_size(data_root, tmp_path, monkeypatch):
    """Guards against a fake above that differs from train_gpt2.py's own command line and log."""
    tiny = dict(model=dict(n_layer=1, n_head=1, n_embd=16), rates={})
    monkeypatch.setitem(learning.SIZES, "tiny", tiny)
    settings = run_settings("tiny", "muon", 1e-3, 4, 1, data_root=str(data_root), dev=True)
    result = run_training(tmp_path / "out", "tiny", settings)
    assert [tokens for tokens, _ in result["curve"]] == [2048 * step for step in range(5)]
    assert result["loss"] < result["curve"][0][1]


def test_the_picture_of_any_experiment(fake_training, tmp_path):
    """Guards against a sweep that can't be drawn while it runs, without a comparison."""
    experiment = Experiment("data", tmp_path, "1.8M", 20, 1)
    result = dict(size="1.8M", steps=20, runs=[])
    draw_learning(result, tmp_path / "empty.png")
    experiment.sweep()
    experiment.compare(dict(adamw=1e-3, muon=1e-3))
    draw_learning(dict(result, runs=experiment.runs, adamw_loss=5.0), tmp_path / "all.png")
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "empty.png").stat().st_size


def test_the_tables_of_an_experiment():
    """Guards against a document with a mean of the wrong seeds: it is made from the runs.

    Muon's steps take 1 / 0.8 times as long, so half of the tokens are 0.62 of the time.
    """
    def one(optimizer, rate, loss, tokens, **settings):
        settings = dict(optimizer=optimizer, max_lr=rate, **settings)
        return dict(settings=settings, loss=loss, tokens=tokens)
    runs = [one("adamw", 1e-3, 5.0, 100, dev=True), one("adamw", 2e-3, 4.5, 100, dev=True),
            one("muon", 2e-3, 4.25, 100, dev=True), one("adamw", 2e-3, 4.0, 100),
            one("adamw", 2e-3, 5.0, 100), one("muon", 2e-3, 3.0, 50)]
    lines = learning.format_tables(dict(runs=runs, ratio=0.5, step_rates=[dict(ratio=0.8)]))
    lines = lines.splitlines()
    assert lines[2:4] == ["| 0.001 | 5.0000 |  |", "| 0.002 | 4.5000 | 4.2500 |"]
    assert lines[7:9] == ["| adamw, rate 0.002 | 100 | 4.0000, 5.0000 | 4.5000 |",
                          "| muon, rate 0.002 | 50 | 3.0000 | 3.0000 |"]
    assert "0.50 of its tokens. Its steps take 1.25 times" in lines[-1]
    assert "0.62 of the time" in lines[-1]


# -----------------------------------------------------------------------------
# samples


@pytest.mark.parametrize("text, verdict", [
    ("def f(x):\n    return x\n", "compiles"),
    ("", "compiles"),
    ("def f(x):\n", "unfinished"),
    ("x = [1,\n", "unfinished"),
    ('def f():\n    """Half a doc', "unfinished"),
    ("def f(x:\n    return x\n", "wrong"),
    ("def f(x):\nreturn x\n", "wrong"),
    ("x = 1\n  y = 2\n", "wrong"),
    ("x = 'half\ny = 1\n", "wrong"),
    ("\0", "wrong"),
])
def test_what_counts_as_python(text, verdict):
    """Guards against a judge that is too kind, or that calls an open bracket at the end an
    error."""
    assert judge_python(text, is_cut=False) == verdict


def test_the_last_line_of_a_sample_that_was_cut():
    """Guards against a sample that is judged by its last line, in the middle of which it ends."""
    assert judge_python("x = 1\ny = = 2", is_cut=True) == "compiles"
    assert judge_python("x = 1\ny = = 2", is_cut=False) == "wrong"
    assert judge_python("x = = 1\ny = 2", is_cut=True) == "wrong"


def test_shares_of_a_real_model(tmp_path):
    """Guards against shares that do not add up, or are of other samples than were asked for."""
    write_dataset(tmp_path / "data", [english(3000, 1)], [english(500, 2)])
    settings = {**TINY, "max_steps": 1, "eval_interval": 1, "checkpoint_interval": 1}
    done = run("train_gpt2.py", "--data_root=data", *flags(**settings), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run("bench.py", "samples", "--checkpoint_path=log/latest_checkpoint.pt",
               "--num_samples=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]["samples"]
    assert [r["temperature"] for r in results] == [0.0, 0.4, 0.6, 0.8, 1.0]
    assert [r["samples"] for r in results] == [1, 3, 3, 3, 3]
    for r in results:
        assert r["compiles"] + r["unfinished"] + r["wrong"] == pytest.approx(1)
