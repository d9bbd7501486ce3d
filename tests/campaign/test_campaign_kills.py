"""The campaign: processes that are killed, stopped for a while, or see the clock go back, while
they make data, train and save.

    python -m pytest tests/campaign/test_campaign_kills.py -m campaign

Whatever happens on the way, the end is compared with that of an undisturbed run, byte by byte.
"""

import itertools
import os
import signal
import time

import campaign
import pytest
import torch
from campaign import children, fault, finish, kill_all, scaled, start, wait_until
from conftest import TINY, command, flags, read_log
from corpus import contents, some_documents, write_jsonl

from gptlib.checkpoints.formats import load_checkpoint
from gptlib.checkpoints.saver import list_checkpoints, save_checkpoint

pytestmark = [*campaign.marks, pytest.mark.usefixtures("no_leftovers")]
rng, progress, no_leftovers = campaign.rng, campaign.progress, campaign.no_leftovers

TRAINING = {**TINY, "max_steps": 200, "eval_interval": 100, "checkpoint_interval": 5,
            "keep_checkpoints": 3, "dropout": 0.1, "auto_resume": True}

# -----------------------------------------------------------------------------
# a run from start to end, as often interrupted as it takes


class Work:
    """A command that can be run again in a folder until it is done, and what it then leaves."""

    def __init__(self, tmp_path, argv, result):
        self.tmp_path, self.argv, self.result = tmp_path, argv, result
        self.folders = (tmp_path / f"work{i}" for i in itertools.count())
        begin = time.monotonic()
        folder = self.new_folder()
        assert self.run(folder) == 0, (folder / "output.txt").read_text()[-2000:]
        self.seconds = time.monotonic() - begin
        self.expected = result(folder)

    def new_folder(self):
        folder = next(self.folders)
        folder.mkdir()
        return folder

    def run(self, folder, **env):
        process = start(self.argv, folder, **env)
        finish(process, folder)
        return process.returncode

    def check(self, folder):
        """Whether what a finished run has left is what the undisturbed one has."""
        output = (folder / "output.txt").read_text(errors="replace")
        assert "Traceback" not in output, output[-3000:]
        found = self.result(folder)
        assert found.keys() == self.expected.keys()
        wrong = [name for name in found if found[name] != self.expected[name]]
        assert wrong == [], "differs from the undisturbed run"

    def kill(self, n_kills, rng, progress, what):
        """kill -9 at random moments, n_kills times; every run is continued to its end."""
        n_killed, folder = 0, self.new_folder()
        bar = progress(None, what)
        while n_killed < n_kills:
            process = start(self.argv, folder)
            time.sleep(rng.uniform(0, 1.1 * self.seconds))
            if kill_all(process):
                n_killed += 1
                bar.update()
            elif process.returncode == 0:
                self.check(folder)
                folder = self.new_folder()
            else:
                raise AssertionError((folder / "output.txt").read_text()[-3000:])
        assert self.run(folder) == 0, (folder / "output.txt").read_text()[-3000:]
        self.check(folder)
        progress.tell(f"{what}: {n_killed} kills -9, every end as undisturbed")


