"""Training steps for tests that bring a model, micro-batches and optimizers of their own, and the
memory that they take."""

import gc
import json
from itertools import accumulate
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from gptlib.distributed import World
from train_gpt2 import Trainer


def take_step(model, batches, optimizers, scaler, autocast, lr, cfg, world=World(), **options):
    """Trainer.step on batches (x, y, tokens), the last of which ends the step."""
    device = batches[0][0].device
    trainer = Trainer(model, optimizers, scaler, autocast, device, cfg.total_batch_size,
                      cfg.grad_clip, world)
    last = len(batches) - 1
    micro_batches = [(x, y, n, i == last) for i, (x, y, n) in enumerate(batches)]
    return trainer.step(iter(micro_batches), lr, **options)


def peak_of_tensors(work, folder):
    """The most bytes of tensors that work() has at once, by the record of torch's profiler.

    A process's own memory depends on malloc, on the number of threads and on the libraries that
    compute; this does not. folder: where the record is written.
    """
    gc.collect()  # what is freed meanwhile would be subtracted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    path = Path(folder, "trace.json")
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    path.unlink()
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(accumulate(size for _, size in changes))
