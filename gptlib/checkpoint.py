"""Checkpoints: save whole or not at all, load those of four programs, find the one a run starts from."""

import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from gptlib.common import UserError, atomic_write, first_line
from gptlib.huggingface import load_hugging_face


CHECKPOINT_VERSION = 1


class PickledConfig:
    """Stands in for the GPTConfig that build-nanogpt pickles into its checkpoints: its fields and nothing to run."""

    NAMES = ("__main__.GPTConfig", "train_gpt2.GPTConfig")


def save_checkpoint(log_dir, state, keep):
    """Write log_dir/model_{step}.pt whole or not at all, let latest_checkpoint.pt name it, drop the oldest beyond `keep`.

    Raises UserError where that can't be done; the checkpoints that were there are intact then.
    """
    path = Path(log_dir) / f"model_{state['step']:05d}.pt"
    atomic_write(path, lambda f: torch.save(state, f))
    latest, link = path.with_name("latest_checkpoint.pt"), path.with_name("latest_checkpoint.tmp")
    try:
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(path.name)
        except OSError:  # Windows, some network drives
            shutil.copyfile(path, link)
        os.replace(link, latest)
        for old in list_checkpoints(log_dir)[keep or None:]:
            old.unlink()
    except OSError as e:
        raise UserError(f"{path} is saved, but {e.filename}: {e.strerror}") from e
    return path


def copy_to_host(state, copies=None):
    """A copy in CPU memory of a nest of dicts, lists and tensors, for a thread to write while the run changes the tensors.

    Tensors that share memory, such as the embedding and the head, share it in the copy too: copies has those made so far.
    """
    copies = {} if copies is None else copies
    if isinstance(state, dict):
        return {k: copy_to_host(v, copies) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copy_to_host(v, copies) for v in state)
    if not torch.is_tensor(state):
        return state
    key = state.device, state.data_ptr(), state.shape, state.dtype
    if key not in copies:
        copies[key] = state.detach().to("cpu", copy=True)
    return copies[key]


def list_checkpoints(log_dir):
    """Paths of the checkpoints of a run, newest first."""
    found = [p for p in Path(log_dir).glob("model_*.pt") if p.stem[6:].isdigit()]
    return sorted(found, key=lambda p: int(p.stem[6:]), reverse=True)


def load_checkpoint(path, mmap=False):
    """A checkpoint as a dict with at least model, config (a GPTConfig's fields) and tokenizer; nothing in it is run.

    With mmap a tensor is read from disk when it is used: who needs the weights alone never reads the optimizer's state.

    Reads this repository's, build-nanogpt's (whose config is a pickled GPTConfig) and nanoGPT's (model_args), and Hugging
    Face's GPT-2: a directory or one of four names. Raises UserError for anything else, with what is missing.
    """
    if str(path) in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl") or Path(path).is_dir():
        return load_hugging_face(str(path))
    path = Path(path)
    if not path.is_file():
        there = ", ".join(str(p) for p in list_checkpoints(path.parent)[:5]) or "none"
        raise UserError(f"no checkpoint {str(path)!r}; checkpoints beside it: {there}")
    try:
        with torch.serialization.safe_globals([(PickledConfig, name) for name in PickledConfig.NAMES]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True,
                                    mmap=mmap and zipfile.is_zipfile(path))
    except Exception as e:  # truncated, empty, garbage or hostile: torch has an exception of its own for each
        asks = re.search(r"GLOBAL ([\w.]+)", str(e))
        raise UserError(f"{str(path)!r} is no checkpoint that can be read: " + (
            f"it asks for {asks[1]} to be run, which is refused; tensors and plain values are read" if asks else
            "torch.save has not written it" if isinstance(e, pickle.UnpicklingError) else first_line(e))) from e
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    if isinstance(checkpoint.get("model_args"), dict):  # nanoGPT
        checkpoint["config"] = {"gelu": "none", **checkpoint["model_args"]}
    if isinstance(checkpoint.get("config"), PickledConfig):  # build-nanogpt
        checkpoint["config"] = vars(checkpoint["config"])
    missing = [k for k in ("model", "config") if not isinstance(checkpoint.get(k), dict)]
    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    missing = missing or [k for k in sizes if k not in checkpoint["config"]]
    if missing:
        raise UserError(f"{str(path)!r} is no checkpoint of a GPT: it has no {' and no '.join(missing)}")
    # the prefixes are of DDP and torch.compile
    checkpoint["model"] = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in checkpoint["model"].items()}
    checkpoint.setdefault("tokenizer", {"name": "gpt2"})
    return checkpoint


def load_initial_checkpoint(flags, world):
    """The checkpoint dict that a run starts from, or None for a fresh model. Rank 0 reads it and hands it round.

    Its "train_config" holds the settings that count where no flag says otherwise: all of them when the run is resumed
    (there is a "step" then), the model's shape alone when its weights are only the start (--init_from).
    """
    start = None
    if world.rank == 0:
        init_from = flags.get("init_from", "scratch")
        if flags.get("resume"):
            start = load_checkpoint(flags["checkpoint_path"])
            if "train_config" not in start:
                raise UserError(f"{flags['checkpoint_path']!r} has no training state to resume: use it with --init_from")
        elif flags.get("auto_resume"):
            for path in list_checkpoints(flags.get("log_dir", "log")):
                try:
                    start = load_checkpoint(path)
                    start["position"], start["optimizer"]
                    break
                except (UserError, KeyError) as e:
                    start = None
                    print(f"skipping {path}: {e}", file=sys.stderr)
        if start is not None:
            for name in ("preset", "resume", "auto_resume", "checkpoint_path"):
                start["train_config"].pop(name, None)
        elif init_from != "scratch":
            start = load_checkpoint(init_from)
            start = {k: start[k] for k in ("model", "config", "tokenizer")}
            start["train_config"] = {k: start["config"][k] for k in ("n_layer", "n_head", "n_embd", "block_size")}
    if world.size > 1:  # other hosts may not see rank 0's disk
        message = [start]
        dist.broadcast_object_list(message, src=0)
        start = message[0]
    return start
