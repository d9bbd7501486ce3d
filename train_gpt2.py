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
import math
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

from fineweb import find_or_make_shards
from gptlib import distributed, runtime
from gptlib.checkpoints import formats
from gptlib.checkpoints.huggingface import export_model
from gptlib.checkpoints.saver import Saver
from gptlib.checkpoints.start import Start, load_start
from gptlib.common import ArgumentParser, UserError, print0, run_main
from gptlib.config import add_flags, check_settings, setting
from gptlib.data import tokenizer as vocabulary
from gptlib.data.loader import open_dataset, prefetch
from gptlib.inference.kv_cache import KVCache
from gptlib.inference.sampling import sample_next
from gptlib.lock import lock_directory
from gptlib.training import console, memory, optim, parallel, presets, scoring
from gptlib.training.evaluation import Evaluator
from gptlib.training.loss_watch import Divergence
from gptlib.training.run_log import RunLog

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


class Causal:
    """Attention within whole sequences, as in training: a token sees itself and those before it.

    The layers ask such an object where the tokens stand and what their queries find. Others have
    the same methods: CachedAttention for decoding, and Packed for HellaSwag.
    """

    def positions(self, idx):
        """The positions of tokens idx (B, T): (T,) if they are those of every row, else (B, T)."""
        return torch.arange(idx.size(1), device=idx.device)

    def attend(self, layer, q, k, v, dropout_p):
        """What queries find in keys and values, all of them (B, nh, T, hs)."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)


CAUSAL = Causal()


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

    def forward(self, x, attention):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        y = attention.attend(self.layer, q, k, v, self.dropout if self.training else 0.0)
        # put the outputs of all heads side by side again
        y = y.transpose(1, 2).contiguous().view(B, T, C)
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

    def forward(self, x, attention):
        x = x + self.attn(self.ln_1(x), attention)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer = None  # the tiktoken.Encoding of its token ids, if that is known
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

    def hidden(self, idx, attention=CAUSAL):
        """The final hidden states, (B, T, n_embd), of tokens idx (B, T).

        attention: where they stand and what they attend to. With a cache, idx has new ones only.
        """
        pos = attention.positions(idx)  # (T,) or (B, T)
        T, limit = idx.size(1), self.config.block_size
        if pos.dim() == 1 and T > limit:  # a row that packs several sequences may be longer
            raise ValueError(f"a sequence of {T} tokens is longer than the model's block size "
                             f"{limit}")
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x, attention)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, return_logits=True):
        """Logits (B, T, vocab_size) and, with targets (B, T), the mean loss in nats.

        Targets of -1 don't count. Training asks for the loss alone: logits that are returned get a
        gradient too, of zeros, as large as themselves.
        """
        logits = self.lm_head(self.hidden(idx))  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        flat = logits.view(-1, logits.size(-1))
        loss = F.cross_entropy(flat, targets.reshape(-1), ignore_index=-1)
        return (logits if return_logits else None), loss

    def flops_per_token(self):
        """FLOPs of training on one token: 6N + 12 n_layer n_embd T.

        That is the formula of PaLM (arXiv:2204.02311, appendix B), for the whole block size. N
        leaves out the position embedding, which is looked up and never multiplied.
        """
        c = self.config
        N = sum(p.numel() for name, p in self.named_parameters() if not name.endswith("wpe.weight"))
        return 6 * N + 12 * c.n_layer * c.n_embd * c.block_size

    @classmethod
    def from_checkpoint(cls, checkpoint, block_size=None, dropout=None):
        """The model of a dict from load_checkpoint; a shorter block_size cuts its context.

        Raises UserError if the weights do not fit the config.
        """
        config = formats.make_config(GPTConfig, checkpoint["config"])
        config.block_size = min(config.block_size, block_size or config.block_size)
        config.dropout = config.dropout if dropout is None else dropout
        with formats.without_weights():
            model = cls(config)
        formats.fill_model(model, checkpoint["model"], checkpoint["config"]["block_size"])
        return model

    @classmethod
    def from_pretrained(cls, name):
        """GPT-2 of the Hugging Face Hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a directory."""
        return cls.from_checkpoint(formats.load_checkpoint(name))

    def save_pretrained(self, directory, tokenizer=None):
        """Write a new directory from which `transformers` loads the model with equal logits."""
        export_model(self, tokenizer or self.tokenizer, directory)


@torch.no_grad()
def generate(model, idx, max_new_tokens, n_vocab, temperature=1.0, top_k=None, top_p=None,
             generator=None, dtype=None):
    """Continue each row of idx (B, T) by up to max_new_tokens; returns (B, T + new).

    It ends at the block size. Ids from n_vocab on are padding of the vocabulary and are never
    drawn. The engine behind inference.py does the same for many sequences of any length.
    """
    B = idx.size(0)
    end = min(idx.size(1) + max_new_tokens, model.config.block_size)
    cache = KVCache.of_model(model, B, end, dtype)
    new, attention = idx, cache.from_start()  # the whole prompt at first, then a token at a time
    while idx.size(1) < end:
        x = model.hidden(new, attention)  # (B, T or 1, n_embd)
        logits = model.lm_head(x[:, -1])  # (B, vocab_size)
        new = sample_next(logits[:, :n_vocab], temperature, top_k, top_p, generator)  # (B, 1)
        idx = torch.cat((idx, new), dim=1)
        pos = torch.full((B, 1), idx.size(1) - 1, device=idx.device)
        attention = cache.narrow(0, B, idx.size(1)).at(pos)
    return idx


# -----------------------------------------------------------------------------
# settings: one dataclass makes the command line, the checks, the checkpoint's copy, docs/flags.md


@dataclass
class TrainConfig:
    preset: str = setting("", "a named set of flags: demo, gpt2, gpt3-small, ...", section="model")
    init_from: str = setting("scratch", "scratch, a GPT-2 name, a model directory or a checkpoint")
    n_layer: int = setting(12, "transformer blocks", 1)
    n_head: int = setting(12, "attention heads in each block", 1)
    n_embd: int = setting(768, "width of the residual stream", 1)
    block_size: int = setting(1024, "tokens of context", 1, formats.LONGEST_CONTEXT)
    dropout: float = setting(0.0, "dropout probability", 0.0, 0.99)
    data_root: str = setting("edu_fineweb10B", "dataset directory, see fineweb.py", section="data")
    dev: bool = setting(False, "hold the end of the training text out, and evaluate on it")
    shuffle: bool = setting(False, "permute the windows in the first epoch too, as in later ones")
    total_batch_size: int = setting(524288, "tokens per step, over all processes", 1)
    batch_size: int = setting(64, "sequences per micro-batch and process; 0: all that fit", 0)
    max_steps: int = setting(19073, "optimizer steps; 19073 are one epoch of 10B tokens", 1,
                             section="optimization")
    warmup_steps: int = setting(715, "steps of linear warm-up, capped at max_steps", 0)
    max_lr: float = setting(None, "learning rate after the warm-up (default: 6e-4; with muon "
                            "1.8e-3 * sqrt(768 / n_embd))", 0.0)
    min_lr: float = setting(None, "learning rate at the end (default: max_lr / 10)", 0.0)
    lr_schedule: str = setting("cosine", "how the rate falls; wsd: in the last fifth only",
                               choices=("cosine", "linear", "wsd"))
    embedding_lr_ratio: float = setting(1.0, "the embeddings' learning rate over the others'", 0.0)
    optimizer: str = setting("adamw", "muon: Muon for hidden matrices, AdamW for the rest",
                             choices=("adamw", "muon"))
    weight_decay: float = setting(0.1, "weight decay of tensors of two or more dimensions", 0.0)
    grad_clip: float = setting(1.0, "largest gradient norm; 0 switches clipping off", 0.0)
    seed: int = setting(1337, "seed of initial weights, order of data and dropout", 0, 2**63)
    eval_interval: int = setting(250, "steps between evaluations", 1, section="evaluation")
    val_tokens: int = setting(10485760, "tokens of the val split to evaluate on", 1)
    hellaswag_examples: int = setting(10042, "HellaSwag examples per evaluation; 0: none", 0)
    hellaswag_data: str = setting("", "HellaSwag jsonl file (default: download it once)")
    num_samples: int = setting(4, "samples printed at each evaluation", 0)
    sample_prompt: str = setting("Hello, I'm a language model,", "text that the samples begin with")
    sample_length: int = setting(32, "tokens per sample, prompt included", 1)
    sample_temperature: float = setting(1.0, "temperature of samples; 0 is greedy", 0.0)
    log_dir: str = setting("log", "where logs and checkpoints go", section="logs and checkpoints")
    log_interval: int = setting(1, "steps between console lines; the files get every step", 1)
    wandb: bool = setting(False, "log to Weights & Biases as well")
    tensorboard: bool = setting(False, "log to TensorBoard as well, under log_dir")
    checkpoint_interval: int = setting(1000, "steps between checkpoints", 1)
    keep_checkpoints: int = setting(5, "how many of the newest to keep; 0 keeps all", 0)
    keep_best: bool = setting(False, "keep the checkpoint of the lowest validation loss as well")
    stop_on_divergence: bool = setting(True, "end a run whose loss stays far above its mean")
    auto_resume: bool = setting(False, "go on from the newest good checkpoint, or start fresh")
    resume: bool = setting(False, "go on from --checkpoint_path")
    checkpoint_path: str = setting("", "the checkpoint of --resume")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", section="machine")
    dtype: str = setting("auto", "precision of products; auto: what the hardware does best",
                         choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = setting(True, "torch.compile the model for training")
    deterministic: bool = setting(False, "on CUDA, results repeat bit for bit, no TF32; slower")
    shard: bool = setting(False, "shard weights, gradients and optimizer state over the processes")
    shard_ranks: int = setting(0, "with --shard: processes that hold one copy; 0: all", 0)
    reduce_each: bool = setting(False, "with --shard: add up gradients after each micro-batch")
    largest_file: int = setting(7 * 10**9, "with --shard: of more parameters, save a directory", 0)
    recompute: bool = setting(False, "recompute activations in the backward pass: less memory")
    recompute_every: int = setting(1, "with --recompute: of every n-th block only", 1)

    def __post_init__(self):
        self.as_given = asdict(self)  # what a checkpoint keeps: a derived value is derived again
        if self.max_lr is None:
            self.max_lr = presets.default_max_lr(self.optimizer, self.n_embd)
        if self.min_lr is None:
            self.min_lr = self.max_lr / 10
        check_settings(self)
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

    def layout(self):
        every = self.recompute_every if self.recompute else 0
        return parallel.Layout(self.shard, self.shard_ranks, self.reduce_each, every, self.compile)


def parse_flags(argv=None):
    """The flags that were given, over those of the preset, as {name: value}.

    Raises UserError for an unknown flag or preset.
    """
    parser = ArgumentParser(__doc__)
    add_flags(parser, TrainConfig)
    given = vars(parser.parse_args(argv))
    return {**presets.preset_settings(given), **given}


# -----------------------------------------------------------------------------
# one step of the optimization


def configure_optimizers(model, cfg, device, world=distributed.World()):
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
    muon = optim.Muon([layers], world, lr=cfg.max_lr, adjust_lr_fn="match_rms_adamw")
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


@dataclass
class Trainer:
    """Does one step of the optimization after the other."""
    model: nn.Module  # compiled and distributed
    optimizers: list
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    device: torch.device
    tokens_per_step: int  # over all processes
    grad_clip: float = 1.0
    world: distributed.World = distributed.World()

    def step(self, micro_batches, lr, interrupted=lambda: False):
        """One step on this process's next micro-batches (x, y, tokens, is_last), at rate lr.

        Returns the mean loss over the step's tokens and the norm of the whole gradient before
        clipping: tensors, which a GPU may not have computed yet. If the norm is not finite the
        weights stay as they are. If interrupted() is true after a micro-batch, the step is given
        up, nothing has changed, and the result is None.
        """
        self.model.train()
        rng = runtime.get_rng(self.device)
        mean_loss = 0.0
        for x, y, n, is_last in micro_batches:
            # Backward adds to the gradients that are there, so they sum up over the micro-batches.
            # The ranks exchange them after the last one only; DDP's forward reads this flag too.
            parallel.set_gradient_sync(self.model, is_last)
            with self.autocast:
                _, loss = self.model(x, y, return_logits=False)
            # the loss is a mean: weighted by tokens, each token counts the same in any micro-batch
            loss = loss * (n / self.tokens_per_step)
            mean_loss = mean_loss + loss.detach()
            # DDP takes the mean of the gradients over the ranks, but their sum is wanted
            self.scaler.scale(loss * self.world.size).backward()
            if is_last:
                break
            if interrupted():
                self.model.zero_grad()
                runtime.set_rng(self.device, rng)
                return None
        if self.world.size > 1:
            dist.all_reduce(mean_loss)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = parallel.clip_gradients(self.model, self.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_ratio"]
            optim.skip_if_not_finite(optimizer, norm)
            optimizer.step()
        self.model.zero_grad()
        self.scaler.update()
        return mean_loss, norm


# -----------------------------------------------------------------------------
# the training loop


def create_model(cfg, start, tokenizer):
    """The model that a run starts from: the checkpoint's, or one with random weights."""
    if start.checkpoint:
        start.check_fit(tokenizer, cfg.data_root, cfg.optimizer, cfg.shard, n_layer=cfg.n_layer,
                        n_head=cfg.n_head, n_embd=cfg.n_embd, block_size=cfg.block_size)
        return GPT.from_checkpoint(start.checkpoint, cfg.block_size, cfg.dropout)
    # 50257 -> 50304: matrix kernels are fastest if sizes are multiples of a power of two
    vocab_size = math.ceil(tokenizer.n_vocab / 64) * 64
    return GPT(GPTConfig(cfg.block_size, vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd,
                         cfg.dropout))


