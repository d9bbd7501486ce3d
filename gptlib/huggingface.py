"""GPT-2 models from and to Hugging Face."""

from pathlib import Path

import torch

from gptlib.common import UserError, atomic_directory, first_line
from gptlib.tokenizer import export_tokenizer, find_tokenizer

# Hugging Face keeps these as Conv1D, the transpose of nn.Linear
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load_hugging_face(name):
    """GPT-2 from the Hugging Face Hub or from a local directory, as load_checkpoint returns it."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging
    logging.disable_progress_bar()  # what is wrong is told below, in a line
    logging.set_verbosity_error()
    try:
        hf, info = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    except Exception as e:  # no network, no weights, torn or hostile files
        raise UserError(f"no GPT-2 model {name!r} could be loaded: {first_line(e)}") from e
    if info["missing_keys"]:
        raise UserError(f"{name!r} is no GPT-2: its weights lack {sorted(info['missing_keys'])[0]}")
    c = hf.config
    gelu = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "none"}
    plain = {"activation_function": tuple(gelu), "n_inner": (None, 4 * c.n_embd), "layer_norm_epsilon": (1e-5,),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "tie_word_embeddings": (True,),
             "add_cross_attention": (False,)}
    for k, expected in plain.items():
        if getattr(c, k) not in expected:
            raise UserError(f"{name!r} is not plain GPT-2: its {k} is {getattr(c, k)}, expected {expected[0]}")
    state = {k: v.t() if k.endswith(TRANSPOSED) else v for k, v in hf.state_dict().items()}
    config = {"block_size": c.n_positions, "vocab_size": c.vocab_size, "n_layer": c.n_layer, "n_head": c.n_head,
              "n_embd": c.n_embd, "gelu": gelu[c.activation_function]}
    return {"model": state, "config": config, "tokenizer": find_tokenizer(name if Path(name).is_dir() else "gpt2")}


def export_model(config, state, tokenizer, directory):
    """Write a new directory from which `transformers` loads model and tokenizer, with equal logits and greedy text.

    config: a GPTConfig; state: the model's state dict; rows of the embedding past the tokenizer's ids are cut. Raises
    UserError where the directory can't be written, or is there already.
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging
    logging.disable_progress_bar()
    n_vocab, eot = (tokenizer.n_vocab, tokenizer.eot_token) if tokenizer else (config.vocab_size, None)
    with torch.device("meta"):  # its shapes alone: the weights are ours
        hf = GPT2LMHeadModel(GPT2Config(
            vocab_size=n_vocab, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
            n_head=config.n_head, activation_function="gelu_new" if config.gelu == "tanh" else "gelu", bos_token_id=eot,
            eos_token_id=eot, embd_pdrop=config.dropout, resid_pdrop=config.dropout, attn_pdrop=config.dropout))
    state = {k: v.t().contiguous() if k.endswith(TRANSPOSED) else v for k, v in state.items()}
    state["transformer.wte.weight"] = state["lm_head.weight"] = state["lm_head.weight"][:n_vocab]
    # transformers has no GPT-2 without biases: zeros are the same function
    state = {k: state[k] if k in state else torch.zeros(v.shape) for k, v in hf.state_dict().items()}
    hf.load_state_dict(state, assign=True)
    hf.tie_weights()
    with atomic_directory(directory) as folder:
        hf.save_pretrained(folder)
        if tokenizer:
            export_tokenizer(tokenizer, folder, config.block_size)
