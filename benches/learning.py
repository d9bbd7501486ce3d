"""What a token teaches: Muon beside AdamW, each at its best learning rate, on the same text.

Every run is `python train_gpt2.py` in a folder of its own, so what is measured is what users get.
Rates are chosen on the dev split (--dev); the runs that are compared see the val split. A run that
is finished is not run again, and one that was stopped goes on from its last checkpoint, so the
same command continues an experiment that was interrupted.
"""

import json
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benches.turns import ROOT, last_lines, take_turns
from gptlib.common import UserError, atomic_write, log
from gptlib.runtime import prepare_attention, prepare_device, resolve_device, resolve_dtype
from gptlib.training.run_log import new_figure
from train_gpt2 import GPT, GPTConfig, TrainConfig, Trainer, configure_optimizers

OPTIMIZERS = ("adamw", "muon")
SEEDS = (1, 2, 3)
MAX_RATES = 8
# The models, and the five rates of each optimizer in the order in which they are tried. The larger
# model is twice as wide, and begins at half of the rate that was best for the smaller one.
SIZES = {
    "1.8M": dict(model=dict(n_layer=3, n_head=3, n_embd=192),
                 rates=dict(adamw=(4e-3, 2e-3, 8e-3, 1e-3, 1.6e-2),
                            muon=(8e-3, 4e-3, 1.6e-2, 2e-3, 3.2e-2))),
    "10M": dict(model=dict(n_layer=5, n_head=6, n_embd=384),
                rates=dict(adamw=(5e-4, 1e-3, 2.5e-4, 2e-3, 4e-3),
                           muon=(8e-3, 1.6e-2, 4e-3, 3.2e-2, 2e-3))),
}
COMMON = dict(block_size=128, total_batch_size=2048, batch_size=16, shuffle=True, min_lr=0.0,
              lr_schedule="linear", compile=False, val_tokens=65536, hellaswag_examples=0,
              num_samples=0, log_interval=100, keep_checkpoints=1)
# Muon's first runs have half of AdamW's tokens. If they end above its loss, longer ones follow,
# otherwise shorter ones, until AdamW's loss lies between those of two lengths.
LONGER = (0.65, 1.0)
SHORTER = (1 / 4, 1 / 8, 1 / 16)
DIVERGED = "not finite ten steps in a row"  # how train_gpt2.py ends if the rate is too high


