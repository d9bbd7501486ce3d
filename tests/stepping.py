"""A training step for tests that bring a model, micro-batches and optimizers of their own."""

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
