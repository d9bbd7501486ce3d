"""
python -m pytest tests/ground/test_common.py

Files that are whole or not there, and how a command ends.
"""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from conftest import ROOT, environment, run
from corpus import contents

from gptlib import common
from gptlib.common import UserError, atomic_directory, atomic_write, run_main


def write_until_full(f):
    f.write(b"new")
    raise OSError(28, "No space left on device")


def write_until_full_as_torch(f):
    """torch.save hides the full disk behind another error."""
    try:
        write_until_full(f)
    except OSError:
        raise RuntimeError("unexpected pos")  # noqa: B904


def write_with_a_bug(f):
    raise RuntimeError("a bug")


def test_atomic_write_keeps_what_was_there(tmp_path):
    """Guards against a full disk, or a bug while writing, that destroys the earlier file."""
    path = tmp_path / "a"
    atomic_write(path, lambda f: f.write(b"old"))
    for write in (write_until_full, write_until_full_as_torch):
        with pytest.raises(UserError, match="a: No space left"):
            atomic_write(path, write)
    with pytest.raises(RuntimeError, match="a bug"):
        atomic_write(path, write_with_a_bug)
    assert contents(tmp_path) == {"a": b"old"}


def test_ctrl_c_exits_with_130():
    """Guards against a traceback after Ctrl-C."""
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as leaving:
        run_main(interrupted)
    assert leaving.value.code == 130


def test_a_directory_is_synced_by_handles_that_may_write(tmp_path, monkeypatch):
    """Guards against an export that fails on Windows, whose os.fsync refuses files opened for
    reading."""
    fcntl = pytest.importorskip("fcntl", reason="Windows itself shows it")

    def fsync(fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_directory(tmp_path / "a") as folder:
        (folder / "b").write_bytes(b"c")
    assert contents(tmp_path / "a") == {"b": b"c"}


def test_output_that_the_encoding_lacks_does_not_end_a_run():
    """Guards against a Chinese character in a sample that ends training on Windows, where stdout in
    a file is in cp1252."""
    code = "from gptlib.common import print0, run_main; run_main(lambda: print0('a\u4e2db'))"
    env = {**environment(), "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert (done.returncode, done.stdout.strip()) == (0, b"a?b"), done.stderr.decode()


def test_under_torchrun_an_error_is_told_once_and_last(tmp_path):
    """Guards against an error that every rank prints, followed by fifty lines of torchrun's
    traceback."""
    done = run("train_gpt2.py", "--preset=nothing", cwd=tmp_path, nproc=2)
    assert done.returncode != 0
    assert done.stderr.count("--preset is 'nothing'") == 1
    last_lines = done.stderr.strip().splitlines()[-2:]
    assert "--preset is 'nothing'" in last_lines[0]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has other permissions")
@pytest.mark.parametrize("planted", ["nothing", "open to others", "a link"])
def test_compiled_code_comes_from_a_folder_of_ours(tmp_path, monkeypatch, planted, capsys):
    """Guards against code that another user has put where torch looks for what it compiled."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    foreseen = tmp_path / f"gpt2_compiled_{os.getuid()}"
    if planted == "open to others":
        foreseen.mkdir()
        foreseen.chmod(0o777)
    elif planted == "a link":
        (tmp_path / "elsewhere").mkdir()
        foreseen.symlink_to(tmp_path / "elsewhere")
    folder = Path(common.private_folder("inductor"))
    assert folder.is_dir()
    assert folder.parent.lstat().st_mode & 0o777 == 0o700
    assert (folder.parent == foreseen) == (planted == "nothing")
    assert ("compiling anew" in capsys.readouterr().err) == (planted != "nothing")
    if planted == "nothing":
        assert common.private_folder("inductor") == str(folder), "the next process finds it again"
