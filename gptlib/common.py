"""What every room shares: errors the user can fix, the command line, and files that are whole or not there."""

import argparse
import contextlib
import difflib
import importlib
import os
import shutil
import sys
from pathlib import Path


class UserError(ValueError):
    """A mistake the user can mend: what was found, what was expected, what to do next."""


def run_main(main):
    """Call main(). A UserError becomes one line on stderr and exit code 1, Ctrl-C becomes exit code 130."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


class ArgumentParser(argparse.ArgumentParser):
    """argparse, whose help begins with the script's docstring and whose errors are one line: a UserError."""

    def __init__(self, description, **how):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **how)

    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, 1)
        raise UserError(message + (f" (did you mean {near[0]}?)" if near else " (see --help)"))


def atomic_write(path, write):
    """Write a file through write(f), f a binary file, so that it is whole or not there.

    Raises UserError when the disk is full or not writable; what was at `path` before is then intact.
    """
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        if hasattr(os, "O_DIRECTORY"):  # POSIX: the new name is on disk when the directory is
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides the one behind the other
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}. Make room or choose another place; what was "
                        "there before is intact") from error
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path):
    """A directory to write files into that takes the name `path` at the end of the block: whole or not there.

    Raises UserError where there is one already that isn't empty, or when the disk is full or not writable.
    """
    from safetensors import SafetensorError
    path = Path(os.path.abspath(path))
    tmp = path.with_name(path.name + ".tmp")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already: choose another name, or remove it")
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # of one that was killed
        tmp.mkdir(parents=True)
        yield tmp
        for file in tmp.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if path.exists():
            path.rmdir()
        os.replace(tmp, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}. Make room or choose another "
                        "place") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def first_line(error):
    """What an exception of another library says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def import_optional(module, package=None):
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"{module} is not installed: pip install {package or module}") from e


def is_rank0():
    """Whether this process is the one that writes and prints: the only one, or rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def print0(text):
    """Print a line on rank 0 alone, above a progress bar where there is one."""
    if is_rank0():
        from tqdm import tqdm
        tqdm.write(text)


def warn(text):
    """Print a warning to stderr, on rank 0 alone."""
    if is_rank0():
        from tqdm import tqdm
        tqdm.write(f"warning: {text}", file=sys.stderr)
