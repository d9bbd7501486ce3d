"""
GPT-2, and the loop that trains it, in one file.

On a laptop: make some data, train a small model on it and sample from it, all in a few minutes:
$ python train_gpt2.py --preset demo

GPT-2 (124M) on one GPU, then the same run on eight, then on eight that may be taken away:
$ python train_gpt2.py
$ torchrun --standalone --nproc_per_node=8 train_gpt2.py
$ torchrun --standalone --nproc_per_node=8 --max-restarts=3 train_gpt2.py --auto_resume

On two hosts with eight GPUs each, the same line on both (10.0.0.1 is the first; docs/hosts.md):
$ torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=10.0.0.1:29500 \\
    train_gpt2.py

Stop it with Ctrl-C or SIGTERM (the last complete step is saved), and go on from there:
$ python train_gpt2.py --resume --checkpoint_path log/model_10000.pt

Every flag, with its default: python train_gpt2.py --help
"""

import contextlib
import dataclasses
import itertools
import math
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

from fineweb import prepare
from gptlib.training import scoring
from gptlib.training.batch_size import choose_batch_size, memory_errors_told
from gptlib.checkpoints.formats import load_checkpoint
from gptlib.common import ArgumentParser, UserError, print0, run_main
from gptlib.config import add_flags, check_settings, setting
from gptlib.data.shards import list_shards
from gptlib.data.dev_split import open_splits
from gptlib.checkpoints.huggingface import export_model
from gptlib.data.loader import prefetch
from gptlib.lock import lock_directory
from gptlib.training.optim import Muon
from gptlib.training.parallel import (Evaluation, clip_gradients, create_on, set_gradient_sync, train_with)
from gptlib.training.plan import print_plan
from gptlib.training.presets import DEMO_VOCAB_SIZE, PRESETS, default_max_lr, preset_settings
from gptlib.training.console import Reporter, describe_run, print_run
from gptlib.checkpoints.saver import Saver
from gptlib.checkpoints.start import Start, load_start
from gptlib.runtime import (StopSignal, World, any_rank, distributed, gather_rng, get_rng,
                            nondeterministic_algorithms, prepare_attention, prepare_device,
                            resolve_device, resolve_dtype, set_rng, skip_init,
                            without_cudnn_attention)
from gptlib.inference.sampling import sample_next
from gptlib.training.step_log import StepLog, update_if_finite
from gptlib.data.tokenizer import load_tokenizer, tokenizer_to_dict
from gptlib.tuning import parse_tuning
from gptlib.training.evaluation import evaluate, validation_loss

# -----------------------------------------------------------------------------
# the model


@dataclass
class GPTConfig:
    block_size: int = 1024  # the longest sequence that the model can read
    vocab_size: int = 50257  # rows of the embedding; training pads them to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and layer norms; nanoGPT's checkpoints may have none
    gelu: str = "tanh"  # GPT-2's approximation; "none" is the exact GELU of nanoGPT's checkpoints


