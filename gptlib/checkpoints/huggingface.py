"""GPT-2 models from and to Hugging Face."""

from pathlib import Path

import torch

from gptlib.common import UserError, atomic_directory, first_line
from gptlib.data.tokenizer import export_tokenizer, find_tokenizer

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
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
    Raises UserError if the model can't be loaded, or if its config computes something else than
    GPT-2.
    """
    hf = load_transformers_model(directory)
    check_plain_gpt2(directory, hf.config)
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
    return {"model": state, "config": config, "tokenizer": find_tokenizer(directory)}


def load_transformers_model(directory):
    """transformers' own model, with all of its weights. Raises UserError in one line."""
    from transformers import GPT2LMHeadModel
    silence_transformers()
    try:
        hf, info = GPT2LMHeadModel.from_pretrained(directory, output_loading_info=True)
    except Exception as error:  # no weights, truncated or hostile files
        raise not_loaded(directory, error) from error
    if info["missing_keys"]:
        first_missing = sorted(info["missing_keys"])[0]
        raise UserError(f"{directory!r} is no GPT-2: its weights lack {first_missing}")
    return hf


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


def export_model(config, state, tokenizer, directory):
    """Write a new directory from which `transformers` loads model and tokenizer, with equal logits
    and greedy text.

    config: a GPTConfig; state: the model's state dict. Rows of the embedding past the tokenizer's
    ids are cut. Raises UserError if the directory can't be written, or exists already.
    """
    from transformers.utils import logging
    logging.disable_progress_bar()
    n_vocab = tokenizer.n_vocab if tokenizer else config.vocab_size
    eot = tokenizer.eot_token if tokenizer else None
    hf = empty_transformers_model(config, n_vocab, eot)
    hf.load_state_dict(to_transformers_state(state, hf, n_vocab), assign=True)
    hf.tie_weights()
    with atomic_directory(directory) as folder:
        hf.save_pretrained(folder)
        if tokenizer:
            export_tokenizer(tokenizer, folder, config.block_size)


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


def to_transformers_state(state, hf, n_vocab):
    """Our state dict with transformers' layout, its padded vocabulary cut to n_vocab."""
    ours = {}
    for key, tensor in state.items():
        ours[key] = tensor.t().contiguous() if key.endswith(TRANSPOSED) else tensor
    head = state["lm_head.weight"][:n_vocab]
    ours["transformer.wte.weight"] = ours["lm_head.weight"] = head
    # transformers has no GPT-2 without biases: zeros are the same function
    for key, tensor in hf.state_dict().items():
        if key not in ours:
            ours[key] = torch.zeros(tensor.shape)
    return {key: ours[key] for key in hf.state_dict()}
