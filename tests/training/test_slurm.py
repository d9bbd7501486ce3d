"""docs/slurm.sh under a real Slurm: stopped twice before its limit, queued again, and finished.

    python -m pytest tests/training/test_slurm.py -m slurm

As root, with Debian's packages slurmctld, slurmd and munge; skipped elsewhere. Two nodes run on
this machine, each with a slurmd of its own. They share its disk and its network.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, environment, flags, free_ports, read_log, run

pytestmark = pytest.mark.slurm
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "unshare")
SETTINGS = {**TINY, "max_steps": 400, "eval_interval": 100, "checkpoint_interval": 1000,
            "total_batch_size": 320, "dropout": 0.1}
NODES = ("node1", "node2")
CONFIG = """
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=trial Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Slurm's daemons, their files, and its commands."""

    def __init__(self, folder):
        self.folder, self.daemons = folder, []
        self.env = {**environment(), "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self, *argv):
        output = open(self.folder / "daemons.txt", "a")
        self.daemons.append(subprocess.Popen(argv, env=self.env, stdout=output, stderr=output,
                                             start_new_session=True))

    def boot(self):
        host = socket.gethostname().split(".")[0]
        munge = self.folder / "munge"
        munge.mkdir()
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        self.start("munged", "--foreground", "--force", f"--key-file={munge}/key",
                   f"--socket={munge}/socket", f"--pid-file={munge}/pid",
                   f"--log-file={munge}/log", f"--seed-file={munge}/seed")
        wait_for((munge / "socket").exists, self.describe)
        names = " ".join(("localhost", host, *NODES))
        (self.folder / "hosts").write_text(f"127.0.0.1 {names}\n")
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(CONFIG.format(
            folder=self.folder, host=host, ports=free_ports(3)))
        self.start("slurmctld", "-D")
        for node in NODES:  # with a table of names of its own: the nodes' names mean this machine
            self.start("unshare", "--mount", "sh", "-c",
                       f'mount --bind "{self.folder}/hosts" /etc/hosts; exec slurmd -D -N {node}')
        wait_for(lambda: self.states() == ["idle", "idle"], self.describe)

    def command(self, *argv, check=True, **variables):
        done = subprocess.run(argv, cwd=ROOT, env={**self.env, **variables}, text=True,
                              capture_output=True, timeout=60)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def states(self):
        return self.command("sinfo", "-h", "-N", "-o", "%T", check=False).split()

    def job(self, number):
        """{field: value} of what Slurm tells of a job."""
        text = self.command("scontrol", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def describe(self):
        files = [*self.folder.glob("*.txt"), *self.folder.glob("*.log")]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in files)

    def shut_down(self):
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


@pytest.fixture
def cluster(tmp_path):
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Slurm; not here: {', '.join(missing) or 'root'}")
    cluster = Cluster(tmp_path / "slurm")
    cluster.folder.mkdir()
    try:
        cluster.boot()
        yield cluster
    finally:
        cluster.command("scancel", "--user=root", check=False)
        time.sleep(1)
        cluster.shut_down()


def wait_for(condition, describe, seconds=500):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, describe()
        time.sleep(0.1)


def steps_of(log_dir):
    """How many steps the log holds."""
    path = log_dir / "log.txt"
    return path.read_text().count(" train ") if path.exists() else 0


@pytest.mark.timeout(1800)
def test_a_stopped_job_is_queued_again_and_finishes(cluster, data_root):
    """Guards against a batch script that loses its steps at the time limit, takes a stopped run for
    a finished one, or starts again what is finished."""
    log_dir = data_root.parent / "log"
    argv = flags(**SETTINGS, data_root=data_root)
    path = Path(sys.executable).parent
    out = cluster.command(
        "sbatch", "--parsable", "--nodes=2", f"--output={cluster.folder}/job.txt",
        "docs/slurm.sh", *argv, LOG_DIR=str(log_dir), PROCESSES="1",
        PATH=f"{path}{os.pathsep}{os.environ['PATH']}")
    job = out.strip()
    for restarts, step in enumerate((50, 150)):
        wait_for(lambda step=step: steps_of(log_dir) > step, cluster.describe)
        # what Slurm does when the time limit is near
        cluster.command("scancel", "--batch", "--signal=USR1", job)
        wait_for(lambda n=restarts: cluster.job(job)["Restarts"] == str(n + 1), cluster.describe)
    wait_for(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), cluster.describe)
    assert cluster.job(job)["JobState"] == "COMPLETED", cluster.describe()
    output = (cluster.folder / "job.txt").read_text()
    assert output.count("resuming at step") == 2, output

    undisturbed = run("train_gpt2.py", *argv, f"--log_dir={data_root.parent}/whole",
                      cwd=data_root.parent, nproc=2)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert read_log(log_dir) == read_log(data_root.parent / "whole")
    ours, theirs = (torch.load(data_root.parent / name / "model_00400.pt", weights_only=True)
                    for name in ("log", "whole"))
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
