"""A run that was stopped, killed or out of disk continues as if nothing had happened.

    python -m pytest tests/checkpoints/test_resume.py
"""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, english, environment, flags, read_log, run, start, write_dataset
from interop_helpers import main_of

import train_gpt2
from gptlib.checkpoints.saver import save_checkpoint
from gptlib.common import UserError

# long enough to be stopped half-way, with dropout's random numbers in every step
LONG = {**TINY, "max_steps": 60, "checkpoint_interval": 7, "eval_interval": 10, "dropout": 0.2,
        "total_batch_size": 512, "n_layer": 4, "n_embd": 64}


def weights(path):
    """The model's tensors of a checkpoint file."""
    return torch.load(path, weights_only=True)["model"]


def assert_same_run(log_dir, reference_dir, last):
    """Equal log.txt and equal weights at step `last`, bit for bit."""
    assert read_log(log_dir) == read_log(reference_dir)
    name = f"model_{last:05d}.pt"
    ours, theirs = weights(log_dir / name), weights(reference_dir / name)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def wait_for(process, is_reached, what):
    """Wait until is_reached() is true; fails when the process ends before."""
    for _ in range(6000):
        if is_reached():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError(f"{what} was never reached")


def wait_for_step(process, log_dir, step):
    """Wait until the process has logged a training step."""
    def is_logged():
        text = (log_dir / "log.txt").read_text() if (log_dir / "log.txt").exists() else ""
        return f"\n{step} train" in text

    wait_for(process, is_logged, f"step {step}")


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Uninterrupted runs, made once for each set of settings."""
    root = tmp_path_factory.mktemp("references")
    data = write_dataset(root / "data", [english(9001, 1), english(8000, 2)], [english(1500, 3)])
    made = {}

    def reference(**settings):
        key = str(sorted(settings.items()))
        if key not in made:
            folder = root / f"run_{len(made)}"
            folder.mkdir()
            done = run("train_gpt2.py", *flags(**settings, data_root=data), cwd=folder)
            assert done.returncode == 0, done.stderr
            made[key] = folder / "log"
        return made[key]

    reference.data = data
    return reference


def test_a_checkpoint_is_written_while_training_continues(tmp_path, references, monkeypatch):
    """Guards against training that waits for a slow disk, and changes what is being written."""
    settings = {**LONG, "max_steps": 20}
    expected = references(**settings)
    save, threads = save_checkpoint, torch.get_num_threads()

    def slow_save(log_dir, state, *options):
        """Writing takes five steps for the first one."""
        for _ in range(6000):
            log = (tmp_path / "log" / "log.txt").read_text()
            if state["step"] > 7 or "\n12 train" in log:
                return save(log_dir, state, *options)
            time.sleep(0.01)
        raise AssertionError("training waits for the checkpoint")

    monkeypatch.setattr("gptlib.checkpoints.saver.save_checkpoint", slow_save)
    try:
        torch.set_num_threads(1)  # as in the run to compare with
        cfg = train_gpt2.TrainConfig(**settings, data_root=str(references.data),
                                     log_dir=str(tmp_path / "log"))
        train_gpt2.train(cfg)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    for step in (7, 14, 20):
        ours, theirs = (torch.load(folder / f"model_{step:05d}.pt", weights_only=True)
                        for folder in (tmp_path / "log", expected))
        for part in ("model", "optimizer", "rng", "position"):
            torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)


@pytest.mark.parametrize("settings", [
    LONG, {**LONG, "optimizer": "muon", "dtype": "auto"},
    {**LONG, "shuffle": True, "batch_size": 3}], ids=["adamw", "muon", "shuffled"])
def test_sigterm_and_resume_equal_an_uninterrupted_run(tmp_path, references, settings):
    """Guards against state that is not saved (moments, random numbers, position), which shows as
    another loss after the resume."""
    expected = references(**settings)
    argv = flags(**settings, auto_resume=True, data_root=references.data)
    process = start("train_gpt2.py", *argv, cwd=tmp_path)  # nothing to resume yet
    wait_for_step(process, tmp_path / "log", 23)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "--auto_resume goes on" in output
    stopped_at = max(read_log(tmp_path / "log")["train"]) + 1
    assert (tmp_path / "log" / f"model_{stopped_at:05d}.pt").exists()
    assert stopped_at < 60
    done = run("train_gpt2.py", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {stopped_at} of 60" in done.stdout
    assert_same_run(tmp_path / "log", expected, 60)


def test_ctrl_c_in_the_first_steps_saves_too(tmp_path, references):
    """Guards against a Ctrl-C before the first regular checkpoint that loses everything, or ends
    in a traceback."""
    process = start("train_gpt2.py", *flags(**LONG, data_root=references.data), cwd=tmp_path)
    wait_for_step(process, tmp_path / "log", 1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "Traceback" not in output, output
    assert list((tmp_path / "log").glob("model_*.pt"))


SLOW_EVALUATION = """
import sys, time
import train_gpt2

