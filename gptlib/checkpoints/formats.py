"""Checkpoints: saved completely or not at all, loaded from four programs' formats, shared between
processes."""

import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from gptlib.distributed import broadcast_nest, map_leaves
from gptlib.checkpoints.directory import (fill_checkpoint, identity_of_directory,
                                         is_checkpoint_directory, read_checkpoint_directory,
                                         remove_directory)
from gptlib.checkpoints.verified_file import PickledConfig, directory_identity, read_checkpoint_file
from gptlib.common import UserError, atomic_write
from gptlib.checkpoints.huggingface import identity_of_hugging_face, load_hugging_face, locate_model
from gptlib.training.parallel import whole
from gptlib.distributed import any_rank, share_from_rank0

CHECKPOINT_VERSION = 1
MODEL_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
SHAPE_FLAGS = ("n_layer", "n_head", "n_embd", "block_size")
TRAINING_STATE = ("train_config", "position", "optimizer")
CAN_MAP = os.name == "posix"  # Windows neither replaces nor removes a file that is mapped

# -----------------------------------------------------------------------------
# save


def save_checkpoint(log_dir, state, keep):
    """Write log_dir/model_{step}.pt completely or not at all, and return its path.

    Then latest_checkpoint.pt names it, and of the checkpoints only the newest `keep` stay (0: all
    of them). Raises UserError where that can't be done; the checkpoints that were there are intact
    then.
    """
    path = checkpoint_path(log_dir, state["step"])
    if path.is_dir():  # of an earlier course of the run
        remove_directory(path)
    atomic_write(path, lambda file: torch.save(state, file))
    publish_checkpoint(path, keep)
    return path


def checkpoint_path(log_dir, step):
    return Path(log_dir) / f"model_{step:05d}.pt"


def publish_checkpoint(path, keep):
    """Let latest_checkpoint.pt name a checkpoint that is written, and remove those beyond the
    newest `keep`."""
    try:
        update_latest(path)
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
    latest = path.with_name("latest_checkpoint.pt")
    link = path.with_name("latest_checkpoint.tmp")
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(path.name)
    except OSError:  # Windows, some network drives
        shutil.copyfile(path, link)
    os.replace(link, latest)


def list_checkpoints(log_dir):
    """Paths of the checkpoints of a run, newest first."""
    paths = [path for path in Path(log_dir).glob("model_*.pt") if path.stem[6:].isdigit()]
    return sorted(paths, key=lambda path: int(path.stem[6:]), reverse=True)


def copy_to_host(state, keep=True):
    """A copy in CPU memory of a nest of dicts, lists and tensors, to be written while training
    changes the tensors.

    Tensors that share memory, such as the embedding and the head, share it in the copy too.
    Sharded tensors are gathered one by one, so all ranks have to call it; one that does not keep
    the copy gets None in place of each tensor.
    """
    copies = {}

    def copy(leaf):
        if not torch.is_tensor(leaf):
            return leaf
        is_sharded = isinstance(leaf, DTensor)
        # The same on all ranks: a rank may have no rows, and then no address to tell by.
        key = id(leaf) if is_sharded else (leaf.device, leaf.data_ptr(), leaf.shape, leaf.dtype)
        if key not in copies:
            tensor = whole(leaf.detach())
            copies[key] = tensor.to("cpu", copy=True) if keep else None
        return copies[key]

    return map_leaves(state, copy)


# -----------------------------------------------------------------------------
# load


def load_checkpoint(path, mmap=False):
    """A checkpoint as a dict with at least model, config (a GPTConfig's fields) and tokenizer;
    nothing in it is executed.

    Reads this repository's checkpoints, build-nanogpt's (whose config is a pickled GPTConfig),
    nanoGPT's (model_args), and Hugging Face's GPT-2: a directory or one of four names. Every
    record is compared with its checksum.

    With mmap a tensor is read from disk when it is used, and only the model's tensors are
    verified: inference never reads the optimizer's state. Raises UserError for anything else, with
    what is damaged or missing.
    """
    return load_any_format(path, mmap, model_only=mmap)


def load_any_format(path, mmap, model_only):
    """load_checkpoint, where mapping the file and verifying the model's tensors alone are separate
    choices."""
    if is_checkpoint_directory(path):
        return fill_checkpoint(read_checkpoint_directory(path), model_only)
    path = Path(locate_model(path))
    if path.is_dir():
        return load_hugging_face(str(path))
    if not path.is_file():
        others = ", ".join(str(other) for other in list_checkpoints(path.parent)[:5])
        raise UserError(f"no checkpoint {str(path)!r}; checkpoints beside it: {others or 'none'}")
    return normalize_checkpoint(path, read_checkpoint_file(path, mmap, model_only))


def normalize_checkpoint(path, contents):
    """What a checkpoint file holds, in this repository's format. Raises UserError naming what is
    missing."""
    checkpoint = contents if isinstance(contents, dict) else {}
    if isinstance(checkpoint.get("model_args"), dict):  # nanoGPT
        checkpoint["config"] = {"gelu": "none", **checkpoint["model_args"]}
    if isinstance(checkpoint.get("config"), PickledConfig):  # build-nanogpt
        checkpoint["config"] = vars(checkpoint["config"])

    missing = [key for key in ("model", "config") if not isinstance(checkpoint.get(key), dict)]
    if not missing:
        missing = [name for name in MODEL_SIZES if name not in checkpoint["config"]]
    if missing:
        names = " and no ".join(missing)
        raise UserError(f"{str(path)!r} is no checkpoint of a GPT: it has no {names}")

    model = checkpoint["model"].items()
    checkpoint["model"] = {strip_wrappers(name): tensor for name, tensor in model}
    checkpoint.setdefault("tokenizer", {"name": "gpt2"})
    return checkpoint


