"""
GPT-2, and the loop that trains it, in one file.

On a laptop: make some data, train a small model on it and sample from it, all in a few minutes:
$ python train_gpt2.py --preset demo

GPT-2 (124M) on one GPU, then the same run on eight, then on eight that may be taken away at any moment:
$ python train_gpt2.py
$ torchrun --standalone --nproc_per_node=8 train_gpt2.py
$ torchrun --standalone --nproc_per_node=8 --max-restarts=3 train_gpt2.py --auto_resume

On two hosts of eight, the same line on each (the first is at 10.0.0.1); to survive the loss of one: README, Several hosts
$ torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=10.0.0.1:29500 train_gpt2.py

Stop it with Ctrl-C or SIGTERM (the step is finished and saved), and go on from where it was:
$ python train_gpt2.py --resume --checkpoint_path log/model_10000.pt

Every flag, with its default: python train_gpt2.py --help
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import hellaswag
from fineweb import (ArgumentParser, UserError, atomic_directory, atomic_write, export_tokenizer, find_tokenizer,
                     list_shards, load_tokenizer, open_shard, prepare, read_meta, run_main, tokenizer_to_dict)


def first_line(error):
    """What an exception of another library says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# -----------------------------------------------------------------------------
# the model


@dataclass
class GPTConfig:
    block_size: int = 1024  # the longest sequence it can see
    vocab_size: int = 50257  # rows of the embedding; training pads them to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # of the linear layers and layer norms; nanoGPT checkpoints may have none
    gelu: str = "tanh"  # GPT-2's approximation; "none" is the exact GELU of nanoGPT checkpoints


@dataclass
class KVCache:
    """The keys and values of a number of sequences (slots), each kept at the position of its token.

    keys, values: a tensor (slots, n_head, size, head_size) a layer; `size` is the longest sequence there is room for.
    """
    keys: list
    values: list

    def narrow(self, first, slots, size):
        """The cache of `slots` slots from `first` on, up to position `size`: a view of this one."""
        part = (slice(first, first + slots), slice(None), slice(size))
        return KVCache([k[part] for k in self.keys], [v[part] for v in self.values])

    def append(self, layer, pos, k, v):
        """Store k, v (B, nh, T, hs) in the B slots, at pos (B, T) or, where that is None, from position 0 on.

        Returns the keys and values to attend to: all there is room for, (B, nh, size, hs), or those given.
        """
        B, _, T, _ = k.size()
        keys, values = self.keys[layer], self.values[layer]
        if pos is None:
            keys[:, :, :T], values[:, :, :T] = k, v
            return k, v
        rows = torch.arange(B, device=pos.device)[:, None]  # (B, 1), pairs with pos
        keys[rows, :, pos] = k.transpose(1, 2).to(keys.dtype)
        values[rows, :, pos] = v.transpose(1, 2).to(values.dtype)
        return keys, values


