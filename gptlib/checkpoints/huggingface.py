"""GPT-2 models from and to Hugging Face."""

import copy
import json
import os
from pathlib import Path

import torch

from gptlib.common import UserError, atomic_directory, first_line
from gptlib.data.tokenizer import export_tokenizer, find_tokenizer

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_ROWS = 50257
ROUNDING = 1e-3  # of the largest logit: by how much two programs may differ in float32
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "meta.json")
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of older GPT-2s, no weights
# Hugging Face keeps these as Conv1D, the transpose of nn.Linear
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# transformers' names of activations, and the `approximate` of torch's GELU that computes the same
GELU_OF = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "none"}


def locate_model(path):
    """The path itself; for one of GPT2_NAMES, the directory of that model in Hugging Face's cache.

    It is downloaded if it is not there. Raises UserError if that fails.
    """
    name = str(path)
    if name not in GPT2_NAMES or Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download
    silence_transformers()
    try:
        return snapshot_download(name, allow_patterns=["config.json", "model.safetensors"])
    except Exception as error:  # no network
        raise not_loaded(name, error) from error


def identity_of_hugging_face(directory):
    """Equal if two processes see the same files, on one host or on a disk that hosts share.

    Copies on separate disks differ: the files come without checksums, and to compare their
    contents one would have to read all of them.
    """
    try:
        files = [path.stat() for path in sorted(Path(directory).iterdir()) if path.is_file()]
    except OSError:
        return None  # the error is reported when the model is loaded
    return tuple((file.st_ino, file.st_size, file.st_mtime_ns) for file in files)


def load_hugging_face(directory):
    """The GPT-2 of a Hugging Face directory, as load_checkpoint returns it.

    transformers maps the files: a tensor, transposed or not, is read from disk when it is used.
    Raises UserError if the model can't be loaded, if its config computes something else than
    GPT-2, or if its files hold more than that config uses.
    """
    hf = load_transformers_model(directory)
    state = {}
    for key, tensor in hf.state_dict().items():
        state[key] = tensor.t() if key.endswith(TRANSPOSED) else tensor
    config = {
        "block_size": hf.config.n_positions,
        "vocab_size": hf.config.vocab_size,
        "n_layer": hf.config.n_layer,
        "n_head": hf.config.n_head,
        "n_embd": hf.config.n_embd,
        "gelu": GELU_OF[hf.config.activation_function],
    }
    tokenizer = tokenizer_of(directory, hf.config.vocab_size)
    return {"model": state, "config": config, "tokenizer": tokenizer}


def load_transformers_model(directory):
    """transformers' own model, with all of its weights. Raises UserError in one line."""
    from transformers import GPT2Config, GPT2LMHeadModel
    silence_transformers()
    check_files(Path(directory))
    try:
        kind = GPT2Config.get_config_dict(directory)[0].get("model_type", "gpt2")
        config = GPT2Config.from_pretrained(directory)
    except Exception as error:  # no config.json, or none that can be read
        raise not_loaded(directory, error) from error
    if kind != "gpt2":
        raise UserError(f"{directory!r} is no GPT-2: its config.json says {kind!r}")
    check_plain_gpt2(directory, config)
    check_size(directory, config)
    try:
        hf, info = GPT2LMHeadModel.from_pretrained(directory, config=config,
                                                   output_loading_info=True)
    except Exception as error:  # no weights, truncated or hostile files
        raise not_loaded(directory, error) from error
    if info["missing_keys"]:
        first_missing = sorted(info["missing_keys"])[0]
        raise UserError(f"{directory!r} is no GPT-2: its weights lack {first_missing}")
    unused = sorted(key for key in info["unexpected_keys"] if not key.endswith(MASKS))
    if unused:
        raise UserError(f"{directory!r} is not plain GPT-2: its config does not use its weights "
                        f"{unused[0]}")
    return hf


def check_files(folder):
    """Raise UserError if the folder's index names weights elsewhere, or if it holds an adapter,
    which transformers would leave out."""
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{str(folder)!r} holds an adapter (LoRA), which is not applied here: "
                        "merge it into its model first")
    for index in folder.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
            elsewhere = [name for name in names if os.path.basename(name) != name]
        except Exception as error:
            raise not_loaded(str(folder), error) from error
        if elsewhere:
            raise UserError(f"{str(index)!r} names {elsewhere[0]!r}: expected files beside it")


def check_size(directory, config):
    """Raise UserError if the model would have more weights than its files have bytes: transformers
    makes it before it reads them."""
    n_embd = config.n_embd
    n = (12 * config.n_layer * n_embd + config.vocab_size + config.n_positions) * n_embd
    files = [*Path(directory).glob("*.safetensors"), *Path(directory).glob("*.bin")]
    n_bytes = sum(file.stat().st_size for file in files)
    if files and n > n_bytes:
        raise UserError(f"{directory!r} is no GPT-2 that can be read: its config.json describes "
                        f"{n:,} weights, and its files have {n_bytes:,} bytes")