@dataclass
class KVCache:
    """Keys and values of several sequences, one slot each, stored at the position of their token.

    keys, values: for each layer a tensor (slots, n_head, size, head_size); `size` is the longest
    sequence that fits.
    """
    keys: list
    values: list

    def narrow(self, first, slots, size):
        """A view of this cache: `slots` slots from `first` on, up to position `size`."""
        part = (slice(first, first + slots), slice(None), slice(size))
        return KVCache([k[part] for k in self.keys], [v[part] for v in self.values])

    def append(self, layer, pos, k, v):
        """Store k, v (B, nh, T, hs) in the B slots, at pos (B, T) or, where it is None, from 0 on.

        Returns the keys and values to attend to: with pos all that the cache holds,
        (B, nh, size, hs); without it k and v themselves.
        """
        B, _, T, _ = k.size()
        keys, values = self.keys[layer], self.values[layer]
        if pos is None:
            keys[:, :, :T], values[:, :, :T] = k, v
            return k, v
        rows = torch.arange(B, device=pos.device)[:, None]  # (B, 1), pairs with pos (B, T)
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
        y = self.attend(q.to(k.dtype), k, v, mask)
        # re-assemble all head outputs side by side
        y = y.to(q.dtype).transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q, k, v, mask):
        """What queries (B, nh, T, hs) find in S keys and values (B, nh, S, hs): (B, nh, T, hs)."""
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0)


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
        self.tokenizer = None  # the tiktoken.Encoding of its token ids, where that is known
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # weight tying: one matrix reads the tokens and predicts them
        self.transformer.wte.weight = self.lm_head.weight
        self._init_weights()

    def _init_weights(self):
        # every block adds to the residual stream twice: smaller projections keep its std at 1
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=residual_std)
            elif p.dim() == 2:
                nn.init.normal_(p, mean=0.0, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None, pos=None, mask=None):
        """The final hidden states, (B, T, n_embd), of tokens idx (B, T).

        With a KVCache of B slots, idx holds only their new tokens, and pos (B, T) the positions of
        these; each token attends to what its slot holds up to that position. Without pos the slots
        are filled from 0 on. Without a cache, pos and a boolean mask (B, 1, T, T) of which token
        attends to which allow rows that hold several sequences.
        """
        B, T = idx.size()
        limit = self.config.block_size
        if pos is None and T > limit:
            raise ValueError(f"a sequence of {T} tokens is longer than the model's block size "
                             f"{limit}")
        if pos is not None and mask is None:  # without either, attention is causal
            S = cache.keys[0].size(2)
            mask = (torch.arange(S, device=idx.device) <= pos[:, :, None])[:, None]  # (B, 1, T, S)
        if pos is None:
            pos_emb = self.transformer.wpe(torch.arange(T, device=idx.device))  # (T, n_embd)
        else:
            pos_emb = self.transformer.wpe(pos)  # (B, T, n_embd)
        x = self.transformer.drop(self.transformer.wte(idx) + pos_emb)  # (B, T, n_embd)
        for block in self.transformer.h:
            x = block(x, cache, pos, mask)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, cache=None, pos=None, return_logits=True):
        """Logits (B, T, vocab_size) and, with targets (B, T), the mean loss in nats.

        Targets of -1 don't count. With a cache only the new positions are computed, see `hidden`.
        Training asks for the loss alone: logits that are returned get a gradient too, of zeros, as
        large as themselves.
        """
        logits = self.lm_head(self.hidden(idx, cache, pos))  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        flat = logits.view(-1, logits.size(-1))
        loss = F.cross_entropy(flat, targets.reshape(-1), ignore_index=-1)
        return (logits if return_logits else None), loss

    def new_cache(self, slots, size=None, dtype=None):
        """A KVCache for `slots` sequences of up to `size` tokens (default: the block size)."""
        c, w = self.config, self.lm_head.weight
        shape = (slots, c.n_head, size or c.block_size, c.n_embd // c.n_head)

        def zeros():
            return [torch.zeros(shape, device=w.device, dtype=dtype or w.dtype)
                    for _ in range(c.n_layer)]

        return KVCache(keys=zeros(), values=zeros())

    def flops_per_token(self):
        """FLOPs of training on one token: 6N + 12 n_layer n_embd T.

        That is the formula of PaLM (arXiv:2204.02311, appendix B), for the whole block size. N
        leaves out the position embedding, which is looked up and never multiplied.
        """
        c = self.config
        N = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * N + 12 * c.n_layer * c.n_embd * c.block_size

    @classmethod
    def from_checkpoint(cls, checkpoint, block_size=None, dropout=None):
        """The model of a dict from load_checkpoint; a shorter block_size cuts its context.

        Raises UserError where the weights do not fit the config.
        """
        known = [field.name for field in dataclasses.fields(GPTConfig)]
        unknown = [name for name in checkpoint["config"] if name not in known]
        if unknown:
            raise UserError(f"the checkpoint's model has a setting {unknown[0]!r}, which this "
                            "program's does not have: they compute different things")
        config = GPTConfig(**checkpoint["config"])
        masks = (".attn.bias", ".attn.masked_bias")  # buffers of older GPT-2s, no weights
        state = {k: v for k, v in checkpoint["model"].items() if not k.endswith(masks)}
        if block_size is not None and block_size < config.block_size:
            config.block_size = block_size
            wpe = "transformer.wpe.weight"
            state[wpe] = state[wpe][:block_size]
        if dropout is not None:
            config.dropout = dropout
        with skip_init():
            model = cls(config)
        try:
            model.load_state_dict(state)
        except RuntimeError as e:
            reason = str(e).splitlines()[1].strip()[:200]
            raise UserError(f"the checkpoint's weights do not fit its config: {reason}") from e
        return model

    @classmethod
    def from_pretrained(cls, name):
        """GPT-2 of the Hugging Face Hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a directory."""
        return cls.from_checkpoint(load_checkpoint(name))

    def save_pretrained(self, directory, tokenizer=None):
        """Write a new directory from which `transformers` loads the model with equal logits.

        tokenizer: default `self.tokenizer`; rows of the embedding past its ids are left out.
        Raises UserError where the directory exists already or can't be written.
        """
        export_model(self.config, self.state_dict(), tokenizer or self.tokenizer, directory)


@torch.no_grad()
def generate(model, idx, max_new_tokens, n_vocab, temperature=1.0, top_k=None, top_p=None,
             generator=None, dtype=None):
    """Continue each row of idx (B, T) by up to max_new_tokens; returns (B, T + new).

    It ends at the block size. Ids from n_vocab on are padding of the vocabulary and are never
    drawn. The engine behind inference.py does the same for many sequences of any length.
    """
    B, T = idx.size()
    end = min(T + max_new_tokens, model.config.block_size)
    cache = model.new_cache(B, end, dtype)
    new, pos = idx, None  # the whole prompt at first (prefill), then one token at a time
    while idx.size(1) < end:
        x = model.hidden(new, cache.narrow(0, B, idx.size(1)), pos)  # (B, T or 1, n_embd)
        logits = model.lm_head(x[:, -1])  # (B, vocab_size)
        new = sample_next(logits[:, :n_vocab], temperature, top_k, top_p, generator)  # (B, 1)
        idx = torch.cat((idx, new), dim=1)
        pos = torch.full((B, 1), idx.size(1) - 1, device=idx.device)
    return idx


# -----------------------------------------------------------------------------
# settings: one dataclass makes the command line, the checks, the checkpoint's copy, docs/flags.md


@dataclass
class TrainConfig:
    preset: str = setting("", "a named set of the flags below, such as demo, gpt2 or gpt3-small")
    init_from: str = setting("scratch", "scratch, a GPT-2 name, a Hugging Face directory or a "
                             "checkpoint file")
    n_layer: int = setting(12, "transformer blocks", 1)
    n_head: int = setting(12, "attention heads in each block", 1)
    n_embd: int = setting(768, "width of the residual stream", 1)
    block_size: int = setting(1024, "tokens of context", 1)
    dropout: float = setting(0.0, "dropout probability", 0.0, 0.99)
    data_root: str = setting("edu_fineweb10B", "dataset directory, as fineweb.py writes it")
    dev: bool = setting(False, "hold the end of the training text out, and evaluate on it")
    shuffle: bool = setting(False, "permute the windows in the first epoch too, as in later ones")
    total_batch_size: int = setting(524288, "tokens per step, over all processes", 1)
    batch_size: int = setting(64, "sequences per micro-batch and process; 0: all that fit", 0)
    max_steps: int = setting(19073, "optimizer steps; 19073 are one epoch of 10B tokens", 1)
    warmup_steps: int = setting(715, "steps of linear warm-up, capped at max_steps", 0)
    max_lr: float = setting(None, "learning rate after the warm-up (default: 6e-4; with muon "
                            "1.8e-3 * sqrt(768 / n_embd))", 0.0)
    min_lr: float = setting(None, "learning rate at the end (default: max_lr / 10)", 0.0)
    lr_schedule: str = setting("cosine", "how the rate falls: cosine, linear, or wsd: in the last "
                               "fifth only", choices=("cosine", "linear", "wsd"))
    embedding_lr_ratio: float = setting(1.0, "learning rate of the embeddings over that of the "
                                        "rest", 0.0)
    optimizer: str = setting("adamw", "adamw, or muon for hidden matrices and AdamW for the rest",
                             choices=("adamw", "muon"))
    weight_decay: float = setting(0.1, "weight decay of tensors of two or more dimensions", 0.0)
    grad_clip: float = setting(1.0, "largest gradient norm; 0 switches clipping off", 0.0)
    eval_interval: int = setting(250, "steps between evaluations", 1)
    val_tokens: int = setting(10485760, "tokens of the val split to evaluate on", 1)
    hellaswag_examples: int = setting(10042, "HellaSwag examples per evaluation; 0: none", 0)
    hellaswag_data: str = setting("", "HellaSwag jsonl file (default: download it once)")
    num_samples: int = setting(4, "samples printed at each evaluation", 0)
    sample_prompt: str = setting("Hello, I'm a language model,", "text that the samples begin with")
    sample_length: int = setting(32, "tokens per sample, prompt included", 1)
    sample_temperature: float = setting(1.0, "temperature of samples; 0 is greedy", 0.0)
    log_dir: str = setting("log", "where checkpoints, log.txt, log.jsonl and log.png go")
    log_interval: int = setting(1, "steps between console lines; the files get every step", 1)
    checkpoint_interval: int = setting(1000, "steps between checkpoints", 1)
    keep_checkpoints: int = setting(5, "how many of the newest to keep; 0 keeps all", 0)
    auto_resume: bool = setting(False, "go on from the newest good checkpoint, or start fresh")
    resume: bool = setting(False, "go on from --checkpoint_path")
    checkpoint_path: str = setting("", "the checkpoint of --resume")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "autocast to bfloat16 or float16, or float32 (on CUDA with TF32 "
                         "products); auto: what the hardware does best",
                         choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = setting(True, "torch.compile the model for training")
    shard: bool = setting(False, "shard weights, gradients and optimizer state over the processes")
    shard_ranks: int = setting(0, "with --shard: processes that hold one copy of the model, such "
                               "as the GPUs of a host; 0: all", 0)
    reduce_each: bool = setting(False, "with --shard, add up gradients over the ranks after each "
                                "micro-batch: less memory, more communication")
    largest_file: int = setting(7 * 10**9, "with --shard: a model of more parameters is saved as a "
                                "directory, by all processes", 0)
    recompute: bool = setting(False, "recompute activations in the backward pass: less memory")
    recompute_every: int = setting(1, "with --recompute: of every n-th block only", 1)
    tuning: str = setting("", "to try on GPUs, such as keep_gradients,bucket_mb=100; docs/speed.md")
    deterministic: bool = setting(False, "on CUDA, results repeat bit for bit, no TF32; slower")
    seed: int = setting(1337, "seed of the initial weights, the order of data and dropout", 0)
    wandb: bool = setting(False, "log to Weights & Biases as well")
    tensorboard: bool = setting(False, "log to TensorBoard as well, under log_dir")
    plan: bool = setting(False, "print memory, time, cost and disk of this run, and exit; no data, "
                         "no GPU needed")
    gpus: int = setting(1, "with --plan: how many GPUs, 8 in a host", 1)
    gpu: str = setting("", "with --plan: the GPU, such as H100 (default: measure this machine)")
    dollars_per_hour: float = setting(0.0, "price of all GPUs together; 0: not known", 0.0)

    def __post_init__(self):
        if self.max_lr is None:
            self.max_lr = default_max_lr(self.optimizer, self.n_embd)
        if self.min_lr is None:
            self.min_lr = self.max_lr / 10
        check_settings(self)
        self.tuned = parse_tuning(self.tuning)
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd {self.n_embd} does not divide by --n_head {self.n_head}: "
                            "make it a multiple")
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr {self.min_lr} is above --max_lr {self.max_lr}: "
                            "lower it, or leave it out for a tenth")
        if self.resume and self.auto_resume:
            raise UserError("--resume and --auto_resume contradict: --resume names a checkpoint, "
                            "--auto_resume finds one")
        if self.resume != bool(self.checkpoint_path):
            raise UserError("--resume and --checkpoint_path go together: "
                            "give both, or --auto_resume alone")
        self.warmup_steps = min(self.warmup_steps, self.max_steps)


