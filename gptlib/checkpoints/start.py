"""What a training run starts from: nothing, weights, or a checkpoint that it resumes."""

import math
import os
import sys
from dataclasses import dataclass, field, replace

import torch

from gptlib.checkpoints.directory import (identity_of_directory, is_checkpoint_directory,
                                          split_sharded)
from gptlib.checkpoints.formats import load_any_format, load_checkpoint, load_directory
from gptlib.checkpoints.huggingface import identity_of_hugging_face, locate_model
from gptlib.checkpoints.saver import list_checkpoints
from gptlib.checkpoints.verified_file import directory_identity
from gptlib.common import UserError, first_line, warn
from gptlib.data.tokenizer import tokenizer_to_dict
from gptlib.distributed import any_rank, broadcast_nest, shard_like, share_from_rank0
from gptlib.runtime import set_rng

SHAPE_FLAGS = ("n_layer", "n_head", "n_embd", "block_size")
TRAINING_STATE = {"train_config": dict, "step": int, "position": int, "optimizer": list,
                  "scaler": dict, "rng": list}
EVALUATION = {"val_loss": float, "val_step": int, "best_loss": float}  # None if there was none yet
OWN_OF_A_START = ("preset", "resume", "auto_resume", "checkpoint_path")
# settings that earlier versions had, with the defaults at which they change nothing
REMOVED_SETTINGS = {"tuning": "", "plan": False, "gpus": 1, "gpu": "", "dollars_per_hour": 0.0}
CAN_MAP = os.name == "posix"  # Windows neither replaces nor removes a file that is mapped


@dataclass
class Start:
    """What a run starts from. The default is a start from scratch.

    settings: what counts if no flag says otherwise: all of a resumed run's, the model's shape
    alone if only its weights are taken. checkpoint: model, config and tokenizer as load_checkpoint
    returns them, or None. directory: from where the ranks of a sharded run still have to read the
    tensors, which are empty until then.
    """

    settings: dict = field(default_factory=dict)
    checkpoint: dict | None = None
    directory: str | None = None
    resumed: bool = False
    step: int = 0
    position: int = 0
    val_loss: float | None = None
    val_step: int | None = None
    best_loss: float = math.inf  # the lowest validation loss of a run with --keep_best
    optimizer: list = field(default_factory=list)
    scaler: dict = field(default_factory=dict)
    rng: list = field(default_factory=list)

    def check_fit(self, tokenizer, data_root, optimizer, shard, **sizes):
        """Raise UserError if the run's settings or its dataset's tokenizer do not fit the
        checkpoint.

        optimizer, shard: the flags; sizes: n_layer, n_head, n_embd and block_size of the flags.
        """
        if self.checkpoint is None:
            return
        theirs = self.checkpoint["config"]
        for name in ("n_layer", "n_head", "n_embd"):
            if sizes[name] != theirs[name]:
                raise UserError(f"--{name} is {sizes[name]}, but the checkpoint's model has "
                                f"{theirs[name]}: leave it out")
        block_size, limit = sizes["block_size"], theirs["block_size"]
        if block_size > limit or (self.resumed and block_size != limit):
            remedy = "leave it out" if self.resumed else "give at most that"
            raise UserError(f"--block_size is {block_size}, but the checkpoint's model has "
                            f"{limit}: {remedy}")
        if shard and self.directory and block_size != limit:
            raise UserError(f"--block_size is {block_size}, but with --shard a checkpoint that is "
                            f"a directory keeps its {limit}: leave it out, or start without "
                            "--shard")
        check_same_tokenizer(data_root, tokenizer, self.checkpoint["tokenizer"])
        if self.resumed and len(self.optimizer) != (2 if optimizer == "muon" else 1):
            raise UserError(f"--optimizer is {optimizer}, but the checkpoint was trained with "
                            "another: leave it out")

    def restore(self, optimizers, scaler, device, rank):
        """Load the state of the optimizers, of the gradient scaler and of the random generators;
        after a start that resumes nothing, do nothing.

        Settings such as the learning rate are not restored: what the flags say counts. A
        checkpoint of a run without loss scaling (bfloat16, float32) has no scaler state; float16
        then begins with a fresh one. Ranks that the earlier run did not have draw their own.
        """
        if not self.resumed:
            return
        try:
            for optimizer, state in zip(optimizers, self.optimizer, strict=True):
                state = dict(state, param_groups=optimizer.state_dict()["param_groups"])
                optimizer.load_state_dict(shard_optimizer_state(state, optimizer))
            if self.directory:  # what is there now is empty
                from gptlib.checkpoints.sharded_tensors import read_tensors
                read_tensors(self.directory, named_optimizer_tensors(optimizers))
            if self.scaler:
                scaler.load_state_dict(self.scaler)
            if rank < len(self.rng):
                set_rng(device, self.rng[rank])
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a hostile or half-written state has a hundred ways to fail
            raise UserError("the checkpoint's training state cannot be restored: "
                            f"{type(error).__name__}: {first_line(error)}") from error

    def release(self):
        """Forget the tensors, which the model and the optimizers now hold."""
        self.checkpoint, self.optimizer, self.rng = None, [], []