def sample(evaluator, cfg, tokenizer, dtype):
    """cfg.num_samples texts that continue cfg.sample_prompt, the same for the same weights.

    Rank 0 draws them; the others have to call it too, and get none.
    """
    if not cfg.num_samples:
        return []
    model, device = evaluator.model.eval(), evaluator.device
    prompt = vocabulary.encode_text(tokenizer, cfg.sample_prompt) or [tokenizer.eot_token]
    idx = torch.tensor([prompt[-cfg.block_size:]] * cfg.num_samples, device=device)  # (B, T)
    # a generator of its own: sampling must not change what training draws
    generator = torch.Generator(device).manual_seed(42)
    with evaluator, runtime.nondeterministic_algorithms(), runtime.without_cudnn_attention(device):
        if evaluator.world.rank > 0:
            return []
        idx = generate(model, idx, cfg.sample_length - idx.size(1), tokenizer.n_vocab,
                       cfg.sample_temperature, top_k=50, generator=generator, dtype=dtype)
    return [tokenizer.decode(row) for row in idx.tolist()]


def open_log(cfg, start, model, data, device, dtype, world, batch_size):
    """Print what is about to run, and open the log of its course; only rank 0 has the files."""
    facts = console.describe_run(asdict(cfg), model, device, dtype, world, batch_size, data)
    console.print_run(facts, data.train.n_tokens)
    resumed_at = start.step if start.resumed else None
    if start.resumed:
        print0(f"resuming at step {start.step} of {cfg.max_steps}, token {start.position:,}")
    run_log = None
    if world.rank == 0:
        run_log = RunLog(cfg.log_dir, resumed_at, facts, cfg.wandb, cfg.tensorboard)
    divergence = Divergence(model.config.vocab_size) if cfg.stop_on_divergence else None
    return console.Console(run_log, device, world, cfg.max_steps, cfg.total_batch_size,
                           model.flops_per_token(), cfg.log_interval, start.step,
                           data.val_tokens_per_byte, divergence)