def strip_wrappers(name):
    """A parameter's name without the prefixes that DDP and torch.compile put before it."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", name)


# -----------------------------------------------------------------------------
# the checkpoint that a run starts from


def load_initial_checkpoint(flags, world):
    """The checkpoint dict that a run starts from, or None for a fresh model; the same on every
    rank.

    Its "train_config" holds the settings that count where no flag says otherwise: all of them when
    the run is resumed (there is a "step" then), the model's shape alone when its weights are only
    the start (--init_from).

    Rank 0 chooses and verifies it. Other ranks map the same file where they see it, and otherwise
    receive it. Of a checkpoint directory a run with --shard gets empty tensors (on the meta
    device): each rank reads its rows when it knows them.
    """
    offer = choose_initial_checkpoint(flags) if world.rank == 0 else None
    if world.size > 1:
        offer = share_offer(offer, world)
    if offer is None:
        return None
    checkpoint = offer.checkpoint
    if offer.weights_only:
        config = checkpoint["config"]
        checkpoint["train_config"] = {name: config[name] for name in SHAPE_FLAGS}
    else:
        for name in ("preset", "resume", "auto_resume", "checkpoint_path"):
            checkpoint["train_config"].pop(name, None)
    shard = {**checkpoint["train_config"], **flags}.get("shard", False)
    if "directory" in checkpoint and not shard:
        fill_checkpoint(checkpoint, model_only=offer.weights_only)
    return checkpoint


@dataclass
class Offer:
    """The checkpoint that rank 0 chose, and what another rank needs to recognize the same file."""

    path: str
    identity: tuple | None  # of identify(); None where the files can't be recognized
    weights_only: bool  # only the start of a new run, not resumed
    is_directory: bool  # a directory, whose tensors are still to be read
    checkpoint: dict | None


def choose_initial_checkpoint(flags):
    """The Offer that the flags ask for, or None to start from scratch. Raises UserError where it
    can't be loaded."""
    if flags.get("resume"):
        return load_training_state(flags["checkpoint_path"])
    if flags.get("auto_resume"):
        for path in list_checkpoints(flags.get("log_dir", "log")):
            try:
                return load_training_state(path)
            except UserError as error:
                print(f"skipping {path}: {error}", file=sys.stderr)
    init_from = flags.get("init_from", "scratch")
    return None if init_from == "scratch" else load_weights(init_from)


def identify(path):
    """What tells a checkpoint, file or directory, from all others; None where that is not known.
    """
    if is_checkpoint_directory(path):
        return identity_of_directory(path)
    if Path(path).is_dir():
        return identity_of_hugging_face(path)
    return directory_identity(path)


def load_training_state(path, verify=True):
    """The Offer of a checkpoint to be resumed, every record of it verified."""
    identity = identify(path)
    if is_checkpoint_directory(path):
        checkpoint = read_checkpoint_directory(path, verify)
    else:
        checkpoint = load_any_format(path, mmap=CAN_MAP, model_only=False)
    for name in TRAINING_STATE:
        if name not in checkpoint:
            raise UserError(f"{str(path)!r} has no training state to resume ({name} is missing): "
                            "use it with --init_from")
    return Offer(str(path), identity, False, "directory" in checkpoint, checkpoint)


def load_weights(init_from, verify=True):
    """The Offer of a model to start from: a checkpoint file, a Hugging Face directory or a GPT-2
    name."""
    path = locate_model(init_from)
    identity = identify(path)
    if is_checkpoint_directory(path):
        checkpoint = read_checkpoint_directory(path, verify)
    else:
        checkpoint = load_checkpoint(path, mmap=CAN_MAP)
    names = ("model", "config", "tokenizer", "directory")
    checkpoint = {name: checkpoint[name] for name in names if name in checkpoint}
    return Offer(str(path), identity, True, "directory" in checkpoint, checkpoint)


def share_offer(offer, world):
    """Rank 0's Offer, on every rank: mapped where the rank sees the identical file, else sent
    tensor by tensor."""
    shared = share_from_rank0(offer and replace(offer, checkpoint=None), world)
    if shared is None:
        return None
    if world.rank > 0:
        offer = shared
        offer.checkpoint = load_identical(offer)

    has_loaded = offer.checkpoint is not None
    if any_rank(not has_loaded, world):  # other hosts may not see rank 0's disk
        if offer.is_directory:
            raise UserError(f"every process has to see the checkpoint {offer.path}, and not all "
                            "do: put --log_dir on a disk that all hosts share")
        offer.checkpoint = broadcast_nest(offer.checkpoint, world.rank, keep_own=has_loaded)
    return offer


def load_identical(offer):
    """The checkpoint that rank 0 offers, read by this rank; None where this rank does not see the
    identical file.

    The records of a file are verified here too: with equal directories, equal checksums, that
    makes their contents equal.
    """
    if offer.identity is None or identify(offer.path) != offer.identity:
        return None
    try:
        load = load_weights if offer.weights_only else load_training_state
        # of a directory, too large to be read by all, rank 0's verification counts
        return load(offer.path, verify=not offer.is_directory).checkpoint
    except UserError:
        return None