class CausalSelfAttention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        # key, query, value projections for all heads, but in a batch
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, pos=None, mask=None):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(self.layer, pos, k, v)  # (B, nh, S, hs)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        y = y.to(q.dtype).transpose(1, 2).contiguous().view(B, T, C)  # re-assemble all head outputs side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=config.gelu)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, pos=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, pos, mask)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):

    # Hugging Face keeps these as Conv1D, the transpose of nn.Linear
    TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # one matrix reads tokens and predicts them
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 * n_layer of them add up on the residual stream: keep its std at 1
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, mean=0.0, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None, pos=None, mask=None):
        """The final hidden states, (B, T, n_embd), of tokens idx (B, T).

        With a KVCache of B slots, idx holds their new tokens alone and pos (B, T) the positions of these; each
        attends to whatever its slot holds at positions up to its own. Without pos the slots are filled afresh. Without a
        cache, pos and a boolean mask (B, 1, T, T) of who attends to whom allow rows of several sequences.
        """
        B, T = idx.size()
        if pos is None and T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than the model's block size {self.config.block_size}")
        if pos is not None and mask is None:  # without either attention is causal
            size = cache.keys[0].size(2)
            mask = (torch.arange(size, device=idx.device) <= pos[:, :, None])[:, None]  # (B, 1, T, size)
        where = torch.arange(T, device=idx.device) if pos is None else pos
        x = self.transformer.wte(idx) + self.transformer.wpe(where)  # (B, T, n_embd)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, cache, pos, mask)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, cache=None, pos=None):
        """Logits (B, T, vocab_size) and, where targets (B, T) are given, the mean loss in nats; targets of -1 don't count.

        With a cache only the new positions are computed: see `hidden`.
        """
        logits = self.lm_head(self.hidden(idx, cache, pos))  # (B, T, vocab_size)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def new_cache(self, slots, size=None, dtype=None):
        """A KVCache for `slots` sequences of up to `size` tokens (the block size by default) on the model's device."""
        c, w = self.config, self.lm_head.weight
        shape = (slots, c.n_head, size or c.block_size, c.n_embd // c.n_head)
        return KVCache(*([torch.zeros(shape, device=w.device, dtype=dtype or w.dtype) for _ in range(c.n_layer)]
                         for _ in range(2)))

    def flops_per_token(self):
        """Training FLOPs a token, forward and backward: 6N + 12 n_layer n_embd T (PaLM, arXiv:2204.02311, appendix B)."""
        N = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * N + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    @classmethod
    def from_pretrained(cls, name):
        """GPT-2 from the Hugging Face Hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or from a local directory."""
        return restore_model(load_checkpoint(name))

    def save_pretrained(self, directory, tokenizer=None):
        """Write a new directory from which `transformers` loads model and tokenizer, with equal logits and greedy text.

        tokenizer: by default the model's own, if it has one (`.tokenizer`); rows of the embedding past its ids are cut.
        Raises UserError where the directory can't be written, or is there already.
        """
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.utils import logging
        logging.disable_progress_bar()
        c = self.config
        tokenizer = tokenizer or getattr(self, "tokenizer", None)
        n_vocab, eot = (tokenizer.n_vocab, tokenizer.eot_token) if tokenizer else (c.vocab_size, None)
        with torch.device("meta"):  # its shapes alone: the weights are ours
            hf = GPT2LMHeadModel(GPT2Config(
                vocab_size=n_vocab, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                activation_function="gelu_new" if c.gelu == "tanh" else "gelu", bos_token_id=eot, eos_token_id=eot,
                embd_pdrop=c.dropout, resid_pdrop=c.dropout, attn_pdrop=c.dropout))
        state = {k: v.t().contiguous() if k.endswith(self.TRANSPOSED) else v for k, v in self.state_dict().items()}
        state["transformer.wte.weight"] = state["lm_head.weight"] = state["lm_head.weight"][:n_vocab]
        # transformers has no GPT-2 without biases: zeros are the same function
        state = {k: state[k] if k in state else torch.zeros(v.shape) for k, v in hf.state_dict().items()}
        hf.load_state_dict(state, assign=True)
        hf.tie_weights()
        with atomic_directory(directory) as folder:
            hf.save_pretrained(folder)
            if tokenizer:
                export_tokenizer(tokenizer, folder, c.block_size)


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, generator=None, noise=None):
    """One token id a row, (B, 1), drawn from logits (B, V) after temperature, top-k and nucleus (arXiv:1904.09751) cuts.

    temperature 0 is greedy; top_k keeps the k likeliest; top_p the smallest set of likeliest tokens whose mass reaches it.
    A row's draw is made with one number from [0, 1): that in noise (B, 1), or of the generator where there is none.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)  # likeliest first
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(descending=True)
    probs = F.softmax(logits.float() / temperature, dim=-1)
    if top_p is not None and top_p < 1:
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)  # mass before it has reached top_p
    if noise is None:
        noise = torch.rand(probs.size(0), 1, device=probs.device, generator=generator)
    mass = probs.cumsum(dim=-1)
    drawn = (mass < noise * mass[:, -1:]).sum(dim=-1, keepdim=True)  # the first whose mass reaches the share: never one of 0
    return drawn if ids is None else ids.gather(-1, drawn)


@torch.no_grad()
def generate(model, idx, max_new_tokens, n_vocab, temperature=1.0, top_k=None, top_p=None, generator=None, dtype=None):
    """Continue each row of idx (B, T) by up to max_new_tokens, as far as the block size goes; returns (B, T + new).

    Ids from n_vocab on are padding of the vocabulary and are never drawn. inference.py does more, for more than samples.
    """
    B, T = idx.size()
    end = min(T + max_new_tokens, model.config.block_size)
    cache = model.new_cache(B, end, dtype)
    new, pos = idx, None  # prefill at first, then a token a time
    while idx.size(1) < end:
        logits = model.lm_head(model.hidden(new, cache.narrow(0, B, idx.size(1)), pos)[:, -1])  # (B, vocab_size)
        new = sample_next(logits[:, :n_vocab], temperature, top_k, top_p, generator)
        idx = torch.cat((idx, new), dim=1)
        pos = torch.full((B, 1), idx.size(1) - 1, device=idx.device)
    return idx


# -----------------------------------------------------------------------------
# settings: one dataclass makes the command line, the checks, the checkpoint's copy and the README's table


def flag(default, help, low=None, high=None, choices=None):
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class TrainConfig:
    preset: str = flag("", "a named set of the flags below: demo, gpt2, gpt2-medium, ..., gpt3-small, ... (see PRESETS)")
    init_from: str = flag("scratch", "scratch, a GPT-2 name (gpt2-xl), a Hugging Face directory or a checkpoint file")
    n_layer: int = flag(12, "transformer blocks", 1)
    n_head: int = flag(12, "attention heads a block", 1)
    n_embd: int = flag(768, "width of the residual stream", 1)
    block_size: int = flag(1024, "tokens of context", 1)
    dropout: float = flag(0.0, "dropout probability", 0.0, 0.99)
    data_root: str = flag("edu_fineweb10B", "dataset directory, as fineweb.py writes it")
    shuffle: bool = flag(False, "permute the windows in the first epoch too (later ones always are)")
    total_batch_size: int = flag(524288, "tokens a step, over all processes and micro-batches", 1)
    batch_size: int = flag(64, "sequences a micro-batch and process; 0 finds the most that fit", 0)
    max_steps: int = flag(19073, "optimizer steps in all; 19073 are one epoch of 10B tokens", 1)
    warmup_steps: int = flag(715, "steps of linear warm-up, capped at max_steps", 0)
    max_lr: float = flag(6e-4, "learning rate after the warm-up", 0.0)
    min_lr: float = flag(None, "learning rate at the end of the cosine (default: max_lr / 10)", 0.0)
    optimizer: str = flag("adamw", "adamw, or muon: torch.optim.Muon for hidden matrices, AdamW for the rest",
                          choices=("adamw", "muon"))
    weight_decay: float = flag(0.1, "on tensors of two or more dimensions", 0.0)
    grad_clip: float = flag(1.0, "largest gradient norm; 0 switches clipping off", 0.0)
    eval_interval: int = flag(250, "steps between evaluations", 1)
    val_tokens: int = flag(10485760, "tokens of the val split to evaluate on", 1)
    hellaswag_examples: int = flag(10042, "HellaSwag examples an evaluation; 0 switches it off", 0)
    hellaswag_data: str = flag("", "HellaSwag jsonl file (default: download it once)")
    num_samples: int = flag(4, "samples printed at an evaluation", 0)
    sample_prompt: str = flag("Hello, I'm a language model,", "what the samples begin with")
    sample_length: int = flag(32, "tokens a sample, prompt included", 1)
    sample_temperature: float = flag(1.0, "of the samples; 0 is greedy", 0.0)
    log_dir: str = flag("log", "where checkpoints, log.txt, log.jsonl and log.png go")
    log_interval: int = flag(1, "steps between console lines (the files get every step)", 1)
    checkpoint_interval: int = flag(1000, "steps between checkpoints", 1)
    keep_checkpoints: int = flag(5, "how many of the newest checkpoints to keep; 0 keeps all", 0)
    auto_resume: bool = flag(False, "go on from the newest whole checkpoint in log_dir, or start fresh if there is none")
    resume: bool = flag(False, "go on from --checkpoint_path")
    checkpoint_path: str = flag("", "the checkpoint of --resume")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag("auto", "autocast to bfloat16 or float16, or float32; auto: what the hardware is good at",
                      choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = flag(True, "torch.compile the model for training")
    deterministic: bool = flag(False, "on CUDA, kernels whose results repeat bit for bit, somewhat slower")
    seed: int = flag(1337, "of the initial weights, the order of data and dropout", 0)
    wandb: bool = flag(False, "log to Weights & Biases as well")
    tensorboard: bool = flag(False, "log to TensorBoard as well, under log_dir")

    def __post_init__(self):
        if self.min_lr is None:
            self.min_lr = self.max_lr / 10
        for f in dataclasses.fields(self):
            value, low, high, choices = getattr(self, f.name), *(f.metadata[k] for k in ("low", "high", "choices"))
            if f.type is float and type(value) is int:
                setattr(self, f.name, float(value))
            elif type(value) is not f.type:
                raise UserError(f"--{f.name} is {value!r}: expected {f.type.__name__}")
            if choices and value not in choices:
                raise UserError(f"--{f.name} is {value!r}: choose one of {', '.join(choices)}")
            if low is not None and not value >= low or high is not None and not value <= high:  # 'not': NaN fails too
                raise UserError(f"--{f.name} is {value}: expected " + (f"{low} to {high}" if high else f"at least {low}"))
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd {self.n_embd} does not divide by --n_head {self.n_head}: make it a multiple")
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr {self.min_lr} is above --max_lr {self.max_lr}: lower it, or leave it out for a tenth")
        if self.resume and self.auto_resume:
            raise UserError("--resume and --auto_resume contradict: --resume names a checkpoint, --auto_resume finds one")
        if self.resume != bool(self.checkpoint_path):
            raise UserError("--resume and --checkpoint_path go together: give both, or --auto_resume alone")
        self.warmup_steps = min(self.warmup_steps, self.max_steps)


def shown_default(f):
    """A field's default as the README's table shows it."""
    return "" if f.default in (None, "") else f"`{f.default}`"


def _size(n_layer, n_head, n_embd, max_lr, total_batch_size, batch_size, block_size=1024):
    """A model size with its rate and batch, for 10B tokens and GPT-3's warm-up of 375M."""
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, max_lr=max_lr, total_batch_size=total_batch_size,
                batch_size=batch_size, block_size=block_size, max_steps=10 * 10**9 // total_batch_size,
                warmup_steps=375 * 10**6 // total_batch_size)