def tokenizer_of(directory, n_rows):
    """The tokenizer of a model's directory, as a dict. Without any it is taken to be GPT-2's, if
    the model has a row for each of its tokens; UserError otherwise."""
    tokenizer = find_tokenizer(directory)
    has_files = any((Path(directory) / name).exists() for name in TOKENIZER_FILES)
    if not has_files and n_rows != GPT2_ROWS:
        raise UserError(f"{directory!r} has no tokenizer, and {n_rows} rows in its embedding: "
                        f"GPT-2's has {GPT2_ROWS}. Put the model's tokenizer.json beside it")
    return tokenizer


def not_loaded(name, error):
    return UserError(f"no GPT-2 model {name!r} could be loaded: {first_line(error)}")


def silence_transformers():
    """Switch off progress bars and warnings: what matters is raised as an error."""
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check_plain_gpt2(name, config):
    """Raise UserError for an option that changes what is computed and that our model lacks."""
    allowed = {
        "activation_function": tuple(GELU_OF),
        "n_inner": (None, 4 * config.n_embd),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
    }
    for key, values in allowed.items():
        value = getattr(config, key)
        if value not in values:
            raise UserError(f"{name!r} is not plain GPT-2: its {key} is {value}, "
                            f"expected {values[0]}")


# -----------------------------------------------------------------------------
# export


def export_model(model, tokenizer, directory):
    """Write a new directory from which `transformers` loads model and tokenizer, with equal logits
    and greedy text.

    Rows of the embedding past the tokenizer's ids are cut. Raises UserError if the model computes
    something else than GPT-2, or if the directory can't be written, or exists already.
    """
    n_vocab = tokenizer.n_vocab if tokenizer else model.config.vocab_size
    eot = tokenizer.eot_token if tokenizer else None
    hf = to_transformers(model, n_vocab, eot)
    with atomic_directory(directory) as folder:
        hf.save_pretrained(folder)
        if tokenizer:
            export_tokenizer(tokenizer, folder, model.config.block_size)


def to_transformers(model, n_vocab, eot=None):
    """transformers' GPT-2 with the weights of a GPT, and equal logits.

    Raises UserError if the logits differ: the model's code was changed, and in transformers or
    llama.cpp it would be another model.
    """
    from transformers.utils import logging
    logging.disable_progress_bar()
    dtype = model.lm_head.weight.dtype
    ours = model if dtype == torch.float32 else copy.deepcopy(model).float()
    hf = empty_transformers_model(model.config, n_vocab, eot)
    state = to_transformers_state(ours.state_dict(), hf, n_vocab, model.config.bias)
    try:
        hf.load_state_dict(state, assign=True)
    except RuntimeError as error:  # a layer of another width
        reason = str(error).splitlines()[1].strip()[:200]
        raise UserError(f"cannot export the model: it is not plain GPT-2: {reason}") from error
    hf.tie_weights()
    require_same_logits(ours, hf.eval(), n_vocab)
    return hf.to(dtype)


def empty_transformers_model(config, n_vocab, eot):
    """transformers' model of the same sizes, on the meta device: shapes without memory."""
    from transformers import GPT2Config, GPT2LMHeadModel
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(
            vocab_size=n_vocab,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu_new" if config.gelu == "tanh" else "gelu",
            bos_token_id=eot,
            eos_token_id=eot,
            embd_pdrop=config.dropout,
            resid_pdrop=config.dropout,
            attn_pdrop=config.dropout,
        ))


def to_transformers_state(state, hf, n_vocab, bias):
    """Our state dict with transformers' layout, its padded vocabulary cut to n_vocab.

    Without bias, biases are zeros: transformers has no GPT-2 without them, and it is the same
    function. Raises UserError for any other difference.
    """
    ours = {}
    for key, tensor in state.items():
        ours[key] = tensor.t().contiguous() if key.endswith(TRANSPOSED) else tensor
    head = state["lm_head.weight"][:n_vocab]
    ours["transformer.wte.weight"] = ours["lm_head.weight"] = head
    theirs = hf.state_dict()
    for key, tensor in theirs.items():
        if key not in ours and key.endswith(".bias") and not bias:
            ours[key] = torch.zeros(tensor.shape, device=head.device)
    different = sorted(ours.keys() ^ theirs.keys())
    if different:
        has = "has a" if different[0] in ours else "has no"
        raise UserError(f"cannot export the model, since it is not plain GPT-2: it {has} "
                        f"{different[0]}")
    return {key: ours[key] for key in theirs}


@torch.no_grad()
def require_same_logits(model, hf, n_vocab):
    """Raise UserError unless both models have the same logits, but for rounding, for some tokens.
    """
    length = min(model.config.block_size, 64)
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(n_vocab, (2, length), generator=generator).to(model.lm_head.weight.device)
    was_training = model.training
    expected = model.eval()(idx)[0][..., :n_vocab]  # (2, T, n_vocab)
    model.train(was_training)
    if not expected.isfinite().all():
        raise UserError("cannot export the model: its logits are not finite")
    difference = (hf(idx).logits - expected).abs().max().item()
    if difference > ROUNDING * expected.abs().max().item():
        raise UserError("cannot export the model: its code computes something else than GPT-2, so "
                        f"in other programs its logits would differ by {difference:.2g}")