def run_settings(size, optimizer, rate, steps, seed, **changes):
    """The flags of one run of train_gpt2.py, as a dict."""
    return {**COMMON, **SIZES[size]["model"], "optimizer": optimizer, "max_lr": rate, "seed": seed,
            "max_steps": steps, "warmup_steps": steps // 20, "eval_interval": max(1, steps // 4),
            "checkpoint_interval": max(1, steps // 4), **changes}


def run_name(size, settings):
    """A folder's name that differs for any two runs that a user may ask for."""
    parts = [size, settings["optimizer"], f"lr{settings['max_lr']:g}",
             f"{settings['max_steps']}steps", f"seed{settings['seed']}"]
    extra = {**COMMON, **SIZES[size]["model"], "dev": False}
    named = ("optimizer", "max_lr", "max_steps", "seed", "warmup_steps", "eval_interval",
             "checkpoint_interval", "data_root")
    for key, value in settings.items():
        if key not in named and value != extra.get(key):
            parts.append(key if value is True else f"{key}={value}")
    return "-".join(parts)


def read_run(folder):
    """What a run has logged: {"train": [(step, loss)], "val": ..., "ms": [of each step]}, and its
    "data_root"."""
    result = {"train": [], "val": [], "ms": [], "data_root": None}
    path = Path(folder) / "log.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # the run was killed while it wrote
            continue
        if record["kind"] in ("train", "val"):
            result[record["kind"]].append((record["step"], record["loss"]))
        if record["kind"] == "train":
            result["ms"].append(record["ms"])
        if record["kind"] == "config":
            result["data_root"] = record["config"]["data_root"]
    return result


def run_training(out, size, settings):
    """Run one training, or what is left of it; returns what `summarize` makes of its log.

    A run whose gradients stopped being finite has no final loss. Raises UserError with the end of
    its output if it fails otherwise, or if `out` holds this run on another dataset.
    """
    folder = Path(out) / run_name(size, settings)
    logged = read_run(folder)
    finished, data_root = logged["val"], settings.get("data_root")
    if logged["data_root"] not in (None, data_root):
        raise UserError(f"{folder} is a run on {logged['data_root']}, not on {data_root}: choose "
                        "another --out")
    if not finished or finished[-1][0] != settings["max_steps"]:
        log(f"  {folder.name}")
        flags = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, str(ROOT / "train_gpt2.py"), "--auto_resume",
                   f"--log_dir={folder}", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 and DIVERGED in done.stderr:
            return dict(name=folder.name, size=size, settings=settings, loss=None, ms=None,
                        tokens=settings["max_steps"] * settings["total_batch_size"], curve=[])
        if done.returncode != 0:
            raise UserError(f"{folder.name}: exit code {done.returncode}\n"
                            f"{last_lines(done.stderr)}")
    return summarize(folder, size, settings)


def summarize(folder, size, settings):
    """One run as the JSON file has it: settings, final loss, loss by tokens, median step time."""
    logged = read_run(folder)
    tokens = settings["total_batch_size"]
    if not logged["val"] or logged["val"][-1][0] != settings["max_steps"]:
        raise UserError(f"{folder}: the run was stopped; the same command goes on with it")
    return dict(name=folder.name, size=size, settings=settings, loss=logged["val"][-1][1],
                tokens=settings["max_steps"] * tokens, ms=statistics.median(logged["ms"]),
                curve=[(step * tokens, loss) for step, loss in logged["val"]])


def best_rate(runs):
    """The rate of the run with the lowest loss; a NaN counts as infinite."""
    def loss(run):
        return math.inf if run["loss"] is None else run["loss"]
    return min(runs, key=loss)["settings"]["max_lr"]


def tokens_to_loss(points, loss):
    """The tokens at which a curve of (tokens, loss) comes down to a loss; None if it does not.

    Between two points the loss is taken as linear in the logarithm of the tokens.
    """
    points = sorted(points)
    for (t0, l0), (t1, l1) in zip(points, points[1:], strict=False):
        if l0 == loss:
            return t0
        if l1 <= loss < l0:
            share = (l0 - loss) / (l0 - l1)
            return math.exp(math.log(t0) + share * (math.log(t1) - math.log(t0)))
    return points[-1][0] if points[-1][1] == loss else None


def mean_loss(runs):
    """The mean of final losses. Raises UserError if a run has none."""
    for run in runs:
        if run["loss"] is None:
            raise UserError(f"{run['name']} has diverged: at this seed the best rate is too high")
    return statistics.mean(run["loss"] for run in runs)


class Experiment:
    """The runs of one model size: a sweep of rates, then seeds at the best ones.

    adamw_embedding: AdamW's learning rate of the embeddings over that of the rest. Beside Muon,
    which leaves them to AdamW at Muon's own, larger rate, 1 is a handicap.
    """

    def __init__(self, data_root, out, size, steps, jobs, adamw_embedding=1.0):
        self.data_root, self.out, self.size = data_root, Path(out), size
        self.steps, self.jobs = steps, jobs
        self.adamw_settings = {}
        if adamw_embedding != 1:
            self.adamw_settings = dict(embedding_lr_ratio=adamw_embedding)
        self.runs = []

    def run(self, wanted):
        """Run several trainings, up to `jobs` at a time; wanted: arguments of run_settings."""
        def one(arguments):
            own = self.adamw_settings if arguments[0] == "adamw" else {}
            settings = run_settings(self.size, *arguments[:4], data_root=str(self.data_root),
                                    **own, **arguments[4])
            result = run_training(self.out, self.size, settings)
            loss = result["loss"]
            log(f"  {result['name']}: {'diverged' if loss is None else f'{loss:.4f}'}")
            return result
        threads = ThreadPoolExecutor(self.jobs)
        try:
            results = list(threads.map(one, wanted))
        finally:  # after a failure the runs that have not begun are left out
            threads.shutdown(cancel_futures=True)
        self.runs += results
        return results

    def sweep(self):
        """{optimizer: its best rate on the dev split}.

        If the best rate is at an end of the grid, the sweep goes on beyond it, three times at
        most.
        """
        grids = {optimizer: list(SIZES[self.size]["rates"][optimizer]) for optimizer in OPTIMIZERS}
        tried = {optimizer: [] for optimizer in OPTIMIZERS}
        new = [(optimizer, rate) for pair in zip(*grids.values(), strict=True)
               for optimizer, rate in zip(OPTIMIZERS, pair, strict=True)]
        while new:
            results = self.run([(*pair, self.steps, 0, dict(dev=True)) for pair in new])
            for (optimizer, _), result in zip(new, results, strict=True):
                tried[optimizer].append(result)
            new = []
            for optimizer, rates in grids.items():
                best = best_rate(tried[optimizer])
                inside = min(rates) < best < max(rates)
                if not inside and len(rates) < MAX_RATES:
                    rates.append(best / 2 if best == min(rates) else best * 2)
                    new.append((optimizer, rates[-1]))
        return {optimizer: best_rate(results) for optimizer, results in tried.items()}

    def compare(self, best):
        """AdamW, then Muon with more or fewer tokens until it has AdamW's loss, three seeds each;
        returns a dict."""
        adamw = self.run([("adamw", best["adamw"], self.steps, seed, {}) for seed in SEEDS])
        target = mean_loss(adamw)
        points = []

        def run_muon(fraction):
            steps = round(self.steps * fraction)
            muon = self.run([("muon", best["muon"], steps, seed, {}) for seed in SEEDS])
            points.append((muon[0]["tokens"], mean_loss(muon)))

        run_muon(0.5)
        for fraction in LONGER if points[0][1] > target else SHORTER:
            if tokens_to_loss(points, target):
                break
            run_muon(fraction)
        tokens = tokens_to_loss(points, target)
        ratio = tokens / adamw[0]["tokens"] if tokens else None
        return dict(rates=best, adamw_tokens=adamw[0]["tokens"], adamw_loss=target,
                    muon=points, muon_tokens_to_adamw_loss=tokens, ratio=ratio)


def time_steps(size, rounds):
    """Steps per second of Muon and AdamW in turns, on random tokens: a list as of take_turns."""
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    prepare_device(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def contender(optimizer):
        cfg = TrainConfig(**run_settings(size, optimizer, 1e-3, 1, 0))
        B, T = cfg.batch_size, cfg.block_size
        prepare_attention(device, dtype, T)
        model = GPT(GPTConfig(T, 2048, cfg.n_layer, cfg.n_head, cfg.n_embd)).to(device)
        optimizers = configure_optimizers(model, cfg, device)
        trainer = Trainer(model, optimizers, scaler, autocast, device, B * T)
        x, y = torch.randint(2048, (2, B, T), device=device)

        def work():
            for _ in range(5):
                trainer.step([(x, y, B * T, True)], 1e-3)
            return 5
        return work

    return take_turns({name: contender(name) for name in ("muon", "adamw")}, rounds, "steps")


def bench_learning(args):
    """Muon's tokens to AdamW's final loss, a JSON file with every run, and a picture."""
    if not args.out:
        raise UserError("bench.py learning keeps its runs in a folder: name it with --out")
    experiment = Experiment(args.data_root, args.out, args.size, args.steps, args.jobs,
                            args.adamw_embedding)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    log(f"\nlearning, {args.size} parameters, {args.steps} steps of 2,048 tokens, in {args.out}")
    result = dict(size=args.size, steps=args.steps, adamw_embedding=args.adamw_embedding)
    best = experiment.sweep()
    log(f"  best rates on the dev split: {best}")
    save(args, experiment, dict(result, rates=best))
    result.update(experiment.compare(best))
    result["step_rates"] = time_steps(args.size, args.rounds)
    save(args, experiment, result)
    if result["ratio"]:
        log(f"  Muon comes to AdamW's final loss of {result['adamw_loss']:.4f} with "
            f"{result['ratio']:.2f} of its tokens")
    return result


def save(args, experiment, result):
    """Write learning_SIZE-STEPSsteps.json, its tables (.md) and its picture (.png), with all known
    so far."""
    result = dict(result, runs=experiment.runs)
    text = json.dumps(result, indent=1)
    name = f"learning_{args.size}-{args.steps}steps"
    if args.adamw_embedding != 1:
        name += f"-embedding{args.adamw_embedding:g}"
    path = Path(args.out) / f"{name}.json"
    atomic_write(path, lambda f: f.write(text.encode()))
    tables = format_tables(result)
    atomic_write(path.with_suffix(".md"), lambda f: f.write(tables.encode()))
    draw_learning(result, path.with_suffix(".png"))


def format_tables(result):
    """The sweep and the comparison as the tables of docs/learning.md."""
    lines = ["| rate | AdamW | Muon |", "|---|---|---|"]
    swept = {(run["settings"]["max_lr"], run["settings"]["optimizer"]): run["loss"]
             for run in result["runs"] if run["settings"].get("dev")}
    for rate in sorted({rate for rate, _ in swept}):
        cells = [f"{swept[rate, name]:.4f}" if swept.get((rate, name)) else ""
                 for name in OPTIMIZERS]
        lines.append(f"| {rate:g} | {cells[0]} | {cells[1]} |")

    lines += ["", "| | tokens | loss of each seed | mean |", "|---|---|---|---|"]
    compared = {}
    for run in result["runs"]:
        if not run["settings"].get("dev"):
            key = run["settings"]["optimizer"], run["settings"]["max_lr"], run["tokens"]
            compared.setdefault(key, []).append(run["loss"])
    for (optimizer, rate, tokens), losses in compared.items():
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        lines.append(f"| {optimizer}, rate {rate:g} | {tokens:,} | {shown} | "
                     f"{statistics.mean(losses):.4f} |")
    if result.get("ratio"):
        slower = 1 / result["step_rates"][0]["ratio"]
        lines += ["", f"Muon comes to AdamW's final loss with {result['ratio']:.2f} of its tokens. "
                      f"Its steps take {slower:.2f} times as long (in turns, median), so that is "
                      f"{result['ratio'] * slower:.2f} of the time."]
    return "\n".join(lines) + "\n"


# -----------------------------------------------------------------------------
# the picture

COLORS = {"adamw": "tab:blue", "muon": "tab:orange"}


def draw_learning(result, path):
    """Draw the sweep of rates, the loss over the tokens, and the final losses of the seeds."""
    figure = new_figure(figsize=(15, 4.5))
    axes = figure.subplots(1, 3)
    draw_sweep(axes[0], [run for run in result["runs"] if run["settings"].get("dev")])
    compared = [run for run in result["runs"] if not run["settings"].get("dev")]
    draw_curves(axes[1], compared)
    draw_final_losses(axes[2], compared, result.get("adamw_loss"))
    for ax in axes:
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    title = f"{result['size']} parameters, {result['steps']:,} steps of 2,048 tokens"
    if result.get("adamw_embedding", 1) != 1:
        title += f", AdamW's embedding at {result['adamw_embedding']:g} times its rate"
    figure.suptitle(title)
    figure.tight_layout()
    atomic_write(path, lambda f: figure.savefig(f, format="png", dpi=110))


def draw_sweep(ax, runs):
    for optimizer in OPTIMIZERS:
        points = sorted((run["settings"]["max_lr"], run["loss"]) for run in runs
                        if run["settings"]["optimizer"] == optimizer and run["loss"] is not None)
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", color=COLORS[optimizer],
                    label=optimizer)
    ax.set(xscale="log", xlabel="learning rate", ylabel="final loss on the dev split",
           title="Choosing the rate")


def draw_curves(ax, runs):
    """The first seed's curve of each optimizer and length of run, without the first tenth."""
    for run in runs:
        if run["settings"]["seed"] != SEEDS[0]:
            continue
        optimizer = run["settings"]["optimizer"]
        curve = [point for point in run["curve"] if point[0] >= run["tokens"] / 10]
        ax.plot(*zip(*curve, strict=True), marker=".", color=COLORS[optimizer],
                label=f"{optimizer}, {run['tokens'] / 1e6:.2f}M tokens")
    ax.set(xlabel="tokens", ylabel="validation loss", title="One seed, over the run")


def draw_final_losses(ax, runs, target):
    for optimizer in OPTIMIZERS:
        points = [(run["tokens"], run["loss"]) for run in runs
                  if run["settings"]["optimizer"] == optimizer]
        if points:
            ax.plot(*zip(*points, strict=True), "o", color=COLORS[optimizer], label=optimizer)
    if target:
        ax.axhline(target, color=COLORS["adamw"], ls="--", lw=1)
    ax.set(xlabel="tokens of the run", ylabel="final validation loss", title="Every seed")
