"""Reads the checkpoints of four programs: this one, build-nanogpt, nanoGPT and Hugging Face."""

import contextlib
import dataclasses
import re
from pathlib import Path

import torch

from gptlib.checkpoints.directory import is_checkpoint_directory, read_checkpoint_directory
from gptlib.checkpoints.huggingface import MASKS, load_hugging_face, locate_model
from gptlib.checkpoints.saver import CHECKPOINT_VERSION, list_checkpoints
from gptlib.checkpoints.verified_file import PickledConfig, read_checkpoint_file
from gptlib.common import UserError, first_line
from gptlib.runtime import skip_init

LONGEST_CONTEXT = 2**16  # tokens: a step of a longer one takes minutes, and can't be interrupted
MODEL_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
TIED = ("transformer.wte.weight", "lm_head.weight")


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
        from gptlib.checkpoints.sharded_tensors import fill_checkpoint
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
    missing or of another kind."""
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
    checkpoint.setdefault("tokenizer", {"name": "gpt2"})

    try:
        check_tokenizer(checkpoint["tokenizer"])
        train_config = checkpoint.get("train_config", {})
        require(isinstance(train_config, dict), "its train_config is no dict")
        require(isinstance(train_config.get("sample_prompt", ""), str),
                "its sample_prompt is no text")
        require(type(checkpoint.get("step", 0)) is int, "its step is no whole number")
        checkpoint["model"] = model_weights(checkpoint["model"])
        check_config(checkpoint["config"], len(checkpoint["model"]))
        check_memory(checkpoint["model"])
    except NotUsable as reason:
        raise UserError(f"{str(path)!r} is no checkpoint of a GPT: {reason}") from reason
    return checkpoint


def check_version(path, version):
    """Raise UserError if a later version of this program wrote the checkpoint."""
    if isinstance(version, int) and version > CHECKPOINT_VERSION:
        raise UserError(f"{str(path)!r} is a checkpoint of version {version}, and this program "
                        f"reads versions up to {CHECKPOINT_VERSION}: update it")


# -----------------------------------------------------------------------------
# what a file may hold: anybody can have written it


class NotUsable(Exception):
    """Why a file is no checkpoint of a GPT."""


def require(condition, reason):
    if not condition:
        raise NotUsable(reason)


def check_config(config, n_weights):
    """Raise NotUsable for a value that no model can be made of."""
    for name in MODEL_SIZES:
        value = config[name]
        is_size = type(value) is int and value > 0
        require(is_size, f"its {name} is {value!r}, expected a whole number above 0")
    context = config["block_size"]
    require(context <= LONGEST_CONTEXT,
            f"its block_size is {context}, expected at most {LONGEST_CONTEXT}")
    n_layer, n_head, n_embd = config["n_layer"], config["n_head"], config["n_embd"]
    require(n_embd % n_head == 0, f"its n_embd, {n_embd}, does not divide by its n_head, {n_head}")
    require(n_layer < n_weights, f"its n_layer is {n_layer}, and it has {n_weights} weights")
    dropout = config.get("dropout", 0.0)
    require(isinstance(dropout, (int, float)) and 0 <= dropout < 1, f"its dropout is {dropout!r}")
    require(isinstance(config.get("bias", True), bool), f"its bias is {config.get('bias')!r}")
    gelu = config.get("gelu", "tanh")
    require(gelu in ("tanh", "none"), f"its gelu is {gelu!r}, expected tanh or none")


def check_tokenizer(spec):
    """Raise NotUsable unless this is a dict as tokenizer_to_dict makes it."""
    is_spec = isinstance(spec, dict) and isinstance(spec.get("name"), str)
    require(is_spec and isinstance(spec.get("ranks", b""), bytes), "its tokenizer is no tokenizer")


def model_weights(model):
    """{parameter's name without the prefixes of DDP and torch.compile: tensor}, without the masks
    of older GPT-2s. Raises NotUsable for what is no weight."""
    weights = {}
    for name, tensor in model.items():
        name = re.sub(r"^(module\.|_orig_mod\.)+", "", str(name))
        if name.endswith(MASKS):
            continue
        require(torch.is_tensor(tensor), f"its {name} is no tensor")
        is_dense = tensor.layout is torch.strided
        require(is_dense and tensor.is_floating_point(), f"its {name} is of {tensor.dtype}, "
                f"{str(tensor.layout).removeprefix('torch.')}: expected floating point, strided")
        weights[name] = tensor
    return weights


def check_memory(weights):
    """Raise NotUsable if the weights take more memory than the file has bytes for them.

    A tensor with a stride of 0 repeats a few bytes without end, and a file can give one tensor
    under a thousand names. Only the embedding and the head may be one.
    """
    needed, stored = {}, {}
    for name, tensor in weights.items():
        if tensor.is_meta:  # of a checkpoint directory, which has its own check
            continue
        storage = tensor.untyped_storage()
        kind = (storage.data_ptr(), tensor.shape) if name in TIED else name
        needed[kind] = tensor.numel() * tensor.element_size()
        stored[storage.data_ptr()] = storage.nbytes()
    available = sum(stored.values())
    require(sum(needed.values()) <= available,
            f"its weights would take {sum(needed.values()):,} bytes, and it holds {available:,}")


# -----------------------------------------------------------------------------
# the model


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


@contextlib.contextmanager
def without_weights():
    """A context in which a model is made whose weights are loaded next. Raises UserError if there
    is no memory for it."""
    try:
        with skip_init():
            yield
    except RuntimeError as error:
        raise UserError("there is no memory for a model of the sizes in the checkpoint's config: "
                        f"{first_line(error)}") from error


@torch.no_grad()
def fill_model(model, state, saved_context):
    """Load a state dict into a model, which may have a shorter context than the one that was saved.

    Of a parameter with two names, such as the embedding and the head, one name is enough. Raises
    UserError if the weights do not fit the model, if the two names have different weights, or if a
    weight is not finite.
    """
    state = dict(state)
    positions = "transformer.wpe.weight"
    if positions in state and len(state[positions]) == saved_context:
        state[positions] = state[positions][:model.config.block_size]
    fill_tied(model, state)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:200]
        raise UserError(f"the checkpoint's weights do not fit its config: {reason}") from error
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not parameter.sum(dtype=torch.float32).isfinite():
            raise UserError(f"the checkpoint's {name} has values that are not finite: its training "
                            "has failed, take an earlier checkpoint")


def fill_tied(model, state):
    """Give each name of a parameter that has several its tensor. Raises UserError if they differ:
    the model would compute with the last one alone."""
    names_of = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    for names in names_of.values():
        given = [name for name in names if name in state]
        for other in given[1:]:
            if not is_same(state[given[0]], state[other]):
                raise UserError(f"the checkpoint's {given[0]} and {other} differ: this model has "
                                "one matrix for both, and would compute something else")
        if given:
            state.update({name: state[given[0]] for name in names})


def is_same(a, b):
    """Whether two tensors are one or have equal values; on the meta device, whether they are one.
    """
    def place(tensor):
        storage = tensor.untyped_storage()._cdata
        return storage, tensor.storage_offset(), tensor.shape, tensor.stride()

    if place(a) == place(b):
        return True
    return not a.is_meta and not b.is_meta and torch.equal(a, b)
