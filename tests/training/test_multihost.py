"""Two hosts for real: network namespaces, a cable between them, and one of them is killed.

    python -m pytest tests/training/test_multihost.py

Each host has a disk of its own with a copy of the data, and a name that its own /etc/hosts says is
127.0.1.1, as Debian's does. Linux only, as root (or in `unshare -rn --mount`), with Debian's
iproute2; skipped elsewhere.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (ROOT, TINY, english, environment, flags, read_log, run,
                      write_dataset)

SETTINGS = {**TINY, "max_steps": 300, "eval_interval": 100, "checkpoint_interval": 10,
            "total_batch_size": 320, "dropout": 0.1, "log_interval": 50, "data_root": "data",
            "auto_resume": True}
ADDRESSES = {"host1": "10.77.0.1", "host2": "10.77.0.2"}
# in namespaces of its own: a name, a table of names, then the command
BOOT = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
UNTIL_IT_SUCCEEDS = 'until "$@"; do sleep 1; done'


def ip(*args):
    return subprocess.run(["ip", *args], capture_output=True, text=True, check=True).stdout


class Host:
    """A machine of the trial: namespaces of Linux, and a folder for its disk."""

    def __init__(self, name, namespace, disk):
        self.name, self.namespace, self.disk = name, namespace, disk
        self.output, self.names = disk / "output.txt", disk / "hosts"

    def write_names(self):
        """The table of names as Debian's installer writes it."""
        others = [f"{address} {name}\n" for name, address in ADDRESSES.items()
                  if name != self.name]
        self.names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n" + "".join(others))

    def inside(self, *argv):
        """A command that runs argv on this host."""
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount",
                "sh", "-c", BOOT, "sh", self.name, str(self.names), *argv]

    def boot(self, again=False):
        """Start what its user would have typed; again: as a service manager that starts it until
        it succeeds.

        A host counts as gone a fifth as soon as usual: its keep-alive is due every second. Without
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE a torchrun that comes new to one that has stayed waits
        in vain for the address of rank 0 (torch 2.13): rank 0 tells it in the first round alone.
        """
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                    "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=host1:29500",
                    "--rdzv_id=trial", "--rdzv_conf=keep_alive_interval=1", "--max-restarts=3",
                    str(ROOT / "train_gpt2.py"), *flags(**SETTINGS)]
        if again:
            torchrun = ["sh", "-c", UNTIL_IT_SUCCEEDS, "sh", *torchrun]
        with open(self.output, "a") as f:
            self.process = subprocess.Popen(
                self.inside(*torchrun), cwd=self.disk, stdout=f, stderr=f,
                env={**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})

    def kill(self):
        """kill -9 for every process there, until there is none."""
        while pids := ip("netns", "pids", self.namespace).split():
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.01)
        self.process.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with the data, and the log of two undisturbed processes of one host."""
    if not shutil.which("ip"):
        pytest.skip("no `ip` command: Debian's iproute2 has it")
    folder = tmp_path_factory.mktemp("undisturbed")
    write_dataset(folder / "data", [english(3001, 1), english(2000, 2)], [english(1500, 3)])
    done = run("train_gpt2.py", *flags(**SETTINGS), cwd=folder, nproc=2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def hosts(tmp_path, undisturbed):
    """host1 and host2, joined by a cable."""
    made = []
    try:
        try:
            connect(made, tmp_path)
        except subprocess.CalledProcessError as e:
            pytest.skip(f"network namespaces can't be made here: {e.stderr.strip()}")
        for host in made:
            shutil.copytree(undisturbed / "data", host.disk / "data")
        yield made
    finally:
        for host in made:
            if hasattr(host, "process"):
                host.kill()
            ip("netns", "delete", host.namespace)


def connect(made, folder):
    """Make both hosts, and add each to the list `made` as soon as its namespace is there."""
    for name in ADDRESSES:
        namespace = f"gpt2-{os.getpid()}-{name}"
        ip("netns", "add", namespace)
        made.append(Host(name, namespace, folder / name))
    first, second = (host.namespace for host in made)
    ip("link", "add", "eth0", "netns", first, "type", "veth",
       "peer", "name", "eth0", "netns", second)
    for host in made:
        address = f"{ADDRESSES[host.name]}/24"
        ip("-n", host.namespace, "address", "add", address, "dev", "eth0")
        ip("-n", host.namespace, "link", "set", "eth0", "up")
        ip("-n", host.namespace, "link", "set", "lo", "up")
        host.disk.mkdir()
        host.write_names()
        subprocess.run(host.inside("true"), capture_output=True, text=True, check=True)


def wait_for(what, hosts, seconds=400):
    end = time.monotonic() + seconds
    while not what():
        outputs = "\n".join(f"--- {host.name}\n{host.output.read_text()[-3000:]}" for host in hosts)
        assert time.monotonic() < end, outputs
        time.sleep(0.02)


def has_step(host, step):
    log = host.disk / "log" / "log.txt"
    return log.exists() and f"\n{step} train" in log.read_text()


@pytest.mark.parametrize("victim", [2, 1], ids=["a host", "the host of rank 0 and rendezvous"])
def test_a_killed_host_comes_back_and_the_run_goes_on(hosts, undisturbed, victim):
    """Guards against a run that is lost with one of its hosts, and against hosts that cannot
    connect because a host's name means 127.0.1.1 to itself."""
    first, second = hosts
    for host in hosts:  # if the rendezvous dies, torchrun ends on the others too
        host.boot(again=victim == 1)
    wait_for(lambda: has_step(first, 45), hosts)
    hosts[victim - 1].kill()
    left = max(read_log(first.disk / "log")["train"])
    assert 45 <= left < 290, "killed too late to tell anything"
    hosts[victim - 1].boot(again=victim == 1)
    wait_for(lambda: all(host.process.poll() is not None for host in hosts), hosts)
    output = first.output.read_text()
    assert [host.process.returncode for host in hosts] == [0, 0], output
    resumed = [int(line.split()[3]) for line in output.splitlines()
               if line.startswith("resuming at step")]
    assert len(resumed) == 1
    assert 40 <= resumed[0] <= left + 1
    assert not (second.disk / "log").exists(), "rank 0 alone writes"
    # the log is whole, and no step stands there twice (read_log)
    log = read_log(first.disk / "log")
    assert list(log["train"]) == list(range(300))
    assert log == read_log(undisturbed / "log")
    ours, theirs = (torch.load(folder / "model_00300.pt", weights_only=True)
                    for folder in (first.disk / "log", undisturbed / "log"))
    assert ours["position"] == theirs["position"] == 300 * 320
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
