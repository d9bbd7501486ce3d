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

import dataclasses
import itertools
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from fineweb import prepare
from gptlib import scoring
from gptlib.checkpoint import CHECKPOINT_VERSION, copy_to_host, load_checkpoint, load_initial_checkpoint, save_checkpoint
from gptlib.common import ArgumentParser, UserError, print0, run_main
from gptlib.config import add_flags, check_settings, setting
from gptlib.dataset import list_shards, read_meta
from gptlib.huggingface import export_model
from gptlib.loader import TokenLoader, prefetch
from gptlib.run_log import RunLog
from gptlib.runtime import (PEAK_TFLOPS, World, compile_model, distributed, get_rng, git_commit, keep_freed_memory,
                            resolve_device, resolve_dtype, set_rng, skip_init)
from gptlib.sampling import sample_next
from gptlib.tokenizer import load_tokenizer, tokenizer_to_dict


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

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer = None  # the tiktoken.Encoding that goes with it, where it is known
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
    def from_checkpoint(cls, checkpoint, block_size=None, dropout=None):
        """The model of a dict from load_checkpoint, its context cut to block_size and its dropout set where given.

        Raises UserError where the weights do not fit the config.
        """
        known = [field.name for field in dataclasses.fields(GPTConfig)]
        config = GPTConfig(**{k: v for k, v in checkpoint["config"].items() if k in known})
        state = checkpoint["model"]
        if block_size is not None and block_size < config.block_size:
            state = {**state, "transformer.wpe.weight": state["transformer.wpe.weight"][:block_size]}
            config.block_size = block_size
        if dropout is not None:
            config.dropout = dropout
        with skip_init():
            model = cls(config)
        masks = (".attn.bias", ".attn.masked_bias")  # buffers of older GPT-2s, not weights
        try:
            model.load_state_dict({k: v for k, v in state.items() if not k.endswith(masks)})
        except RuntimeError as e:
            raise UserError(f"the checkpoint's weights do not fit its config: {str(e).splitlines()[1].strip():.200}") from e
        return model

    @classmethod
    def from_pretrained(cls, name):
        """GPT-2 from the Hugging Face Hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or from a local directory."""
        return cls.from_checkpoint(load_checkpoint(name))

    def save_pretrained(self, directory, tokenizer=None):
        """Write a new directory from which `transformers` loads model and tokenizer, with equal logits and greedy text.

        tokenizer: by default the model's own, if it has one (`.tokenizer`); rows of the embedding past its ids are cut.
        Raises UserError where the directory can't be written, or is there already.
        """
        export_model(self.config, self.state_dict(), tokenizer or self.tokenizer, directory)


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


@dataclass
class TrainConfig:
    preset: str = setting("", "a named set of the flags below: demo, gpt2, gpt2-medium, ..., gpt3-small, ... (see PRESETS)")
    init_from: str = setting("scratch", "scratch, a GPT-2 name (gpt2-xl), a Hugging Face directory or a checkpoint file")
    n_layer: int = setting(12, "transformer blocks", 1)
    n_head: int = setting(12, "attention heads a block", 1)
    n_embd: int = setting(768, "width of the residual stream", 1)
    block_size: int = setting(1024, "tokens of context", 1)
    dropout: float = setting(0.0, "dropout probability", 0.0, 0.99)
    data_root: str = setting("edu_fineweb10B", "dataset directory, as fineweb.py writes it")
    shuffle: bool = setting(False, "permute the windows in the first epoch too (later ones always are)")
    total_batch_size: int = setting(524288, "tokens a step, over all processes and micro-batches", 1)
    batch_size: int = setting(64, "sequences a micro-batch and process; 0 finds the most that fit", 0)
    max_steps: int = setting(19073, "optimizer steps in all; 19073 are one epoch of 10B tokens", 1)
    warmup_steps: int = setting(715, "steps of linear warm-up, capped at max_steps", 0)
    max_lr: float = setting(6e-4, "learning rate after the warm-up", 0.0)
    min_lr: float = setting(None, "learning rate at the end of the cosine (default: max_lr / 10)", 0.0)
    optimizer: str = setting("adamw", "adamw, or muon: torch.optim.Muon for hidden matrices, AdamW for the rest",
                          choices=("adamw", "muon"))
    weight_decay: float = setting(0.1, "on tensors of two or more dimensions", 0.0)
    grad_clip: float = setting(1.0, "largest gradient norm; 0 switches clipping off", 0.0)
    eval_interval: int = setting(250, "steps between evaluations", 1)
    val_tokens: int = setting(10485760, "tokens of the val split to evaluate on", 1)
    hellaswag_examples: int = setting(10042, "HellaSwag examples an evaluation; 0 switches it off", 0)
    hellaswag_data: str = setting("", "HellaSwag jsonl file (default: download it once)")
    num_samples: int = setting(4, "samples printed at an evaluation", 0)
    sample_prompt: str = setting("Hello, I'm a language model,", "what the samples begin with")
    sample_length: int = setting(32, "tokens a sample, prompt included", 1)
    sample_temperature: float = setting(1.0, "of the samples; 0 is greedy", 0.0)
    log_dir: str = setting("log", "where checkpoints, log.txt, log.jsonl and log.png go")
    log_interval: int = setting(1, "steps between console lines (the files get every step)", 1)
    checkpoint_interval: int = setting(1000, "steps between checkpoints", 1)
    keep_checkpoints: int = setting(5, "how many of the newest checkpoints to keep; 0 keeps all", 0)
    auto_resume: bool = setting(False, "go on from the newest whole checkpoint in log_dir, or start fresh if there is none")
    resume: bool = setting(False, "go on from --checkpoint_path")
    checkpoint_path: str = setting("", "the checkpoint of --resume")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "autocast to bfloat16 or float16, or float32; auto: what the hardware is good at",
                      choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = setting(True, "torch.compile the model for training")
    deterministic: bool = setting(False, "on CUDA, kernels whose results repeat bit for bit, somewhat slower")
    seed: int = setting(1337, "of the initial weights, the order of data and dropout", 0)
    wandb: bool = setting(False, "log to Weights & Biases as well")
    tensorboard: bool = setting(False, "log to TensorBoard as well, under log_dir")

    def __post_init__(self):
        if self.min_lr is None:
            self.min_lr = self.max_lr / 10
        check_settings(self)
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd {self.n_embd} does not divide by --n_head {self.n_head}: make it a multiple")
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr {self.min_lr} is above --max_lr {self.max_lr}: lower it, or leave it out for a tenth")
        if self.resume and self.auto_resume:
            raise UserError("--resume and --auto_resume contradict: --resume names a checkpoint, --auto_resume finds one")
        if self.resume != bool(self.checkpoint_path):
            raise UserError("--resume and --checkpoint_path go together: give both, or --auto_resume alone")
        self.warmup_steps = min(self.warmup_steps, self.max_steps)


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
    parser = ArgumentParser(__doc__)
    add_flags(parser, TrainConfig)
    given = vars(parser.parse_args(argv))
    name = given.get("preset", "")
    if name and name not in PRESETS:
        raise UserError(f"--preset is {name!r}: choose one of {', '.join(PRESETS)}")
    return {**PRESETS.get(name, {}), **given}


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


