"""How a run goes on from a checkpoint, and the thread that writes the next ones."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from gptlib.checkpoints.formats import (checkpoint_path, copy_to_host, publish_checkpoint,
                               save_checkpoint)
from gptlib.checkpoints.directory import DirectoryWriter, read_tensors, split_sharded
from gptlib.common import UserError, print0
from gptlib.training.parallel import shard_like
from gptlib.distributed import World, any_rank, share_from_rank0
from gptlib.data.tokenizer import tokenizer_to_dict


def check_fit(cfg, checkpoint, tokenizer):
    """Raise UserError where the settings or the dataset's tokenizer do not fit the checkpoint
    that a run starts from.
    """
    theirs = checkpoint["config"]
    for name in ("n_layer", "n_head", "n_embd"):
        ours = getattr(cfg, name)
        if ours != theirs[name]:
            raise UserError(f"--{name} is {ours}, but the checkpoint's model has {theirs[name]}: "
                            "leave it out")
    resumed = "step" in checkpoint
    limit = theirs["block_size"]
    if cfg.block_size > limit or (resumed and cfg.block_size != limit):
        remedy = "leave it out" if resumed else "give at most that"
        raise UserError(f"--block_size is {cfg.block_size}, but the checkpoint's model has "
                        f"{limit}: {remedy}")
    if cfg.shard and "directory" in checkpoint and cfg.block_size != limit:
        raise UserError(f"--block_size is {cfg.block_size}, but with --shard a checkpoint that is "
                        f"a directory keeps its {limit}: leave it out, or start without --shard")
    check_same_tokenizer(cfg.data_root, tokenizer, checkpoint["tokenizer"])
    if resumed and len(checkpoint["optimizer"]) != (2 if cfg.optimizer == "muon" else 1):
        raise UserError(f"--optimizer is {cfg.optimizer}, but the checkpoint was trained with "
                        "another: leave it out")


def check_same_tokenizer(data_root, tokenizer, theirs):
    """Raise UserError where the dataset's tokenizer is not the checkpoint's, a dict of
    tokenizer_to_dict.
    """
    ours = tokenizer_to_dict(tokenizer)
    if all(theirs.get(key) == value for key, value in ours.items()):
        return
    name = theirs["name"]
    source = "gpt2" if name == "gpt2" else "THE_CHECKPOINT"
    raise UserError(
        f"the tokenizer of --data_root {data_root} ({tokenizer.name}, {tokenizer.n_vocab} tokens) "
        f"is not the checkpoint's ({name}): give the dataset that goes with it, or make one of "
        f"your text by python fineweb.py --tokenizer {source}")


def restore_training_state(checkpoint, optimizers, scaler):
    """Load the state of the optimizers and of the gradient scaler.

    Settings such as the learning rate are not restored: what the flags say counts. A checkpoint
    of a run without loss scaling (bfloat16, float32) has no scaler state; float16 then begins
    with a fresh one.
    """
    for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
        state = dict(state, param_groups=optimizer.state_dict()["param_groups"])
        optimizer.load_state_dict(shard_optimizer_state(state, optimizer))
    if "directory" in checkpoint:  # what is there now is empty
        read_tensors(checkpoint["directory"], named_optimizer_tensors(optimizers))
    if checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])


def shard_optimizer_state(state, optimizer):
    """The state dict of an optimizer, its tensors cut as the optimizer's parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in state["param_groups"] for i in group["params"]]
    tensors = {}
    for i, p in zip(indices, parameters, strict=True):
        values = state["state"].get(i, {})
        tensors[i] = {name: shard_like(tensor, p) for name, tensor in values.items()}
    return {**state, "state": tensors}


def named_optimizer_tensors(optimizers):
    """{name in a checkpoint directory: sharded tensor of the optimizers' state}."""
    state = {"optimizer": [optimizer.state_dict() for optimizer in optimizers]}
    return split_sharded(state)[0]


def require_shared_disk(folder, world):
    """Raise UserError on all ranks where one of them does not see what rank 0 writes there."""
    probe = Path(folder) / f".shared_{share_from_rank0(os.getpid(), world)}"
    if world.rank == 0:
        with contextlib.suppress(OSError):  # a full disk: nobody sees it, and nothing is known
            probe.touch()
    is_there = share_from_rank0(probe.exists(), world)
    is_missing = any_rank(is_there and not probe.exists(), world)
    if world.rank == 0:
        probe.unlink(missing_ok=True)
    if is_missing:
        raise UserError(f"a model of more than --largest_file parameters is saved by all processes "
                        f"together, and not all see {folder} of the first: put --log_dir on a disk "
                        "that all hosts share")


class BackgroundSaver:
    """Writes checkpoints from a thread, one at a time, while training goes on from the same
    tensors.

    With as_directory every rank writes its share of a sharded model into a directory; otherwise
    rank 0 writes one file. Raises UserError where the ranks don't share the disk of a directory.
    """

    def __init__(self, log_dir, keep, world=World(), as_directory=False):
        self.log_dir, self.keep, self.world = log_dir, keep, world
        self.thread, self.writing = ThreadPoolExecutor(1), None
        if as_directory:
            require_shared_disk(log_dir, world)
        # the threads that write talk to each other while training does: on a group of their own
        self.group = dist.new_group(backend="gloo") if as_directory else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.thread.shutdown()

    def save(self, state, wait=False):
        """Copy the state and let rank 0 write the copy in the background; with wait, it returns
        when that is on disk. Every rank has to call it: sharded tensors are gathered.

        Raises UserError only with wait: a checkpoint on the way that can't be written is a
        warning, since the next may be.
        """
        if self.writing:  # one at a time: each holds a copy of the state
            self.writing.result()
        if self.group:
            write = self._start_directory(state, wait)
        else:
            write = self._start_file(state)
        self.writing = write and self.thread.submit(self._report, write, state["step"], wait)
        if wait and self.writing:
            self.writing.result()

    def _start_file(self, state):
        copy = copy_to_host(state, keep=self.world.rank == 0)
        if self.world.rank > 0:
            return None
        return lambda: save_checkpoint(self.log_dir, copy, self.keep)

    def _start_directory(self, state, wait):
        path = checkpoint_path(self.log_dir, state["step"])
        writer = DirectoryWriter(path, state, self.group, frozen=wait)
        return lambda: writer.finish(lambda: publish_checkpoint(path, self.keep))

    def _report(self, write, step, must_succeed):
        try:
            path = write()
            print0(f"step {step:5d} | saved {path}")
        except UserError as e:
            if must_succeed:
                raise
            print0(f"warning: step {step} is not saved, training goes on: {e}")
