"""Reads the checkpoints of four programs: this one, build-nanogpt, nanoGPT and Hugging Face."""

import dataclasses
import re
from pathlib import Path

from gptlib.checkpoints.directory import (fill_checkpoint, is_checkpoint_directory,
                                          read_checkpoint_directory)
from gptlib.checkpoints.huggingface import load_hugging_face, locate_model
from gptlib.checkpoints.saver import CHECKPOINT_VERSION, list_checkpoints
from gptlib.checkpoints.verified_file import PickledConfig, read_checkpoint_file
from gptlib.common import UserError

MODEL_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")


def load_checkpoint(path, mmap=False):
    """A checkpoint as a dict with at least model, config (a GPTConfig's fields) and tokenizer.

    Reads this repository's checkpoints, build-nanogpt's (whose config is a pickled GPTConfig),
    nanoGPT's (model_args), and Hugging Face's GPT-2: a directory or one of four names. Nothing in
    them is executed, and every record is compared with its checksum.

    With mmap a tensor is read from disk when it is used, and only the model's tensors are
    verified: inference never reads the optimizer's state. Raises UserError for anything else,
    which says what is damaged or missing.
    """
    return load_any_format(path, mmap, model_only=mmap)


def load_any_format(path, mmap, model_only):
    """load_checkpoint with two separate choices: whether the file is mapped, and whether only the
    model's tensors are verified."""
    if is_checkpoint_directory(path):
        return fill_checkpoint(load_directory(path), model_only)
    path = Path(locate_model(path))
    if path.is_dir():
        return load_hugging_face(str(path))
    if not path.is_file():
        others = ", ".join(str(other) for other in list_checkpoints(path.parent)[:5])
        raise UserError(f"no checkpoint {str(path)!r}; checkpoints beside it: {others or 'none'}")
    return normalize_checkpoint(path, read_checkpoint_file(path, mmap, model_only))


def load_directory(path, verify=True):
    """The checkpoint of a directory that `torchrun` wrote, its sharded tensors still empty."""
    return normalize_checkpoint(path, read_checkpoint_directory(path, verify))


def normalize_checkpoint(path, contents):
    """What a checkpoint holds, in this repository's format. Raises UserError, which names what is
    missing."""
    checkpoint = contents if isinstance(contents, dict) else {}
    check_version(path, checkpoint.get("version"))
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


def check_version(path, version):
    """Raise UserError if a later version of this program wrote the checkpoint."""
    if isinstance(version, int) and version > CHECKPOINT_VERSION:
        raise UserError(f"{str(path)!r} is a checkpoint of version {version}, and this program "
                        f"reads versions up to {CHECKPOINT_VERSION}: update it")


def strip_wrappers(name):
    """A parameter's name without the prefixes that DDP and torch.compile put before it."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", name)


def make_config(config_class, fields):
    """A GPTConfig, the config_class of the caller, from the "config" of a checkpoint.

    Raises UserError for a field that this code's model lacks: it would compute something else.
    """
    known = [field.name for field in dataclasses.fields(config_class)]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise UserError(f"the checkpoint's model has a setting {unknown[0]!r}, which this "
                        "program's does not have: they compute different things")
    return config_class(**fields)


def fill_model(model, state):
    """Load a state dict into a model, which may have a shorter context than the one that was saved.

    Raises UserError if the weights do not fit the model.
    """
    masks = (".attn.bias", ".attn.masked_bias")  # buffers of older GPT-2s, no weights
    state = {name: tensor for name, tensor in state.items() if not name.endswith(masks)}
    positions = "transformer.wpe.weight"
    if positions in state:
        state[positions] = state[positions][:model.config.block_size]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:200]
        raise UserError(f"the checkpoint's weights do not fit its config: {reason}") from error
