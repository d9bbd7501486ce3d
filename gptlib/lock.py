"""One run for each directory: a lock that ends with the process that holds it, even by kill -9."""

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path

from gptlib.common import UserError, open_unless_link, warn

LOCK_NAME = ".lock"
locked_here = set()  # the directories that this process has locked


@contextlib.contextmanager
def lock_directory(path):
    """Hold the lock of a directory until the end of the block; the directory is made if needed.

    Raises UserError with host and process if another process holds it. The operating system
    ends the lock with the process; the file .lock that stays behind only says who held it last.
    If the platform or the file system has no locks, a warning says so and the block runs without
    one.

    fcntl.lockf rather than flock: network file systems (NFS) pass it on to the server, so it holds
    between hosts, and children that are forked do not inherit it and keep it alive. Such a lock
    belongs to the whole process: it ends when any of its handles of the file is closed, so a
    second lock in the same process is refused before the file is opened.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        name = path.resolve()
        if name in locked_here:
            raise UserError(f"{path} is in use by this very process")
        file = open(path / LOCK_NAME, "a+", opener=open_unless_link)
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.ELOOP:
            reason = f"its {LOCK_NAME} is a link, which could lead to any file: remove it"
        raise UserError(f"{path} can't be written to: {reason}") from error
    with file:
        if acquire(file, path):
            write_owner(file)
        locked_here.add(name)
        try:
            yield
        finally:
            locked_here.remove(name)


def acquire(file, path):
    """Whether the file could be locked; False, with a warning, if there are no locks here.

    Raises UserError if another process has locked it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        warn(f"this platform has no file locks: make sure that no other run uses {path}")
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows EAGAIN and EACCES
        raise UserError(f"{path} is in use by {describe_owner(file)}: wait for it to end, "
                        "stop it, or choose another directory") from error
    except OSError as error:
        warn(f"{path} can't be locked ({error.strerror}): make sure that no other run uses it")
        return False
    return True


def write_owner(file):
    """Write into the lock file who holds it. On a full disk the owner stays unnamed, and the lock
    holds all the same."""
    start = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "start": start}
    with contextlib.suppress(OSError):
        file.seek(0)
        file.truncate()
        file.write(json.dumps(owner) + "\n")
        file.flush()


def describe_owner(file):
    """Who holds the lock, in words, as far as its file says."""
    try:
        file.seek(0)
        owner = json.loads(file.read())
        return f"process {owner['pid']} on {owner['host']}, running since {owner['start']}"
    except (OSError, ValueError, KeyError, TypeError):  # not yet written, or the disk was full
        return "another process"
