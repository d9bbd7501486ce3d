"""The Dockerfile, built with podman, and its images used as docs/cloud.md says.

    python -m pytest tests/test_container.py -m container

As root, with Debian's podman, runc and debootstrap; skipped elsewhere. If the base image is not
here, a stand-in takes its name: Debian from debootstrap, with the Python that runs this test under
/usr/local. CONTAINER_BUILD holds further flags for podman build. A quarter of an hour.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import requests
import serving_helpers as serving
from conftest import ROOT, free_ports, read_log

pytestmark = [pytest.mark.container, pytest.mark.timeout(3600)]
BASE = "docker.io/library/" + re.search("^FROM (python:.*) AS", (ROOT / "Dockerfile").read_text(),
                                        re.M)[1]
LIBRARIES = ("ca-certificates,libbz2-1.0,libffi8,liblzma5,libncursesw6,libreadline8,libsqlite3-0,"
             "libssl3,libuuid1,zlib1g")
REAL_BASE_BYTES = 130e6  # of Docker Hub's image; the stand-in is larger
NEW_TOKENS = 3000


def run(*argv):
    done = subprocess.run([str(arg) for arg in argv], cwd=ROOT, text=True, capture_output=True)
    output = f"{argv}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, output
    return done.stdout.strip()


def import_stand_in(root):
    """A stand-in for the base image, without caches as Docker's images are."""
    run("debootstrap", "--variant=minbase", f"--include={LIBRARIES}", "bookworm", root)
    shutil.copytree(sys.base_prefix, root / "usr" / "local", symlinks=True, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("site-packages", "__pycache__", "test", "*.a"))
    (root / "etc/apt/apt.conf.d/no-cache").write_text(
        'Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";')
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs/")
    run("chroot", root, "sh", "-c", "ldconfig && python3 -m ensurepip && apt-get clean"
        "&& cd /usr/local/bin && ln -sf pip3 pip && ln -sf python3 python")
    run("sh", "-c", f"tar -C {root} -c . | podman import - {BASE}")


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    """gpt2 and gpt2-serve, for CPUs."""
    programs = ("podman", "runc", "debootstrap")
    missing = [program for program in programs if not shutil.which(program)]
    if missing or os.geteuid() != 0 or sys.base_prefix == "/usr":
        pytest.skip(f"needs root, a Python of its own and podman; not here: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("container")
    # podman's own limits may be above this machine's
    (folder / "containers.conf").write_text(
        '[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n')
    os.environ["CONTAINERS_CONF"] = str(folder / "containers.conf")
    if not run("podman", "images", "-q", BASE):
        import_stand_in(folder / "root")
    build = ["podman", "build", "--format=docker", "--network=host", "--pull=never",
             "--build-arg=TORCH=cpu", "--build-arg=COMMIT=0123abc",
             *shlex.split(os.environ.get("CONTAINER_BUILD", "")), "."]
    run(*build, "--target=serve", "--tag=gpt2-serve")
    run(*build, "--tag=gpt2")


@contextlib.contextmanager
def container(*argv):
    """A container that runs in the background; yields its id."""
    number = run("podman", "run", "--detach", "--network=host", *argv)
    try:
        yield number
    finally:
        run("podman", "rm", "--force", number)


def wait_for(condition, number):
    while not condition():
        is_running = run("podman", "inspect", "--format={{.State.Running}}", number)
        assert is_running == "true", run("podman", "logs", number)
        time.sleep(0.1)


def stop(number):
    """The exit code after SIGTERM; 137 if it did not help."""
    run("podman", "stop", "--time=300", number)
    return int(run("podman", "inspect", "--format={{.State.ExitCode}}", number))


def test_size_and_contents():
    """Guards against a server's image with the packages of training, and a folder in /app that
    anybody may write to."""
    sizes = [int(run("podman", "image", "inspect", "--format={{.Size}}", name))
             for name in ("gpt2-serve", BASE)]
    assert sizes[0] - sizes[1] + REAL_BASE_BYTES < 1.3e9
    find = ["find", "/app", "-perm", "-o+w"]
    assert run("podman", "run", "--rm", "--network=host", "gpt2", *find) == ""


def test_a_run_is_stopped_and_resumed(tmp_path):
    """Guards against a stop that loses steps, files of another user, a report without commit."""
    tmp_path.chmod(0o777)
    log = tmp_path / "log" / "log.txt"
    argv = ["--volume", f"{tmp_path}:/runs", "gpt2", "python", "/app/train_gpt2.py",
            "--preset=demo", "--auto_resume", "--max_steps=40", "--val_tokens=4096"]
    with container(*argv) as number:
        wait_for(lambda: log.exists() and log.read_text().count(" train ") > 10, number)
        assert stop(number) == 0
    with container(*argv) as number:
        assert run("podman", "wait", number) == "0", run("podman", "logs", number)
        assert "resuming at step" in run("sh", "-c", f"podman logs {number} 2>&1")
    assert sorted(read_log(tmp_path / "log")["train"]) == list(range(40))
    assert log.stat().st_uid == 1000
    assert "commit 0123abc" in (tmp_path / "log" / "report.md").read_text()


@pytest.fixture
def server(tmp_path):
    """Arguments of a server on a free port, and its address."""
    shutil.copytree(serving.make_home(), tmp_path / "runs", symlinks=True)
    for folder in (tmp_path, *tmp_path.parents[:2], tmp_path / "runs"):
        folder.chmod(0o755)
    port, = free_ports(1)
    argv = ["--volume", f"{tmp_path}/runs:/runs:ro", f"--env=PORT={port}",
            f"--env=MAX_LENGTH_LIMIT={NEW_TOKENS}", "gpt2-serve"]
    return argv, f"http://127.0.0.1:{port}"


def health(url):
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(f"{url}/health", timeout=serving.START).json()
    return {}


def test_serve_without_rights(server):
    """Guards against a server that writes outside /runs, needs a capability or an entry in
    /etc/passwd, or loses requests in flight when it is stopped."""
    argv, url = server
    rights = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--user=12345:12345"]
    with container(*rights, *argv) as number:
        wait_for(lambda: health(url).get("status") == "healthy", number)
        run("podman", "healthcheck", "run", number)
        answers = [
            serving.in_background(requests.post, f"{url}/generate", timeout=600,
                                  json=dict(prompt="the", max_length=NEW_TOKENS, seed=seed))
            for seed in range(4)]
        wait_for(lambda: health(url).get("slots_in_use") == 4, number)
        assert stop(number) == 0
        generated = [answer.result(serving.WAIT).json()["tokens_generated"] for answer in answers]
        assert generated == [NEW_TOKENS] * 4


def test_sigterm_while_the_server_imports(server):
    """Guards against a process 1 that ignores SIGTERM until Python has a handler for it."""
    argv, _ = server
    with container(*argv) as number:
        time.sleep(2)
        assert stop(number) in (143, 0)  # 143: SIGTERM itself ended it
