"""Several hosts for real: two network namespaces, a cable between them, torchrun on each, and one of the hosts killed.

    python -m pytest tests/training/test_multihost.py

Each host has a disk of its own with a copy of the data. The lines that torchrun is given are the README's. Linux only, as
root (or in `unshare -rn --mount`), with Debian's iproute2; skipped elsewhere.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, environment, flags, read_log, run

SETTINGS = {**TINY, "max_steps": 300, "eval_interval": 100, "checkpoint_interval": 10, "total_batch_size": 320,
            "dropout": 0.1, "log_interval": 50, "data_root": "data", "auto_resume": True}


def ip(*args):
    return subprocess.run(["ip", *args], capture_output=True, text=True, check=True).stdout


class Host:
    """A machine of the trial: a network namespace, and a folder for its disk."""

    def __init__(self, name, address, disk):
        self.name, self.address, self.disk = name, address, disk
        self.output = disk / "output.txt"

    def boot(self, endpoint, again=False):
        """Start what its user would have typed; again=True: as a service manager that starts it until it succeeds.

        is_host tells who keeps the rendezvous: torchrun compares the endpoint with what the machine's name resolves to, and
        all namespaces share one name. A host counts as gone a fifth as soon as usual: its keep-alive is due every second.

        Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE a torchrun that comes new to one that has stayed waits in vain for the
        address of rank 0 (torch 2.13): rank 0 tells it in the first round alone, and each round has keys of its own.
        """
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                    f"--rdzv_endpoint={endpoint}:29500", "--rdzv_id=trial", f"--local_addr={self.address}",
                    f"--rdzv_conf=is_host={int(endpoint == self.address)},keep_alive_interval=1", "--max-restarts=3",
                    str(ROOT / "train_gpt2.py"), *flags(**SETTINGS)]
        if again:
            torchrun = ["sh", "-c", 'until "$@"; do sleep 1; done', "sh", *torchrun]
        with open(self.output, "a") as f:
            self.process = subprocess.Popen(["ip", "netns", "exec", self.name, *torchrun], cwd=self.disk, stdout=f, stderr=f,
                                            env={**environment(), "GLOO_SOCKET_IFNAME": "eth0",
                                                 "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})

    def kill(self):
        """kill -9 for every process there, until there is none."""
        while pids := ip("netns", "pids", self.name).split():
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.01)
        self.process.wait()


@pytest.fixture
def hosts(tmp_path, data_root):
    """Two of them, 10.77.0.1 and 10.77.0.2."""
    if not shutil.which("ip"):
        pytest.skip("no `ip` command: Debian's iproute2 has it")
    names = [f"gpt2-{os.getpid()}-{i}" for i in (1, 2)]
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(Host(name, f"10.77.0.{len(made) + 1}", tmp_path / f"disk{len(made) + 1}"))
            ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
            for host in made:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
                ip("-n", host.name, "link", "set", "eth0", "up")
                ip("-n", host.name, "link", "set", "lo", "up")
                subprocess.run(["ip", "netns", "exec", host.name, "true"], capture_output=True, text=True, check=True)
        except subprocess.CalledProcessError as e:
            pytest.skip(f"network namespaces can't be made here: {e.stderr.strip()}")
        for host in made:
            shutil.copytree(data_root, host.disk / "data")
        yield made
    finally:
        for host in made:
            if hasattr(host, "process"):
                host.kill()
            ip("netns", "delete", host.name)


def wait_for(what, hosts, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        outputs = "\n".join(f"--- {host.name}\n{host.output.read_text()[-3000:]}" for host in hosts)
        assert time.monotonic() < end, outputs
        time.sleep(0.02)


def has_step(host, step):
    log = host.disk / "log" / "log.txt"
    return log.exists() and f"\n{step} train" in log.read_text()


@pytest.mark.parametrize("victim", [2, 1], ids=["a host is killed", "the host of rank 0 and of the rendezvous is killed"])
def test_a_host_is_killed_and_comes_back_and_the_run_goes_on(tmp_path, hosts, data_root, victim):
    """Guards against a run that is lost with one of its hosts."""
    first, second = hosts
    for host in hosts:  # where the rendezvous dies with its host, torchrun ends on the others and has to be started again
        host.boot(first.address, again=victim == 1)
    wait_for(lambda: has_step(first, 45), hosts)
    hosts[victim - 1].kill()
    left = max(read_log(first.disk / "log")["train"])
    assert 45 <= left < 290, "killed too late to tell anything"
    hosts[victim - 1].boot(first.address, again=victim == 1)
    wait_for(lambda: all(host.process.poll() is not None for host in hosts), hosts)
    output = first.output.read_text()
    assert [host.process.returncode for host in hosts] == [0, 0], output
    resumed = [int(line.split()[3]) for line in output.splitlines() if line.startswith("resuming at step")]
    assert len(resumed) == 1
    assert 40 <= resumed[0] <= left + 1
    assert not (second.disk / "log").exists()  # rank 0 alone writes

    # the log is whole, no step is there twice (read_log), and all of it is what two undisturbed processes of one host write
    undisturbed = run("train_gpt2.py", *flags(**SETTINGS), cwd=data_root.parent, nproc=2)
    assert undisturbed.returncode == 0, undisturbed.stderr
    ours, theirs = read_log(first.disk / "log"), read_log(data_root.parent / "log")
    assert list(ours["train"]) == list(range(300))
    assert ours == theirs
    ours, theirs = (torch.load(p / "log" / "model_00300.pt", weights_only=True) for p in (first.disk, data_root.parent))
    assert ours["position"] == theirs["position"] == 300 * 320
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
