"""How a training step grows with batch, context and model."""

import time
from pathlib import Path

from benches.training import peak_memory, training_ours
from benches.turns import separate_processes
from gptlib.common import UserError, atomic_write, log
from gptlib.runtime import resolve_device
from gptlib.training.presets import PRESETS


def growth_point(args, n_layer, B, T):
    """Seconds and peak bytes of a training step, measured in a process of its own."""
    args.batch_size, args.block_size = B, T
    PRESETS[args.preset] = {**PRESETS[args.preset], "n_layer": n_layer}
    step = training_ours(args, False)
    step()
    step()  # the second step still gets fresh pages from the system
    t0 = time.perf_counter()
    for _ in range(args.rounds):
        step()
    seconds = (time.perf_counter() - t0) / args.rounds
    peak = peak_memory(resolve_device(args.device))
    return lambda: (seconds, peak)


def growth_sweeps(preset, B, T):
    """{what varies: [(its value, (layers, sequences, tokens))]}, one thing varied at a time."""
    L = preset["n_layer"]
    contexts = [n for n in (128, 256, 512, 1024) if n <= preset["block_size"]]
    depths = [n for n in (1, L // 4, L // 2, L) if n]
    return {
        "micro-batch (sequences)": [(n, (L, n, T)) for n in (1, 2, 4, 8)],
        "context (tokens)": [(n, (L, B, n)) for n in contexts],
        "depth (layers)": [(n, (n, B, T)) for n in depths],
    }


def draw_growth(results, title, path):
    """Draw time and memory over each thing that was varied."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 3, figsize=(12, 6), sharex="col")
    for column, (name, points) in zip(axes.T, results.items(), strict=True):
        at = [point["at"] for point in points]
        column[0].plot(at, [point["seconds"] for point in points], marker="o")
        column[1].plot(at, [point["bytes"] / 2**30 for point in points], marker="o")
        column[0].set_ylabel("seconds a step")
        column[1].set_ylabel("peak GiB")
        column[1].set_xlabel(name)
        for ax in column:
            ax.set(ylim=(0, None), xlim=(0, None))
            ax.grid(alpha=0.3)
    fig.suptitle(title)
    fig.tight_layout()
    atomic_write(path, lambda f: fig.savefig(f, format="png", dpi=110))
    log(f"drawn in {path}")


def bench_growth(args):
    """Time and memory of a step over micro-batch, context and depth, and a picture of them."""
    folder = Path(args.picture).parent
    if not folder.is_dir():
        raise UserError(f"--picture {args.picture}: there is no folder {str(folder)!r}")
    preset = PRESETS[args.preset]
    B, T = 2, min(256, preset["block_size"])
    results = {}
    for name, points in growth_sweeps(preset, B, T).items():
        results[name] = []
        for n, point in points:
            with separate_processes(point=(growth_point, args, *point)) as works:
                seconds, peak = works["point"]()
            results[name].append(dict(at=n, seconds=seconds, bytes=peak))
            log(f"  {name} {n:5}: {seconds:7.3f} s a step, {peak / 2**30:5.2f} GiB")
    title = (f"a training step of {args.preset}, eager: unless it is varied, "
             f"{preset['n_layer']} layers, {B} x {T} tokens")
    draw_growth(results, title, args.picture)
    return results
