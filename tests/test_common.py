"""
python -m pytest tests/test_common.py

Files that are whole or not there, and how a command ends.
"""

import pytest

from conftest import run
from corpus import contents

from gptlib.common import UserError, atomic_write, run_main


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
    """A full disk or a bug while writing destroys the file that was there before."""
    path = tmp_path / "a"
    atomic_write(path, lambda f: f.write(b"old"))
    for write in (write_until_full, write_until_full_as_torch):
        with pytest.raises(UserError, match="a: No space left"):
            atomic_write(path, write)
    with pytest.raises(RuntimeError, match="a bug"):
        atomic_write(path, write_with_a_bug)
    assert contents(tmp_path) == {"a": b"old"}


def test_ctrl_c_exits_with_130():
    """Ctrl-C prints a traceback."""
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as leaving:
        run_main(interrupted)
    assert leaving.value.code == 130


def test_under_torchrun_an_error_is_told_once_and_last(tmp_path):
    """Every rank prints the user's error, and torchrun's traceback of fifty lines follows."""
    done = run("train_gpt2.py", "--preset=nothing", cwd=tmp_path, nproc=2)
    assert done.returncode != 0
    assert done.stderr.count("--preset is 'nothing'") == 1
    last_lines = done.stderr.strip().splitlines()[-2:]
    assert "--preset is 'nothing'" in last_lines[0]
