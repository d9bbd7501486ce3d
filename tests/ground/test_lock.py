"""One run per directory: the second is refused, and no lock outlives its process.

    python -m pytest tests/ground/test_lock.py
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, english, flags, run, write_dataset

from gptlib import lock
from gptlib.common import UserError
from gptlib.lock import lock_directory

HOLD = """
import sys, time
from gptlib.lock import lock_directory
with lock_directory(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "log"."""
    argv = [sys.executable, "-c", HOLD, str(tmp_path / "log")]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused(holder, tmp_path):
    """Guards against two runs in one folder, and a refusal that does not say whose run to look for.
    """
    with pytest.raises(UserError) as error:
        with lock_directory(tmp_path / "log"):
            pass
    assert f"process {holder.pid} on {socket.gethostname()}" in str(error.value)
    assert "\n" not in str(error.value)
    assert holder.poll() is None


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    """Guards against a log folder of a stranger whose .lock leads to a file of the user's, which
    the name of the lock's owner would replace."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / ".lock").symlink_to(victim)
    done = run("train_gpt2.py", *flags(**TINY, data_root=write_dataset(
        tmp_path / "data", [english(3001)], [english(1500)])), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == ("error: log can't be written to: its .lock is a link, which could lead "
                           "to any file: remove it\n")
    assert victim.read_text() == "mine"


def test_a_refused_process_does_not_end_the_lock(holder, tmp_path):
    """Guards against a refused process that releases a POSIX lock by closing its file, so that a
    third gets it."""
    for _ in range(2):
        with pytest.raises(UserError, match=f"process {holder.pid} "):
            with lock_directory(tmp_path / "log"):
                pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_ends_with_its_process(holder, tmp_path, number):
    """Guards against a lock that outlives kill -9 and keeps --auto_resume from ever starting again.
    """
    holder.send_signal(number)
    holder.wait(timeout=30)
    with lock_directory(tmp_path / "log"):
        owner = json.loads((tmp_path / "log" / ".lock").read_text())
    assert owner["pid"] == os.getpid()
    assert owner["host"] == socket.gethostname()


def test_the_lock_is_free_after_the_block(tmp_path):
    """Guards against a lock kept after the block, or after an error in it, that refuses the next
    run here."""
    with pytest.raises(KeyError):
        with lock_directory(tmp_path / "log"):
            raise KeyError
    with lock_directory(tmp_path / "log"):
        pass


def test_the_same_process_is_refused_too(tmp_path):
    """Guards against a process that takes its own POSIX lock again, and releases both after the
    inner block."""
    with lock_directory(tmp_path / "log"):
        with pytest.raises(UserError, match="in use by this very process"):
            with lock_directory(tmp_path / "other" / ".." / "log"):
                pass


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, capsys):
    """Guards against a network file system without locks on which nobody can train."""
    import fcntl

    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock_directory(tmp_path):
        pass
    assert "can't be locked (No locks available)" in capsys.readouterr().err


def test_without_fcntl_there_is_a_warning(tmp_path, monkeypatch, capsys):
    """Guards against Windows, which has no fcntl, on which nobody can train."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with lock_directory(tmp_path):
        pass
    assert "this platform has no file locks" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "3", '{"pid": 1}'])
def test_an_owner_that_can_not_be_read(tmp_path, text):
    """Guards against a traceback about a lock file that a full disk left empty."""
    with open(tmp_path / lock.LOCK_NAME, "w+") as file:
        file.write(text)
        assert lock.describe_owner(file) == "another process"


def test_a_directory_that_can_not_be_made(tmp_path):
    """Guards against a traceback if a file stands in the directory's place."""
    (tmp_path / "log").write_text("")
    with pytest.raises(UserError, match="can't be written to"):
        with lock_directory(tmp_path / "log"):
            pass