def parse_flags(argv=None):
    """The flags that were given, over those of the preset, as {name: value}.

    Raises UserError for an unknown flag or preset.
    """
    parser = ArgumentParser(__doc__)
    add_flags(parser, TrainConfig)
    given = vars(parser.parse_args(argv))
    return {**preset_settings(given), **given}


# -----------------------------------------------------------------------------
# the parts of a training step


def configure_optimizers(model, cfg, device, world=World()):
    """The optimizers of a run: AdamW, and with --optimizer muon also Muon for the hidden matrices.

    Tensors of two or more dimensions decay, biases and norms don't. Muon
    (https://kellerjordan.github.io/posts/muon) scales its updates to the size of AdamW's
    (arXiv:2502.16982), so that one learning rate serves both. A group's rate is that of the
    step times its lr_ratio.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in params.items() if p.dim() >= 2}
    hidden = {name: p for name, p in matrices.items() if name.startswith("transformer.h.")}
    decaying = dict(weight_decay=cfg.weight_decay, lr_ratio=1.0)
    layers = dict(decaying, params=list(hidden.values()))
    embeddings = dict(decaying, params=[p for name, p in matrices.items() if name not in hidden])
    embeddings["lr_ratio"] = cfg.embedding_lr_ratio
    vectors = dict(params=[p for p in params.values() if p.dim() < 2], weight_decay=0.0,
                   lr_ratio=1.0)
    options = dict(lr=cfg.max_lr, betas=(0.9, 0.95), eps=1e-8,
                   fused=device.type in ("cuda", "cpu"))
    if cfg.optimizer == "adamw":
        return [torch.optim.AdamW([embeddings, layers, vectors], **options)]
    adamw = torch.optim.AdamW([embeddings, vectors], **options)
    layers["params"] = [hidden[name] for name in sorted(hidden)]
    muon = Muon([layers], world, lr=cfg.max_lr, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def get_lr(step, cfg):
    """The learning rate of a step: linear warm-up to max_lr, then as lr_schedule says to min_lr."""
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    decay_steps = max(cfg.max_steps - cfg.warmup_steps, 1)
    ratio = min((step - cfg.warmup_steps) / decay_steps, 1.0)
    if cfg.lr_schedule == "cosine":
        coeff = 0.5 * (1.0 + math.cos(math.pi * ratio))  # from 1 to 0
    else:
        coeff = min((1.0 - ratio) / (0.2 if cfg.lr_schedule == "wsd" else 1.0), 1.0)
    return cfg.min_lr + coeff * (cfg.max_lr - cfg.min_lr)


def take_step(model, micro_batches, optimizers, scaler, autocast, lr, cfg, world=World(),
              interrupted=lambda: False, n_common=math.inf):
    """One optimizer step on this process's micro-batches (x, y, tokens), at learning rate lr.

    Returns this rank's share of the loss (the shares of all ranks add up to the mean over the
    step's tokens), and the norm of the whole gradient before clipping: tensors, which on CUDA the
    device may not have computed yet. If the norm is not finite, the weights stay as they are. If
    `interrupted()` is true between two micro-batches, the step is given up, nothing has changed,
    and the result is None. It is asked between the first n_common micro-batches only, those that
    every rank has: the ranks agree on the answer.
    """
    model.train()
    loss_sum = 0.0
    for i, (x, y, n) in enumerate(micro_batches):
        if 0 < i < n_common and interrupted():
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=not cfg.tuned.keep_gradients)
            return None
        # Backward adds to the gradients that are there, so they sum up over the micro-batches. The
        # ranks exchange them after the last one only; DDP's forward reads this flag too.
        is_last = i == len(micro_batches) - 1
        set_gradient_sync(model, is_last or (cfg.shard and cfg.reduce_each))
        with autocast:
            _, loss = model(x, y, return_logits=False)
        # the loss is a mean: weighted by tokens, each token counts the same in a short micro-batch
        loss = loss * (n / cfg.total_batch_size)
        loss_sum = loss_sum + loss.detach()
        # DDP takes the mean of the gradients over the ranks, but their sum is wanted
        scaler.scale(loss * world.size).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = clip_gradients(model, cfg.grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
    update_if_finite(optimizers, norm)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=not cfg.tuned.keep_gradients)
    scaler.update()
    return loss_sum, norm


def sample(model, cfg, tokenizer, device, autocast, dtype, rank=0):
    """cfg.num_samples texts that continue cfg.sample_prompt, the same for the same weights.

    Rank 0 draws them; the others have to call it too, and get none.
    """
    if not cfg.num_samples:
        return []
    model.eval()
    prompt = tokenizer.encode_ordinary(cfg.sample_prompt) or [tokenizer.eot_token]
    idx = torch.tensor([prompt[-cfg.block_size:]] * cfg.num_samples, device=device)  # (B, T)
    # a generator of its own: sampling must not change what training draws
    generator = torch.Generator(device).manual_seed(42)
    with autocast, nondeterministic_algorithms(), without_cudnn_attention(device):
        if rank > 0:
            return []
        idx = generate(model, idx, cfg.sample_length - idx.size(1), tokenizer.n_vocab,
                       cfg.sample_temperature, top_k=50, generator=generator, dtype=dtype)
    return [tokenizer.decode(row) for row in idx.tolist()]


def create_model(cfg, start, tokenizer):
    """The model that a run starts from: the checkpoint's, or one with random weights."""
    if start and start.checkpoint:
        start.check_fit(tokenizer, cfg.data_root, cfg.optimizer, cfg.shard, n_layer=cfg.n_layer,
                        n_head=cfg.n_head, n_embd=cfg.n_embd, block_size=cfg.block_size)
        return GPT.from_checkpoint(start.checkpoint, cfg.block_size, cfg.dropout)
    # 50257 -> 50304: matrix kernels are fastest where the sizes are multiples of a power of two
    vocab_size = math.ceil(tokenizer.n_vocab / 64) * 64
    return GPT(GPTConfig(cfg.block_size, vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd,
                         cfg.dropout))