def check_same_tokenizer(data_root, tokenizer, theirs):
    """Raise UserError if the dataset's tokenizer is not the checkpoint's, a dict of
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


# -----------------------------------------------------------------------------
# choosing


def load_start(flags, world, known):
    """The Start that the flags ask for, the same on every rank.

    flags: {name: value} of those that were given; known: the names of all settings. Rank 0 chooses
    and verifies the checkpoint. Another rank maps the same file if it sees it, and otherwise
    receives it. With --shard the tensors of a checkpoint directory stay empty (on the meta
    device): each rank reads its rows when it knows them. Raises UserError.
    """
    offer = choose_checkpoint(flags) if world.rank == 0 else None
    if world.size > 1:
        offer = share_offer(offer, world)
    if offer is None:
        return Start()
    checkpoint = offer.checkpoint
    if offer.weights_only:
        settings = {name: checkpoint["config"][name] for name in SHAPE_FLAGS}
    else:
        settings = known_settings(checkpoint["train_config"], known)
    shard = {**settings, **flags}.get("shard", False)
    if "directory" in checkpoint and not shard:
        from gptlib.checkpoints.sharded_tensors import fill_checkpoint
        fill_checkpoint(checkpoint, model_only=offer.weights_only)
    start = Start(settings, checkpoint, checkpoint.pop("directory", None))
    if not offer.weights_only:
        start.resumed = True
        for name in ("step", "position", "val_loss", "val_step", "optimizer", "scaler", "rng"):
            setattr(start, name, checkpoint.pop(name, None))
        best_loss = checkpoint.pop("best_loss", None)
        start.best_loss = math.inf if best_loss is None else best_loss
    return start


def known_settings(train_config, known):
    """The settings of a checkpoint that this version knows, without those that only say how a run
    was started. The others are left out with a warning, unless they were at their default."""
    settings = {}
    for name, value in train_config.items():
        if name in OWN_OF_A_START:
            continue
        if name in known:
            settings[name] = value
        elif name not in REMOVED_SETTINGS or REMOVED_SETTINGS[name] != value:
            warn(f"the checkpoint was trained with {name} = {value!r}, a setting that this version "
                 "does not know: it is left out")
    return settings


@dataclass
class Offer:
    """The checkpoint that rank 0 chose, and what another rank needs to recognize the same file."""

    path: str
    identity: tuple | None  # what identify() returned; None: not to be recognized
    weights_only: bool  # whether a new run starts from its weights
    is_directory: bool  # then the tensors are still to be read
    checkpoint: dict | None


def choose_checkpoint(flags):
    """The Offer that the flags ask for, or None to start from scratch. Raises UserError if it
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
    """What tells a checkpoint, file or directory, from all others; None if that is not known."""
    if is_checkpoint_directory(path):
        return identity_of_directory(path)
    if os.path.isdir(path):
        return identity_of_hugging_face(path)
    return directory_identity(path)


def load_training_state(path, verify=True):
    """The Offer of a checkpoint to be resumed, every record of it verified."""
    identity = identify(path)
    if is_checkpoint_directory(path):
        checkpoint = load_directory(path, verify)
    else:
        checkpoint = load_any_format(path, mmap=CAN_MAP, model_only=False)
    reason = wrong_training_state(checkpoint)
    if reason:
        raise UserError(f"{str(path)!r} has no training state to resume ({reason}): use it with "
                        "--init_from")
    return Offer(str(path), identity, False, "directory" in checkpoint, checkpoint)


def wrong_training_state(checkpoint):
    """What is missing or wrong in a checkpoint that is to be resumed; None if nothing is."""
    for name, kind in {**TRAINING_STATE, **EVALUATION}.items():
        value = checkpoint.get(name)
        if value is None and name in EVALUATION:
            continue
        if type(value) is not kind:
            return f"{name} is no {kind.__name__}" if name in checkpoint else f"{name} is missing"
        if kind is int and not 0 <= value < 2**62:
            return f"{name} is {value}"
    return None


def load_weights(init_from, verify=True):
    """The Offer of a model to start from: a checkpoint, a Hugging Face directory or a GPT-2
    name."""
    path = locate_model(init_from)
    identity = identify(path)
    if is_checkpoint_directory(path):
        checkpoint = load_directory(path, verify)
    else:
        checkpoint = load_checkpoint(path, mmap=CAN_MAP)
    names = ("model", "config", "tokenizer", "directory")
    checkpoint = {name: checkpoint[name] for name in names if name in checkpoint}
    return Offer(str(path), identity, True, "directory" in checkpoint, checkpoint)


# -----------------------------------------------------------------------------
# sharing


def share_offer(offer, world):
    """Rank 0's Offer, on every rank: mapped if the rank sees the identical file, else sent tensor
    by tensor."""
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
    """The checkpoint that rank 0 offers, read by this rank; None if this rank does not see the
    identical file.

    The records of a file are verified here too: with equal directories, equal checksums, that
    makes their contents equal.
    """
    if offer.identity is None or identify(offer.path) != offer.identity:
        return None
    try:
        load = load_weights if offer.weights_only else load_training_state
        # a directory is too large to be read by all: rank 0's verification counts
        return load(offer.path, verify=not offer.is_directory).checkpoint
    except UserError:
        return None
