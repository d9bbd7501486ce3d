"""A rank that dies or hangs ends the others in time, with a line that says which it was.

    python -m pytest tests/ground/test_processes.py
"""

import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from conftest import ROOT, environment

from gptlib.distributed import is_failed_exchange
from gptlib.common import UserError

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
