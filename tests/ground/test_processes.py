"""A rank that dies or hangs ends the others in time, with a line that says which it was.

    python -m pytest tests/ground/test_processes.py
"""

import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, environment

from gptlib.common import UserError
from gptlib.distributed import World, is_failed_exchange
from gptlib.training import console as console_module
from gptlib.training.console import Console

# The ranks meet when all have imported torch, which may take some of them longer than the timeout;
# rank 0 then takes a free port.
RANK = """
import os, signal, socket, sys, time
from datetime import timedelta
from pathlib import Path
from gptlib import distributed
from gptlib.common import run_main
distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=6)

def meet(folder, rank):
    (folder / str(rank)).touch()
    wait_for([folder / str(other) for other in range(3)])
    if rank == 0:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            (folder / "unfinished").write_text(str(s.getsockname()[1]))
        (folder / "unfinished").rename(folder / "port")
    wait_for([folder / "port"])
    os.environ["MASTER_PORT"] = (folder / "port").read_text()

def wait_for(paths):
    while not all(path.exists() for path in paths):
        time.sleep(0.01)

def main():
    meet(Path(sys.argv[2]), int(os.environ["RANK"]))
    with distributed.join() as world:
        for step in range(1000):
            if step == 20 and world.rank == 1:
                os.kill(os.getpid(), getattr(signal, sys.argv[1]))
            distributed.any_rank(False, world)

run_main(main)
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGSTOP"])
def test_the_others_end_and_name_the_rank(tmp_path, end):
    """Guards against GPUs that wait for half an hour, or a traceback of gloo that names nobody."""
    env = {**environment(), "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1",
           "WORLD_SIZE": "3"}
    processes = []
    for rank in range(3):
        processes.append(subprocess.Popen(
            [sys.executable, "-c", RANK, end, str(tmp_path)], text=True, stderr=subprocess.PIPE,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
    begin = time.monotonic()
    try:
        errors = {rank: processes[rank].communicate(timeout=200)[1] for rank in (0, 2)}
    finally:
        for process in processes:
            process.kill()
    for rank, error in errors.items():
        assert processes[rank].returncode == 1, error
        assert f"rank {rank} of 3 ends: rank 1 does not answer any more" in error
        assert "Traceback" not in error
    assert time.monotonic() - begin < 200


@pytest.mark.parametrize("error, expected", [
    (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
    (RuntimeError("NCCL error: remote process exited"), True),
    (dist.DistBackendError("broken"), True),
    (RuntimeError("expected scalar type Float"), False),
    (UserError("gloo is a word here"), False),
    (ValueError("nccl"), False),
])
def test_other_errors_stay_what_they_are(error, expected):
    """Guards against a bug in the model that is told as a rank which went away."""
    assert is_failed_exchange(error) == expected


# -----------------------------------------------------------------------------
# a GPU that waits for a rank which is gone


class Mark:
    """Stands in for an event in the queue of a GPU, which the GPU reaches when it is asked the n-th
    time, or never."""

    def __init__(self, n=None):
        self.n, self.asked = n, 0

    def query(self):
        self.asked += 1
        return self.n is not None and self.asked >= self.n

    def elapsed_time(self, end):
        return 5.0


def take_step(monkeypatch, console, step, n=None):
    """Have the console see a step at whose end the GPU arrives when asked the n-th time."""
    monkeypatch.setattr(console_module, "time_mark", lambda device: Mark(n))
    console.step_begins()
    console.step_ended(step, torch.tensor(1.0), 0.1, torch.tensor(1.0))


def console_of(size):
    return Console(None, torch.device("cpu"), World(size=size), 10, 1, 1, late=True)


def test_the_host_polls_until_the_step_has_ended(monkeypatch):
    """Guards against a wait inside of CUDA, in which a process sees no signal."""
    console = console_of(size=2)
    take_step(monkeypatch, console, 0, n=5)
    console.stop_waiting()  # a signal alone ends nothing: the step is over soon
    console.flush()
    assert console.steps_done == 1


@pytest.mark.parametrize("steps_before", [0, 1])
def test_after_a_signal_the_host_waits_a_few_steps(monkeypatch, steps_before):
    """Guards against GPUs that are lost for 30 s to 10 minutes because of a rank that is gone."""
    monkeypatch.setattr(console_module, "WAIT_AFTER_SIGNAL", 0.01)
    with pytest.raises(dist.DistError, match="no step ended within") as raised:
        with console_of(size=2) as console:
            if steps_before:
                take_step(monkeypatch, console, 0, n=1)
                console.flush()
            else:
                console.step_seconds = 0.01
            take_step(monkeypatch, console, steps_before)
            console.stop_waiting()
            console.flush()
    assert is_failed_exchange(raised.value)
    assert console.steps_done == steps_before


def test_after_an_error_only_a_finished_step_is_read(monkeypatch):
    """Guards against an error that never reaches the user, since the GPU waits for another rank."""
    for n, steps_done in ((None, 0), (1, 1)):
        with pytest.raises(UserError, match="broken"), console_of(size=2) as console:
            take_step(monkeypatch, console, 0, n=n)
            raise UserError("broken")
        assert console.steps_done == steps_done
