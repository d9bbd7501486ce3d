"""The campaign: a disk that is full at a random byte of every file that is written.

    python -m pytest tests/campaign/test_campaign_disk.py -m campaign

A dataset or a last checkpoint that cannot be written ends the program with one line; a log cannot
stop a run. With room again, the same command ends as if nothing had happened.
"""

import os
import re
import shutil
import subprocess

import campaign
import pytest
import torch
from campaign import HANGS, fault, scaled
from conftest import TINY, command, environment, flags, read_log
from corpus import contents, some_documents, write_jsonl

pytestmark = campaign.marks
rng, progress = campaign.rng, campaign.progress

TRAINING = {**TINY, "max_steps": 40, "eval_interval": 20, "checkpoint_interval": 10,
            "auto_resume": True}


def execute(argv, cwd, **env):
    """Run a command to its end; returns the CompletedProcess."""
    cwd.mkdir(exist_ok=True)
    return subprocess.run(argv, cwd=cwd, env={**environment(), **env}, text=True,
                          capture_output=True, timeout=HANGS)


def assert_one_line(done, what):
    """Exit code 1, no traceback, a last line that says what to do."""
    assert done.returncode == 1, f"{what}: exit code {done.returncode}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr, f"{what}\n{done.stderr[-3000:]}"
    line = done.stderr.strip().splitlines()[-1]
    assert re.match("error: .*(No space left on device|room)", line), f"{what}: {line}"


def assert_same_training(folder, expected):
    """Log and weights of a run are those of the undisturbed one."""
    log, theirs = read_log(folder / "log"), read_log(expected / "log")
    assert log == theirs
    ours, theirs = (torch.load(path / "log" / "model_00040.pt", weights_only=True)
                    for path in (folder, expected))
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
    names = sorted(os.listdir(folder / "log"))
    assert names == sorted(os.listdir(expected / "log"))