# -----------------------------------------------------------------------------
# the training loop


def train(cfg, start=None, world=World()):
    """Train as cfg says, from where `start` says; returns the last validation loss."""
    start = start or Start()
    # device and precision
    device = resolve_device(cfg.device, world.local_rank if world.size > 1 else None)
    dtype = resolve_dtype(cfg.dtype, device)
    # sharded weights are cast where they are used: the cache would keep whole copies of them
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32,
                              cache_enabled=not cfg.shard)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    prepare_device(device, cfg.deterministic)
    prepare_attention(device, dtype, cfg.block_size)

    # data
    tokenizer = load_tokenizer(cfg.data_root)
    loader, val_loader, val_tokens_per_byte = open_splits(cfg)
    hellaswag = scoring.load_for_training(cfg.hellaswag_data, cfg.hellaswag_examples, tokenizer,
                                          cfg.block_size, world)

    # model and optimizers; the initial weights are the same on every rank
    torch.manual_seed(cfg.seed)
    raw_model = create_on(device, cfg, world, lambda: create_model(cfg, start, tokenizer),
                          start.directory)
    optimizers = configure_optimizers(raw_model, cfg, device, world)
    torch.manual_seed(cfg.seed + world.rank)  # dropout differs between ranks

    # where the run stands
    step, position = start.step, start.position
    val_loss, val_step = start.val_loss, start.val_step
    start.restore(optimizers, scaler, device, world.rank)
    start.release()
    if start.resumed:
        print0(f"resuming at step {step} of {cfg.max_steps}, {position:,} tokens into the run")
    start_step = step
    batch_size = cfg.batch_size or choose_batch_size(raw_model, cfg, device, autocast, dtype, world)
    positions = itertools.count(position, cfg.total_batch_size)
    steps = prefetch((loader.batches(p, cfg.total_batch_size, batch_size, world, tokenizer.n_vocab,
                                      even=cfg.shard)
                      for p in positions), device)

    # The compiled, distributed model trains. The raw model shares its weights, and is evaluated,
    # sampled from and saved.
    model = train_with(raw_model, cfg, device, world)
    evaluation = Evaluation(raw_model, autocast, world)
    loss_of = validation_loss(raw_model, device, batch_size, cfg.compile and not cfg.shard)

    facts = describe_run(cfg, raw_model, device, dtype, world, batch_size)
    print_run(facts, loader.n_tokens)
    reporter = Reporter(cfg, raw_model, facts, device, world, step if start.resumed else None,
                        val_tokens_per_byte, tokenizer.name == "gpt2")
    as_directory = cfg.shard and facts["parameters"] > cfg.largest_file
    saver = Saver(cfg.log_dir, cfg.keep_checkpoints, world, as_directory)
    with (reporter, saver, contextlib.closing(steps), StepLog(reporter, device) as step_log,
          StopSignal(world) as stop_signal):
        while True:
            last_step = step == cfg.max_steps
            # if any rank was signalled, all stop at this step, before an evaluation begins
            stop = stop_signal.on_any_rank()

            # once in a while evaluate, and look at what the model writes
            due = step % cfg.eval_interval == 0 or last_step
            if due and step != val_step and not stop:
                step_log.flush()
                val_loss = evaluate(raw_model, val_loader, cfg.val_tokens, batch_size, device,
                                    evaluation, world, loss_of)
                val_step = step
                reporter.validation(step, val_loss)
                if hellaswag:
                    reporter.hellaswag(step, scoring.evaluate(
                        raw_model, hellaswag, tokenizer, evaluation, world.rank, world.size))
                if step > 0:
                    reporter.samples(step, sample(raw_model, cfg, tokenizer, device, evaluation,
                                                  dtype, world.rank))
                reporter.draw()

            # once in a while write a checkpoint
            due = step % cfg.checkpoint_interval == 0 or last_step or stop
            if due and step > start_step:
                step_log.flush()
                rng = gather_rng(device, world)
                saver.save(dict(
                    model=raw_model.state_dict(keep_vars=True),
                    config=asdict(raw_model.config),
                    optimizer=[optimizer.state_dict() for optimizer in optimizers],
                    scaler=scaler.state_dict(), rng=rng, train_config=asdict(cfg),
                    tokenizer=tokenizer_to_dict(tokenizer), step=step, position=position,
                    val_loss=val_loss, val_step=val_step), wait=last_step or stop)
            if last_step or stop:
                break

            # do one step of the optimization
            step_log.start()
            rng_before = get_rng(device)
            lr = get_lr(step, cfg)
            n_common = loader.fewest_micro_batches(position, cfg.total_batch_size, batch_size,
                                                   world.size)
            result = take_step(model, next(steps), optimizers, scaler, autocast, lr, cfg, world,
                               stop_signal.on_any_rank, n_common)
            if result is None:  # a signal came between two micro-batches: the step never was
                set_rng(device, rng_before)
                continue
            loss, norm = result
            if world.size > 1:
                dist.all_reduce(loss)
            step_log.end(step, loss, lr, norm)
            step += 1
            position += cfg.total_batch_size

    reporter.end(step, position, val_loss)
    return val_loss


