"""What eight bits cost: perplexity and greedy tokens on held-out text, beside bf16 and float32."""

import math

import torch
from torch.nn import functional as F

from gptlib.checkpoints.formats import load_checkpoint
from gptlib.common import UserError, log
from gptlib.data.shards import list_shards, open_shard
from inference import load_model_from_checkpoint

HELD_OUT_TOKENS = 20480
BATCH_TOKENS = 2048


def held_out_rows(path, block_size):
    """Windows (rows, block_size + 1) of the val split that the checkpoint's run has not seen."""
    train_config = load_checkpoint(path, mmap=True).get("train_config", {})
    if "data_root" not in train_config:
        raise UserError(f"{path} does not say what data it was trained on")
    shards = list_shards(train_config["data_root"], "val")
    if not shards:
        raise UserError(f"there is no val split in {train_config['data_root']}, from which {path} "
                        "was trained")
    tokens = open_shard(shards[0])
    n = min(len(tokens) - 1, HELD_OUT_TOKENS) // block_size
    starts = torch.arange(n)[:, None] * block_size
    stream = torch.tensor(tokens[:n * block_size + 1].astype("int64"))
    return stream[starts + torch.arange(block_size + 1)]


@torch.inference_mode()
def read_rows(model, rows):
    """The mean loss in nats over the rows, and the likeliest token at each of their positions."""
    losses, choices = [], []
    batch = max(1, BATCH_TOKENS // rows.size(1))
    device = model.lm_head.weight.device
    for part in rows.to(device).split(batch):
        logits = model(part[:, :-1])[0].float().flatten(0, 1)
        losses.append(F.cross_entropy(logits, part[:, 1:].flatten(), reduction="none").double())
        choices.append(logits.argmax(1))
    return torch.cat(losses).mean().item(), torch.cat(choices)


def measure_quality(path, device):
    """Perplexity of a checkpoint on its held-out text in float32, bf16 and int8.

    Returns {name: dict(perplexity, ratio and agreement with float32)}; agreement is the share of
    positions at which the likeliest next token is the same.
    """
    results = {}
    single = load_model_from_checkpoint(path, device, "float32")
    rows = held_out_rows(path, single.config.block_size)
    reference = read_rows(single, rows)
    for name, dtype, quantize in [("float32", "float32", None), ("bfloat16", "bfloat16", None),
                                  ("int8", "auto", "int8")]:
        model = load_model_from_checkpoint(path, device, dtype, quantize)
        loss, choices = read_rows(model, rows)
        results[name] = dict(perplexity=math.exp(loss), ratio=math.exp(loss - reference[0]),
                             agreement=(choices == reference[1]).double().mean().item())
    return results


def show_quality(path, results):
    log(f"\nperplexity of {path} on its held-out text, and greedy tokens equal to float32's")
    for name, r in results.items():
        log(f"  {name:42} {r['perplexity']:13,.3f}  x {r['ratio']:.5f}  {r['agreement']:8.2%}")
