"""What the campaign's tests share: how much of it to run, a progress line, faults that a process
meets.

    python -m pytest -m campaign                         # all of it: an hour on two cores
    CAMPAIGN_SCALE=0.01 python -m pytest -m campaign     # a few of each: minutes
    CAMPAIGN_SEED=7 python -m pytest -m campaign         # other kills, other damage
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import environment
from tqdm import tqdm

SCALE = float(os.environ.get("CAMPAIGN_SCALE", "1"))
SEED = int(os.environ.get("CAMPAIGN_SEED", "0"))
HANGS = 1500  # seconds: what takes longer hangs, however busy the machine is

# Every test file of the campaign takes these over. A test has an hour instead of ten minutes.
marks = [pytest.mark.campaign, pytest.mark.timeout(3600)]


def scaled(count):
    """How many of `count` trials to run, at least two."""
    return max(2, round(count * SCALE))


@pytest.fixture
def rng(request):
    """Random numbers that depend on CAMPAIGN_SEED and on the test alone."""
    return random.Random(f"{SEED} {request.node.name}")


class Uncaptured:
    """A file to write to the terminal although pytest hides what tests print."""

    def __init__(self, capsys):
        self.capsys = capsys

    def write(self, text):
        with self.capsys.disabled():
            sys.stderr.write(text)
            sys.stderr.flush()

    def flush(self):
        pass


@pytest.fixture
def progress(capsys):
    """progress(iterable, what): a progress line; progress.tell(text): the figures of a test."""
    file = Uncaptured(capsys)

    def show(iterable, what):
        return tqdm(iterable, desc=what, file=file, mininterval=1, ncols=100)

    show.tell = lambda text: file.write(f"\ncampaign: {text}\n")
    return show


# -----------------------------------------------------------------------------
# processes


started = []


@pytest.fixture
def no_leftovers():
    """Nothing that a test has started outlives it, also where it fails."""
    yield
    while started:
        kill_all(started.pop())


def start(argv, cwd, **env):
    """Start a command, its output in cwd/output.txt."""
    with open(cwd / "output.txt", "a") as output:
        process = subprocess.Popen(argv, cwd=cwd, env={**environment(), **env}, stdout=output,
                                   stderr=output)
    started.append(process)
    return process


def children(pid):
    """The pids of a process's children."""
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def kill_all(process):
    """kill -9 for a process and all that it started. Returns whether it was still running.

    Not by its process group: torchrun's workers have groups of their own, and outlive it.
    """
    if process.poll() is not None:
        return False
    pids = [process.pid]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)  # so that it starts no others meanwhile
        pids += children(pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return True


def finish(process, cwd):
    """Wait until a process ends by itself, and return what it printed since output.txt began."""
    try:
        process.wait(HANGS)
    finally:
        kill_all(process)
    return (cwd / "output.txt").read_text(errors="replace")


def wait_until(true, process=None, seconds=HANGS):
    """Wait until true(), for as long as the process runs. Returns the seconds that it took."""
    begin = time.monotonic()
    while not true():
        assert time.monotonic() < begin + seconds, "hung"
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.02)
    return time.monotonic() - begin


# -----------------------------------------------------------------------------
# faults: Python imports sitecustomize.py when it starts, in every process that has the directory
# in its PYTHONPATH

CLOCK = '''
import random, time
real, offset = time.time, 0.0

def wrong():
    """The time, set back by up to a day at one call in ten."""
    global offset
    if random.random() < 0.1:
        offset -= random.random() * 86400
    return real() + offset

time.time = wrong
time.time_ns = lambda: int(wrong() * 1e9)
'''

FULL_DISK = '''
import builtins, errno, fnmatch, io, os
real = builtins.open
pattern, limit, refusals = os.environ["FULL_DISK"].split(":")
limit, left = int(limit), [int(refusals)]

class OnFullDisk(io.FileIO):
    """A file on a disk that is full at its byte `limit`, until it has refused so many writes."""

    def write(self, data):
        data = memoryview(data).cast("B")
        if left[0] <= 0:
            return super().write(data)
        room = limit - self.seek(0, os.SEEK_END)
        if room < len(data):
            left[0] -= 1
        if room <= 0 and len(data) > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data[:room])

def limited(file, mode="r", *args, **kwargs):
    matches = (isinstance(file, (str, os.PathLike))
               and fnmatch.fnmatch(os.path.basename(file), pattern))
    if not matches or not set(mode) & set("wax+"):
        return real(file, mode, *args, **kwargs)
    raw = OnFullDisk(file, mode.replace("b", "").replace("t", ""))
    if kwargs.get("buffering") == 0:
        return raw
    binary = io.BufferedWriter(raw)
    return binary if "b" in mode else io.TextIOWrapper(binary, "utf-8", write_through=False)

builtins.open = io.open = limited
'''


def fault(folder, code):
    """The environment in which every Python process runs this code before its own."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}