def data_preparation(tmp_path):
    """fineweb.py on a corpus of some 20 shards, a tokenizer of its own included."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", some_documents(3000))
    argv = command("fineweb.py", f"--files={corpus}", "--data_root=data", "--tokenizer=bpe",
                   "--vocab_size=300", "--shard_size=10000")
    return Work(tmp_path, argv, lambda folder: contents(folder / "data"))


def training_result(folder):
    """Log, weights and all other state of a run."""
    log = read_log(folder / "log")
    last = torch.load(folder / "log" / "latest_checkpoint.pt", weights_only=True)
    state = {name: repr(last[name]) for name in ("step", "position", "val_loss", "tokenizer")}
    weights = {name: value.numpy().tobytes() for name, value in last["model"].items()}
    moments = {f"{i}.{key}.{name}": torch.as_tensor(value).numpy().tobytes()
               for i, optimizer in enumerate(last["optimizer"])
               for key, values in optimizer["state"].items() for name, value in values.items()}
    names = sorted(path.name for path in (folder / "log").iterdir())
    return {**log, **state, **weights, **moments, "files": names}


def training(tmp_path, data_root, nproc=0):
    argv = command("train_gpt2.py", *flags(**TRAINING, data_root=data_root), nproc=nproc)
    return Work(tmp_path, argv, training_result)


def test_data_preparation_is_killed(tmp_path, rng, progress):
    """Guards against a dataset that differs when its making was interrupted."""
    work = data_preparation(tmp_path)
    work.kill(scaled(40), rng, progress, "data preparation")


def test_training_is_killed(tmp_path, data_root, rng, progress):
    """Guards against a run that is lost, or goes another way, after a kill."""
    work = training(tmp_path, data_root)
    work.kill(scaled(30), rng, progress, "training, one process")


def test_two_processes_are_killed(tmp_path, data_root, rng, progress):
    """Guards against the same with torchrun and all its workers killed at once, as by a power
    cut."""
    work = training(tmp_path, data_root, nproc=2)
    work.kill(scaled(20), rng, progress, "training, two processes")


# -----------------------------------------------------------------------------
# one worker of torchrun


class Elastic:
    """torchrun --max-restarts: two workers that train, and what torchrun prints."""

    def __init__(self, folder, data_root, max_restarts):
        folder.mkdir()
        self.folder = folder
        settings = {**TRAINING, "max_steps": 10**6, "eval_interval": 10**6, "data_root": data_root}
        argv = command("train_gpt2.py", *flags(**settings), nproc=2)
        argv.insert(argv.index("--standalone"), f"--max-restarts={max_restarts}")
        self.process = start(argv, folder)
        self.start_seconds = wait_until(lambda: self.count("parameters on 2 x") > 0, self.process)

    def output(self):
        return (self.folder / "output.txt").read_text(errors="replace")

    def workers(self):
        """The pids of the two ranks."""
        found = []
        for pid in children(self.process.pid):
            try:
                with open(f"/proc/{pid}/cmdline") as f:
                    found += [pid] * ("train_gpt2.py" in f.read())
            except OSError:  # it has just ended
                continue
        return found

    def losses(self):
        log = self.folder / "log" / "log.txt"
        return read_log(log.parent).get("train", {}) if log.exists() else {}

    def kill_worker(self, rng):
        """kill -9 one of the workers."""
        wait_until(lambda: len(self.workers()) == 2, self.process)
        os.kill(rng.choice(self.workers()), signal.SIGKILL)

    def count(self, text):
        return self.output().count(text)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the workers in /proc")
def test_one_worker_is_killed_and_torchrun_goes_on(tmp_path, data_root, rng, progress):
    """Guards against restarted workers that wait for the dead ones (gloo: connectFullMesh), and
    against losses that differ afterwards."""
    n_kills, waits = scaled(50), []
    ours = Elastic(tmp_path / "ours", data_root, max_restarts=n_kills)
    try:
        wait_until(lambda: len(ours.losses()) > 20, ours.process)
        for _ in progress(range(n_kills), "one worker of two"):
            time.sleep(rng.uniform(0, 2))
            resumed, noticed = ours.count("parameters on 2 x"), ours.count("failed (exitcode: -9)")
            ours.kill_worker(rng)
            wait_until(lambda n=noticed: ours.count("failed (exitcode: -9)") > n, ours.process)
            waits.append(wait_until(lambda n=resumed: ours.count("parameters on 2 x") > n,
                                    ours.process))
            assert ours.process.poll() is None, ours.output()[-3000:]
        assert ours.count("failed (exitcode") == n_kills, "a restart failed, and was repeated"
        steps = len(ours.losses())
        wait_until(lambda: len(ours.losses()) > steps + 5, ours.process)
    finally:
        kill_all(ours.process)
    losses = ours.losses()
    undisturbed = Elastic(tmp_path / "theirs", data_root, max_restarts=0)
    try:
        wait_until(lambda: len(undisturbed.losses()) >= len(losses), undisturbed.process)
    finally:
        kill_all(undisturbed.process)
    expected = undisturbed.losses()
    assert list(losses) == list(range(len(losses)))
    assert [step for step in losses if losses[step] != expected[step]] == []
    waits.sort()
    progress.tell(f"one worker of two: {n_kills} kills -9; from torchrun's notice to the first "
                  f"step median {waits[len(waits) // 2]:.1f} s, longest {waits[-1]:.1f} s (a start "
                  f"of the same two before: {ours.start_seconds:.1f} s, after: "
                  f"{undisturbed.start_seconds:.1f} s)")


# -----------------------------------------------------------------------------
# saving itself


def state_of(step):
    """A checkpoint whose every number is its step."""
    tensors = {f"{i}": torch.full((1000 + i,), float(step)) for i in range(20)}
    config = dict(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1)
    return dict(model=tensors, config=config, step=step, optimizer=[dict(tensors)])


def save_forever(folder, step):
    while True:
        step += 1
        save_checkpoint(folder, state_of(step), keep=3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that a kill costs milliseconds")
def test_saving_is_killed(tmp_path, rng, progress):
    """Guards against a torn checkpoint, a latest_checkpoint.pt that leads nowhere, and against
    fewer checkpoints than were asked for."""
    n_kills, newest, n_saved = scaled(60), 0, 0
    before = tmp_path / "before"
    before.mkdir()
    begin = time.monotonic()
    for i in range(3):
        save_checkpoint(before, state_of(i), keep=3)
    seconds = (time.monotonic() - begin) / 3
    for _ in progress(range(n_kills), "saving"):
        pid = os.fork()
        if pid == 0:
            try:
                save_forever(tmp_path, newest)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, 10 * seconds))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "saving ended by itself"
        paths = list_checkpoints(tmp_path)
        n_saved = max(n_saved, len(paths))
        assert len(paths) >= min(3, n_saved)
        for path in [*paths, *tmp_path.glob("latest_checkpoint.pt")]:
            loaded = load_checkpoint(path)
            step = loaded["step"]
            assert all(bool((t == step).all()) for t in loaded["model"].values())
            assert newest - 3 <= step
        if paths:
            assert int(paths[0].stem[6:]) >= newest, "a checkpoint was lost"
            newest = int(paths[0].stem[6:])
    assert newest > n_kills, "killed too early to tell anything"
    progress.tell(f"saving: {n_kills} kills -9 in {newest} saves, every checkpoint whole")


# -----------------------------------------------------------------------------
# stopped and continued; the clock set back


def pause(work, count, rng, progress, what):
    """SIGSTOP and SIGCONT to a random process of the group, at random moments, in every run."""
    for _ in progress(range(count), what):
        folder = work.new_folder()
        process = start(work.argv, folder)
        while process.poll() is None:
            time.sleep(rng.uniform(0, work.seconds / 3))
            try:
                pid = rng.choice([process.pid, *children(process.pid)])
                os.kill(pid, signal.SIGSTOP)
                time.sleep(rng.uniform(0, 2))
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:  # a child that has just ended
                continue
        assert process.returncode == 0, (folder / "output.txt").read_text()[-3000:]
        work.check(folder)
    progress.tell(f"{what}: {count} runs, every end as undisturbed")


def test_data_preparation_is_stopped_and_continued(tmp_path, rng, progress):
    """Guards against work that is lost or done twice while a laptop sleeps."""
    pause(data_preparation(tmp_path), scaled(10), rng, progress, "data preparation, SIGSTOP")


@pytest.mark.parametrize("nproc", [0, 2])
def test_training_is_stopped_and_continued(tmp_path, data_root, rng, progress, nproc):
    """Guards against the same in training, and a rank that gives up on one that was stopped."""
    pause(training(tmp_path, data_root, nproc), scaled(10), rng, progress,
          f"training, {max(nproc, 1)} processes, SIGSTOP")


def test_the_clock_goes_back_in_data_preparation(tmp_path, progress):
    """Guards against waits, names or an order of files that follow the wall clock."""
    work = data_preparation(tmp_path)
    count = scaled(5)
    for _ in progress(range(count), "data preparation, clock back"):
        folder = work.new_folder()
        assert work.run(folder, **fault(tmp_path / "fault", campaign.CLOCK)) == 0
        work.check(folder)
    progress.tell(f"data preparation, clock set back again and again: {count} runs as undisturbed")


@pytest.mark.parametrize("nproc", [0, 2])
def test_the_clock_goes_back_in_training(tmp_path, data_root, rng, progress, nproc):
    """Guards against the same in training, killed and continued meanwhile."""
    work = training(tmp_path, data_root, nproc)
    count = scaled(5)
    for _ in progress(range(count), f"training, {max(nproc, 1)} processes, clock back"):
        folder, env = work.new_folder(), fault(tmp_path / "fault", campaign.CLOCK)
        process = start(work.argv, folder, **env)
        time.sleep(rng.uniform(0, work.seconds))
        kill_all(process)
        assert work.run(folder, **env) == 0, (folder / "output.txt").read_text()[-3000:]
        work.check(folder)
    progress.tell(f"training, {max(nproc, 1)} processes, clock set back again and again: "
                  f"{count} runs as undisturbed")
