"""Saves checkpoints completely or not at all, from a thread while training goes on."""

import contextlib
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from gptlib.checkpoints.directory import remove_directory
from gptlib.checkpoints.verified_file import directory_identity
from gptlib.common import UserError, atomic_write, print0, remove_leftover
from gptlib.distributed import (World, any_rank, is_sharded, map_leaves, share_from_rank0,
                                whole)

CHECKPOINT_VERSION = 1  # a program that knows only lower ones refuses the checkpoint
LATEST = "latest_checkpoint.pt"

# -----------------------------------------------------------------------------
# the files of a log directory


def save_checkpoint(log_dir, state, keep, is_best=False):
    """Write log_dir/model_{step}.pt completely or not at all, and return its path.

    Then latest_checkpoint.pt names it, and only the newest `keep` checkpoints stay (0: all of
    them). Raises UserError if that can't be done; the earlier checkpoints are intact then.
    """
    path = checkpoint_path(log_dir, state["step"])
    if path.is_dir():  # the run was here before, sharded, and then resumed from an earlier step
        remove_directory(path)
    atomic_write(path, lambda file: torch.save(state, file))
    publish_checkpoint(path, keep, is_best)
    return path


def checkpoint_path(log_dir, step):
    return Path(log_dir) / f"model_{step:05d}.pt"


def list_checkpoints(log_dir):
    """Paths of the checkpoints of a run, newest first."""
    paths = [path for path in Path(log_dir).glob("model_*.pt") if path.stem[6:].isdigit()]
    return sorted(paths, key=lambda path: int(path.stem[6:]), reverse=True)


def publish_checkpoint(path, keep, is_best=False):
    """Let latest_checkpoint.pt name a checkpoint that is written, keep the best one, and remove all
    but the newest `keep`."""
    try:
        update_latest(path)
        if is_best:
            keep_as_best(path)
        for old in list_checkpoints(path.parent)[keep:] if keep else []:
            remove_checkpoint(old)
    except OSError as error:
        raise UserError(f"{path} is saved, but {error.filename}: {error.strerror}") from error


def remove_checkpoint(path):
    """Remove a checkpoint, file or directory."""
    if path.is_dir():
        remove_directory(path)
    else:
        path.unlink()


def update_latest(path):
    """Let latest_checkpoint.pt, beside the checkpoint at `path`, stand for that one."""
    link = path.with_name("latest_checkpoint.tmp")
    remove_leftover(link)
    try:
        link.symlink_to(path.name)
    except OSError:  # Windows, some network drives
        with open(path, "rb") as source, open(link, "xb") as target:
            shutil.copyfileobj(source, target)
    os.replace(link, path.with_name(LATEST))


def tidy(log_dir):
    """Let latest_checkpoint.pt name the newest checkpoint, since later ones may have been moved
    away, and remove what killed processes left of checkpoints that they wrote or removed."""
    for pattern in ("model_*.pt.tmp", "model_*.pt.removed"):
        for path in Path(log_dir).glob(pattern):
            remove_leftover(path)
    latest, checkpoints = Path(log_dir) / LATEST, list_checkpoints(log_dir)
    if not checkpoints:
        latest.unlink(missing_ok=True)
    elif latest.is_symlink():
        if os.readlink(latest) != checkpoints[0].name:
            update_latest(checkpoints[0])
    elif directory_identity(latest) != directory_identity(checkpoints[0]):
        update_latest(checkpoints[0])


def keep_as_best(path):
    """Let best_checkpoint.pt be the checkpoint at `path`, and stay when that one is removed."""
    best, copy = (path.with_name(f"best_checkpoint.{end}") for end in ("pt", "tmp"))
    for old in (copy, best):
        if old.is_dir():
            remove_directory(old)
    copy.unlink(missing_ok=True)
    if path.is_dir():
        shutil.copytree(path, copy, copy_function=link_or_copy)
    else:
        link_or_copy(path, copy)
    os.replace(copy, best)


