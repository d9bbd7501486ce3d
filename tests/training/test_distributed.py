"""The same loss whatever the hardware: processes under torchrun against one, on gloo.

    python -m pytest tests/training/test_distributed.py
"""

import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pytest
import torch
from conftest import (ROOT, TINY, command, english, environment, flags, read_log, run,
                      write_dataset, write_hellaswag)
from torch.distributed import TCPStore

from gptlib.distributed import agree_on_name

# 320 tokens are ten rows: they divide evenly neither by two processes of three rows, nor by three
# processes
SETTINGS = {**TINY, "total_batch_size": 320, "max_steps": 10, "hellaswag_examples": 20,
            "hellaswag_data": "hella.jsonl", "data_root": "data"}


def losses(log_dir):
    """Everything the log tells: train, val and HellaSwag."""
    log = read_log(log_dir)
    assert log["hella"].keys() == log["val"].keys()
    return [float(v) for kind in ("train", "val", "hella") for _, v in sorted(log[kind].items())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data and questions."""
    folder = tmp_path_factory.mktemp("distributed")
    write_dataset(folder / "data", [english(3001, 1), english(2000, 2)], [english(1500, 3)])
    write_hellaswag(folder / "hella.jsonl")
    return folder


@pytest.fixture(scope="module")
def single(folder):
    """The folder with a run of one process in it, which several tests compare with."""
    train(folder, "single", checkpoint_interval=5)
    return folder


def train(folder, name, nproc=0, **settings):
    """Train into the folder `name`; returns what was printed."""
    argv = flags(**{**SETTINGS, "log_dir": name, **settings})
    done = run("train_gpt2.py", *argv, cwd=folder, nproc=nproc)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("nproc, batch_size", [(0, 3), (2, 4), (2, 3), (3, 3), (3, 8)])
def test_losses_are_those_of_one_process(single, nproc, batch_size):
    """Guards against a loss that depends on the number of processes or the micro-batch."""
    name = f"{nproc}x{batch_size}"
    train(single, name, nproc, batch_size=batch_size)
    assert losses(single / name) == pytest.approx(losses(single / "single"), abs=3e-5)


def test_more_processes_than_rows_and_an_odd_batch(folder):
    """Guards against ranks that wait forever for one that has nothing to read."""
    # two rows, of 32 and 18 tokens, for three processes
    for nproc in (0, 3):
        train(folder, f"odd{nproc}", nproc, total_batch_size=50, max_steps=8)
    assert losses(folder / "odd0") == pytest.approx(losses(folder / "odd3"), abs=3e-5)


def test_a_run_of_one_process_goes_on_on_two(folder, single):
    """Guards against tokens skipped or read twice when the number of processes changes."""
    shutil.copytree(folder / "single", folder / "resumed", symlinks=True)
    (folder / "resumed" / "model_00010.pt").unlink()
    output = train(folder, "resumed", nproc=2, auto_resume=True)
    assert "resuming at step 5 of 10, token 1,600" in output
    assert losses(folder / "resumed") == pytest.approx(losses(folder / "single"), abs=3e-5)
    saved = torch.load(folder / "resumed" / "model_00010.pt", weights_only=True)
    assert (saved["position"], len(saved["rng"])) == (3200, 2)


def children_of(pid):
    """The process ids of a process' children, on Linux."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of torchrun in /proc")
def test_sigterm_to_all_processes_saves_one_step(folder):
    """Guards against ranks that stop at different steps and then wait for each other, and against
    a save that is lost because Slurm, systemd and pkill signal the processes as well as torchrun,
    which passes the signal on."""
    settings = {**SETTINGS, "max_steps": 20000, "eval_interval": 10000,
                "checkpoint_interval": 10000}
    process = Popen(command("train_gpt2.py", *flags(**settings), nproc=2), cwd=folder,
                    env=environment(), text=True, stdout=PIPE, stderr=STDOUT)
    log = folder / "log" / "log.txt"
    while process.poll() is None and not (log.exists() and "\n20 train" in log.read_text()):
        time.sleep(0.02)
    for pid in (*children_of(process.pid), process.pid):
        os.kill(pid, signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    saved = list((folder / "log").glob("model_*.pt"))
    assert len(saved) == 1, output
    assert "goes on" in output
    assert int(saved[0].stem[6:]) == max(read_log(folder / "log")["train"]) + 1


# Two starts in one torchrun; rank 1 has been given another flag or another dataset.
DIFFERENT = """
import sys
from gptlib.common import UserError
from gptlib.distributed import join
from train_gpt2 import TrainConfig, train

with join() as world:
    for name, value in (("max_steps", 4), ("batch_size", 2), ("data_root", "other")):
        mine = {name: value} if world.rank == 1 else {}
        try:
            train(TrainConfig(**{**eval(sys.argv[1]), **mine}), world=world)
        except UserError as error:
            print(f"rank {world.rank}: {error}")
"""


def test_hosts_that_differ_are_told(folder):
    """Guards against ranks that train on fewer shards without a word, or wait for each other for
    ten minutes because they count to different steps."""
    write_dataset(folder / "other", [english(3001, 1)], [english(1500, 3)])
    (folder / "different.py").write_text(DIFFERENT)
    done = Popen(command(folder / "different.py", repr({**SETTINGS, "log_dir": "never"}), nproc=2),
                 cwd=folder, env={**environment(), "PYTHONPATH": str(ROOT)}, text=True, stdout=PIPE,
                 stderr=STDOUT)
    output = done.communicate(timeout=300)[0]
    assert done.returncode == 0, output
    for difference in ("--max_steps is 4 on rank 1, but 10 on rank 0",
                       "--batch_size is 2 on rank 1, but 4 on rank 0",
                       "the number of training tokens is 3001 on rank 1, but 5001 on rank 0"):
        for rank in (0, 1):
            assert f"rank {rank}: {difference}: start all hosts" in output
    assert not (folder / "never").exists(), "a run has begun"


# -----------------------------------------------------------------------------
# processes that torchrun starts again: it keeps one store for all starts

JOIN = """
import torch, torch.distributed
from gptlib.distributed import join
with join():
    torch.distributed.all_reduce(torch.ones(1))
"""


@pytest.fixture
def agent_store():
    """The store of torchrun's agent, which outlives the processes that it starts."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def store_client(server):
    """A connection of its own: one that waits for a key is blocked meanwhile."""
    return TCPStore("127.0.0.1", server.port, is_master=False)


def agree(server, size):
    """The name that each rank of one start is told."""
    with ThreadPoolExecutor(size) as threads:
        ranks = reversed(range(size))  # rank 0 last: the others ask before it answers
        told = [threads.submit(agree_on_name, store_client(server), rank, size) for rank in ranks]
        return [future.result(timeout=60) for future in told]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_each_start_has_a_name_of_its_own(agent_store, size):
    """Guards against restarted processes that read the addresses of the dead ones and wait for
    them."""
    starts = [agree(agent_store, size) for _ in range(3)]
    for names in starts:
        assert len(set(names)) == 1, f"the ranks of one start were told {names}"
    assert len({names[0] for names in starts}) == 3


def test_a_restart_ignores_addresses_of_the_dead(agent_store):
    """Guards against a rank that is taken for present because its predecessor was, killed while it
    waited."""
    agent_store.set("start/id_of_rank/1", "killed before rank 0 answered")
    agent_store.set("start/answer_to/of another", "the name of an earlier start")
    with ThreadPoolExecutor(1) as thread:
        rank0 = thread.submit(agree_on_name, store_client(agent_store), 0, 2)
        agent_store.wait(["start/answer_to/killed before rank 0 answered"])
        assert not rank0.done(), "rank 0 went on with a dead process"
        name = agree_on_name(store_client(agent_store), 1, 2)
        assert rank0.result(timeout=60) == name


def test_a_restart_uses_keys_of_its_own(agent_store):
    """Guards against a process group that is made without the name: nearly all keys of the second
    start would be those of the first."""
    n_keys = []
    for _ in range(2):
        env = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(agent_store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        ranks = [Popen([sys.executable, "-c", JOIN], cwd=ROOT, stdout=PIPE, stderr=STDOUT,
                       text=True, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                 for rank in (0, 1)]
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], outputs
        n_keys.append(agent_store.num_keys())
    first, both = n_keys
    assert both - first > first / 2, f"{first} keys after the first start, {both} after the second"