DEMO_VOCAB_SIZE = 2048

PRESETS = {
    # two to three minutes on two CPU cores; chosen by experiment, see README. Not compiled: that takes longer than it saves
    "demo": dict(n_layer=3, n_head=3, n_embd=192, block_size=128, data_root="demo_data", shuffle=True,
                 total_batch_size=2048, batch_size=16, max_steps=1000, warmup_steps=50, max_lr=8e-3, min_lr=0.0,
                 optimizer="muon", compile=False, eval_interval=250, val_tokens=131072, hellaswag_examples=0,
                 num_samples=2, sample_prompt="def", sample_length=128, sample_temperature=0.8, log_interval=50,
                 checkpoint_interval=250, keep_checkpoints=2),
    # the four sizes of GPT-2; the paper tells no rates, so GPT-3's of the nearest size
    "gpt2": _size(12, 12, 768, 6e-4, 2**19, 64),
    "gpt2-medium": _size(24, 16, 1024, 3e-4, 2**19, 32),
    "gpt2-large": _size(36, 20, 1280, 2.5e-4, 2**19, 16),
    "gpt2-xl": _size(48, 25, 1600, 2e-4, 2**20, 8),
    # GPT-3, table 2.1 of arXiv:2005.14165. Two of its rows don't multiply out: XL says 24 heads of 128 for a width of
    # 2048 (here 16), 13B says a width of 5140 for 40 heads of 128 (here 5120)
    "gpt3-small": _size(12, 12, 768, 6e-4, 2**19, 32, 2048),
    "gpt3-medium": _size(24, 16, 1024, 3e-4, 2**19, 16, 2048),
    "gpt3-large": _size(24, 16, 1536, 2.5e-4, 2**19, 8, 2048),
    "gpt3-xl": _size(24, 16, 2048, 2e-4, 2**20, 8, 2048),
    "gpt3-2.7b": _size(32, 32, 2560, 1.6e-4, 2**20, 4, 2048),
    "gpt3-6.7b": _size(32, 32, 4096, 1.2e-4, 2**21, 2, 2048),
    "gpt3-13b": _size(40, 40, 5120, 1e-4, 2**21, 1, 2048),
    "gpt3-175b": _size(96, 96, 12288, 6e-5, 3 * 2**20, 1, 2048),
}