# -----------------------------------------------------------------------------
# the training loop


def train(cfg, start, world=World()):
    """Train as cfg says, from what load_initial_checkpoint found (None: from scratch); returns the last validation loss."""
    master = world.rank == 0

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
    hellaswag_examples = load_hellaswag(cfg, world)

    # the model; the same on every process
    torch.manual_seed(cfg.seed)
    if start is None:
        vocab_size = -(-tokenizer.n_vocab // 64) * 64  # 50257 -> 50304: matrix products like round numbers
        raw_model = GPT(GPTConfig(cfg.block_size, vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout))
    else:
        check_fit(cfg, start, tokenizer)
        raw_model = GPT.from_checkpoint(start, cfg.block_size, cfg.dropout)
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
        print0(f"resuming at step {step} of {cfg.max_steps}, {position:,} tokens into the run")
    start_step = step
    if start is not None:
        start.clear()  # the caller holds it too, and a copy of the weights is not for keeping
    batch_size = cfg.batch_size or find_batch_size(raw_model, cfg, device, autocast, world)
    steps = prefetch((loader.batches(p, cfg.total_batch_size, batch_size, world)
                      for p in itertools.count(position, cfg.total_batch_size)), device)

    # the compiled, distributed model trains; the raw one shares its weights, and evaluates, samples and is saved
    model = compile_model(raw_model, device) if cfg.compile else raw_model
    if world.size > 1:
        model = DDP(model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    n_params = sum(p.numel() for p in raw_model.parameters())
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if name in device_name), None)
    print0(f"{n_params / 1e6:.1f}M parameters on {world.size} x {device_name}, {str(dtype).removeprefix('torch.')}, "
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
            print0(f"step {state['step']:5d} | saved {path}")
        except UserError as e:
            if is_last:
                raise
            print0(f"warning: step {state['step']} is not saved, training goes on: {e}")

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
            shown = f" | {bpb['bpb']:.4f} bits per byte" if bpb else ""
            print0(f"step {step:5d} | validation loss: {val_loss:.4f}{shown}")
            if master:
                log.write(step, "val", loss=val_loss, **bpb)
            if hellaswag_examples:
                scores = scoring.evaluate(raw_model, hellaswag_examples, tokenizer, autocast, world.rank, world.size)
                print0(f"step {step:5d} | HellaSwag accuracy: {scores['acc_norm']:.4f} on {scores['examples']} examples")
                if master:
                    log.write(step, "hella", acc_norm=scores["acc_norm"], acc=scores["acc"])
            if master and step > 0:
                for text in sample(raw_model, cfg, tokenizer, device, autocast, dtype):
                    print0(f"sample: {text}")
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
            print0(f"step {step:5d} | warning: the gradient norm is {norm}, the update is skipped")
        if step % cfg.log_interval == 0:
            print0(f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | dt: {dt * 1000:.2f}ms | "
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
    print0(f"stopped after {step} of {cfg.max_steps} steps; --auto_resume goes on" if stop and not last_step else
        f"done: {step} steps, {position:,} tokens" + (f", val loss {val_loss:.4f}" if val_loss is not None else ""))
    return val_loss


def load_hellaswag(cfg, world):
    """The HellaSwag examples of every evaluation, read by rank 0; none, with a warning, where they can't be had."""
    examples = []
    if cfg.hellaswag_examples and world.rank == 0:
        try:
            examples = scoring.load_examples(cfg.hellaswag_data)[:cfg.hellaswag_examples]
        except (UserError, OSError) as e:
            print0(f"warning: no HellaSwag evaluation in this run: {e}")
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
        start = load_initial_checkpoint(flags, world)
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
