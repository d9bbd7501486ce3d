"""What every folder of the library uses: errors that the user can fix, the command line, files
that are written completely or not at all, messages.
"""

import argparse
import contextlib
import difflib
import importlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import zlib
from pathlib import Path


class UserError(ValueError):
    """An error that the user can fix. Its text says what was found, what was expected and what to
    do next.
    """


def run_main(main):
    """Call main(). A UserError becomes one line on stderr and exit code 1, Ctrl-C becomes exit
    code 130.
    """
    # On Windows a file or a pipe gets cp1252: a sample with a character that cp1252 lacks must not
    # end the run.
    sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        exit_with_error(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def exit_with_error(message):
    """Exit with code 1 after telling the user once what was wrong, even if torchrun started several
    processes.

    torchrun ends with a report of its own, fifty lines long; it takes the message and prints it at
    the end. Rank 0 exits first, and torchrun then ends the other ranks, which usually have the same
    error. If only another rank has an error, that rank reports it a moment later. If torchrun will
    restart the processes it writes no report, so the message is printed here.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not report:
        sys.exit(message)
    if not is_rank0():
        time.sleep(15)  # torchrun ends this rank sooner if rank 0 has failed too
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"):
        print(message, file=sys.stderr)
    failure = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    Path(report).write_text(json.dumps({"message": failure}))
    sys.exit(1)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose help begins with the script's docstring and whose errors are a
    UserError of one line.
    """

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        similar = difflib.get_close_matches(unknown, self._option_string_actions, 1)
        hint = f"did you mean {similar[0]}?" if similar else "see --help"
        raise UserError(f"{message} ({hint})")


# -----------------------------------------------------------------------------
# files


def open_unless_link(path, flags):
    """An opener for open() that fails for a link, which could lead to another file."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def atomic_write(path, write):
    """Write a file through write(f), f a binary file, so that it is complete or not there at all.

    Raises UserError if the disk is full or not writable; the earlier file at `path` is then intact.
    """
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        write_synced(tmp, write)
        os.replace(tmp, path)
        sync_directory(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save hides the OSError behind a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}. Make room or choose "
                        "another place; what was there before is intact") from error
    finally:
        tmp.unlink(missing_ok=True)


def write_synced(path, write):
    """Write a new file through write(f), f a binary file, and wait until it is on the disk.

    What has the name already is removed: a killed process left it, or it is a link, through which
    another file would be written.
    """
    remove_leftover(path)
    with open(path, "xb") as f:  # x: fail if the name has appeared meanwhile
        write(f)
        f.flush()
        os.fsync(f.fileno())


def remove_leftover(path):
    """Remove a file, a link or a folder, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def crc32_of_file(path):
    """The CRC-32 of a file, a number. Threads run in parallel: zlib releases the interpreter lock.
    """
    crc = 0
    with open(path, "rb") as f:
        while data := f.read(2**20):
            crc = zlib.crc32(data, crc)
    return crc


def sync_directory(path):
    """Write the names in a directory to the disk: only then does a renamed file survive a power
    cut.
    """
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    folder = os.open(path, os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def atomic_directory(path):
    """A directory to write files into, which gets the name `path` only at the end of the block,
    when it is complete.

    Raises UserError if `path` exists and isn't empty, or if the disk is full or not writable.
    """
    from safetensors import SafetensorError  # raised for a full disk, and no OSError
    path = Path(os.path.abspath(path))
    tmp = path.with_name(path.name + ".tmp")
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty:
        raise UserError(f"{path} is there already: choose another name, or remove it")
    try:
        remove_leftover(tmp)
        tmp.mkdir(parents=True)
        yield tmp
        for file in tmp.iterdir():
            with open(file, "r+b") as f:  # Windows: no fsync of a file opened to read
                os.fsync(f.fileno())
        if path.exists():
            path.rmdir()
        os.replace(tmp, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}. "
                        "Make room or choose another place") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def private_folder(name):
    """A folder of the temporary directory that no other user can write to, for compiled code.

    The usual folders of torch have names that anybody can foresee: whoever makes one first chooses
    the code that is run from it. One that another user made, or may write to, is not used: then the
    folder is a new one, and what was compiled before is compiled anew.
    """
    owner = os.getuid() if hasattr(os, "getuid") else 0  # Windows has a directory for each user
    root = Path(tempfile.gettempdir()) / f"gpt2_compiled_{owner}"
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    if hasattr(os, "getuid"):
        found = root.lstat()
        is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == owner
        if not is_ours or found.st_mode & 0o022:
            warn(f"{root} belongs to another user, or others may write to it: compiling anew")
            root = Path(tempfile.mkdtemp(prefix="gpt2_compiled_"))
    folder = root / name
    folder.mkdir(exist_ok=True)
    return str(folder)


# -----------------------------------------------------------------------------
# other people's code


def first_line(error):
    """The first line of another library's exception, or its class's name if it has no text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def duration(seconds):
    """Seconds as people say it: 42 s, 3 min 05 s, 2 h 07 min, 3.5 days; empty for None."""
    if seconds is None:
        return ""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds / 86400:,.1f} days"


def import_optional(module, package=None):
    """Import a module that is not in requirements.txt; UserError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"{module} is not installed: pip install {package or module}") from e


# -----------------------------------------------------------------------------
# messages. tqdm is imported when the first one is printed, so that fineweb.py --help starts at once


def is_rank0():
    """Whether this process is the one that writes and prints: the only one, or rank 0 under
    torchrun.
    """
    return os.environ.get("RANK", "") in ("", "0")


def log(text):
    """Print a line to stderr at once, for everything that is not the program's result."""
    print(text, file=sys.stderr, flush=True)


def print0(text):
    """Print a line on rank 0 alone, above the progress bar if there is one."""
    if is_rank0():
        from tqdm import tqdm
        tqdm.write(text)


def warn(text):
    """Print a warning to stderr, on rank 0 alone."""
    if is_rank0():
        from tqdm import tqdm
        tqdm.write(f"warning: {text}", file=sys.stderr)