def evaluate(*args):
    while True:
        print("evaluating", flush=True)
        time.sleep(0.01)

train_gpt2.Evaluator.validation_loss = evaluate
sys.argv = ["train_gpt2.py", *sys.argv[1:]]
train_gpt2.main()
"""


def test_a_second_signal_exits_at_once(tmp_path, references):
    """Guards against someone who presses Ctrl-C twice and still waits for minutes; and against a
    first signal that does not let an evaluation end."""
    argv = [sys.executable, "-c", SLOW_EVALUATION, *flags(**LONG, data_root=references.data)]
    process = subprocess.Popen(argv, cwd=tmp_path, env={**environment(), "PYTHONPATH": str(ROOT)},
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.stdout.readline() != "evaluating\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    for _ in range(200):  # more lines than the pipe held at the time of the signal
        assert process.stdout.readline() == "evaluating\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT


def test_kill_9_loses_the_steps_since_the_last_checkpoint(tmp_path, references):
    """Guards against a process that damages what was saved before, killed at any moment, even in
    the middle of a log line."""
    expected = references(**LONG)
    argv = flags(**LONG, auto_resume=True, data_root=references.data)
    for step, saved in ((16, 14), (37, 35)):  # killed twice
        process = start("train_gpt2.py", *argv, cwd=tmp_path)
        wait_for_step(process, tmp_path / "log", step)
        checkpoint = tmp_path / "log" / f"model_{saved:05d}.pt"
        wait_for(process, checkpoint.exists, checkpoint)  # it is written while training goes on
        process.kill()
        process.communicate()
    with open(tmp_path / "log" / "log.txt", "a") as f:
        f.write("38 tra")  # as a crash in the middle of a line would leave it
    with open(tmp_path / "log" / "log.jsonl", "a") as f:
        f.write('{"kind": "tra')
    # 35, or a later one if the process went on for longer before it was killed
    newest = max(int(path.stem[6:]) for path in (tmp_path / "log").glob("model_*.pt"))
    assert newest >= 35
    done = run("train_gpt2.py", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {newest} of 60" in done.stdout
    assert_same_run(tmp_path / "log", expected, 60)


def test_resume_takes_settings_from_the_checkpoint(tmp_path, references):
    """Guards against a resume that needs the flags of the first start again, and against one that
    does not heed a flag that is given."""
    expected = references(**LONG)
    shutil.copytree(expected, tmp_path / "log")
    path = sorted((tmp_path / "log").glob("model_*.pt"))[1]  # of the five that were kept
    done = run("train_gpt2.py", "--resume", "--checkpoint_path", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "log", expected, 60)
    done = run("train_gpt2.py", "--resume", "--checkpoint_path", path, "--max_steps", 50,
               cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(read_log(tmp_path / "log")["train"]) == 49


def test_a_complete_run_changes_nothing(tmp_path, references):
    """Guards against an --auto_resume that trains on after the last step, or rewrites what is
    there."""
    shutil.copytree(references(**LONG), tmp_path / "log")
    before = {p.name: p.read_bytes() for p in (tmp_path / "log").glob("model_*")}
    argv = flags(**LONG, auto_resume=True, data_root=references.data)
    done = run("train_gpt2.py", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing to do: at step 60, --max_steps is" in done.stdout
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "log").glob("model_*")}
    assert read_log(tmp_path / "log") == read_log(references(**LONG))


def test_damaged_checkpoints_are_named_and_skipped(tmp_path, references):
    """Guards against a run that does not continue from the newest checkpoint that is intact, if
    later ones are truncated, empty, random or have one flipped byte."""
    expected = references(**LONG)
    shutil.copytree(expected, tmp_path / "log")
    newest = sorted((tmp_path / "log").glob("model_*.pt"))
    whole = newest[-1].read_bytes()
    newest[-1].write_bytes(whole[:len(whole) // 2])
    newest[-2].write_bytes(b"")
    newest[-3].write_bytes(np.random.default_rng(0).bytes(5000))
    flipped = bytearray(newest[-4].read_bytes())
    flipped[len(flipped) // 2] ^= 1  # in the optimizer's state, which torch.load takes as it is
    newest[-4].write_bytes(flipped)
    argv = flags(**LONG, auto_resume=True, data_root=references.data)
    done = run("train_gpt2.py", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for path in newest[-4:]:
        assert f"skipping log/{path.name}" in done.stderr
    assert f"resuming at step {int(newest[-5].stem[6:])} of 60" in done.stdout
    assert sorted(p.name for p in (tmp_path / "log_001").iterdir()) == [p.name for p in newest[-4:]]
    assert_same_run(tmp_path / "log", expected, 60)


def test_a_fresh_start_moves_the_earlier_run_away(tmp_path, references):
    """Guards against a second start in the same log_dir that overwrites the checkpoints of days."""
    expected = references(**LONG)
    shutil.copytree(expected, tmp_path / "log", symlinks=True)
    settings = flags(**{**LONG, "max_steps": 2}, data_root=references.data)
    for i in (1, 2):
        done = run("train_gpt2.py", *settings, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "files of an earlier run from log to " in done.stdout
        assert f"log_00{i}\n" in done.stdout
    assert_same_run(tmp_path / "log_001", expected, 60)
    latest = weights(tmp_path / "log_001" / "latest_checkpoint.pt")
    assert latest.keys() == weights(expected / "model_00060.pt").keys()
    assert sorted(read_log(tmp_path / "log")["train"]) == [0, 1]


def test_only_the_oldest_checkpoints_are_removed(references):
    """Guards against removing newer checkpoints than the oldest, or more than --keep_checkpoints
    says, and against a latest_checkpoint.pt that names another one."""
    steps = sorted(int(p.stem[6:]) for p in references(**LONG).glob("model_*.pt"))
    assert steps == [35, 42, 49, 56, 60]
    assert (references(**LONG) / "latest_checkpoint.pt").resolve().name == "model_00060.pt"


def test_a_full_disk_leaves_the_earlier_checkpoints_intact(tmp_path, references):
    """Guards against a save that fails half-way and ends the run or leaves a part of a file; on a
    real small file system."""
    folder = tmp_path / "small"
    folder.mkdir()
    size = next(references(**LONG).glob("model_*.pt")).stat().st_size
    options = f"size={int(size * 1.8)}"
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
                           capture_output=True)
    if mount.returncode:
        pytest.skip("a tmpfs can't be mounted here (needs root)")
    try:
        (folder / "filler").write_bytes(b"x" * size)
        settings = {**LONG, "max_steps": 75, "eval_interval": 100, "checkpoint_interval": 30,
                    "keep_checkpoints": 1, "data_root": references.data, "log_dir": folder}
        process = start("train_gpt2.py", *flags(**settings), cwd=tmp_path)
        output = ""
        for line in process.stdout:
            output += line
            if "step 30 is not saved, training goes on" in line:
                assert "No space left" in line
                assert not list(folder.glob("*.pt*"))
                (folder / "filler").unlink()
        assert process.wait(timeout=60) == 1, output
        assert "Traceback" not in output, output
        assert "error: cannot write" in output, output
        assert "model_00075.pt: No space left" in output, output
        names = sorted(path.name for path in folder.glob("*.*t*"))
        assert names == ["latest_checkpoint.pt", "log.txt", "model_00060.pt"]
        assert torch.load(folder / "latest_checkpoint.pt", weights_only=True)["step"] == 60
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("settings, message", [
    (dict(n_layer=3), "--n_layer is 3, but the checkpoint's model has 4"),
    (dict(n_embd=128), "--n_embd is 128, but the checkpoint's model has 64"),
    (dict(block_size=64), "--block_size is 64, but the checkpoint's model has 32"),
    (dict(optimizer="muon"), "--optimizer is muon, but the checkpoint was trained with another"),
    (dict(data_root="other"), r"is not the checkpoint's \(bpe\)"),
])
def test_what_does_not_fit_the_checkpoint_is_named(
        tmp_path, references, monkeypatch, settings, message):
    """Guards against another shape, optimizer or tokenizer than the checkpoint's that ends in a
    traceback, or trains on in silence."""
    shutil.copytree(references.data, tmp_path / "other")
    ranks = tmp_path / "other" / "tokenizer.tiktoken"
    lines = ranks.read_bytes().splitlines()
    # another tokenizer of the same size
    lines[1], lines[2] = lines[1].split()[0] + b" 2", lines[2].split()[0] + b" 1"
    ranks.write_bytes(b"\n".join(lines) + b"\n")
    path = next(references(**LONG).glob("model_*.pt"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        main_of(monkeypatch, train_gpt2, "--resume", "--checkpoint_path", path, *flags(**settings))
    assert "\n" not in str(error.value)


def test_fine_tuning_with_a_shorter_context(tmp_path, references):
    """Guards against an --init_from that takes more than the weights: it is a new run with its own
    steps, whose first loss is the checkpoint's."""
    path = references(**LONG) / "latest_checkpoint.pt"
    settings = {k: v for k, v in TINY.items() if not k.startswith("n_")}
    settings |= dict(block_size=16, max_steps=1, max_lr=1e-4, init_from=path)
    done = run("train_gpt2.py", *flags(**settings, data_root=references.data), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = torch.load(path, weights_only=True)
    after = torch.load(tmp_path / "log" / "model_00001.pt", weights_only=True)
    assert after["config"] == {**before["config"], "block_size": 16, "dropout": 0.0}
    assert after["step"] == 1
    for k in ("transformer.h.0.attn.c_attn.weight", "transformer.h.3.mlp.c_proj.weight"):
        torch.testing.assert_close(after["model"][k], before["model"][k], atol=1e-3, rtol=0)
    first_loss = float(read_log(tmp_path / "log")["val"][0])
    assert first_loss < 3.0, "a fresh model's is ln(320)"