def parse_flags(argv=None):
    """The flags that were given, over those of the preset: {name: value}. Raises UserError for one that is unknown."""
    def boolean(text):
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
        return text.lower() in ("true", "1", "yes")

    parser = ArgumentParser(__doc__, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(TrainConfig):
        if f.type is bool:
            parser.add_argument(f"--{f.name}", nargs="?", const=True, type=boolean, metavar="BOOL",
                                help=f"{f.metadata['help']} (default: {f.default})".replace("%", "%%"))
            parser.add_argument(f"--no-{f.name}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
        else:
            default = "" if f.default in (None, "") else f" (default: {f.default})"
            parser.add_argument(f"--{f.name}", type=f.type, help=(f.metadata["help"] + default).replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    name = given.get("preset", "")
    if name and name not in PRESETS:
        raise UserError(f"--preset is {name!r}: choose one of {', '.join(PRESETS)}")
    return {**PRESETS.get(name, {}), **given}


# -----------------------------------------------------------------------------
# where it runs


@dataclass(frozen=True)
class World:
    """This process among those of torchrun; alone by default."""
    rank: int = 0
    local_rank: int = 0
    size: int = 1


@contextlib.contextmanager
def distributed():
    """Join the processes that torchrun started, if it did, and leave them at the end."""
    if "RANK" not in os.environ:
        yield World()
        return
    world = World(*(int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    # NCCL for what lives on a GPU; gloo for the rest, such as the state that rank 0 reads and hands round
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield world
    dist.destroy_process_group()  # not after an error: the others may be waiting in a collective


def resolve_device(name="auto", local_rank=None):
    """The torch.device for auto, cpu, cuda, cuda:N or mps; under torchrun cuda is the one of the local rank."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps and local_rank is None else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}: expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local_rank or 0)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps is not there: this machine or this build of torch has no Metal")
    return device


def resolve_dtype(name, device):
    """The torch.dtype of autocast; auto: bfloat16 where the hardware has it, float16 on older GPUs, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def keep_freed_memory(device):
    """On a CPU have glibc's malloc keep what is freed: a step reuses gigabytes, and fresh pages cost a sixth of its time."""
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def compile_model(model, device, say, **how):
    """torch.compile(model, **how), or the model itself with a warning where a trial shows that no compiler works."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as e:  # a missing gcc, Triton or OpenMP, each with an exception of its own
        say(f"warning: torch.compile does not work here, going on without ({first_line(e)})")
        return model
    return torch.compile(model, **how)


# -----------------------------------------------------------------------------
# data: which tokens a step reads


class TokenLoader:
    """One split of a dataset as an endless stream of tokens, a pure function of (seed, position).

    The shards joined are a ring of N tokens, and an epoch is a lap round it. The stream is cut into windows of
    T = block_size tokens, each predicting the token after it; that of the ring's last token is its first, <|endoftext|>.
    The first lap is in file order, unless `shuffle`. The later ones begin at a seeded place, so that windows fall on other
    tokens each time, and visit the windows that lie whole inside the lap in a seeded permutation, shard by shard, so that
    one shard at a time is read. A window across two laps stays where it is: a lap reads each token once, whatever N and T.
    """

    def __init__(self, data_root, split, block_size, seed=0, shuffle=False):
        self.paths = list_shards(data_root, split)
        if not self.paths:
            raise UserError(f"no {split} shards in {str(data_root)!r}")
        self.block_size, self.seed, self.shuffle = block_size, seed, shuffle
        self.starts = np.cumsum([0] + [len(open_shard(path)) for path in self.paths])  # ring offset of each shard, and N
        self.n_tokens = int(self.starts[-1])
        if self.n_tokens < 2:
            raise UserError(f"the {split} split of {str(data_root)!r} has {self.n_tokens} tokens: too few to predict one")
        # few shards are mapped at a time, else resident memory would grow with the dataset
        self._shard = functools.lru_cache(2)(lambda i: open_shard(self.paths[i]))
        self._permutation = functools.lru_cache(2)(lambda n, *key: np.random.default_rng((seed, *key)).permutation(n))
        self._lap = functools.lru_cache(2)(self._lap)

    def _lap(self, lap):
        """Where a lap begins in the ring, and how it visits the shards.

        Returns (ring offset, order of the shards, windows up to the end of each in that order, first window of each); the
        shard that the lap begins in counts as two.
        """
        N, T = self.n_tokens, self.block_size
        rng = np.random.default_rng((self.seed, lap))
        begin = int(rng.integers(N)) if lap else 0
        borders = np.unique(np.concatenate(([0], (self.starts[:-1] - begin) % N, [N])))  # of the shards, from `begin` on
        first, last = -(-lap * N // T), (lap + 1) * N // T  # windows first..last-1 lie whole inside the lap
        edges = np.clip(-(-(lap * N + borders) // T), first, last)  # a window belongs to the shard it starts in
        order = rng.permutation(len(edges) - 1)
        return begin, order, np.cumsum(np.diff(edges)[order]), edges

    def _pieces(self, position, length):
        """Yield (ring offset, tokens) of what the stream reads from `position` on, cut at windows' and laps' borders."""
        N, T = self.n_tokens, self.block_size
        while length > 0:
            k, lap = position // T, position // N
            begin, order, ends, edges = self._lap(lap)
            offset = position - lap * N
            if (lap or self.shuffle) and lap * N <= k * T and (k + 1) * T <= (lap + 1) * N:
                i = int(np.searchsorted(ends, k - edges[0], side="right"))
                count = int(edges[order[i] + 1] - edges[order[i]])
                inner = self._permutation(count, lap, i)[k - edges[0] - (ends[i] - count)]
                offset += int(edges[order[i]] + inner - k) * T
            n = min((k + 1) * T - position, (lap + 1) * N - position, length)
            yield (begin + offset) % N, n
            position, length = position + n, length - n

    def _read(self, start, n):
        """n tokens from ring offset `start` on, as an int64 tensor."""
        out = np.empty(n, dtype=np.int64)
        done = 0
        while done < n:
            at = (start + done) % self.n_tokens
            i = int(np.searchsorted(self.starts, at, side="right")) - 1
            piece = self._shard(i)[at - self.starts[i]:][:n - done]
            out[done:done + len(piece)] = piece
            done += len(piece)
        return torch.from_numpy(out)

    def batches(self, position, n_tokens, batch_size, world=World()):
        """Yield this process's share of the n_tokens from `position` on, in micro-batches (x, y, tokens in it).

        x, y: (up to batch_size, block_size) int64. The tokens are cut into rows at the windows' borders, the rows dealt
        out to the processes. A row that is cut short, or begins inside a window, is padded with targets of -1. A process
        left without a row gets one of 0 tokens, so that it can take part in what follows.
        """
        T = self.block_size
        rows = []  # (position of the first token, length)
        while n_tokens > 0:
            length = min(T - position % T, n_tokens)
            rows.append((position, length))
            position, n_tokens = position + length, n_tokens - length
        mine = rows[world.rank::world.size]
        for i in range(0, max(len(mine), 1), batch_size):
            micro = mine[i:i + batch_size] or rows[:1]
            x = torch.zeros(len(micro), T, dtype=torch.int64)
            y = torch.full((len(micro), T), -1)
            for row, (p, length) in enumerate(micro):
                done = 0
                for start, n in self._pieces(p, length):
                    tokens = self._read(start, n + 1)
                    x[row, done:done + n], y[row, done:done + n] = tokens[:-1], tokens[1:]
                    done += n
            yield x, y, sum(length for _, length in micro) if mine else 0


def prefetch(steps, device):
    """Yield the lists of micro-batches that `steps` yields, moved to the device by a second thread, one step ahead."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load():
        micro_batches = list(next(steps))
        if stream is None:
            return [(x.to(device), y.to(device), n) for x, y, n in micro_batches]
        with torch.cuda.stream(stream):
            return [(x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True), n)
                    for x, y, n in micro_batches]

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(load)
        while True:
            micro_batches = ahead.result()
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)  # the copies are done before the model reads them, and
                for x, y, _ in micro_batches:  # their memory is not given to the next copies while it still does
                    x.record_stream(torch.cuda.current_stream())
                    y.record_stream(torch.cuda.current_stream())
            ahead = thread.submit(load)
            yield micro_batches


# -----------------------------------------------------------------------------
# the parts of a training step


def configure_optimizers(model, cfg, device):
    """The optimizers of a run: AdamW, and with --optimizer muon torch's Muon for the matrices inside the blocks.

    Tensors of two or more dimensions decay, biases and norms don't. Muon (https://kellerjordan.github.io/posts/muon) scales
    its updates to the size of AdamW's (arXiv:2502.16982), so that one learning rate serves both.
    """
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    hidden = {n for n, p in params.items() if cfg.optimizer == "muon" and p.dim() == 2 and n.startswith("transformer.h.")}
    rest = [p for n, p in params.items() if n not in hidden]
    groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=cfg.weight_decay),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.max_lr, betas=(0.9, 0.95), eps=1e-8,
                                    fused=device.type in ("cuda", "cpu"))]
    if hidden:
        optimizers.append(torch.optim.Muon([params[n] for n in sorted(hidden)], lr=cfg.max_lr,
                                           weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def get_lr(step, cfg):
    """The learning rate of a step: linear warm-up to max_lr, then a cosine to min_lr at max_steps."""
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    ratio = min((step - cfg.warmup_steps) / max(cfg.max_steps - cfg.warmup_steps, 1), 1.0)
    return cfg.min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (cfg.max_lr - cfg.min_lr)


def take_step(model, micro_batches, optimizers, scaler, autocast, lr, cfg, world=World()):
    """One step of the optimizers on this process's (x, y, tokens) micro-batches, at learning rate lr.

    Returns this process's share of the loss, a tensor (the shares add up to the mean over the step's tokens), and the norm
    of the whole gradient before clipping. Where that is not finite the weights stay as they are.
    """
    model.train()
    loss_sum = 0.0
    for i, (x, y, n) in enumerate(micro_batches):
        if world.size > 1:  # gradients meet after the last micro-step alone; the forward pass reads this too
            model.require_backward_grad_sync = i == len(micro_batches) - 1
        with autocast:
            _, loss = model(x, y)
        loss = loss * (n / cfg.total_batch_size)  # a token counts the same in a short micro-batch
        loss_sum = loss_sum + loss.detach()
        scaler.scale(loss * world.size).backward()  # DDP takes the mean over processes; it is the sum that is wanted
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(norm):
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return loss_sum, norm


@torch.no_grad()
def evaluate(model, loader, n_tokens, batch_size, device, autocast, world=World()):
    """Mean loss in nats a token over the first n_tokens predictions of a split, the same for any number of processes."""
    model.eval()
    n_tokens = min(n_tokens, loader.n_tokens - 1)  # not round the ring: the last token has nothing to predict
    total = torch.zeros(1, dtype=torch.float64)
    n_batches = -(-n_tokens // loader.block_size // world.size // batch_size)
    for x, y, n in tqdm(loader.batches(0, n_tokens, batch_size, world), total=n_batches, desc="validation", leave=False,
                        disable=None if world.rank == 0 else True):
        if n:
            with autocast:
                _, loss = model(x.to(device), y.to(device))
            total += loss.item() * n
    if world.size > 1:
        dist.all_reduce(total)
    return total.item() / n_tokens


def find_batch_size(model, cfg, device, autocast, world):
    """The most sequences, a power of two, whose forward and backward pass fit beside the state of AdamW."""

    def fits(B):
        if device.type == "cpu":  # nothing tells in time: count the bytes of the logits and of what the blocks keep
            c = model.config
            known = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ())  # on Linux
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 4 << 30
            return B * cfg.block_size * (10 * c.vocab_size + 80 * c.n_layer * c.n_embd) < free / 2
        try:
            state = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]  # noqa: F841
            idx = torch.zeros(B, cfg.block_size, dtype=torch.int64, device=device)
            with autocast:
                _, loss = model(idx, idx)
            loss.backward()
            return True
        except RuntimeError as e:
            if "out of memory" not in str(e):
                raise
            return False
        finally:
            model.zero_grad(set_to_none=True)

    B = 1 << max(0, (cfg.total_batch_size // (cfg.block_size * world.size)).bit_length() - 1)  # more is never needed
    while B > 1 and not fits(B):
        B //= 2
    if world.size > 1:
        smallest = torch.tensor(B)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        B = int(smallest)
    return B


# -----------------------------------------------------------------------------
# checkpoints


CHECKPOINT_VERSION = 1


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
        with torch.serialization.safe_globals([(GPTConfig, "__main__.GPTConfig"), (GPTConfig, "train_gpt2.GPTConfig")]):
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
    if isinstance(checkpoint.get("config"), GPTConfig):  # build-nanogpt
        checkpoint["config"] = asdict(checkpoint["config"])
    missing = [k for k in ("model", "config") if not isinstance(checkpoint.get(k), dict)]
    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    missing = missing or [k for k in sizes if k not in checkpoint["config"]]
    if missing:
        raise UserError(f"{str(path)!r} is no checkpoint of a GPT: it has no {' and no '.join(missing)}")
    names = {f.name for f in dataclasses.fields(GPTConfig)}
    checkpoint["config"] = {k: v for k, v in checkpoint["config"].items() if k in names}
    # the prefixes are of DDP and torch.compile
    checkpoint["model"] = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in checkpoint["model"].items()}
    checkpoint.setdefault("tokenizer", {"name": "gpt2"})
    return checkpoint


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
    state = {k: v.t() if k.endswith(GPT.TRANSPOSED) else v for k, v in hf.state_dict().items()}
    config = GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, gelu=gelu[c.activation_function])
    return {"model": state, "config": asdict(config), "tokenizer": find_tokenizer(name if Path(name).is_dir() else "gpt2")}


def find_start(flags, world):
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
            for path in list_checkpoints(flags.get("log_dir", TrainConfig.log_dir)):
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


class SkipInit(TorchFunctionMode):
    """Leaves out the random initial weights of modules made in its context: drawing GPT-2 XL's takes longer than loading."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **(kwargs or {}))


def restore_model(checkpoint, block_size=None, dropout=None):
    """The GPT of a checkpoint dict, its context cut to block_size and its dropout set where they are given."""
    config = GPTConfig(**checkpoint["config"])
    state = checkpoint["model"]
    if block_size is not None and block_size < config.block_size:
        state = {**state, "transformer.wpe.weight": state["transformer.wpe.weight"][:block_size]}
        config.block_size = block_size
    if dropout is not None:
        config.dropout = dropout
    with SkipInit():
        model = GPT(config)
    try:
        model.load_state_dict({k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))})
    except RuntimeError as e:
        raise UserError(f"the checkpoint's weights do not fit its config: {str(e).splitlines()[1].strip():.200}") from e
    return model


def check_fit(cfg, start, tokenizer):
    """Raise UserError where the settings or the dataset's tokenizer do not fit the checkpoint that a run starts from."""
    theirs = start["config"]
    for name in ("n_layer", "n_head", "n_embd"):
        if getattr(cfg, name) != theirs[name]:
            raise UserError(f"--{name} is {getattr(cfg, name)}, but the checkpoint's model has {theirs[name]}: leave it out")
    if cfg.block_size > theirs["block_size"] or "step" in start and cfg.block_size != theirs["block_size"]:
        raise UserError(f"--block_size is {cfg.block_size}, but the checkpoint's model has {theirs['block_size']}: "
                        + ("leave it out" if "step" in start else "give at most that"))
    ours, name = tokenizer_to_dict(tokenizer), start["tokenizer"]["name"]
    if any(start["tokenizer"].get(k) != v for k, v in ours.items()):
        raise UserError(f"the tokenizer of --data_root {cfg.data_root} ({tokenizer.name}, {tokenizer.n_vocab} tokens) is "
                        f"not the checkpoint's ({name}): give the dataset that goes with it, or make one of your text by "
                        f"python fineweb.py --tokenizer {'gpt2' if name == 'gpt2' else 'THE_CHECKPOINT'}")
    if "step" in start and len(start["optimizer"]) != (2 if cfg.optimizer == "muon" else 1):
        raise UserError(f"--optimizer is {cfg.optimizer}, but the checkpoint was trained with another: leave it out")


def get_rng(device):
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_rng(device, state):
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state[device.type])