def train(cfg, start=Start(), world=distributed.World()):
    """Train as cfg says, from `start` on; returns the last validation loss."""
    # device and precision
    device = runtime.resolve_device(cfg.device, world.local_rank if world.size > 1 else None)
    dtype = runtime.resolve_dtype(cfg.dtype, device)
    # sharded weights are cast for each use: the cache would keep whole copies of them
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32,
                              cache_enabled=not cfg.shard)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    runtime.prepare_device(device, cfg.deterministic, keep_memory=not cfg.shard)
    runtime.prepare_attention(device, dtype, cfg.block_size)

    # data
    data = open_dataset(cfg.data_root, cfg.block_size, cfg.seed, cfg.shuffle, cfg.dev)
    parallel.check_same_run(asdict(cfg), data, world)
    tokenizer = data.tokenizer
    hellaswag = scoring.load_for_training(cfg.hellaswag_data, cfg.hellaswag_examples, tokenizer,
                                          cfg.block_size, world)

    # model and optimizers; the initial weights are the same on every rank
    layout = cfg.layout()
    torch.manual_seed(cfg.seed)
    raw_model = parallel.create_on(device, layout, world,
                                   lambda: create_model(cfg, start, tokenizer), start.directory)
    optimizers = configure_optimizers(raw_model, cfg, device, world)
    torch.manual_seed(cfg.seed + world.rank)  # dropout differs between ranks
    start.restore(optimizers, scaler, device, world.rank)
    start.release()  # main() holds it too, and the weights need not be in memory twice
    step, position, val_loss, val_step = start.step, start.position, start.val_loss, start.val_step
    batch_size = cfg.batch_size or memory.choose_batch_size(
        raw_model, layout, cfg.optimizer, cfg.total_batch_size, device, autocast, dtype, world)

    # the compiled, distributed model trains; the raw one shares its weights and does the rest
    model = parallel.train_with(raw_model, layout, device, world)
    trainer = Trainer(model, optimizers, scaler, autocast, device, cfg.total_batch_size,
                      cfg.grad_clip, world)
    evaluator = Evaluator(raw_model, device, autocast, world, batch_size,
                          cfg.compile and not cfg.shard)
    micro_batches = prefetch(data.train.micro_batches(position, cfg.total_batch_size, batch_size,
                                                      world, tokenizer.n_vocab), device)
    log = open_log(cfg, start, raw_model, data, device, dtype, world, batch_size)
    as_directory = cfg.shard and sum(p.numel() for p in raw_model.parameters()) > cfg.largest_file
    saver = Saver(cfg.log_dir, cfg.keep_checkpoints, world, as_directory, cfg.keep_best,
                  start.best_loss)
    with (log, saver, contextlib.closing(micro_batches),
          distributed.StopSignal(world, log.stop_waiting) as stop_signal):
        while True:
            last_step = step == cfg.max_steps
            # if any rank was signalled, all stop at this step, before an evaluation begins
            stop = stop_signal.on_any_rank()

            # once in a while evaluate, and look at what the model writes
            due = step % cfg.eval_interval == 0 or last_step
            if due and step != val_step and not stop:
                log.flush()
                val_loss = evaluator.validation_loss(data.val, cfg.val_tokens)
                val_step = step
                log.validation(step, val_loss)
                if hellaswag:
                    log.hellaswag(step, scoring.evaluate(
                        raw_model, hellaswag, tokenizer, evaluator, world.rank, world.size))
                if step > 0:
                    log.samples(step, sample(evaluator, cfg, tokenizer, dtype))
                log.draw_in(saver.thread)

            # once in a while write a checkpoint; one of a high loss must not replace a good one
            due = step % cfg.checkpoint_interval == 0 and not log.is_loss_high
            is_best = step == val_step and saver.is_best(val_loss)
            if (due or is_best or last_step or stop) and step > start.step:
                log.flush()
                rng = distributed.gather_from_all(runtime.get_rng(device), world)
                saver.save(dict(
                    model=raw_model.state_dict(keep_vars=True),
                    config=asdict(raw_model.config),
                    optimizer=[optimizer.state_dict() for optimizer in optimizers],
                    scaler=scaler.state_dict(), rng=rng, train_config=cfg.as_given,
                    tokenizer=vocabulary.tokenizer_to_dict(tokenizer), step=step, position=position,
                    val_loss=val_loss, val_step=val_step), wait=last_step or stop,
                    keep_all=log.is_loss_high)
            if last_step or stop:
                break

            # do one step of the optimization
            log.step_begins()
            lr = get_lr(step, cfg)
            result = trainer.step(micro_batches, lr, stop_signal.on_any_rank)
            if result is None:  # a signal came between two micro-batches: the step never was
                continue
            loss, norm = result
            log.step_ended(step, loss, lr, norm)
            step += 1
            position += cfg.total_batch_size

    log.end(step, position, val_loss)
    return val_loss


def main():
    flags = parse_flags()
    # Contradictions show before anything is read; the rest is checked when the checkpoint's
    # settings are known.
    early = ("resume", "auto_resume", "checkpoint_path")
    TrainConfig(**{name: value for name, value in flags.items() if name in early})
    with distributed.join(flags.get("device", "auto")) as world:
        start = load_start(flags, world, [field.name for field in dataclasses.fields(TrainConfig)])
        cfg = TrainConfig(**{**start.settings, **flags})
        if start.step >= cfg.max_steps:
            return print0(f"nothing to do: at step {start.step}, --max_steps is {cfg.max_steps}")
        find_or_make_shards(cfg.data_root, cfg.preset == "demo", world)
        # a second run in the same directory is refused: they would overwrite each other's files
        lock = lock_directory(cfg.log_dir) if world.rank == 0 else contextlib.nullcontext()
        with lock, memory.memory_errors_told(cfg.batch_size):
            train(cfg, start, world)


if __name__ == "__main__":
    run_main(main)
