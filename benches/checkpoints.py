"""Saving and loading, and how long training waits for it."""

import os
import tempfile
from pathlib import Path

import torch

from benches.training import training_shape
from benches.turns import show_results, take_turns
from gptlib.checkpoints.saver import copy_to_host, save_checkpoint
from gptlib.common import atomic_write
from gptlib.runtime import resolve_device
from train_gpt2 import GPT, TrainConfig, configure_optimizers


def training_state(config, device):
    """A checkpoint's content after one step of AdamW, with gradients of zero."""
    model = GPT(config).to(device)
    optimizer, = configure_optimizers(model, TrainConfig(), device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return dict(model=model.state_dict(), optimizer=[optimizer.state_dict()], step=1)


def bench_checkpoint(args):
    """Checkpoints per second: what training waits for, and what is written in the background."""
    config, *_ = training_shape(args)
    device = resolve_device(args.device)
    state = training_state(config, device)
    on_host = copy_to_host(state)

    with tempfile.TemporaryDirectory(dir=".") as folder:
        def copy():
            if device.type == "cuda":
                torch.cuda.synchronize()
            copy_to_host(state)
            return 1

        def save():
            save_checkpoint(folder, on_host, 1)
            return 1

        def save_unflushed():
            torch.save(on_host, Path(folder) / "bare.pt")
            return 1

        save()
        size = (Path(folder) / "model_00001.pt").stat().st_size
        data = os.urandom(2**20) * (size // 2**20)

        def write_bytes():
            atomic_write(Path(folder) / "bytes", lambda f: f.write(data))
            return 1

        contenders = {
            "copy_to_host: all that training waits for": copy,
            "save_checkpoint, in the background": save,
            "torch.save, not flushed": save_unflushed,
            "floor: as many bytes, flushed": write_bytes,
        }
        results = take_turns(contenders, args.rounds, "runs")
    title = f"checkpoint of {args.preset}, {size / 2**20:,.0f} MiB, {device.type}"
    show_results(title, results)
    return {title: results}