def link_or_copy(source, target):
    """A second name for a file, or a copy if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def copy_to_host(state, keep=True):
    """A copy of a nest of tensors in CPU memory, to be written while training changes the tensors.

    Tensors that share memory, such as the embedding and the head, share it in the copy too.
    Collective: sharded tensors are gathered one by one. A rank with keep=False gets None in place
    of each tensor.
    """
    copies = {}

    def copy(leaf):
        if not torch.is_tensor(leaf):
            return leaf
        # Every rank must gather the same tensors. A rank without rows of a tensor has no address
        # to tell it by, so a sharded one is told by its object.
        key = (id(leaf) if is_sharded(leaf)
               else (leaf.device, leaf.data_ptr(), leaf.shape, leaf.dtype))
        if key not in copies:
            tensor = whole(leaf.detach())
            copies[key] = tensor.to("cpu", copy=True) if keep else None
        return copies[key]

    return map_leaves(state, copy)


# -----------------------------------------------------------------------------
# the thread


def require_shared_disk(folder, world):
    """Raise UserError on all ranks if any rank cannot see files that rank 0 writes to `folder`."""
    probe = Path(folder) / f".shared_{share_from_rank0(os.getpid(), world)}"
    if world.rank == 0:
        with contextlib.suppress(OSError):  # a full disk: no rank sees it, no rank is missing
            probe.touch(exist_ok=False)  # never through a link of that name
    is_there = share_from_rank0(probe.exists(), world)
    is_missing = any_rank(is_there and not probe.exists(), world)
    if world.rank == 0:
        probe.unlink(missing_ok=True)
    if is_missing:
        raise UserError(f"a model of more than --largest_file parameters is saved by all processes "
                        f"together, and not all see {folder} of the first: put --log_dir on a disk "
                        "that all hosts share")


class Saver:
    """Writes checkpoints from a thread, one at a time, while training goes on.

    With as_directory every rank writes its share of a sharded model into a directory; otherwise
    rank 0 writes one file. With keep_best, best_checkpoint.pt becomes one whose validation loss is
    below best_loss, the lowest so far. Raises UserError if a directory is wanted and the ranks
    share no disk.
    """

    def __init__(self, log_dir, keep, world=World(), as_directory=False, keep_best=False,
                 best_loss=math.inf):
        self.log_dir, self.keep, self.world = log_dir, keep, world
        self.keep_best, self.best_loss = keep_best, best_loss
        self.thread, self.writing = ThreadPoolExecutor(1), None
        if world.rank == 0:
            with contextlib.suppress(OSError):  # the first save will say what is wrong
                tidy(log_dir)
        if as_directory:
            require_shared_disk(log_dir, world)
        # the writing threads communicate while training does, so they have a group of their own
        self.group = dist.new_group(backend="gloo") if as_directory else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.thread.shutdown()

    def is_best(self, val_loss):
        """Whether a checkpoint with this validation loss is to be kept as the best one."""
        return self.keep_best and val_loss is not None and val_loss < self.best_loss

    def save(self, state, wait=False, keep_all=False):
        """Copy the state and write the copy in the background; with wait, return when it is on
        disk; with keep_all, no earlier checkpoint is removed.

        state: a nest of tensors and plain values, with "step", "val_step" and "val_loss".
        Collective: every process calls it. Raises UserError only with wait: otherwise a checkpoint
        that can't be written is a warning, since the next one may be.
        """
        if self.writing:  # one at a time: each holds a copy of the state
            self.writing.result()
        is_best = state["step"] == state["val_step"] and self.is_best(state["val_loss"])
        if is_best:
            self.best_loss = state["val_loss"]
        state = {"version": CHECKPOINT_VERSION, "best_loss": self.best_loss, **state}
        keep = 0 if keep_all else self.keep
        if self.group:
            write = self._start_directory(state, wait, keep, is_best)
        else:
            write = self._start_file(state, keep, is_best)
        self.writing = write and self.thread.submit(self._report, write, state["step"], wait)
        if wait and self.writing:
            self.writing.result()

    def _start_file(self, state, keep, is_best):
        copy = copy_to_host(state, keep=self.world.rank == 0)
        if self.world.rank > 0:
            return None
        return lambda: save_checkpoint(self.log_dir, copy, keep, is_best)

    def _start_directory(self, state, wait, keep, is_best):
        from gptlib.checkpoints.sharded_tensors import DirectoryWriter
        path = checkpoint_path(self.log_dir, state["step"])
        writer = DirectoryWriter(path, state, self.group, frozen=wait)
        return lambda: writer.finish(lambda: publish_checkpoint(path, keep, is_best))

    def _report(self, write, step, must_succeed):
        try:
            path = write()
            print0(f"step {step:5d} | saved {path}")
        except UserError as e:
            if must_succeed:
                raise
            print0(f"warning: step {step} is not saved, training goes on: {e}")