# -----------------------------------------------------------------------------
# the log


class RunLog:
    """What a run leaves to look at: log.jsonl (all that is known), log.txt (step, kind, value a line) and log.png.

    A disk that is full warns once and never stops the run.
    """

    def __init__(self, cfg, step, facts):
        """Start afresh where step is None, after moving an earlier run out of the way; else go on at `step`."""
        self.dir = Path(cfg.log_dir)
        self.warned = False
        self.sinks = []
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if step is None:
                names = ("log.*", "model_*.pt", "latest_checkpoint.pt", "tensorboard")
                self._move_aside([path for name in names for path in self.dir.glob(name)])
            else:  # later checkpoints belong to a course that this run leaves, or are torn
                self._move_aside([path for path in list_checkpoints(self.dir) if int(path.stem[6:]) > step])
                self._drop_after(step)
        except OSError as e:
            raise UserError(f"--log_dir {cfg.log_dir} can't be written to: {e.strerror}") from e
        self._append("log.jsonl", json.dumps({"kind": "config" if step is None else "resume", "step": step or 0, **facts}))
        if cfg.wandb:
            run = import_optional("wandb").init(project="gpt2", dir=cfg.log_dir, config=facts["config"])
            self.sinks.append(lambda name, value, step: run.log({name: value}, step=step))
        if cfg.tensorboard:
            writer = import_optional("torch.utils.tensorboard", "tensorboard").SummaryWriter(self.dir / "tensorboard")
            self.sinks.append(writer.add_scalar)

    def _move_aside(self, paths):
        """Move what an earlier run left into the first free numbered folder beside this one: nothing is overwritten."""
        if paths:
            asides = (self.dir.with_name(f"{self.dir.name}_{i:03d}") for i in itertools.count(1))
            aside = next(path for path in asides if not path.exists())
            aside.mkdir()
            for path in paths:
                os.replace(path, aside / path.name)
            print(f"moved {len(paths)} files of an earlier run from {self.dir} to {aside}")

    def _drop_after(self, step):
        """Drop what the run wrote after its checkpoint at `step`: training step k comes after checkpoint k."""
        kept = [r for r in self._records() if r["step"] < step or r["step"] == step and r["kind"] != "train"]
        text = "".join(self._line(r) + "\n" for r in kept if r["kind"] in self.VALUE)
        atomic_write(self.dir / "log.txt", lambda f: f.write(text.encode()))
        atomic_write(self.dir / "log.jsonl", lambda f: f.write("".join(json.dumps(r) + "\n" for r in kept).encode()))

    VALUE = {"train": ("loss", ".6f"), "val": ("loss", ".4f"), "hella": ("acc_norm", ".4f")}  # what log.txt tells of each

    def _line(self, record):
        name, digits = self.VALUE[record["kind"]]
        return f"{record['step']} {record['kind']} {math.nan if record[name] is None else record[name]:{digits}}"

    def _records(self):
        path = self.dir / "log.jsonl"
        records = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):  # a crash cut it short
                records.append(json.loads(line))
        return records

    def _append(self, name, line):
        try:
            with open(self.dir / name, "a") as f:
                f.write(line + "\n")
        except OSError as e:
            if not self.warned:
                print(f"warning: {self.dir / name} can't be written to ({e.strerror}); training goes on", file=sys.stderr)
            self.warned = True

    def write(self, step, kind, **values):
        """Record the values of a kind (train, val, hella) at a step."""
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        record = {"kind": kind, "step": step, **finite}
        self._append("log.jsonl", json.dumps(record))
        self._append("log.txt", self._line(record))
        for sink in self.sinks:
            for name, value in values.items():
                if value is not None:
                    sink(f"{kind}/{name}", value, step)

    def draw(self, gpt2_tokens):
        """Redraw log.png, with the published GPT-2 and GPT-3 lines where the tokens are GPT-2's."""
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        records = self._records()

        def curve(kind):
            name, _ = self.VALUE[kind]
            points = [(r["step"], r[name]) for r in records if r["kind"] == kind and r[name] is not None]
            return [x for x, _ in points], [y for _, y in points]

        train, val, hella = map(curve, self.VALUE)
        fig, axes = plt.subplots(1, 2 if hella[0] else 1, figsize=(13 if hella[0] else 7, 4.5), squeeze=False)
        axes[0][0].plot(*train, lw=0.8, alpha=0.6, label="train")
        axes[0][0].plot(*val, marker=".", label=f"val {val[1][-1]:.4f}" if val[1] else "val")
        axes[0][0].set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
        if hella[0]:
            axes[0][1].plot(*hella, marker=".", label=f"this run {hella[1][-1]:.4f}")
            axes[0][1].set(xlabel="step", ylabel="acc_norm", title="HellaSwag")
        if gpt2_tokens:
            axes[0][0].axhline(3.2924, color="r", ls="--", lw=1, label="OpenAI GPT-2 (124M) on FineWeb-Edu val")
            if hella[0]:
                axes[0][1].axhline(0.2945, color="r", ls="--", lw=1, label="OpenAI GPT-2 (124M)")
                axes[0][1].axhline(0.337, color="g", ls="--", lw=1, label="OpenAI GPT-3 (124M)")
        for ax in axes[0]:
            ax.grid(alpha=0.3)
            ax.legend()
        fig.tight_layout()
        with contextlib.suppress(UserError):  # a full disk; the next evaluation tries again
            atomic_write(self.dir / "log.png", lambda f: fig.savefig(f, format="png", dpi=110))
        plt.close(fig)