@pytest.fixture
def preparation(tmp_path):
    """The command that makes a dataset, and the folder of an undisturbed run."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", some_documents(600))
    argv = command("fineweb.py", f"--files={corpus}", "--data_root=data", "--tokenizer=bpe",
                   "--vocab_size=300", "--shard_size=8000")
    done = execute(argv, tmp_path / "undisturbed")
    assert done.returncode == 0, done.stderr
    return argv, tmp_path / "undisturbed"


@pytest.fixture
def training(tmp_path, data_root):
    argv = command("train_gpt2.py", *flags(**TRAINING, data_root=data_root))
    done = execute(argv, tmp_path / "undisturbed")
    assert done.returncode == 0, done.stderr
    return argv, tmp_path / "undisturbed"


def full_disk(tmp_path, name, limit, refusals=10**9):
    """The environment in which files of this name end at byte `limit`."""
    env = fault(tmp_path / "fault", campaign.FULL_DISK)
    return {**env, "FULL_DISK": f"{name}:{limit}:{refusals}"}


# -----------------------------------------------------------------------------
# each file by itself, at a random byte


def test_the_files_of_a_dataset(tmp_path, preparation, rng, progress):
    """Guards against a torn meta.json, tokenizer or shard, and a dataset that does not go on."""
    argv, undisturbed = preparation
    sizes = {path.name: path.stat().st_size for path in (undisturbed / "data").iterdir()
             if path.name != ".lock"}
    names = sorted(sizes) + ["meta.json", "tokenizer.tiktoken"] * 3
    for i in progress(range(scaled(40)), f"full disk, {len(sizes)} files of a dataset"):
        name, folder = names[i % len(names)], tmp_path / f"run{i}"
        limit = rng.randrange(sizes[name])
        what = f"{name} at byte {limit}"
        done = execute(argv, folder, **full_disk(tmp_path, f"{name}.tmp", limit))
        if done.returncode != 0 or name != "meta.json":  # meta.json grows with the shards
            assert_one_line(done, what)
        assert list((folder / "data").glob("*.tmp")) == [], what
        again = execute(argv, folder)
        assert again.returncode == 0, f"{what}\n{again.stderr}"
        assert contents(folder / "data") == contents(undisturbed / "data"), what
        shutil.rmtree(folder)
    progress.tell(f"full disk: {scaled(40)} datasets, a file each at a random byte; one line, and "
                  "byte-identical with room again")


LOGS = ["log.txt", "log.jsonl", "log.png", "model_00010.pt", "model_00020.pt", "model_00040.pt"]


@pytest.mark.parametrize("name", LOGS)
def test_the_files_of_a_run(tmp_path, training, rng, progress, name):
    """Guards against a run that is stopped by its log, a torn checkpoint, a save that failed in
    silence, and a log that stays torn."""
    argv, undisturbed = training
    size = (undisturbed / "log" / name).stat().st_size
    is_log, is_last = name.startswith("log"), name == "model_00040.pt"
    file = name if name in ("log.txt", "log.jsonl") else f"{name}.tmp"
    for i in progress(range(scaled(8)), f"full disk, {name}"):
        folder, limit = tmp_path / f"run{i}", rng.randrange(size)
        what = f"{name} at byte {limit}"
        done = execute(argv, folder, **full_disk(tmp_path, file, limit))
        if is_last:
            assert_one_line(done, what)
            again = execute(argv, folder)
            assert again.returncode == 0, f"{what}\n{again.stderr}"
            assert "resuming at step 30" in again.stdout, what
        else:
            assert done.returncode == 0, f"{what}\n{done.stderr[-3000:]}"
            assert "Traceback" not in done.stderr, what
        if name in ("log.txt", "log.jsonl"):
            assert f"{name} can't be written to" in done.stderr, what
        if name == "model_00010.pt":
            assert "step 10 is not saved, training goes on" in done.stdout, what
        if not is_log and name != "model_00040.pt":
            assert not (folder / "log" / name).exists(), what
            shutil.copy(undisturbed / "log" / name, folder / "log")
        if name == "log.png":
            shutil.copy(undisturbed / "log" / name, folder / "log")
        if name != "log.txt":  # of which only the beginning is there
            assert_same_training(folder, undisturbed)
        shutil.rmtree(folder)
    progress.tell(f"full disk: {scaled(8)} runs, {name} at a random byte")


@pytest.mark.parametrize("name", ["log.txt", "log.jsonl"])
def test_a_log_with_room_again(tmp_path, training, rng, progress, name):
    """Guards against half a line that the next one is appended to: plotters read three fields."""
    argv, undisturbed = training
    size = (undisturbed / "log" / name).stat().st_size
    for i in progress(range(scaled(8)), f"full disk for a while, {name}"):
        folder, limit, refusals = tmp_path / f"run{i}", rng.randrange(size // 2), rng.randint(1, 6)
        what = f"{name} at byte {limit}, {refusals} refusals"
        done = execute(argv, folder, **full_disk(tmp_path, name, limit, refusals))
        assert done.returncode == 0, f"{what}\n{done.stderr[-3000:]}"
        ours = (folder / "log" / name).read_text().splitlines()
        theirs = (undisturbed / "log" / name).read_text().splitlines()
        if name == "log.txt":
            assert [line for line in ours if line not in theirs] == [], what
        torn = [line for line in ours if name == "log.jsonl" and not line.endswith("}")]
        assert torn == [], what
        assert len(theirs) - 8 <= len(ours) < len(theirs), what
        shutil.rmtree(folder)
    progress.tell(f"full disk: {scaled(8)} runs whose {name} had room later: whole lines only")


# -----------------------------------------------------------------------------
# a small disk for everything


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes): an empty disk of that size. Linux, as root."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)],
                              capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    mount.grow = lambda folder: subprocess.run(
        ["mount", "-o", "remount,size=64m", str(folder)], check=True)
    try:
        yield mount
    finally:
        for folder in mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


def disk_usage(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_small_disk_for_a_dataset(preparation, small_disk, rng, progress):
    """Guards against what fails only where every file shares the disk: the temporary file too."""
    argv, undisturbed = preparation
    total = disk_usage(undisturbed)
    for _ in progress(range(scaled(20)), "a small disk for a dataset"):
        folder = small_disk(rng.randrange(4096, total))
        done = execute(argv, folder)
        if done.returncode != 0:
            assert_one_line(done, f"{folder}")
        small_disk.grow(folder)
        again = execute(argv, folder)
        assert again.returncode == 0, again.stderr
        assert contents(folder / "data") == contents(undisturbed / "data")
    progress.tell(f"a small disk: {scaled(20)} datasets, byte-identical with room again")


def test_a_small_disk_for_a_run(training, small_disk, rng, progress):
    """Guards against the same in training: the logs and the checkpoints share the disk."""
    argv, undisturbed = training
    total = disk_usage(undisturbed)
    for _ in progress(range(scaled(20)), "a small disk for a run"):
        folder = small_disk(rng.randrange(4096, total))
        done = execute(argv, folder)
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        if done.returncode != 0:
            assert done.stderr.strip().splitlines()[-1].startswith("error: "), done.stderr[-2000:]
        small_disk.grow(folder)
        again = execute(argv, folder)
        assert again.returncode == 0, again.stderr[-3000:]
        last = torch.load(folder / "log" / "model_00040.pt", weights_only=True)["model"]
        expected = torch.load(undisturbed / "log" / "model_00040.pt", weights_only=True)["model"]
        torch.testing.assert_close(last, expected, rtol=0, atol=0)
    progress.tell(f"a small disk: {scaled(20)} runs, equal weights with room again")