def make_demo_data(cfg, world):
    """Rank 0 makes the demo's dataset, the others wait. UserError where another one is missing."""
    if cfg.preset != "demo" or cfg.data_root != PRESETS["demo"]["data_root"]:
        raise UserError(
            f"no shards in {cfg.data_root!r}. "
            f"Make them: python fineweb.py --data_root {cfg.data_root}\n"
            "or see it all work on a small corpus first: python train_gpt2.py --preset demo")
    print0(f"no shards in {cfg.data_root!r}: making some from the Python standard library of this "
           "interpreter")
    if world.rank == 0:
        prepare(cfg.data_root, source="stdlib", tokenizer="bpe", vocab_size=DEMO_VOCAB_SIZE)
    any_rank(False, world)  # wait for rank 0


def main():
    flags = parse_flags()
    # Contradictions show before anything is read; the rest is checked when the checkpoint's
    # settings are known.
    early = ("resume", "auto_resume", "checkpoint_path")
    TrainConfig(**{name: value for name, value in flags.items() if name in early})
    with distributed() as world:
        known = [field.name for field in dataclasses.fields(TrainConfig)]
        start = load_start(flags, world, known)
        cfg = TrainConfig(**{**start.settings, **flags})
        if cfg.plan:
            vocab_size = start.checkpoint and start.checkpoint["config"]["vocab_size"]
            return print_plan(cfg, lambda cfg, t: create_model(cfg, Start(), t), vocab_size)
        if not list_shards(cfg.data_root, "train"):
            make_demo_data(cfg, world)
        # a second run in the same directory is refused: they would overwrite each other's files
        lock = lock_directory(cfg.log_dir) if world.rank == 0 else contextlib.nullcontext()
        with lock, memory_errors_told(cfg.batch_size):
            train(cfg, start, world)


if __name__ == "__main__":
    run_main(main)