def import_optional(module, package=None):
    import importlib
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"{module} is not installed: pip install {package or module}") from e


def git_commit():
    """The commit of this checkout, or None outside of one."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


PEAK_TFLOPS = {  # dense bf16 (float16 where there is none), from the makers' datasheets
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "A10": 125,
    "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65,
}


# -----------------------------------------------------------------------------
# the training loop


def train(cfg, start, world=World()):
    """Train as cfg says, from what find_start found (None: from scratch); returns the last validation loss."""
    master = world.rank == 0

    def say(text):
        if master:
            tqdm.write(text)

    # where it runs
    device = resolve_device(cfg.device, world.local_rank if world.size > 1 else None)
    dtype = resolve_dtype(cfg.dtype, device)
    autocast = torch.autocast(device_type=device.type, dtype=dtype, enabled=dtype != torch.float32)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    keep_freed_memory(device)
    if cfg.deterministic or device.type == "cpu":  # compiled code would add gradients of the embedding in any order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False

    # the data
    tokenizer = load_tokenizer(cfg.data_root)
    loader = TokenLoader(cfg.data_root, "train", cfg.block_size, cfg.seed, cfg.shuffle)
    val_loader = TokenLoader(cfg.data_root, "val", cfg.block_size)
    meta = read_meta(cfg.data_root)
    tokens_per_byte = meta["tokens"]["val"] / meta["bytes"]["val"] if meta.get("bytes", {}).get("val") else None
    hellaswag_examples = load_hellaswag(cfg, world, say)

    # the model; the same on every process
    torch.manual_seed(cfg.seed)
    if start is None:
        vocab_size = -(-tokenizer.n_vocab // 64) * 64  # 50257 -> 50304: matrix products like round numbers
        raw_model = GPT(GPTConfig(cfg.block_size, vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout))
    else:
        check_fit(cfg, start, tokenizer)
        raw_model = restore_model(start, cfg.block_size, cfg.dropout)
    raw_model.to(device)
    optimizers = configure_optimizers(raw_model, cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    torch.manual_seed(cfg.seed + world.rank)  # dropout differs between processes

    # where the run stands
    step, position, val_loss, val_step = 0, 0, None, None
    resumed = start is not None and "step" in start
    if resumed:
        step, position, val_loss, val_step = (start[k] for k in ("step", "position", "val_loss", "val_step"))
        for optimizer, state in zip(optimizers, start["optimizer"], strict=True):
            for saved, ours in zip(state["param_groups"], optimizer.param_groups, strict=True):
                saved.update({k: v for k, v in ours.items() if k != "params"})  # what the flags say counts
            optimizer.load_state_dict(state)
        scaler.load_state_dict(start["scaler"])
        if world.rank < len(start["rng"]):
            set_rng(device, start["rng"][world.rank])
        say(f"resuming at step {step} of {cfg.max_steps}, {position:,} tokens into the run")
    start_step = step
    if start is not None:
        start.clear()  # the caller holds it too, and a copy of the weights is not for keeping
    batch_size = cfg.batch_size or find_batch_size(raw_model, cfg, device, autocast, world)
    steps = prefetch((loader.batches(p, cfg.total_batch_size, batch_size, world)
                      for p in itertools.count(position, cfg.total_batch_size)), device)

    # the compiled, distributed model trains; the raw one shares its weights, and evaluates, samples and is saved
    model = compile_model(raw_model, device, say) if cfg.compile else raw_model
    if world.size > 1:
        model = DDP(model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    n_params = sum(p.numel() for p in raw_model.parameters())
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if name in device_name), None)
    say(f"{n_params / 1e6:.1f}M parameters on {world.size} x {device_name}, {str(dtype).removeprefix('torch.')}, "
        f"{loader.n_tokens:,} training tokens, micro-batches of {batch_size} x {cfg.block_size}, "
        f"{-(-cfg.total_batch_size // (batch_size * cfg.block_size * world.size))} a step and process")
    log = RunLog(cfg, step if resumed else None, dict(
        config=asdict(cfg), parameters=n_params, git_commit=git_commit(), torch=torch.__version__, device=device_name,
        dtype=str(dtype), world_size=world.size, batch_size=batch_size, vocab_size=raw_model.config.vocab_size,
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))) if master else None

    # a checkpoint is written while training goes on
    writer, writing = ThreadPoolExecutor(1), None

    def save(state, is_last):
        try:
            path = save_checkpoint(cfg.log_dir, state, cfg.keep_checkpoints)
            say(f"step {state['step']:5d} | saved {path}")
        except UserError as e:
            if is_last:
                raise
            say(f"warning: step {state['step']} is not saved, training goes on: {e}")

    # SIGTERM and SIGINT let the step end and save; the second one is not caught
    signals = []

    def on_signal(number, frame):
        signals.append(number)
        for s in old_handlers:
            signal.signal(s, signal.SIG_DFL)

    old_handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    stop = False
    bad_steps = 0
    bar = tqdm(total=cfg.max_steps, initial=step, desc="training", unit="step", dynamic_ncols=True,
               disable=None if master else True)

    while True:
        last_step = step == cfg.max_steps

        # once in a while evaluate, and look at what the model says
        if (step % cfg.eval_interval == 0 or last_step) and step != val_step and not stop:
            val_loss, val_step = evaluate(raw_model, val_loader, cfg.val_tokens, batch_size, device, autocast, world), step
            bpb = {"bpb": val_loss * tokens_per_byte / math.log(2)} if tokens_per_byte else {}
            say(f"step {step:5d} | validation loss: {val_loss:.4f}" + (f" | {bpb['bpb']:.4f} bits per byte" if bpb else ""))
            if master:
                log.write(step, "val", loss=val_loss, **bpb)
            if hellaswag_examples:
                scores = hellaswag.evaluate(raw_model, hellaswag_examples, tokenizer, autocast, world.rank, world.size)
                say(f"step {step:5d} | HellaSwag accuracy: {scores['acc_norm']:.4f} on {scores['examples']} examples")
                if master:
                    log.write(step, "hella", acc_norm=scores["acc_norm"], acc=scores["acc"])
            if master and step > 0:
                for text in sample(raw_model, cfg, tokenizer, device, autocast, dtype):
                    say(f"sample: {text}")
            if master:
                log.draw(gpt2_tokens=tokenizer.name == "gpt2")

        # once in a while write a checkpoint
        if step > start_step and (step % cfg.checkpoint_interval == 0 or last_step or stop):
            rng = [get_rng(device)]
            if world.size > 1:
                rng = [None] * world.size
                dist.all_gather_object(rng, get_rng(device))
            if master:
                if writing:  # one at a time: each holds a copy of the state
                    writing.result()
                writing = writer.submit(save, copy_to_host(dict(
                    version=CHECKPOINT_VERSION, model=raw_model.state_dict(), config=asdict(raw_model.config),
                    optimizer=[o.state_dict() for o in optimizers], scaler=scaler.state_dict(), rng=rng,
                    train_config=asdict(cfg), tokenizer=tokenizer_to_dict(tokenizer), step=step, position=position,
                    val_loss=val_loss, val_step=val_step)), last_step or stop)
                if last_step or stop:
                    writing.result()
        if last_step or stop:
            break

        # do one step of the optimization
        t0 = time.perf_counter()
        lr = get_lr(step, cfg)
        loss, norm = take_step(model, next(steps), optimizers, scaler, autocast, lr, cfg, world)
        stop = bool(signals)
        if world.size > 1:  # one tells of a signal, all stop at the same step
            totals = torch.stack((loss, torch.tensor(float(stop), device=device)))
            dist.all_reduce(totals)
            loss, stop = totals[0], totals[1].item() > 0
        loss = loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()  # so that the step is timed to its end
        dt = time.perf_counter() - t0
        tokens_per_second = cfg.total_batch_size / dt

        # tell of it
        mfu = tokens_per_second * raw_model.flops_per_token() / (peak * world.size) if peak else None
        bad_steps = 0 if math.isfinite(norm) else bad_steps + 1
        if bad_steps:
            say(f"step {step:5d} | warning: the gradient norm is {norm}, the update is skipped")
        if step % cfg.log_interval == 0:
            say(f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | dt: {dt * 1000:.2f}ms | "
                f"tok/sec: {tokens_per_second:.2f}" + (f" | mfu: {mfu:.2%}" if mfu else ""))
        if master:
            memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
            log.write(step, "train", loss=loss, lr=lr, norm=norm, ms=dt * 1000,
                      tokens_per_second=tokens_per_second, mfu=mfu, memory_mib=memory)
        bar.update()
        if bad_steps == 10:
            raise UserError(f"stopped at step {step}: the gradient norm was not finite ten steps in a row. Start again from "
                            "the last checkpoint with a smaller --max_lr, or look at the data")
        step += 1
        position += cfg.total_batch_size

    bar.close()
    steps.close()
    writer.shutdown()
    for s, handler in old_handlers.items():
        signal.signal(s, handler)
    say(f"stopped after {step} of {cfg.max_steps} steps; --auto_resume goes on" if stop and not last_step else
        f"done: {step} steps, {position:,} tokens" + (f", val loss {val_loss:.4f}" if val_loss is not None else ""))
    return val_loss


def load_hellaswag(cfg, world, say):
    """The HellaSwag examples of every evaluation, read by rank 0; none, with a warning, where they can't be had."""
    examples = []
    if cfg.hellaswag_examples and world.rank == 0:
        try:
            examples = hellaswag.load_examples(cfg.hellaswag_data)[:cfg.hellaswag_examples]
        except (UserError, OSError) as e:
            say(f"warning: no HellaSwag evaluation in this run: {e}")
    if world.size > 1:
        message = [examples]
        dist.broadcast_object_list(message, src=0)
        examples = message[0]
    return examples


def sample(model, cfg, tokenizer, device, autocast, dtype):
    """cfg.num_samples texts that continue cfg.sample_prompt, the same at every call for the same weights."""
    if not cfg.num_samples:
        return []
    model.eval()
    prompt = tokenizer.encode_ordinary(cfg.sample_prompt) or [tokenizer.eot_token]
    idx = torch.tensor([prompt[-cfg.block_size:]] * cfg.num_samples, device=device)
    generator = torch.Generator(device).manual_seed(42)  # its own: sampling must not change what training draws
    with autocast:
        idx = generate(model, idx, cfg.sample_length - idx.size(1), tokenizer.n_vocab, cfg.sample_temperature, top_k=50,
                       generator=generator, dtype=dtype)
    return [tokenizer.decode(row) for row in idx.tolist()]


def main():
    flags = parse_flags()
    # contradictions show before anything is read; the rest is checked when the checkpoint's settings are known
    TrainConfig(**{k: v for k, v in flags.items() if k in ("resume", "auto_resume", "checkpoint_path")})
    with distributed() as world:
        start = find_start(flags, world)
        cfg = TrainConfig(**{**(start["train_config"] if start else {}), **flags})
        if not list_shards(cfg.data_root, "train"):
            if cfg.preset != "demo" or cfg.data_root != PRESETS["demo"]["data_root"]:
                raise UserError(
                    f"no shards in {cfg.data_root!r}. Make them: python fineweb.py --data_root {cfg.data_root}\n"
                    "or see it all work on a small corpus first, in minutes: python train_gpt2.py --preset demo")
            if world.rank == 0:
                print(f"no shards in {cfg.data_root!r}: making some from the Python standard library of this interpreter")
                prepare(cfg.data_root, source="stdlib", tokenizer="bpe", vocab_size=DEMO_VOCAB_SIZE)
            if world.size > 1:
                dist.all_reduce(torch.zeros(1))  # wait for it
        try:
            train(cfg, start, world)
        except torch.OutOfMemoryError as e:
            raise UserError(f"out of memory at --batch_size {cfg.batch_size}: try half of it, or 0 to find what fits") from e


if __name__ == "__main__":
    run_main(main)
